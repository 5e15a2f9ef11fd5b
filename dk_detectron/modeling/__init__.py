"""Backbones: ordinary constructors, and their builders, registered with detectron2 on import."""

from .build import (
    build_mobilenetv2_backbone,
    build_mobilenetv2_fpn_backbone,
    build_resnet_dk_backbone,
    build_resnet_dk_fpn_backbone,
    build_resnet_dw_backbone,
    build_resnet_dw_fpn_backbone,
    build_retinanet_mobilenetv2_fpn_backbone,
    build_retinanet_resnet_dk_fpn_backbone,
    build_retinanet_resnet_dw_fpn_backbone,
    to_channels_last,
)
from .classifier import ImageClassifier
from .convolutions import NORMS
from .features import FeatureList
from .mobilenetv2 import mobilenet_v2
from .resnet import adapt_resnet
from .resnetdw import resnet_dw

__all__ = [
    "NORMS",
    "FeatureList",
    "ImageClassifier",
    "adapt_resnet",
    "build_mobilenetv2_backbone",
    "build_mobilenetv2_fpn_backbone",
    "build_resnet_dk_backbone",
    "build_resnet_dk_fpn_backbone",
    "build_resnet_dw_backbone",
    "build_resnet_dw_fpn_backbone",
    "build_retinanet_mobilenetv2_fpn_backbone",
    "build_retinanet_resnet_dk_fpn_backbone",
    "build_retinanet_resnet_dw_fpn_backbone",
    "mobilenet_v2",
    "resnet_dw",
    "to_channels_last",
]
