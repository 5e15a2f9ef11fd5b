"""Deformable kernels, whose weight is a scope that the kernel is sampled from; and DCN."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..ops import deform_kernel_conv2d, per_image_conv2d, sample_kernel
from ..ops.arguments import pair
from .adaptive import PERTURBATION, AdaptiveConv2d, pooled
from .generators import LocalConv2d
from .start import centre_gain, deviation, embed_scope, lift_to_scope, spread_offset
from .zero_generators import Generator, LinearGenerator


class ScopeConv2d(AdaptiveConv2d):
    """A layer whose weight is a scope that the kernel is sampled from.

    The scope starts as smooth as a rigid weight allows: the taps, spread evenly over it, read that
    weight. From a given one the taps rest there (*"we initialize kernel grids to be uniformly
    distributed within the scope size"*, section 4), by the generator's bias. From scratch nothing
    has to be exact, and they rest in the centre, one cell apart.
    """

    kernel_offset_generator: Generator
    offset_groups = 1  # of input channels, each with offsets of its own

    def __init__(self, in_channels, out_channels, kernel_size, *args, scope_size=None, **kwargs):
        kernel_size = pair("kernel_size", kernel_size, 1)
        scope = [k + 1 for k in kernel_size] if scope_size is None else scope_size
        self.scope_size = pair("scope_size", scope, 1)
        if any(s < k for s, k in zip(self.scope_size, kernel_size, strict=True)):
            raise ValueError(
                f"scope_size: expected at least the kernel_size {kernel_size}, got {scope_size!r}"
            )
        super().__init__(in_channels, out_channels, kernel_size, *args, **kwargs)

    def _weight_shape(self) -> list[int]:
        return [*self.rigid_shape[:2], *self.scope_size]

    def rigid_state(self, weight: Tensor) -> dict[str, Tensor]:
        spread = spread_offset(self.scope_size, self.kernel_size).repeat(self.offset_groups)
        return super().rigid_state(weight) | {"kernel_offset_generator.bias": spread}

    @torch.no_grad()
    def set_drawn_weight(self, weight: Tensor) -> None:
        self.set_rigid_weight(weight)
        self.weight.mul_(centre_gain(self.scope_size, self.kernel_size))
        nn.init.zeros_(self.kernel_offset_generator.bias)

    def _from_rigid(self, weight: Tensor) -> Tensor:
        scope = lift_to_scope(weight, self.scope_size)
        if 1 not in self.kernel_size:
            return scope
        # Along an axis with a single tap the scope is constant: its offsets would get no gradient
        # and its cells equal ones, for ever. Perturb them by what the tap does not see at rest.
        noise = torch.randn_like(scope)
        rest = spread_offset(self.scope_size, self.kernel_size).to(noise.device).unsqueeze(0)
        read = sample_kernel(noise, rest, self.kernel_size)[0]
        noise = noise - lift_to_scope(read, self.scope_size)
        return scope + PERTURBATION * deviation(weight) * noise

    def _to_rigid(self):
        return self._kernels(self.kernel_offset_generator.bias.double().unsqueeze(0))[0]

    def _kernels(self, offset: Tensor) -> Tensor:
        """Those [M, C_out, C_in / groups, K_h, K_w] of offsets [M, G*2*K] for all places."""
        weight, dim = self.weight.double(), int(self.groups == 1)
        parts = zip(
            weight.chunk(self.offset_groups, dim), offset.chunk(self.offset_groups, 1), strict=True
        )
        return torch.cat([sample_kernel(w, o, self.kernel_size) for w, o in parts], 1 + dim)

    @torch.no_grad()
    def fitted(self, entries: dict[str, Tensor]) -> dict[str, Tensor]:
        """As in the base class; or of the entries of a layer of a smaller scope.

        That lies in this one (:func:`embed_scope`), and the generator's bias makes up for where.
        """
        weight, bias = entries.get("weight"), entries.get("kernel_offset_generator.bias")
        if weight is None or bias is None or weight.shape == self.weight.shape:
            return super().fitted(entries)
        if [*weight.shape[:2], bias.numel()] != [*self.rigid_shape[:2], self._offsets]:
            return entries
        scope, move = embed_scope(weight, self.scope_size)
        moved = bias + move.to(bias).repeat(self._offsets // 2)
        return entries | {"weight": scope, "kernel_offset_generator.bias": moved}

    @property
    def _offsets(self) -> int:
        return self.offset_groups * 2 * self.kernel_size[0] * self.kernel_size[1]

    @torch.no_grad()
    def sensitivity(self, distance: float = 0.2) -> float:
        """How much the kernels change if all taps move from where they rest by ``distance`` cells.

        Returns:
            The change's norm over the kernels' own, as root mean square over the four directions.
        """
        generator = self.kernel_offset_generator
        rest = generator.bias.double().unsqueeze(0)
        steps = distance * torch.tensor([[1, 0], [-1, 0], [0, 1], [0, -1]]).to(rest)
        moved = rest + steps.repeat(1, generator.bias.numel() // 2)
        kernels = self._kernels(torch.cat([rest, moved]))
        change = (kernels[1:] - kernels[0]).square().sum() / len(steps)
        return float((change / kernels[0].square().sum()).sqrt())

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, scope_size={self.scope_size}"


class LocalDeformKernel2d(ScopeConv2d, LocalConv2d):
    """Local deformable kernel (section 3.3, eq. 7): kernel offsets for every output location.

    Args (beyond those of ``nn.Conv2d``):
        scope_size: size of the stored weight, one more than the kernel by default.
        offset_generator, modulated, offset_groups: as of :class:`LocalConv2d`.
    """

    def _make_generators(self, factory):
        self.kernel_offset_generator = self._offset_convolution(2, factory)
        super()._make_generators(factory)

    def _to_rigid(self):
        self._check_factors()
        return super()._to_rigid()

    def _convolve(self, x, seen):
        return deform_kernel_conv2d(
            x,
            self.weight,
            self.bias,
            kernel_offset=self._with_factors(self.kernel_offset_generator(seen), seen),
            kernel_size=self.kernel_size,
            offset_groups=self.offset_groups,
            **self._conv_arguments,
        )


class GlobalDeformKernel2d(ScopeConv2d):
    """Global deformable kernel (section 3.3): kernel offsets for every image.

    Args (beyond those of ``nn.Conv2d``):
        scope_size: size of the stored weight, one more than the kernel by default.
    """

    def _make_generators(self, factory):
        taps = self.kernel_size[0] * self.kernel_size[1]
        self.kernel_offset_generator = LinearGenerator(self.in_channels, 2 * taps, **factory)

    def _convolve(self, x, seen):
        kernel_offset = self.kernel_offset_generator(pooled(seen))
        kernels = sample_kernel(self.weight, kernel_offset, self.kernel_size)
        return per_image_conv2d(x, kernels, self.bias, **self._conv_arguments)


def _check_data_rest(generator: Generator) -> None:
    if generator.bias.any():
        raise ValueError("weight: expected data offsets of zero, got some that move the data")


class DeformConv2d(LocalConv2d):
    """Deformable convolution (eq. 9, Dai et al. 2017): data offsets for every output location.

    Args (beyond those of ``nn.Conv2d``):
        offset_generator, modulated, offset_groups: as of :class:`LocalConv2d`.
    """

    def _make_generators(self, factory):
        self.data_offset_generator = self._offset_convolution(2, factory)
        super()._make_generators(factory)

    def _to_rigid(self):
        _check_data_rest(self.data_offset_generator)
        self._check_factors()
        return self.weight

    def _convolve(self, x, seen):
        return deform_kernel_conv2d(
            x,
            self.weight,
            self.bias,
            data_offset=self._with_factors(self.data_offset_generator(seen), seen),
            kernel_size=self.kernel_size,
            offset_groups=self.offset_groups,
            **self._conv_arguments,
        )


class DeformKernelConv2d(ScopeConv2d, LocalConv2d):
    """Deformable convolution with deformable kernels (eq. 11): both offsets, learnt separately.

    Args (beyond those of ``nn.Conv2d``):
        scope_size: size of the stored weight, one more than the kernel by default.
        offset_generator, modulated, offset_groups: as of :class:`LocalConv2d`.
    """

    def _make_generators(self, factory):
        self.kernel_offset_generator = self._offset_convolution(2, factory)
        self.data_offset_generator = self._offset_convolution(2, factory)
        super()._make_generators(factory)

    def _to_rigid(self):
        _check_data_rest(self.data_offset_generator)
        self._check_factors()
        return super()._to_rigid()

    def _convolve(self, x, seen):
        return deform_kernel_conv2d(
            x,
            self.weight,
            self.bias,
            kernel_offset=self.kernel_offset_generator(seen),
            data_offset=self._with_factors(self.data_offset_generator(seen), seen),
            kernel_size=self.kernel_size,
            offset_groups=self.offset_groups,
            **self._conv_arguments,
        )
