"""A network's convolutions, and what keeps one of them from becoming adaptive."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn

from .layers import AdaptiveConv2d, SeparableConv2d

# Any of which may make a convolution compute something else.
METHODS = "__call__", "forward", "_conv_forward"
# What detectron2's convolutions and adaptive layers apply to their outputs.
FOLLOWERS = "norm", "activation"


def convolutions(model: nn.Module) -> dict[Any, list[str]]:
    """Those that are not parts of adaptive ones, with all their names."""
    parts = {part for generator in _generators(model) for part in generator.modules()}
    found: dict[Any, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if _is_convolution(module) and module not in parts:
            found.setdefault(module, []).append(name)
    return found


def _generators(model: nn.Module) -> Iterator[nn.Module]:
    for module in model.modules():
        if isinstance(module, AdaptiveConv2d):
            yield from module.generators
        elif hands_on_features(module):
            yield module.shared_offset_generator  # type: ignore[misc]


def hands_on_features(module: nn.Module) -> bool:
    """Whether it is a block of this project's backbones with what its stage's layers share."""
    return isinstance(getattr(module, "shared_offset_generator", None), SeparableConv2d)


def _is_convolution(module: nn.Module) -> bool:
    """Scripted ones have the name of their class alone."""
    if isinstance(module, torch.jit.ScriptModule):
        return "Conv" in module.original_name and hasattr(module, "weight")
    return isinstance(module, nn.modules.conv._ConvNd)


def owners(model: nn.Module) -> Counter[int]:
    """How many modules hold each parameter, by its id."""
    return Counter(id(p) for module in model.modules() for p in module._parameters.values())


def tied(layer: nn.Module, held: Counter[int]) -> str:
    """What a layer of another kind would untie, in words; empty if its weight is its own."""
    return "another module has the same weight" if held[id(layer.weight)] > 1 else ""


def obstacle(conv: nn.Module, held: Counter[int]) -> str:
    """Why a convolution cannot become adaptive, in words; empty if it can."""
    kind = type(conv).__name__
    if isinstance(conv, torch.jit.ScriptModule):
        return "scripted: deformify before torch.jit.script or trace"
    if not isinstance(conv, nn.Conv2d):
        return f"a {kind}, of which there is no adaptive kind"
    if _has_own_way(conv):
        return f"a {kind}, which convolves in a way of its own"
    if reason := attachment(conv, followers(conv)):
        return reason
    if not conv.weight.is_floating_point():
        return f"weight: expected a floating point type, got {conv.weight.dtype}"
    if conv.weight.is_inference():
        return "its weight was made in torch.inference_mode: make the network outside of it"
    return tied(conv, held)


def _has_own_way(conv: nn.Conv2d) -> bool:
    """Whether it convolves neither as torch's nor as detectron2's does."""
    from detectron2.layers import Conv2d  # late, since it takes as long to import as torch

    known = nn.Conv2d, Conv2d
    return any(
        name in vars(conv) or getattr(type(conv), name) not in [getattr(k, name) for k in known]
        for name in METHODS
    )


def followers(conv: nn.Conv2d) -> dict[str, Any]:
    """What it applies to its outputs. torch's applies nothing, whatever is attached to it."""
    from detectron2.layers import Conv2d

    names = FOLLOWERS if type(conv).forward is Conv2d.forward else ()
    return {name: getattr(conv, name) for name in names}


def attachment(layer: nn.Module, parts: Iterable[str]) -> str:
    """What somebody has attached to a layer that one of another kind would lose; empty if nothing.

    Or would apply itself, as an adaptive layer does with a norm.

    Args:
        parts: names of the layer's own tensors and modules, beside weight and bias.
    """
    # Not asked for their values: to make them may draw, or change buffers.
    if made := [name for name in ("weight", "bias") if name not in layer._parameters]:
        return (
            f"its {' and '.join(made)} is made by a parametrization or by pruning: remove that "
            "first, by remove_parametrizations, prune.remove or the like"
        )
    held = [*layer._parameters, *layer._buffers, *layer._modules]
    held += [name for name in FOLLOWERS if vars(layer).get(name) is not None]
    lost = ", ".join(name for name in held if name not in ("weight", "bias", *parts))
    if lost:
        return (
            f"it holds {lost}, which a layer of another kind cannot: keep that in the module "
            "around it"
        )
    return ""
