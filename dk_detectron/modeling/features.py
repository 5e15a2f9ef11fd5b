"""A backbone as other libraries take it: a list of feature maps."""

from __future__ import annotations

from detectron2.modeling import Backbone
from torch import Tensor, nn


class FeatureList(nn.Module):
    """The features of a backbone as a list, shallow to deep, such as a U-Net or timm's users want.

    Attributes:
        names, channels, strides: of each feature; the strides in input pixels.
    """

    def __init__(self, backbone: Backbone):
        super().__init__()
        self.backbone = backbone
        shapes = backbone.output_shape()
        self.names = sorted(shapes, key=lambda name: shapes[name].stride)
        self.channels = [shapes[name].channels for name in self.names]
        self.strides = [shapes[name].stride for name in self.names]

    def forward(self, x: Tensor) -> list[Tensor]:
        """[N, C_in, H, W] -> [N, channels[i], H / strides[i], W / strides[i]] for every i."""
        features = self.backbone(x)
        return [features[name] for name in self.names]
