"""What predicts offsets for every output location, and the layers that have such generators."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..ops.arguments import check_groups, check_images, checked_output_size
from .adaptive import AdaptiveConv2d
from .zero_generators import ConvGenerator, StartsAtZero

OFFSET_GENERATORS = ("full", "separable", "shared")
# Channels of what several layers make their offsets of.
SHARED_FEATURES = 32


class SeparableConv2d(nn.Conv2d):
    """A depthwise convolution, and the 1x1 convolution of what it gives.

    ``weight`` and ``bias`` are the 1x1 convolution's: zeros there give zeros, whatever the
    depthwise one is.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: tuple[int, int],
        stride: tuple[int, int],
        padding: tuple[int, int],
        dilation: tuple[int, int],
        **factory,
    ):
        super().__init__(in_channels, out_channels, 1, **factory)
        self.depthwise = nn.Conv2d(
            in_channels, in_channels, kernel_size, stride, padding, dilation, in_channels,
            bias=False, **factory,
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.depthwise(x))


class SeparableGenerator(StartsAtZero, SeparableConv2d):
    """A :class:`ConvGenerator` of fewer multiply-adds."""


class LocalConv2d(AdaptiveConv2d):
    """A layer with offsets for every output location, perhaps with factors of the taps as well.

    The factors (the modulation of DCNv2) are 2 * sigmoid of what ``mask_offset_generator`` predicts
    of the same input: 1 at the start, so that the layer starts as the rigid one. DCNv2 itself has
    no factor 2, and starts at half the rigid convolution.

    Args (beyond those of ``nn.Conv2d``):
        offset_generator: "full", the paper's: a convolution like the target's, from all channels to
            2*K, of C_in * 2*K * K multiply-adds a location; or "separable": a depthwise one, then
            1x1, of C_in * (2*K + K), six times fewer for 3x3. Its depthwise part gets no gradient
            before the first step, since what follows it starts at zero. Or "shared": a 1x1
            convolution of the ``features`` that :meth:`forward` then takes, and that several layers
            may see, of SHARED_FEATURES * 2*K.
        modulated: whether each tap has a factor.
        offset_groups: each of so many parts of the input channels has offsets and factors of its
            own. Must divide ``groups``, or ``in_channels`` where ``groups`` is 1.
    """

    def __init__(
        self,
        *args,
        offset_generator: str = "full",
        modulated: bool = False,
        offset_groups: int = 1,
        **kwargs,
    ):
        if offset_generator not in OFFSET_GENERATORS:
            raise ValueError(
                f"offset_generator: expected one of {', '.join(OFFSET_GENERATORS)}, got "
                f"{offset_generator!r}"
            )
        self.offset_generator = offset_generator
        self.modulated = modulated
        self.offset_groups = offset_groups
        super().__init__(*args, **kwargs)

    def _make_generators(self, factory: dict) -> None:
        """That of the factors, which comes last; a subclass makes those of its offsets."""
        if self.groups == 1:
            check_groups(self.offset_groups, self.in_channels, "in_channels", "offset_groups")
        else:
            check_groups(self.offset_groups, self.groups, "groups", "offset_groups")
        if self.modulated:
            self.mask_offset_generator = self._offset_convolution(1, factory)

    def forward(self, x: Tensor, features: Tensor | None = None) -> Tensor:
        """[N, C_in, H, W] -> [N, C_out, H_out, W_out].

        Args:
            features: [N, SHARED_FEATURES, H_out, W_out], what a "shared" generator sees.

        Raises:
            ValueError: ``features`` are missing, or given to a generator that sees ``x``; or this
                is no batch, or smaller than the kernel.
        """
        check_images(x)
        checked_output_size(x, self.kernel_size, self.stride, self.padding, self.dilation)
        if (features is None) == (self.offset_generator == "shared"):
            wanted = "those that layers share" if features is None else "None"
            got = "None" if features is None else f"a tensor of {list(features.shape)}"
            raise ValueError(
                f"features: expected {wanted}, as offset_generator is {self.offset_generator!r}, "
                f"got {got}"
            )
        return self._finished(self._convolve(x, x if features is None else features))

    def _offset_convolution(self, numbers: int, factory: dict) -> nn.Conv2d:
        """Predicts so many numbers for each tap."""
        channels = self.offset_groups * numbers * self.kernel_size[0] * self.kernel_size[1]
        if self.offset_generator == "shared":
            return ConvGenerator(SHARED_FEATURES, channels, 1, **factory)
        arguments = {**self._conv_arguments, **factory}
        del arguments["groups"]  # never depthwise
        kind = ConvGenerator if self.offset_generator == "full" else SeparableGenerator
        return kind(self.in_channels, channels, self.kernel_size, **arguments)

    def _with_factors(self, offset: Tensor, seen: Tensor) -> Tensor:
        """Offsets as the operator takes them, those of each group before its factors."""
        if not self.modulated:
            return offset
        factors = 2 * self.mask_offset_generator(seen).sigmoid().to(offset.dtype)
        groups = (numbers.chunk(self.offset_groups, 1) for numbers in (offset, factors))
        return torch.cat([part for pair in zip(*groups, strict=True) for part in pair], 1)

    def _check_factors(self) -> None:
        """Raises ``ValueError`` unless all factors at rest are 1."""
        if self.modulated and self.mask_offset_generator.bias.any():  # type: ignore[union-attr]
            raise ValueError("weight: expected factors of 1, got some that scale the taps")

    def extra_repr(self) -> str:
        text = super().extra_repr()
        if self.offset_generator != "full":
            text += f", offset_generator={self.offset_generator}"
        if self.modulated:
            text += ", modulated=True"
        if self.offset_groups != 1:
            text += f", offset_groups={self.offset_groups}"
        return text
