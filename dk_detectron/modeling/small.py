"""A network small enough to learn in seconds: what studies of many seeds train."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn


def small_network(
    depthwise: Callable[[int, int], nn.Module],
    channels: int,
    in_channels: int,
    num_classes: int,
    stem_stride: int = 1,
    strides: tuple[int, ...] = (2, 1, 2, 1, 2),
) -> nn.Sequential:
    """A 3x3 stem, then a depthwise 3x3 and a pointwise layer for every stride; BatchNorm, ReLU.

    Args:
        depthwise: makes a depthwise convolution, given its index and stride.

    Returns:
        A network from pictures [N, in_channels, H, W] to logits [N, num_classes].
    """

    def normed(convolution: nn.Module) -> list[nn.Module]:
        return [convolution, nn.BatchNorm2d(channels), nn.ReLU()]

    layers = normed(nn.Conv2d(in_channels, channels, 3, stem_stride, 1, bias=False))
    for index, stride in enumerate(strides):
        layers += normed(depthwise(index, stride))
        layers += normed(nn.Conv2d(channels, channels, 1, bias=False))
    return nn.Sequential(
        *layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, num_classes)
    )
