"""What all adaptive layers share, and conditional convolution."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from fvcore.nn import weight_init
from torch import Tensor, nn

from ..ops import per_image_conv2d
from ..ops.arguments import Size, check_groups, check_images, pair
from .start import deviation
from .zero_generators import GENERATOR, Generator, LinearGenerator

# Where symmetry would keep weights equal for ever, they start this much apart, in standard
# deviations.
PERTURBATION = 0.5
# Of these perturbations where weights are loaded: a file always becomes the same network.
SEED = 42


class AdaptiveConv2d(nn.Module):
    """What the layers share: the arguments of ``nn.Conv2d``, initialisation, norm and activation.

    A subclass says what its weight looks like, makes its generators, and convolves.
    """

    bias: nn.Parameter | None

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
        Args:
            padding: pixels, "valid" for none, or "same" for as many outputs as inputs.

        Raises:
            ValueError: a size, number or padding that does not work; another padding mode than
                zeros.
        """
        super().__init__()
        for name, value in ("in_channels", in_channels), ("out_channels", out_channels):
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}: expected an integer >= 1, got {value!r}")
            check_groups(groups, value, name)
        if padding_mode != "zeros":
            raise ValueError(f"padding_mode: expected 'zeros', got {padding_mode!r}")
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.kernel_size = pair("kernel_size", kernel_size, 1)
        self.stride = pair("stride", stride, 1)
        self.dilation = pair("dilation", dilation, 1)
        self.padding = self._padding(padding)
        self.groups = groups
        factory = {"device": device, "dtype": dtype}
        self.weight = nn.Parameter(torch.empty(self._weight_shape(), **factory))
        made = nn.Parameter(torch.empty(out_channels, **factory)) if bias else None
        self.register_parameter("bias", made)  # also none, as nn.Conv2d does
        self._make_generators(factory)
        self.norm = norm
        self.activation = activation
        self._draw_parameters()

    def _padding(self, padding: Size | str) -> tuple[int, int]:
        """Pixels on both sides of each axis, of what ``nn.Conv2d`` takes."""
        if padding == "valid":
            return 0, 0
        if padding != "same":
            if isinstance(padding, str):
                raise ValueError(f"padding: expected pixels, 'same' or 'valid', got {padding!r}")
            return pair("padding", padding, 0)
        total = [d * (k - 1) for d, k in zip(self.dilation, self.kernel_size, strict=True)]
        if self.stride != (1, 1) or any(pixels % 2 for pixels in total):
            raise ValueError(
                "padding: expected pixels, as 'same' needs a stride of 1 and an even "
                f"dilation * (kernel_size - 1), got 'same' with stride {self.stride}, dilation "
                f"{self.dilation} and kernel_size {self.kernel_size}"
            )
        return total[0] // 2, total[1] // 2

    def _weight_shape(self) -> list[int]:
        return self.rigid_shape

    def _make_generators(self, factory: dict) -> None:
        raise NotImplementedError

    def _convolve(self, x: Tensor, seen: Tensor) -> Tensor:
        """The convolution of ``x``; its generators see ``seen``, which need not be the same."""
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

    @property
    def generators(self) -> list[Generator]:
        """The modules that predict what adapts the layer."""
        return [generator for _, generator in self._named_generators()]

    def _named_generators(self) -> Iterator[tuple[str, Generator]]:
        return ((n, m) for n, m in self.named_children() if n.endswith("_generator"))

    def reset_parameters(self) -> None:
        """Initialises weight and bias as ``nn.Conv2d`` does, and the generators to zero.

        The depthwise part of a separable generator, which zeros follow, is drawn.
        """
        for generator in self.generators:
            for module in generator.modules():
                module.reset_parameters()
        self._draw_parameters()

    def _draw_parameters(self) -> None:
        """:meth:`reset_parameters` where the generators are new."""
        rigid = nn.Conv2d(
            self.in_channels, self.out_channels, self.kernel_size, groups=self.groups,
            bias=self.bias is not None,
        )  # fmt: skip
        self.set_drawn_weight(rigid.weight.detach())
        if self.bias is not None and rigid.bias is not None:
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
        for name, tensor in self.rigid_state(weight).items():
            self.get_parameter(name).copy_(tensor)

    def rigid_state(self, weight: Tensor) -> dict[str, Tensor]:
        """What :meth:`set_rigid_weight` sets, by the names in the layer's state.

        Raises:
            ValueError: ``weight`` has another shape.
        """
        if list(weight.shape) != self.rigid_shape:
            raise ValueError(f"weight: expected {self.rigid_shape}, got {list(weight.shape)}")
        state = {"weight": self._from_rigid(weight)}
        for name, generator in self._named_generators():
            for key in "weight", "bias":
                state[f"{name}.{key}"] = weight.new_zeros(getattr(generator, key).shape)
        return state

    @torch.no_grad()
    def rigid_weight(self) -> Tensor:
        """The inverse of :meth:`set_rigid_weight`: of the convolution that the layer is as it is.

        Returns:
            [C_out, C_in / groups, K_h, K_w].

        Raises:
            ValueError: it is none, as its generators follow the input or it moves the data.
        """
        if any(generator.weight.any() for generator in self.generators):
            raise ValueError("weight: expected generators of zeros, got some that follow the input")
        return self._to_rigid().to(self.weight.dtype)

    @torch.no_grad()
    def fitted(self, entries: dict[str, Tensor]) -> dict[str, Tensor]:
        """The state of this layer that has the outputs of another.

        Args:
            entries: of a state, by their names in this layer. Of a rigid convolution, which has no
                generators, they become what :meth:`set_rigid_weight` makes.

        Returns:
            ``entries``, or others in their place.

        Raises:
            ValueError: the other cannot be had exactly.
        """
        weight = entries.get("weight")
        generated = any(GENERATOR.match(name) for name in entries)
        if weight is None or generated or list(weight.shape) != self.rigid_shape:
            return entries
        # Perturbations cancel to the last digit of the type in which they are drawn.
        exact = torch.promote_types(self.weight.dtype, weight.dtype)
        exact = torch.promote_types(exact, torch.float32)
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(SEED)
            made = self.rigid_state(weight.to("cpu", exact))
            # Beside what is zero, such as the depthwise part of a separable generator.
            others = {
                name: _value(parameter)
                for name, parameter in self.named_parameters()
                if GENERATOR.match(name) and name not in made
            }
        return entries | made | others

    def _load_from_state_dict(self, state_dict, prefix, *args):
        """As torch's, of what :meth:`fitted` makes of the entries.

        With ``assign``, that has their type and device, as the rest of the network then has.
        """
        entries = {n.removeprefix(prefix): t for n, t in state_dict.items() if n.startswith(prefix)}
        local_metadata, *_, error_msgs = args
        try:
            fitted = self.fitted(entries)
        except ValueError as error:
            error_msgs.append(f"{prefix}{error}")
        else:
            made = {n: t for n, t in fitted.items() if t is not entries.get(n)}
            if local_metadata.get("assign_to_params_buffers"):
                made = {n: t.to(entries.get(n, entries["weight"])) for n, t in made.items()}
            state_dict.update({prefix + name: tensor for name, tensor in made.items()})
        super()._load_from_state_dict(state_dict, prefix, *args)

    def set_drawn_weight(self, weight: Tensor) -> None:
        """Makes the layer a start from scratch, given a rigid weight of independent draws.

        Of the variance of ``weight``, but not necessarily the very same convolution.
        """
        self.set_rigid_weight(weight)

    def _from_rigid(self, weight: Tensor) -> Tensor:
        return weight

    def _to_rigid(self) -> Tensor:
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """[N, C_in, H, W] -> [N, C_out, H_out, W_out]."""
        return self._finished(self._convolve(x, x))

    def _finished(self, x: Tensor) -> Tensor:
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


def _value(parameter: Tensor) -> Tensor:
    """A copy on the CPU; of a parameter on "meta", which has no value, a draw as nn.Conv2d's."""
    if parameter.is_meta:
        return nn.init.kaiming_uniform_(torch.empty(parameter.shape, device="cpu"), a=5**0.5)
    return parameter.to("cpu", copy=True)


def pooled(x: Tensor) -> Tensor:
    """[N, C, H, W] -> [N, C], the mean over all places: what a generator for whole images sees.

    Raises:
        ValueError: ``x`` is no batch.
    """
    check_images(x)
    return x.mean((2, 3))


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
        self.gate_generator = LinearGenerator(self.in_channels, self.num_experts, **factory)

    def _from_rigid(self, weight):
        # At the start every gate is sigmoid(0) = 1/2. Equal experts would get equal gradients and
        # never part: perturb them by amounts that cancel in the mixture.
        noise = torch.randn(self._weight_shape(), dtype=weight.dtype, device=weight.device)
        apart = PERTURBATION * deviation(weight) * (noise - noise.mean(0))
        return (weight + apart) * (2 / self.num_experts)

    def _to_rigid(self):
        gates = self.gate_generator.bias.double().sigmoid()
        return (gates @ self.weight.double().flatten(1)).unflatten(0, self.rigid_shape)

    def _convolve(self, x, seen):
        gates = self.gate_generator(pooled(seen)).sigmoid()
        kernels = (gates.to(self.weight.dtype) @ self.weight.flatten(1)).unflatten(
            1, self.rigid_shape
        )
        return per_image_conv2d(x, kernels, self.bias, **self._conv_arguments)

    def extra_repr(self):
        return f"{super().extra_repr()}, num_experts={self.num_experts}"


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
