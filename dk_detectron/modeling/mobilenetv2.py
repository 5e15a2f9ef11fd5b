"""MobileNet-V2 of width 1.0 (Sandler et al. 2018)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch.nn.functional as F
from detectron2.layers import CNNBlockBase, Conv2d, get_norm
from detectron2.modeling.backbone.resnet import ResNet
from torch import Tensor

from ..layers import msra_fill
from .block import Block, adapt, assemble, share_offsets
from .convolutions import (
    STAGES,
    BlockConvs,
    Norm,
    check_out_features,
    norm_layer,
    stage_convs,
)


class Group(NamedTuple):
    """A row of Table 2 of Sandler et al.: blocks of equal width."""

    stage: str
    expansion: int
    out_channels: int
    num_blocks: int
    stride: int


STEM_CHANNELS = 32
STEM_GROUP = Group("stem", 1, 16, 1, 1)
GROUPS = (
    Group("res2", 6, 24, 2, 2),
    Group("res3", 6, 32, 3, 2),
    Group("res4", 6, 64, 4, 2),
    Group("res4", 6, 96, 3, 1),
    Group("res5", 6, 160, 3, 2),
    Group("res5", 6, 320, 1, 1),
)


class InvertedResidualBlock(Block):
    """1x1 expansion, depthwise 3x3, linear 1x1 projection, and the identity where shapes allow."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        expansion: int,
        convs: BlockConvs,
        stride: int = 1,
        norm: Norm = "BN",
    ):
        """
        Args:
            expansion: hidden channels per input channel; with 1 there is no expansion convolution.
            convs: constructors of the convolutions.
            norm: anything that ``detectron2.layers.get_norm`` takes.
        """
        super().__init__(in_channels, out_channels, stride)
        channels = in_channels * expansion
        self.conv1 = None
        if expansion != 1:
            self.conv1 = convs.conv1x1(
                in_channels,
                channels,
                kernel_size=1,
                bias=False,
                norm=get_norm(norm, channels),
                activation=F.relu6,
            )
        self.conv2 = convs.conv3x3(
            channels,
            channels,
            kernel_size=3,
            stride=stride,
            padding=1,
            groups=channels,
            bias=False,
            norm=get_norm(norm, channels),
            activation=F.relu6,
        )
        self.conv3 = convs.conv1x1(
            channels,
            out_channels,
            kernel_size=1,
            bias=False,
            norm=get_norm(norm, out_channels),
        )
        for conv in (self.conv1, self.conv2, self.conv3):
            if conv is not None:
                msra_fill(conv)

    def convolve(self, x: Tensor, features: Tensor | None) -> Tensor:
        out = x if self.conv1 is None else self.conv1(x)
        out = self.conv3(adapt(self.conv2, out, features))
        return x + out if self.stride == 1 and self.in_channels == self.out_channels else out


class MobileNetV2Stem(CNNBlockBase):
    """The first convolution and the one block at half resolution."""

    def __init__(self, in_channels: int, *, convs: BlockConvs, norm: Norm = "BN"):
        super().__init__(in_channels, STEM_GROUP.out_channels, stride=2)
        self.conv1 = Conv2d(
            in_channels,
            STEM_CHANNELS,
            kernel_size=3,
            stride=2,
            padding=1,
            bias=False,
            norm=get_norm(norm, STEM_CHANNELS),
            activation=F.relu6,
        )
        msra_fill(self.conv1)
        self.block = InvertedResidualBlock(
            STEM_CHANNELS,
            STEM_GROUP.out_channels,
            expansion=STEM_GROUP.expansion,
            convs=convs,
            norm=norm,
        )
        share_offsets([self.block])

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(x)
        return self.block(x, self.block.offset_features(x))


class FinalConvBlock(Block):
    """The last 1x1 convolution, to the features that the classifier sees."""

    def __init__(
        self, in_channels: int, out_channels: int, *, convs: BlockConvs, norm: Norm = "BN"
    ):
        super().__init__(in_channels, out_channels, stride=1)
        self.conv1 = convs.conv1x1(
            in_channels,
            out_channels,
            kernel_size=1,
            bias=False,
            norm=get_norm(norm, out_channels),
            activation=F.relu6,
        )
        msra_fill(self.conv1)

    def convolve(self, x: Tensor, features: Tensor | None) -> Tensor:
        return self.conv1(x)


def mobilenet_v2(
    *,
    norm: Norm = "BN",
    out_features: Sequence[str] = STAGES,
    res5_channels: int = 1280,
    freeze_at: int = 0,
    in_channels: int = 3,
    gradient_checkpointing: bool = False,
    **convs,
) -> ResNet:
    """MobileNet-V2 whose convolutions adapt as asked for.

    detectron2's ResNet is the container: a stem and the stages res2 ... res5, at strides of 4 to
    32. It maps a batch of images [N, in_channels, H, W] to a dict of features by name.

    Args:
        norm: what ``detectron2.layers.get_norm`` takes.
        out_features: which features it returns, of "stem", "res2", ..., "res5".
        res5_channels: 1280, with the final 1x1 convolution, or 320, without.
        freeze_at: how many of stem, res2, ... do not learn.
        gradient_checkpointing: compute activations again instead of keeping them.
        convs: which convolutions, as :func:`stage_convs` takes them: conv1x1, conv3x3, ...

    Raises:
        ValueError: an argument has a value that does not work.
    """
    last = GROUPS[-1].out_channels
    if res5_channels not in (last, 1280):
        raise ValueError(f"res5_channels: expected {last} or 1280, got {res5_channels}")
    out_features, norm = check_out_features(out_features), norm_layer(norm)
    stages, convs = {}, stage_convs(**convs)
    stem = MobileNetV2Stem(in_channels, convs=convs["stem"], norm=norm)
    channels = STEM_GROUP.out_channels
    for group in GROUPS:
        blocks = ResNet.make_stage(
            InvertedResidualBlock,
            group.num_blocks,
            stride_per_block=[group.stride] + [1] * (group.num_blocks - 1),
            in_channels=channels,
            out_channels=group.out_channels,
            expansion=group.expansion,
            convs=convs[group.stage],
            norm=norm,
        )
        stages.setdefault(group.stage, []).extend(blocks)
        channels = group.out_channels
    if res5_channels != last:
        final = FinalConvBlock(last, res5_channels, convs=convs["res5"], norm=norm)
        stages["res5"].append(final)
    return assemble(stem, list(stages.values()), out_features, freeze_at, gradient_checkpointing)
