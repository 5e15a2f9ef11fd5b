"""What adapts the layers of a network: seen, held fixed, or with its true derivative.

Of this project's layers it is what their generators predict. torchvision's and detectron2's
deformable convolutions are given it: offsets [N, 2*K, H_out, W_out] in the same order, and masks.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from detectron2.layers import DeformConv, ModulatedDeformConv
from torch import Tensor, nn
from torchvision.ops import DeformConv2d as TorchvisionDeformConv2d

from ..layers import AdaptiveConv2d, ScopeConv2d
from ..ops import outside_scope
from .forward import feature_map, frozen, place, run

FOREIGN = TorchvisionDeformConv2d, DeformConv, ModulatedDeformConv
KINDS = "kernel_offset", "data_offset", "gate"


@dataclass
class Observation:
    """What adapted one layer on one picture.

    Attributes:
        layer: the module.
        values: by kind: "kernel_offset" and "data_offset" [2*K, H_out, W_out] (for every image:
            [2*K]), "gate" [E].
        input_size, output_size: (height, width) of the layer's feature maps.
    """

    layer: nn.Module
    values: dict[str, Tensor]
    input_size: tuple[int, int]
    output_size: tuple[int, int]


def adaptive_layers(model: nn.Module) -> dict[str, Any]:
    """The layers that adapt to their input, by name, in the order of the model."""
    kinds = (AdaptiveConv2d, *FOREIGN)
    return {name: m for name, m in model.named_modules() if isinstance(m, kinds)}


def observe(model: nn.Module, image: Tensor, until: str | None = None) -> dict[str, Observation]:
    """What adapted each layer on one picture, by the layer's name, in the order of their calls.

    Args:
        image: [C, H, W], as :func:`dk_detectron.analysis.forward.run` takes it.
        until: the last layer to run, by its name; the whole model by default.

    Raises:
        ValueError: the model has no such layers.
        NotImplementedError: detectron2's own deformable convolution, on a CPU.
    """
    layers = adaptive_layers(model)
    if not layers:
        raise ValueError(
            f"model: expected layers of dk_detectron.layers, or deformable convolutions, got "
            f"{type(model).__name__} without any"
        )
    found: dict[str, Observation] = {}
    with ExitStack() as stack:
        for name, layer in layers.items():
            _watch(stack, found, name, layer)
        stack.enter_context(frozen(model))
        stack.enter_context(torch.no_grad())
        if until is None:
            run(model, place(model, image))
        else:
            feature_map(model, place(model, image), until)
    return found


def _note(values: dict[str, Tensor], kind: str, _, __, output: Tensor) -> None:
    values.setdefault(kind, output[0].detach())


def _watch(stack: ExitStack, found: dict, name: str, layer: Any) -> None:
    values: dict[str, Tensor] = {}

    if isinstance(layer, AdaptiveConv2d):
        for kind in KINDS:
            if (generator := getattr(layer, f"{kind}_generator", None)) is not None:
                handle = generator.register_forward_hook(partial(_note, values, kind))
                stack.callback(handle.remove)

    def finish(_, args, kwargs, output):
        if name in found:  # a layer that runs on several maps: the first counts
            return
        args = [*args, *kwargs.values()]
        if isinstance(layer, FOREIGN):
            values["data_offset"] = args[1][0].detach()
        elif "gate" in values:
            values["gate"] = values["gate"].sigmoid()
        sizes = tuple(args[0].shape[2:]), tuple(output.shape[2:])
        found[name] = Observation(layer, values, *sizes)

    stack.callback(layer.register_forward_hook(finish, with_kwargs=True).remove)


@contextmanager
def derivative(model: nn.Module, *, attached: bool) -> Iterator[None]:
    """How derivatives pass what adapts the layers, within it.

    Args:
        attached: they do, as they are; where taps are clipped to the scope, they are zero, although
            training lets those pass that lead back inside. If not, what adapts is held fixed.
    """
    with ExitStack() as stack:
        for layer in adaptive_layers(model).values():
            if isinstance(layer, AdaptiveConv2d):
                for generator in layer.generators:
                    hook = _true_derivative(layer) if attached else _held
                    stack.callback(generator.register_forward_hook(hook).remove)
            elif not attached:
                handle = layer.register_forward_pre_hook(_hold_arguments, with_kwargs=True)
                stack.callback(handle.remove)
        yield


def _held(_, __, output: Tensor) -> Tensor:
    return output.detach()


def _hold_arguments(_, args, kwargs):
    """Of (input, offset[, mask]), by place or by name."""
    held = {
        name: value.detach() if name != "input" and isinstance(value, Tensor) else value
        for name, value in kwargs.items()
    }
    return (*args[:1], *(value.detach() for value in args[1:])), held


def _true_derivative(layer: AdaptiveConv2d):
    def hook(generator: nn.Module, _, offset: Tensor) -> Tensor:
        if not isinstance(layer, ScopeConv2d) or generator is not layer.kernel_offset_generator:
            return offset
        row, column = outside_scope(offset.detach(), layer.scope_size, layer.kernel_size)
        clipped = torch.stack([row, column], 2).flatten(1, 2)
        return torch.where(clipped, offset.detach(), offset)

    return hook
