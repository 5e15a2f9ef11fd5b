"""What the residual blocks of both backbone families share: gradient checkpointing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from detectron2.layers import CNNBlockBase
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


class Block(CNNBlockBase):
    """A block of a stage, whose convolutions are in :meth:`convolve`.

    Attributes:
        gradient_checkpointing: in training, keep the input alone and compute the activations again
            in the backward pass (Chen et al. 2016).
    """

    gradient_checkpointing = False

    def convolve(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        if not (self.gradient_checkpointing and self.training and torch.is_grad_enabled()):
            return self.convolve(x)
        options: dict[str, Any] = {"use_reentrant": False}
        options["preserve_rng_state"] = False  # nothing here is random
        # A compiled graph updates the statistics once, whatever it computes again.
        if not torch.compiler.is_compiling():
            options["context_fn"] = self._contexts
        return checkpoint(self.convolve, x, **options)

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


def checkpoint_blocks(backbone: nn.Module) -> None:
    """Turns on gradient checkpointing in every :class:`Block`."""
    for module in backbone.modules():
        if isinstance(module, Block):
            module.gradient_checkpointing = True
