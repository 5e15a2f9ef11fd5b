"""Image classification with any backbone: the networks of Tables 1 and 2."""

from __future__ import annotations

from detectron2.config import CfgNode, configurable
from detectron2.modeling import META_ARCH_REGISTRY, Backbone, build_backbone
from torch import Tensor, nn


@META_ARCH_REGISTRY.register()
class ImageClassifier(nn.Module):
    """Global average pool and a linear layer over the last feature of a backbone."""

    @configurable
    def __init__(self, *, backbone: Backbone, num_classes: int):
        super().__init__()
        self.backbone = backbone
        shapes = backbone.output_shape()
        self.in_feature = max(shapes, key=lambda name: shapes[name].stride)
        self.linear = nn.Linear(shapes[self.in_feature].channels, num_classes)
        # Goyal et al. 2017, section 5.1.
        nn.init.normal_(self.linear.weight, std=0.01)
        nn.init.zeros_(self.linear.bias)

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict:
        return {"backbone": build_backbone(cfg), "num_classes": cfg.MODEL.CLASSIFIER.NUM_CLASSES}

    def forward(self, images: Tensor) -> Tensor:
        """[N, 3, H, W] -> logits [N, num_classes]."""
        features = self.backbone(images)[self.in_feature]
        return self.linear(features.mean((2, 3)))
