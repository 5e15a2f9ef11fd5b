"""What a network costs: parameters, and multiply-adds as the paper counts them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from math import prod

import torch
from torch import Tensor, nn

from .adaptive import AdaptiveConv2d, CondConv2d
from .modes import evaluation_mode
from .scope import DeformConv2d, DeformKernelConv2d, GlobalDeformKernel2d, LocalDeformKernel2d


def count_parameters(model: nn.Module) -> int:
    """Trainable parameters; the affine parameters of a frozen norm count, its statistics do not."""
    frozen = sum(
        buffer.numel()
        for name, buffer in model.named_buffers()
        if name.rsplit(".", 1)[-1] in ("weight", "bias")
    )
    return frozen + sum(p.numel() for p in model.parameters())


def _convolution(module, output: Tensor) -> int:
    return output.numel() * module.in_channels // module.groups * prod(module.kernel_size)


def _local(offsets: int) -> Callable[[AdaptiveConv2d, Tensor], int]:
    """The convolution, and two more for every tap and learnt offset: 18 for a 3x3 kernel."""
    return lambda module, output: (1 + 2 * offsets) * _convolution(module, output)


# Multiply-adds of one image. The generators are modules of their own and counted as such.
COSTS: dict[type, Callable[..., int]] = {
    nn.Conv2d: _convolution,
    nn.ConvTranspose2d: lambda module, output: (
        output.numel() * module.in_channels // module.groups * prod(module.kernel_size)
        // prod(module.stride)
    ),
    nn.Linear: lambda module, output: output.numel() * module.in_features,
    LocalDeformKernel2d: _local(1),
    DeformConv2d: _local(1),
    DeformKernelConv2d: _local(2),
    # Four cells for each sampled value.
    GlobalDeformKernel2d: lambda module, output: (
        _convolution(module, output) + 4 * prod(module.rigid_shape)
    ),
    # The paper counts a convolution for every expert, although mixing the weights first costs one.
    CondConv2d: lambda module, output: module.num_experts * _convolution(module, output),
}  # fmt: skip


@torch.no_grad()
def count_multiply_adds(model: nn.Module, *inputs) -> Counter[str]:
    """Multiply-adds of ``model(*inputs)``, a batch of one, by layer type, as the paper counts.

    In evaluation mode; the model is left as it was.
    """
    counts: Counter[str] = Counter()

    def count(module: nn.Module, _, output: Tensor) -> None:
        for kind, cost in COSTS.items():
            if isinstance(module, kind):
                counts[kind.__name__] += cost(module, output)

    hooks = [m.register_forward_hook(count) for m in model.modules() if isinstance(m, tuple(COSTS))]
    try:
        with evaluation_mode(model):
            model(*inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return counts
