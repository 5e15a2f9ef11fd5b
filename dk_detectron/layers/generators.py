"""What predicts offsets for every output location, and the layers that have such generators."""

from __future__ import annotations

from torch import Tensor, nn

from .adaptive import AdaptiveConv2d

OFFSET_GENERATORS = ("full", "separable")


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


class LocalConv2d(AdaptiveConv2d):
    """A layer with offsets for every output location.

    Args (beyond those of ``nn.Conv2d``):
        offset_generator: "full", the paper's: a convolution like the target's, from all channels to
            2*K, of C_in * 2*K * K multiply-adds a location; or "separable": a depthwise one, then
            1x1, of C_in * (2*K + K), six times fewer for 3x3. Its depthwise part gets no gradient
            before the first step, since what follows it starts at zero.
    """

    def __init__(self, *args, offset_generator: str = "full", **kwargs):
        if offset_generator not in OFFSET_GENERATORS:
            raise ValueError(
                f"offset_generator: expected one of {', '.join(OFFSET_GENERATORS)}, got "
                f"{offset_generator!r}"
            )
        self.offset_generator = offset_generator
        super().__init__(*args, **kwargs)

    def _offset_convolution(self, factory: dict) -> nn.Conv2d:
        arguments = {**self._conv_arguments, **factory}
        del arguments["groups"]  # never depthwise
        taps = self.kernel_size[0] * self.kernel_size[1]
        kind = nn.Conv2d if self.offset_generator == "full" else SeparableConv2d
        return kind(self.in_channels, 2 * taps, self.kernel_size, **arguments)

    def extra_repr(self) -> str:
        text = super().extra_repr()
        return text if self.offset_generator == "full" else f"{text}, offset_generator=separable"
