"""ResNet-DW: ResNet with bottlenecks twice as wide and depthwise 3x3 convolutions (Table 5)."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from detectron2.layers import Conv2d, get_norm
from detectron2.modeling.backbone.resnet import BasicStem, ResNet
from torch import Tensor, nn

from ..layers import msra_fill
from .block import Block, adapt, assemble
from .convolutions import (
    STAGES,
    BlockConvs,
    Norm,
    check_out_features,
    norm_layer,
    stage_convs,
)

BLOCKS_PER_STAGE = {50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3)}


class DepthwiseBottleneckBlock(Block):
    """1x1, depthwise 3x3, 1x1, and a projection shortcut where the shape changes."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        bottleneck_channels: int,
        convs: BlockConvs,
        stride: int = 1,
        norm: Norm = "BN",
        stride_in_1x1: bool = False,
    ):
        """
        Args:
            convs: constructors of the convolutions; the shortcut is always rigid.
            norm: anything that ``detectron2.layers.get_norm`` takes.
            stride_in_1x1: stride in the first 1x1 convolution instead of in the 3x3.
        """
        super().__init__(in_channels, out_channels, stride)
        stride_1x1, stride_3x3 = (stride, 1) if stride_in_1x1 else (1, stride)
        self.shortcut = nn.Identity()
        if in_channels != out_channels or stride != 1:
            self.shortcut = Conv2d(
                in_channels,
                out_channels,
                kernel_size=1,
                stride=stride,
                bias=False,
                norm=get_norm(norm, out_channels),
            )
            msra_fill(self.shortcut)
        self.conv1 = convs.conv1x1(
            in_channels,
            bottleneck_channels,
            kernel_size=1,
            stride=stride_1x1,
            bias=False,
            norm=get_norm(norm, bottleneck_channels),
        )
        self.conv2 = convs.conv3x3(
            bottleneck_channels,
            bottleneck_channels,
            kernel_size=3,
            stride=stride_3x3,
            padding=1,
            groups=bottleneck_channels,
            bias=False,
            norm=get_norm(norm, bottleneck_channels),
        )
        self.conv3 = convs.conv1x1(
            bottleneck_channels,
            out_channels,
            kernel_size=1,
            bias=False,
            norm=get_norm(norm, out_channels),
        )
        for conv in (self.conv1, self.conv2, self.conv3):
            msra_fill(conv)

    def convolve(self, x: Tensor, features: Tensor | None) -> Tensor:
        out = F.relu_(self.conv1(x))
        out = F.relu_(adapt(self.conv2, out, features))
        out = self.conv3(out) + self.shortcut(x)
        return F.relu_(out)


def resnet_dw(
    *,
    depth: int = 50,
    width: int = 64,
    stem_channels: int = 64,
    res2_channels: int = 256,
    stride_in_1x1: bool = False,
    norm: Norm = "BN",
    out_features: Sequence[str] = STAGES,
    freeze_at: int = 0,
    in_channels: int = 3,
    gradient_checkpointing: bool = False,
    **convs,
) -> ResNet:
    """ResNet-DW whose convolutions adapt as asked for.

    It maps a batch of images [N, in_channels, H, W] to a dict of features by name, at strides of 4
    to 32.

    Args:
        depth: 50, 101 or 152.
        width: half the channels of res2's bottlenecks, as ResNet's own are before the paper's
            doubling.
        stem_channels, res2_channels: of the outputs; each later stage has twice as many.
        stride_in_1x1: stride in the first 1x1 convolution of a block instead of in the 3x3.
        norm: what ``detectron2.layers.get_norm`` takes.
        out_features: which features it returns, of "stem", "res2", ..., "res5".
        freeze_at: how many of stem, res2, ... do not learn.
        gradient_checkpointing: compute activations again instead of keeping them.
        convs: which convolutions, as :func:`stage_convs` takes them: conv1x1, conv3x3, ...

    Raises:
        ValueError: an argument has a value that does not work.
    """
    if depth not in BLOCKS_PER_STAGE:
        known = ", ".join(map(str, BLOCKS_PER_STAGE))
        raise ValueError(f"depth: expected one of {known} for ResNet-DW, got {depth}")
    out_features, norm = check_out_features(out_features), norm_layer(norm)
    stages, convs = [], stage_convs(**convs)
    stem = BasicStem(in_channels, stem_channels, norm)
    channels = stem_channels
    for i, (stage, num_blocks) in enumerate(zip(STAGES, BLOCKS_PER_STAGE[depth], strict=True)):
        out_channels = res2_channels * 2**i
        first_stride = 1 if i == 0 else 2
        stages.append(
            ResNet.make_stage(
                DepthwiseBottleneckBlock,
                num_blocks,
                stride_per_block=[first_stride] + [1] * (num_blocks - 1),
                in_channels=channels,
                out_channels=out_channels,
                bottleneck_channels=2 * width * 2**i,
                convs=convs[stage],
                norm=norm,
                stride_in_1x1=stride_in_1x1,
            )
        )
        channels = out_channels
    return assemble(stem, stages, out_features, freeze_at, gradient_checkpointing)
