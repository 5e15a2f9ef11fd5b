"""ResNet-DW: ResNet with bottlenecks twice as wide and depthwise 3x3 convolutions (Table 5)."""

from __future__ import annotations

import torch.nn.functional as F
from detectron2.config import CfgNode
from detectron2.layers import Conv2d, ShapeSpec, get_norm
from detectron2.modeling import BACKBONE_REGISTRY, FPN
from detectron2.modeling.backbone.resnet import BasicStem, ResNet
from torch import Tensor, nn

from ..layers import msra_fill
from .block import Block, checkpoint_blocks
from .build import (
    STAGES,
    BlockConvs,
    block_convs,
    build_fpn,
    build_retinanet_fpn,
    check_out_features,
    norm_layer,
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
        norm: str = "BN",
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

    def convolve(self, x: Tensor) -> Tensor:
        out = F.relu_(self.conv1(x))
        out = F.relu_(self.conv2(out))
        out = self.conv3(out) + self.shortcut(x)
        return F.relu_(out)


@BACKBONE_REGISTRY.register()
def build_resnet_dw_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> ResNet:
    """ResNet-DW with the convolutions that ``MODEL.DEFORM_KERNEL`` asks for; outputs res2 ... res5.

    Raises:
        ValueError: a key has a value that this backbone does not know.
    """
    # fmt: off
    depth         = cfg.MODEL.RESNETS.DEPTH
    width         = cfg.MODEL.RESNETS.WIDTH_PER_GROUP
    stem_channels = cfg.MODEL.RESNETS.STEM_OUT_CHANNELS
    res2_channels = cfg.MODEL.RESNETS.RES2_OUT_CHANNELS
    stride_in_1x1 = cfg.MODEL.RESNETS.STRIDE_IN_1X1
    norm          = norm_layer(cfg.MODEL.RESNETS.NORM)
    out_features  = cfg.MODEL.RESNETS.OUT_FEATURES
    freeze_at     = cfg.MODEL.BACKBONE.FREEZE_AT
    checkpointing = cfg.MODEL.BACKBONE.GRADIENT_CHECKPOINTING
    # fmt: on
    if depth not in BLOCKS_PER_STAGE:
        raise ValueError(
            f"MODEL.RESNETS.DEPTH: expected one of {', '.join(map(str, BLOCKS_PER_STAGE))} for "
            f"ResNet-DW, got {depth}"
        )
    for key in "NUM_GROUPS", "RES5_DILATION":
        if cfg.MODEL.RESNETS[key] != 1:
            raise ValueError(
                f"MODEL.RESNETS.{key}: expected 1 for ResNet-DW, got {cfg.MODEL.RESNETS[key]}"
            )
    check_out_features("MODEL.RESNETS.OUT_FEATURES", out_features)
    stem = BasicStem(input_shape.channels, stem_channels, norm)
    stages = []
    in_channels = stem_channels
    for i, (stage, num_blocks) in enumerate(zip(STAGES, BLOCKS_PER_STAGE[depth], strict=True)):
        out_channels = res2_channels * 2**i
        first_stride = 1 if i == 0 else 2
        stages.append(
            ResNet.make_stage(
                DepthwiseBottleneckBlock,
                num_blocks,
                stride_per_block=[first_stride] + [1] * (num_blocks - 1),
                in_channels=in_channels,
                out_channels=out_channels,
                bottleneck_channels=2 * width * 2**i,
                convs=block_convs(cfg, stage),
                norm=norm,
                stride_in_1x1=stride_in_1x1,
            )
        )
        in_channels = out_channels
    backbone = ResNet(stem, stages, out_features=out_features, freeze_at=freeze_at)
    if checkpointing:
        checkpoint_blocks(backbone)
    return backbone


@BACKBONE_REGISTRY.register()
def build_resnet_dw_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> FPN:
    """Feature pyramid over :func:`build_resnet_dw_backbone`."""
    return build_fpn(cfg, build_resnet_dw_backbone(cfg, input_shape))


@BACKBONE_REGISTRY.register()
def build_retinanet_resnet_dw_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> FPN:
    """RetinaNet's feature pyramid over :func:`build_resnet_dw_backbone`."""
    return build_retinanet_fpn(cfg, build_resnet_dw_backbone(cfg, input_shape))
