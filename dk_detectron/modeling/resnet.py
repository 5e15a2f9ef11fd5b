"""detectron2's own ResNets and ResNeXts with adaptive convolutions."""

from __future__ import annotations

from typing import Any

from detectron2.layers import Conv2d
from detectron2.modeling.backbone.resnet import ResNet

from ..deformify import deformify
from .convolutions import STAGES, stage_convs


def adapt_resnet(resnet: ResNet, **convs) -> ResNet:
    """Makes the convolutions of a ResNet's blocks adaptive, in place, with the same outputs.

    Args:
        resnet: of detectron2. What does not learn in it stays so.
        convs: which convolutions, as :func:`stage_convs` takes them: conv1x1, conv3x3, ... The
            shortcuts and the stem stay rigid.

    Returns:
        ``resnet``.

    Raises:
        ValueError: an argument has a value that does not work, if only for some of the chosen
            convolutions; those before may have changed.
    """
    by_stage = stage_convs(**convs)
    for stage in STAGES:
        for size, constructor in zip((1, 3), by_stage[stage], strict=True):

            def chosen(name: str, conv: Any, size: int = size) -> bool:
                return max(conv.kernel_size) == size and not name.endswith("shortcut")

            if constructor is not Conv2d and hasattr(resnet, stage):
                blocks = getattr(resnet, stage)
                for name, reason in deformify(blocks, constructor, chosen).kept.items():
                    if chosen(name, blocks.get_submodule(name)):
                        raise ValueError(f"{reason}, in {stage}.{name}")
    return resnet
