"""From the configuration to the convolutions and pyramids that both backbone families share."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from math import gcd
from typing import NamedTuple

import torch
from detectron2.config import CfgNode
from detectron2.layers import Conv2d
from detectron2.modeling import FPN, Backbone
from detectron2.modeling.backbone.fpn import LastLevelMaxPool, LastLevelP6P7
from torch import nn

from ..layers import (
    CondConv2d,
    DeformConv2d,
    DeformKernelConv2d,
    GlobalDeformKernel2d,
    LocalDeformKernel2d,
)

STAGES = ("res2", "res3", "res4", "res5")


class BlockConvs(NamedTuple):
    """Constructors of a residual block's convolutions, with the arguments of ``nn.Conv2d``."""

    conv1x1: Callable[..., nn.Module] = Conv2d
    conv3x3: Callable[..., nn.Module] = Conv2d


def block_convs(cfg: CfgNode, stage: str) -> BlockConvs:
    """The constructors for the blocks of ``stage`` ("res2" ... "res5"; the stem counts as "stem").

    Raises:
        ValueError: a key of ``MODEL.DEFORM_KERNEL`` has an unknown value.
    """
    # fmt: off
    conv_1x1    = cfg.MODEL.DEFORM_KERNEL.CONV_1X1
    conv_3x3    = cfg.MODEL.DEFORM_KERNEL.CONV_3X3
    scope_1x1   = cfg.MODEL.DEFORM_KERNEL.SCOPE_SIZE_1X1
    scope_3x3   = cfg.MODEL.DEFORM_KERNEL.SCOPE_SIZE_3X3
    data_offset = cfg.MODEL.DEFORM_KERNEL.DATA_OFFSET_ON_PER_STAGE
    num_experts = cfg.MODEL.DEFORM_KERNEL.NUM_EXPERTS
    # fmt: on
    if len(data_offset) != len(STAGES):
        raise ValueError(
            "MODEL.DEFORM_KERNEL.DATA_OFFSET_ON_PER_STAGE: expected one value for each of "
            f"{', '.join(STAGES)}, got {data_offset}"
        )

    def constructor(key: str, value: str, scope_size: int) -> Callable[..., nn.Module]:
        constructors = {
            "rigid": Conv2d,
            "local": partial(LocalDeformKernel2d, scope_size=scope_size),
            "global": partial(GlobalDeformKernel2d, scope_size=scope_size),
            "conditional": partial(CondConv2d, num_experts=num_experts),
        }
        if value not in constructors:
            raise ValueError(
                f"MODEL.DEFORM_KERNEL.{key}: expected one of {', '.join(constructors)}, "
                f"got {value!r}"
            )
        return constructors[value]

    conv1x1 = constructor("CONV_1X1", conv_1x1, scope_1x1)
    conv3x3 = constructor("CONV_3X3", conv_3x3, scope_3x3)
    if stage in STAGES and data_offset[STAGES.index(stage)]:
        deformable = {
            "rigid": DeformConv2d,
            "local": partial(DeformKernelConv2d, scope_size=scope_3x3),
        }
        if conv_3x3 not in deformable:
            raise ValueError(
                "MODEL.DEFORM_KERNEL.DATA_OFFSET_ON_PER_STAGE: expected CONV_3X3 to be one of "
                f"{', '.join(deformable)} where it is on, got {conv_3x3!r}"
            )
        conv3x3 = deformable[conv_3x3]
    return BlockConvs(conv1x1, conv3x3)


def norm_layer(name: str) -> str | Callable[[int], nn.Module]:
    """What ``detectron2.layers.get_norm`` takes, with a "GN" for any number of channels.

    detectron2's has 32 groups, which do not divide the 16, 24 or 144 channels of MobileNet-V2.
    """
    return (lambda channels: nn.GroupNorm(gcd(32, channels), channels)) if name == "GN" else name


def build_fpn(cfg: CfgNode, bottom_up: Backbone, top_block: nn.Module | None = None) -> FPN:
    """detectron2's feature pyramid over ``bottom_up``, with P6 by max pooling or ``top_block``."""
    return FPN(
        bottom_up=bottom_up,
        in_features=cfg.MODEL.FPN.IN_FEATURES,
        out_channels=cfg.MODEL.FPN.OUT_CHANNELS,
        norm=cfg.MODEL.FPN.NORM,
        top_block=top_block or LastLevelMaxPool(),
        fuse_type=cfg.MODEL.FPN.FUSE_TYPE,
    )


def build_retinanet_fpn(cfg: CfgNode, bottom_up: Backbone) -> FPN:
    """RetinaNet's feature pyramid: P6 and P7 by convolutions of ``bottom_up``'s res5."""
    res5 = bottom_up.output_shape()["res5"]
    return build_fpn(cfg, bottom_up, LastLevelP6P7(res5.channels, cfg.MODEL.FPN.OUT_CHANNELS))


def check_out_features(key: str, out_features: list[str]) -> None:
    """Raises ``ValueError`` if a requested feature does not exist."""
    known = ("stem", *STAGES)
    if not out_features or not set(out_features) <= set(known):
        raise ValueError(f"{key}: expected some of {', '.join(known)}, got {out_features}")


def to_channels_last(model: nn.Module) -> nn.Module:
    """As ``model.to(memory_format=torch.channels_last)``, which refuses weights of experts.

    Convolutions hand on the layout of their weights.
    """
    for parameter in model.parameters():
        if parameter.dim() == 4:
            parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
    return model
