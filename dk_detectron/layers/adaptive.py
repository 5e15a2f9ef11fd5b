"""Convolutions that adapt to their input: deformable kernels and what the paper compares them with.

All take ``nn.Conv2d``'s arguments in its order, and ``norm`` and ``activation`` as
``detectron2.layers.Conv2d`` does. What adapts them is predicted from the input by small generators
whose weights start at zero, so that every layer starts as a rigid convolution: a drawn one, or the
given one (:meth:`AdaptiveConv2d.set_rigid_weight`). ``docs/start.md`` has the evidence for how.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod

import torch
from fvcore.nn import weight_init
from torch import Tensor, nn

from .ops import (
    axis_coefficients,
    deform_kernel_conv2d,
    per_image_conv2d,
    rest_kernel,
    sample_kernel,
    tap_locations,
)

__all__ = [
    "LocalDeformKernel2d",
    "GlobalDeformKernel2d",
    "DeformConv2d",
    "DeformKernelConv2d",
    "CondConv2d",
    "msra_fill",
]

Size = int | Sequence[int]

# Where symmetry would keep weights equal for ever, they start this much apart, in standard
# deviations.
PERTURBATION = 0.5


def _pair(value: Size) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else tuple(value)


class AdaptiveConv2d(nn.Module):
    """What the layers share: the arguments of ``nn.Conv2d``, initialisation, norm and activation.

    A subclass says what its weight looks like, makes its generators, and convolves.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Size,
        stride: Size = 1,
        padding: Size = 0,
        dilation: Size = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        device=None,
        dtype=None,
        *,
        norm: nn.Module | None = None,
        activation: Callable[[Tensor], Tensor] | None = None,
    ):
        """
        Raises:
            ValueError: ``groups`` does not divide the channels, or another padding mode than zeros.
        """
        super().__init__()
        if in_channels % groups or out_channels % groups:
            raise ValueError(
                f"groups: expected a divisor of in_channels={in_channels} and "
                f"out_channels={out_channels}, got {groups}"
            )
        if padding_mode != "zeros":
            raise ValueError(f"padding_mode: expected 'zeros', got {padding_mode!r}")
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.kernel_size = _pair(kernel_size)
        self.stride = _pair(stride)
        self.padding = _pair(padding)
        self.dilation = _pair(dilation)
        self.groups = groups
        factory = {"device": device, "dtype": dtype}
        self.weight = nn.Parameter(torch.empty(self._weight_shape(), **factory))
        self.bias = nn.Parameter(torch.empty(out_channels, **factory)) if bias else None
        self._make_generators(factory)
        self.norm = norm
        self.activation = activation
        self.reset_parameters()

    def _weight_shape(self) -> list[int]:
        return self.rigid_shape

    def _make_generators(self, factory: dict) -> None:
        raise NotImplementedError

    def _convolve(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    @property
    def rigid_shape(self) -> list[int]:
        """The weight of the rigid convolution that this layer adapts."""
        return [self.out_channels, self.in_channels // self.groups, *self.kernel_size]

    @property
    def _conv_arguments(self) -> dict:
        return {
            "stride": self.stride,
            "padding": self.padding,
            "dilation": self.dilation,
            "groups": self.groups,
        }

    def _offset_convolution(self, factory: dict) -> nn.Conv2d:
        """The generator of local offsets: as the target, but C_in -> 2*K and never depthwise."""
        arguments = {**self._conv_arguments, "groups": 1}
        taps = self.kernel_size[0] * self.kernel_size[1]
        return nn.Conv2d(self.in_channels, 2 * taps, self.kernel_size, **arguments, **factory)

    @property
    def generators(self) -> list[nn.Module]:
        """The modules that predict what adapts the layer."""
        return [m for name, m in self.named_children() if name.endswith("_generator")]

    def reset_parameters(self) -> None:
        """Initialises weight and bias as ``nn.Conv2d`` does, and the generators to zero."""
        rigid = nn.Conv2d(
            self.in_channels, self.out_channels, self.kernel_size, groups=self.groups,
            bias=self.bias is not None,
        )  # fmt: skip
        self.set_drawn_weight(rigid.weight.detach())
        if self.bias is not None:
            with torch.no_grad():
                self.bias.copy_(rigid.bias)

    @torch.no_grad()
    def set_rigid_weight(self, weight: Tensor) -> None:
        """Makes the layer exactly the rigid convolution of ``weight``, its generators included.

        Args:
            weight: [C_out, C_in / groups, K_h, K_w].

        Raises:
            ValueError: ``weight`` has another shape.
        """
        if list(weight.shape) != self.rigid_shape:
            raise ValueError(f"weight: expected {self.rigid_shape}, got {list(weight.shape)}")
        for generator in self.generators:
            nn.init.zeros_(generator.weight)
            nn.init.zeros_(generator.bias)
        self.weight.copy_(self._from_rigid(weight))

    def set_drawn_weight(self, weight: Tensor) -> None:
        """Makes the layer a start from scratch, given a rigid weight of independent draws.

        Of the variance of ``weight``, but not necessarily the very same convolution.
        """
        self.set_rigid_weight(weight)

    def _from_rigid(self, weight: Tensor) -> Tensor:
        return weight

    def forward(self, x: Tensor) -> Tensor:
        """[N, C_in, H, W] -> [N, C_out, H_out, W_out]."""
        x = self._convolve(x)
        if self.norm is not None:
            x = self.norm(x)
        if self.activation is not None:
            x = self.activation(x)
        return x

    def extra_repr(self) -> str:
        text = (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, "
            f"stride={self.stride}"
        )
        if self.padding != (0, 0):
            text += f", padding={self.padding}"
        if self.dilation != (1, 1):
            text += f", dilation={self.dilation}"
        if self.groups != 1:
            text += f", groups={self.groups}"
        if self.bias is None:
            text += ", bias=False"
        return text


class ScopeConv2d(AdaptiveConv2d):
    """A layer whose weight is a scope that the kernel is sampled from.

    The scope starts as smooth as a rigid weight allows: the taps, spread evenly over it, read that
    weight. From a given one the taps rest there (*"we initialize kernel grids to be uniformly
    distributed within the scope size"*, section 4), by the generator's bias. From scratch nothing
    has to be exact, and they rest in the centre, one cell apart.
    """

    def __init__(self, in_channels, out_channels, kernel_size, *args, scope_size=None, **kwargs):
        kernel_size = _pair(kernel_size)
        scope = tuple(k + 1 for k in kernel_size) if scope_size is None else _pair(scope_size)
        if len(scope) != 2 or any(s < k for s, k in zip(scope, kernel_size, strict=True)):
            raise ValueError(
                f"scope_size: expected one or two integers, at least the kernel_size {kernel_size},"
                f" got {scope_size!r}"
            )
        self.scope_size = scope
        super().__init__(in_channels, out_channels, kernel_size, *args, **kwargs)

    def _weight_shape(self) -> list[int]:
        return [*self.rigid_shape[:2], *self.scope_size]

    @torch.no_grad()
    def set_rigid_weight(self, weight: Tensor) -> None:
        super().set_rigid_weight(weight)
        self.kernel_offset_generator.bias.copy_(spread_offset(self.scope_size, self.kernel_size))

    @torch.no_grad()
    def set_drawn_weight(self, weight: Tensor) -> None:
        super().set_rigid_weight(weight)
        self.weight.mul_(_centre_gain(self.scope_size, self.kernel_size))

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
        return scope + PERTURBATION * weight.std(correction=0) * noise

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
        kernels = sample_kernel(self.weight.double(), torch.cat([rest, moved]), self.kernel_size)
        change = (kernels[1:] - kernels[0]).square().sum() / len(steps)
        return float((change / kernels[0].square().sum()).sqrt())

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, scope_size={self.scope_size}"


class LocalDeformKernel2d(ScopeConv2d):
    """Local deformable kernel (section 3.3, eq. 7): kernel offsets for every output location.

    Args (beyond those of ``nn.Conv2d``):
        scope_size: size of the stored weight, one more than the kernel by default.
    """

    def _make_generators(self, factory):
        self.kernel_offset_generator = self._offset_convolution(factory)

    def _convolve(self, x):
        return deform_kernel_conv2d(
            x,
            self.weight,
            self.bias,
            kernel_offset=self.kernel_offset_generator(x),
            kernel_size=self.kernel_size,
            **self._conv_arguments,
        )


class GlobalDeformKernel2d(ScopeConv2d):
    """Global deformable kernel (section 3.3): kernel offsets for every image.

    Args (beyond those of ``nn.Conv2d``):
        scope_size: size of the stored weight, one more than the kernel by default.
    """

    def _make_generators(self, factory):
        taps = self.kernel_size[0] * self.kernel_size[1]
        self.kernel_offset_generator = nn.Linear(self.in_channels, 2 * taps, **factory)

    def _convolve(self, x):
        kernel_offset = self.kernel_offset_generator(x.mean((2, 3)))
        kernels = sample_kernel(self.weight, kernel_offset, self.kernel_size)
        return per_image_conv2d(x, kernels, self.bias, **self._conv_arguments)


class DeformConv2d(AdaptiveConv2d):
    """Deformable convolution (eq. 9, Dai et al. 2017): data offsets for every output location."""

    def _make_generators(self, factory):
        self.data_offset_generator = self._offset_convolution(factory)

    def _convolve(self, x):
        return deform_kernel_conv2d(
            x,
            self.weight,
            self.bias,
            data_offset=self.data_offset_generator(x),
            kernel_size=self.kernel_size,
            **self._conv_arguments,
        )


class DeformKernelConv2d(ScopeConv2d):
    """Deformable convolution with deformable kernels (eq. 11): both offsets, learnt separately.

    Args (beyond those of ``nn.Conv2d``):
        scope_size: size of the stored weight, one more than the kernel by default.
    """

    def _make_generators(self, factory):
        self.kernel_offset_generator = self._offset_convolution(factory)
        self.data_offset_generator = self._offset_convolution(factory)

    def _convolve(self, x):
        return deform_kernel_conv2d(
            x,
            self.weight,
            self.bias,
            kernel_offset=self.kernel_offset_generator(x),
            data_offset=self.data_offset_generator(x),
            kernel_size=self.kernel_size,
            **self._conv_arguments,
        )


class CondConv2d(AdaptiveConv2d):
    """Conditional convolution (soft conditional computation, SCC; Yang et al. 2019).

    The kernel of each image is a mixture of experts, W(n) = sum_e g_e(n) * W_e, with gates
    g = sigmoid(linear(global average pool)).

    Args (beyond those of ``nn.Conv2d``):
        num_experts: E.
    """

    def __init__(self, *args, num_experts: int = 8, **kwargs):
        if num_experts < 1:
            raise ValueError(f"num_experts: expected an integer >= 1, got {num_experts}")
        self.num_experts = num_experts
        super().__init__(*args, **kwargs)

    def _weight_shape(self):
        return [self.num_experts, *self.rigid_shape]

    def _make_generators(self, factory):
        self.gate_generator = nn.Linear(self.in_channels, self.num_experts, **factory)

    def _from_rigid(self, weight):
        # At the start every gate is sigmoid(0) = 1/2. Equal experts would get equal gradients and
        # never part: perturb them by amounts that cancel in the mixture.
        shared = weight * (2 / self.num_experts)
        noise = torch.randn(self._weight_shape(), dtype=weight.dtype, device=weight.device)
        return shared + PERTURBATION * shared.std(correction=0) * (noise - noise.mean(0))

    def _convolve(self, x):
        gates = self.gate_generator(x.mean((2, 3))).sigmoid()
        kernels = (gates.to(self.weight.dtype) @ self.weight.flatten(1)).unflatten(
            1, self.rigid_shape
        )
        return per_image_conv2d(x, kernels, self.bias, **self._conv_arguments)

    def extra_repr(self):
        return f"{super().extra_repr()}, num_experts={self.num_experts}"


# ---- the start of a scope
# --------------------------------------------------------------------------


def _spread_taps(scope_size: int, kernel_size: int) -> Tensor:
    """Places of the taps along an axis [K], evenly over the whole scope; a single one: its centre.

    In float64, as everything here: what comes of it is exact in the type of the weight.
    """
    centre = (scope_size - 1) / 2
    first = 0 if kernel_size > 1 else centre
    return torch.linspace(first, 2 * centre, kernel_size, dtype=torch.float64)


def spread_offset(scope_size: Sequence[int], kernel_size: Sequence[int]) -> Tensor:
    """The kernel offsets [2*K] that spread the taps evenly over the scope, in scope cells."""
    spread = torch.meshgrid(*map(_spread_taps, scope_size, kernel_size), indexing="ij")
    zero = torch.zeros(1, 2 * prod(kernel_size), dtype=torch.float64)
    centre = tap_locations(zero, scope_size, kernel_size)
    return torch.stack(
        [s.flatten() - c[0] for s, c in zip(spread, centre, strict=True)], -1
    ).flatten()


def _smooth_inverse(scope_size: int, kernel_size: int) -> Tensor:
    """[S, K]: the cells of least squared differences along an axis that the spread taps read so."""
    read = axis_coefficients(_spread_taps(scope_size, kernel_size), scope_size)  # [K, S]
    difference = torch.eye(scope_size, dtype=torch.float64).diff(dim=0)
    # Lagrange: the gradient of |difference @ cells|^2 is a combination of the rows of `read`.
    system = torch.zeros(2 * [scope_size + kernel_size], dtype=torch.float64)
    system[:scope_size, :scope_size] = difference.t() @ difference
    system[:scope_size, scope_size:] = read.t()
    system[scope_size:, :scope_size] = read
    return torch.linalg.inv(system)[:scope_size, scope_size:]


def lift_to_scope(weight: Tensor, scope_size: Size) -> Tensor:
    """The smoothest scope whose kernel, at :func:`spread_offset`, is exactly ``weight``.

    Args:
        weight: [C_out, C_in / groups, K_h, K_w].
        scope_size: (S_h, S_w), no smaller than the kernel.

    Returns:
        [C_out, C_in / groups, S_h, S_w].
    """
    weight64 = weight.double()
    rows, columns = (
        _smooth_inverse(size, taps).to(weight64)
        for size, taps in zip(_pair(scope_size), weight.shape[2:], strict=True)
    )
    return (rows @ weight64 @ columns.t()).to(weight.dtype)


def _centre_gain(scope_size: Sequence[int], kernel_size: Sequence[int]) -> float:
    """By how much taps in the centre of a lifted scope lower the deviation of independent draws."""
    taps = prod(kernel_size)
    units = torch.eye(taps, dtype=torch.float64).view(taps, 1, *kernel_size)
    read = rest_kernel(lift_to_scope(units, scope_size), kernel_size)
    return float(read.square().sum(0).mean()) ** -0.5


def msra_fill(module: nn.Module) -> None:
    """He et al.'s initialisation of a rigid or adaptive convolution, as detectron2 uses it."""
    if not isinstance(module, AdaptiveConv2d):
        weight_init.c2_msra_fill(module)
        return
    rigid = torch.empty(module.rigid_shape)
    nn.init.kaiming_normal_(rigid, mode="fan_out", nonlinearity="relu")
    module.set_drawn_weight(rigid)
    if module.bias is not None:
        nn.init.zeros_(module.bias)
