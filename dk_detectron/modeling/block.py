"""What the residual blocks and stages of both backbone families share."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from detectron2.layers import CNNBlockBase
from detectron2.modeling.backbone.resnet import ResNet
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..layers import SHARED_FEATURES, LocalConv2d, SeparableConv2d


class Block(CNNBlockBase):
    """A block of a stage, whose convolutions are in :meth:`convolve`.

    Attributes:
        gradient_checkpointing: in training, keep the inputs alone and compute the activations again
            in the backward pass (Chen et al. 2016).
        shared_offset_generator: of a stage's first block, what predicts of its input the features
            of which layers of the whole stage make their offsets.
    """

    gradient_checkpointing = False
    shared_offset_generator: SeparableConv2d | None

    def __init__(self, in_channels: int, out_channels: int, stride: int):
        super().__init__(in_channels, out_channels, stride)
        self.shared_offset_generator = None

    def convolve(self, x: Tensor, features: Tensor | None) -> Tensor:
        raise NotImplementedError

    def offset_features(self, x: Tensor) -> Tensor | None:
        """[N, C_in, H, W] -> [N, SHARED_FEATURES, H_out, W_out]; None where nothing is shared."""
        generator = self.shared_offset_generator
        return None if generator is None else generator(x)

    def forward(self, x: Tensor, features: Tensor | None = None) -> Tensor:
        """[N, C_in, H, W] -> [N, C_out, H_out, W_out].

        Args:
            features: :meth:`offset_features` of the stage's first block.
        """
        if not (self.gradient_checkpointing and self.training and torch.is_grad_enabled()):
            return self.convolve(x, features)
        options: dict[str, Any] = {"use_reentrant": False}
        options["preserve_rng_state"] = False  # nothing here is random
        # A compiled graph updates the statistics once, whatever it computes again.
        if not torch.compiler.is_compiling():
            options["context_fn"] = self._contexts
        return checkpoint(self.convolve, x, features, **options)

    def _contexts(self):
        return nullcontext(), _spared_statistics(self)


@contextmanager
def _spared_statistics(block: nn.Module) -> Iterator[None]:
    """Norms that see the same batch again update copies of their statistics."""
    buffers = {module: module._buffers for module in block.modules()}
    try:
        for module, originals in buffers.items():
            module._buffers = {
                name: None if tensor is None else tensor.clone()
                for name, tensor in originals.items()
            }
        yield
    finally:
        for module, originals in buffers.items():
            module._buffers = originals


class Stage(nn.Sequential):
    """Blocks of the same resolution, whose offsets may have features in common."""

    def forward(self, x: Tensor) -> Tensor:
        first: Any = self[0]
        features = first.offset_features(x)
        for block in self:
            x = block(x, features)
        return x


def adapt(conv: nn.Module, x: Tensor, features: Tensor | None) -> Tensor:
    """A 3x3 convolution of a block, which takes features where its stage has some."""
    return conv(x) if features is None else conv(x, features)


def share_offsets(blocks: Sequence[Block]) -> None:
    """Gives the first of a stage's blocks what predicts features for those that ask for them."""
    layers = (module for block in blocks for module in block.modules())
    if any(isinstance(m, LocalConv2d) and m.offset_generator == "shared" for m in layers):
        first = blocks[0]
        first.shared_offset_generator = SeparableConv2d(
            first.in_channels, SHARED_FEATURES, (3, 3), 2 * (first.stride,), (1, 1), (1, 1)
        )


def assemble(
    stem: CNNBlockBase,
    stages: Sequence[Sequence[Block]],
    out_features: Sequence[str],
    freeze_at: int,
    gradient_checkpointing: bool,
) -> ResNet:
    """detectron2's ResNet, the container of a stem and stages res2, res3, ..."""
    for blocks in stages:
        share_offsets(blocks)
    backbone = ResNet(stem, stages, out_features=out_features, freeze_at=freeze_at)
    backbone.stages = [Stage(*blocks) for blocks in backbone.stages]
    for name, stage in zip(backbone.stage_names, backbone.stages, strict=True):
        setattr(backbone, name, stage)
    for module in backbone.modules():
        if isinstance(module, Block):
            module.gradient_checkpointing = gradient_checkpointing
    return backbone
