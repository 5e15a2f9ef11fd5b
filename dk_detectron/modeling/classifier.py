"""Image classification with any backbone: the networks of Tables 1 and 2."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from detectron2.config import CfgNode, configurable
from detectron2.modeling import META_ARCH_REGISTRY, Backbone, build_backbone
from torch import Tensor, nn


@META_ARCH_REGISTRY.register()
class ImageClassifier(nn.Module):
    """Global average pool and a linear layer over the last feature of a backbone."""

    pixel_mean: Tensor
    pixel_std: Tensor

    @configurable
    def __init__(
        self,
        *,
        backbone: Backbone,
        num_classes: int,
        pixel_mean: Sequence[float],
        pixel_std: Sequence[float],
    ):
        super().__init__()
        self.backbone = backbone
        shapes = backbone.output_shape()
        self.in_feature = max(shapes, key=lambda name: shapes[name].stride)
        self.linear = nn.Linear(shapes[self.in_feature].channels, num_classes)
        # Goyal et al. 2017, section 5.1.
        nn.init.normal_(self.linear.weight, std=0.01)
        nn.init.zeros_(self.linear.bias)
        for name, values in ("pixel_mean", pixel_mean), ("pixel_std", pixel_std):
            self.register_buffer(name, torch.tensor(values).view(-1, 1, 1), persistent=False)

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict:
        return {
            "backbone": build_backbone(cfg),
            "num_classes": cfg.MODEL.CLASSIFIER.NUM_CLASSES,
            "pixel_mean": cfg.MODEL.PIXEL_MEAN,
            "pixel_std": cfg.MODEL.PIXEL_STD,
        }

    def normalize(self, pixels: Tensor) -> Tensor:
        """Values of 0 to 255, [N, 3, H, W] on any device, to what the backbone takes."""
        return (
            pixels.to(self.pixel_mean.device, non_blocking=True) - self.pixel_mean
        ) / self.pixel_std

    def forward(self, inputs: Tensor | dict[str, Tensor]) -> Tensor | dict[str, Tensor]:
        """Logits, or the loss of a batch.

        Args:
            inputs: normalised images [N, 3, H, W], as torchvision's classifiers take them; or a
                batch of a loader: "image", pixels of 0 to 255 [N, 3, H, W], and "label" [N].

        Returns:
            Logits [N, num_classes]; of a batch, in training mode: {"loss_cls": cross entropy}.
        """
        if isinstance(inputs, dict):
            logits = self(self.normalize(inputs["image"]))
            if not self.training:
                return logits
            return {"loss_cls": F.cross_entropy(logits, inputs["label"].to(logits.device))}
        features = self.backbone(inputs)[self.in_feature]
        return self.linear(features.mean((2, 3)))
