"""Where the offsets of a trained network go, and what it is worth that they follow the picture."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ..layers import ScopeConv2d
from ..ops import outside_scope

GENERATOR = "offset_generator"


def outside(offset: Tensor, scope_size: Sequence[int], kernel_size: Sequence[int]) -> Tensor:
    """Of offsets [N, 2*K, ...]: which lead out of the scope, along their axis."""
    return torch.stack(outside_scope(offset, scope_size, kernel_size), 2).flatten(1, 2)


def look_at_taps(layer: ScopeConv2d, offset: Tensor) -> dict[str, float]:
    """Of a layer's kernel offsets [N, 2*K] or [N, 2*K, H, W], in scope cells.

    Returns:
        Of the taps' coordinates, rows and columns each by themselves: ``moved``, the mean distance
        from where they rest; ``clipped``, the share that leads out of the scope; ``dead``, the
        share that does so everywhere.
    """
    rest = layer.kernel_offset_generator.bias.detach()
    rest = rest.view(-1, *[1] * (offset.dim() - 2))
    clipped = outside(offset, layer.scope_size, layer.kernel_size)
    return {
        "moved": float((offset - rest).abs().mean()),
        "clipped": float(clipped.float().mean()),
        "dead": float(clipped.transpose(0, 1).flatten(1).all(1).float().mean()),
    }


@contextmanager
def watch_taps(model: nn.Module) -> Iterator[dict[str, dict[str, float]]]:
    """Within it, notes a look at the last forward pass of each layer with a scope, by name."""
    seen, hooks = {}, []
    for name, layer in model.named_modules():
        if isinstance(layer, ScopeConv2d):

            def look(_, inputs, offset, name=name, layer=layer):
                seen[name] = look_at_taps(layer, offset.detach())

            hooks.append(layer.kernel_offset_generator.register_forward_hook(look))
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def _over_places(offset: Tensor) -> Tensor:
    return offset.mean((2, 3), keepdim=True) if offset.dim() > 2 else offset


def _over_all(offset: Tensor) -> Tensor:
    return _over_places(offset).mean(0, keepdim=True)


# What a generator's output [N, 2*K] or [N, 2*K, H, W] is replaced by. The first alone leaves the
# distribution of each offset as it is: offsets that a network has never seen cost accuracy by
# themselves.
REPLACEMENTS: dict[str, Callable[[Tensor], Tensor]] = {
    "another picture's": lambda offset: offset.roll(1, 0),
    "mean over places": _over_places,
    "mean over all": _over_all,
}


def generators(model: nn.Module) -> list[nn.Module]:
    """The modules that predict offsets; not those that predict what generators share."""
    return [
        module
        for name, module in model.named_modules()
        if name.endswith(GENERATOR) and not name.endswith(f"shared_{GENERATOR}")
    ]


@contextmanager
def replaced_offsets(model: nn.Module, replacement: str) -> Iterator[None]:
    """Within it, all offsets of a batch are replaced: one of REPLACEMENTS."""

    def replace(_, inputs, offset):
        return REPLACEMENTS[replacement](offset).expand_as(offset).contiguous()

    hooks = [module.register_forward_hook(replace) for module in generators(model)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
