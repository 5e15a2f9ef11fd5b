"""MobileNet-V2 of width 1.0 (Sandler et al. 2018), as a detectron2 backbone."""

from __future__ import annotations

from typing import NamedTuple

import torch.nn.functional as F
from detectron2.config import CfgNode
from detectron2.layers import CNNBlockBase, Conv2d, ShapeSpec, get_norm
from detectron2.modeling import BACKBONE_REGISTRY, FPN
from detectron2.modeling.backbone.resnet import ResNet
from torch import Tensor

from ..layers import msra_fill
from .block import Block, checkpoint_blocks
from .build import (
    BlockConvs,
    block_convs,
    build_fpn,
    build_retinanet_fpn,
    check_out_features,
    norm_layer,
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
        norm: str = "BN",
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

    def convolve(self, x: Tensor) -> Tensor:
        out = x if self.conv1 is None else self.conv1(x)
        out = self.conv3(self.conv2(out))
        return x + out if self.stride == 1 and self.in_channels == self.out_channels else out


class MobileNetV2Stem(CNNBlockBase):
    """The first convolution and the one block at half resolution."""

    def __init__(self, in_channels: int, *, convs: BlockConvs, norm: str = "BN"):
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

    def forward(self, x: Tensor) -> Tensor:
        return self.block(self.conv1(x))


class FinalConvBlock(Block):
    """The last 1x1 convolution, to the features that the classifier sees."""

    def __init__(self, in_channels: int, out_channels: int, *, convs: BlockConvs, norm: str = "BN"):
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

    def convolve(self, x: Tensor) -> Tensor:
        return self.conv1(x)


@BACKBONE_REGISTRY.register()
def build_mobilenetv2_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> ResNet:
    """MobileNet-V2 with the convolutions that ``MODEL.DEFORM_KERNEL`` asks for: res2 ... res5.

    detectron2's ResNet is the container: a stem and four stages of blocks, with freezing.

    Raises:
        ValueError: a key has a value that this backbone does not know.
    """
    # fmt: off
    norm          = norm_layer(cfg.MODEL.MOBILENETV2.NORM)
    out_features  = cfg.MODEL.MOBILENETV2.OUT_FEATURES
    res5_channels = cfg.MODEL.MOBILENETV2.RES5_CHANNELS
    freeze_at     = cfg.MODEL.BACKBONE.FREEZE_AT
    checkpointing = cfg.MODEL.BACKBONE.GRADIENT_CHECKPOINTING
    # fmt: on
    last = GROUPS[-1].out_channels
    if res5_channels not in (last, 1280):
        raise ValueError(
            f"MODEL.MOBILENETV2.RES5_CHANNELS: expected {last} or 1280, got {res5_channels}"
        )
    check_out_features("MODEL.MOBILENETV2.OUT_FEATURES", out_features)
    stem = MobileNetV2Stem(input_shape.channels, convs=block_convs(cfg, "stem"), norm=norm)
    stages = {}
    in_channels = stem.out_channels
    for group in GROUPS:
        blocks = ResNet.make_stage(
            InvertedResidualBlock,
            group.num_blocks,
            stride_per_block=[group.stride] + [1] * (group.num_blocks - 1),
            in_channels=in_channels,
            out_channels=group.out_channels,
            expansion=group.expansion,
            convs=block_convs(cfg, group.stage),
            norm=norm,
        )
        stages.setdefault(group.stage, []).extend(blocks)
        in_channels = group.out_channels
    if res5_channels != last:
        convs = block_convs(cfg, "res5")
        stages["res5"].append(FinalConvBlock(last, res5_channels, convs=convs, norm=norm))
    backbone = ResNet(stem, list(stages.values()), out_features=out_features, freeze_at=freeze_at)
    if checkpointing:
        checkpoint_blocks(backbone)
    return backbone


@BACKBONE_REGISTRY.register()
def build_mobilenetv2_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> FPN:
    """Feature pyramid over :func:`build_mobilenetv2_backbone`."""
    return build_fpn(cfg, build_mobilenetv2_backbone(cfg, input_shape))


@BACKBONE_REGISTRY.register()
def build_retinanet_mobilenetv2_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> FPN:
    """RetinaNet's feature pyramid over :func:`build_mobilenetv2_backbone`."""
    return build_retinanet_fpn(cfg, build_mobilenetv2_backbone(cfg, input_shape))
