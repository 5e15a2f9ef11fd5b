"""Backbones, registered with detectron2 on import."""

from .build import to_channels_last
from .classifier import ImageClassifier
from .mobilenet_v2 import (
    build_mobilenetv2_backbone,
    build_mobilenetv2_fpn_backbone,
    build_retinanet_mobilenetv2_fpn_backbone,
)
from .resnet_dw import (
    build_resnet_dw_backbone,
    build_resnet_dw_fpn_backbone,
    build_retinanet_resnet_dw_fpn_backbone,
)

__all__ = [
    "ImageClassifier",
    "build_mobilenetv2_backbone",
    "build_mobilenetv2_fpn_backbone",
    "build_resnet_dw_backbone",
    "build_resnet_dw_fpn_backbone",
    "build_retinanet_mobilenetv2_fpn_backbone",
    "build_retinanet_resnet_dw_fpn_backbone",
    "to_channels_last",
]
