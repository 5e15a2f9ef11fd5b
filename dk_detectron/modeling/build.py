"""The registered builders: from the configuration, read once, to the constructors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial, reduce

import torch
from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, FPN, Backbone
from detectron2.modeling.backbone.fpn import LastLevelMaxPool, LastLevelP6P7
from detectron2.modeling.backbone.resnet import ResNet, build_resnet_backbone
from torch import nn

from .mobilenetv2 import mobilenet_v2
from .resnet import adapt_resnet
from .resnetdw import resnet_dw

# Arguments of the constructors, and the keys that they come from.
CONVOLUTION_KEYS = {
    "conv1x1": "MODEL.DEFORM_KERNEL.CONV_1X1",
    "conv3x3": "MODEL.DEFORM_KERNEL.CONV_3X3",
    "scope_size_1x1": "MODEL.DEFORM_KERNEL.SCOPE_SIZE_1X1",
    "scope_size_3x3": "MODEL.DEFORM_KERNEL.SCOPE_SIZE_3X3",
    "data_offset": "MODEL.DEFORM_KERNEL.DATA_OFFSET_ON_PER_STAGE",
    "num_experts": "MODEL.DEFORM_KERNEL.NUM_EXPERTS",
    "offset_generator": "MODEL.DEFORM_KERNEL.OFFSET_GENERATOR",
    "modulated": "MODEL.DEFORM_KERNEL.MODULATED",
    "offset_groups": "MODEL.DEFORM_KERNEL.OFFSET_GROUPS",
}
BACKBONE_KEYS = CONVOLUTION_KEYS | {
    "freeze_at": "MODEL.BACKBONE.FREEZE_AT",
    "gradient_checkpointing": "MODEL.BACKBONE.GRADIENT_CHECKPOINTING",
}
MOBILENETV2_KEYS = BACKBONE_KEYS | {
    "norm": "MODEL.MOBILENETV2.NORM",
    "out_features": "MODEL.MOBILENETV2.OUT_FEATURES",
    "res5_channels": "MODEL.MOBILENETV2.RES5_CHANNELS",
}
RESNET_DW_KEYS = BACKBONE_KEYS | {
    "depth": "MODEL.RESNETS.DEPTH",
    "width": "MODEL.RESNETS.WIDTH_PER_GROUP",
    "stem_channels": "MODEL.RESNETS.STEM_OUT_CHANNELS",
    "res2_channels": "MODEL.RESNETS.RES2_OUT_CHANNELS",
    "stride_in_1x1": "MODEL.RESNETS.STRIDE_IN_1X1",
    "norm": "MODEL.RESNETS.NORM",
    "out_features": "MODEL.RESNETS.OUT_FEATURES",
}


def _construct(
    constructor: Callable[..., ResNet], cfg: CfgNode, keys: Mapping[str, str], **arguments
) -> ResNet:
    """Calls ``constructor``; its errors name keys, which their reader has written."""
    for argument, key in keys.items():
        arguments[argument] = reduce(getattr, key.split("."), cfg)
    try:
        return constructor(**arguments)
    except ValueError as error:
        argument, _, text = str(error).partition(": ")
        if argument not in keys:
            raise
        raise ValueError(f"{keys[argument]}: {text}") from error


@BACKBONE_REGISTRY.register()
def build_mobilenetv2_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> ResNet:
    """:func:`mobilenet_v2` as the configuration asks for it.

    Raises:
        ValueError: a key has a value that this backbone does not know.
    """
    return _construct(mobilenet_v2, cfg, MOBILENETV2_KEYS, in_channels=input_shape.channels)


@BACKBONE_REGISTRY.register()
def build_resnet_dw_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> ResNet:
    """:func:`resnet_dw` as the configuration asks for it.

    Raises:
        ValueError: a key has a value that this backbone does not know.
    """
    for key in "NUM_GROUPS", "RES5_DILATION":
        if cfg.MODEL.RESNETS[key] != 1:
            raise ValueError(
                f"MODEL.RESNETS.{key}: expected 1 for ResNet-DW, got {cfg.MODEL.RESNETS[key]}"
            )
    return _construct(resnet_dw, cfg, RESNET_DW_KEYS, in_channels=input_shape.channels)


@BACKBONE_REGISTRY.register()
def build_resnet_dk_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> ResNet:
    """detectron2's ``build_resnet_backbone``, its convolutions as MODEL.DEFORM_KERNEL asks for.

    Raises:
        ValueError: a key has a value that this backbone does not know.
    """
    if cfg.MODEL.BACKBONE.GRADIENT_CHECKPOINTING:
        raise ValueError(
            "MODEL.BACKBONE.GRADIENT_CHECKPOINTING: expected False for detectron2's ResNet, whose "
            "blocks know nothing of it, got True"
        )
    if any(cfg.MODEL.RESNETS.DEFORM_ON_PER_STAGE):
        raise ValueError(
            "MODEL.RESNETS.DEFORM_ON_PER_STAGE: expected all False, got "
            f"{cfg.MODEL.RESNETS.DEFORM_ON_PER_STAGE}: deformable convolutions of this project are "
            "asked for by MODEL.DEFORM_KERNEL.DATA_OFFSET_ON_PER_STAGE"
        )
    resnet = build_resnet_backbone(cfg, input_shape)
    return _construct(partial(adapt_resnet, resnet), cfg, CONVOLUTION_KEYS)


def build_fpn(cfg: CfgNode, bottom_up: Backbone, top_block: nn.Module | None = None) -> FPN:
    """detectron2's feature pyramid over ``bottom_up``, with P6 by max pooling or ``top_block``.

    Raises:
        ValueError: it is asked to take features that ``bottom_up`` does not return.
    """
    known, wanted = bottom_up.output_shape(), cfg.MODEL.FPN.IN_FEATURES
    if not wanted or not set(wanted) <= set(known):
        raise ValueError(
            f"MODEL.FPN.IN_FEATURES: expected some of {', '.join(known)}, the OUT_FEATURES of "
            f"{cfg.MODEL.BACKBONE.NAME}, got {wanted}"
        )
    return FPN(
        bottom_up=bottom_up,
        in_features=cfg.MODEL.FPN.IN_FEATURES,
        out_channels=cfg.MODEL.FPN.OUT_CHANNELS,
        norm=cfg.MODEL.FPN.NORM,
        top_block=top_block or LastLevelMaxPool(),
        fuse_type=cfg.MODEL.FPN.FUSE_TYPE,
    )


def build_retinanet_fpn(cfg: CfgNode, bottom_up: Backbone) -> FPN:
    """RetinaNet's feature pyramid: P6 and P7 by convolutions of ``bottom_up``'s res5.

    Raises:
        ValueError: ``bottom_up`` does not return all that is asked for.
    """
    shapes = bottom_up.output_shape()
    if "res5" not in shapes:
        raise ValueError(
            f"OUT_FEATURES of {cfg.MODEL.BACKBONE.NAME}: expected res5 among them, of which "
            f"RetinaNet's P6 and P7 are made, got {', '.join(shapes)}"
        )
    top_block = LastLevelP6P7(shapes["res5"].channels, cfg.MODEL.FPN.OUT_CHANNELS)
    return build_fpn(cfg, bottom_up, top_block)


@BACKBONE_REGISTRY.register()
def build_mobilenetv2_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> FPN:
    """Feature pyramid over :func:`build_mobilenetv2_backbone`."""
    return build_fpn(cfg, build_mobilenetv2_backbone(cfg, input_shape))


@BACKBONE_REGISTRY.register()
def build_resnet_dw_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> FPN:
    """Feature pyramid over :func:`build_resnet_dw_backbone`."""
    return build_fpn(cfg, build_resnet_dw_backbone(cfg, input_shape))


@BACKBONE_REGISTRY.register()
def build_resnet_dk_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> FPN:
    """Feature pyramid over :func:`build_resnet_dk_backbone`."""
    return build_fpn(cfg, build_resnet_dk_backbone(cfg, input_shape))


@BACKBONE_REGISTRY.register()
def build_retinanet_resnet_dk_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> FPN:
    """RetinaNet's feature pyramid over :func:`build_resnet_dk_backbone`."""
    return build_retinanet_fpn(cfg, build_resnet_dk_backbone(cfg, input_shape))


@BACKBONE_REGISTRY.register()
def build_retinanet_mobilenetv2_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> FPN:
    """RetinaNet's feature pyramid over :func:`build_mobilenetv2_backbone`."""
    return build_retinanet_fpn(cfg, build_mobilenetv2_backbone(cfg, input_shape))


@BACKBONE_REGISTRY.register()
def build_retinanet_resnet_dw_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> FPN:
    """RetinaNet's feature pyramid over :func:`build_resnet_dw_backbone`."""
    return build_retinanet_fpn(cfg, build_resnet_dw_backbone(cfg, input_shape))


def to_channels_last(model: nn.Module) -> nn.Module:
    """As ``model.to(memory_format=torch.channels_last)``, which refuses weights of experts.

    Convolutions hand on the layout of their weights.
    """
    for parameter in model.parameters():
        if parameter.dim() == 4:
            parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
    return model
