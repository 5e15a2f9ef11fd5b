"""How far the offsets of a network in training go, and which layer is worst."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from functools import partial

import torch
from detectron2.engine import HookBase
from detectron2.utils import comm
from torch import Tensor, nn

from ..layers import AdaptiveConv2d, ScopeConv2d
from ..ops import outside_scope

# Below detectron2's, whose handlers write to the terminal and to log.txt.
LOGGER = logging.getLogger("detectron2.dk_detectron.engine.monitoring")

# Of detectron2's writers, in steps.
PERIOD = 20
UNITS = {"kernel_offset": "cells", "data_offset": "pixels"}


@dataclass
class LayerOffsets:
    """The offsets of one kind in one layer and forward pass.

    Attributes:
        clipped: the share of taps that are, since they are outside the scope; 0 of data offsets.
        mean, largest: of absolute values; what is not a number counts as infinite.
        count: how many values they were.
        reach: the side of the scope, or of the feature map: beyond it, offsets lead nowhere.
    """

    layer: str
    clipped: float
    mean: float
    largest: float
    count: int
    reach: int


@dataclass
class Offsets:
    """All offsets of one kind in one forward pass."""

    kind: str
    layers: list[LayerOffsets]

    def _average(self, attribute: str) -> float:
        total = sum(layer.count for layer in self.layers)
        return sum(getattr(layer, attribute) * layer.count for layer in self.layers) / total

    @property
    def worst(self) -> LayerOffsets:
        return max(self.layers, key=lambda layer: (layer.clipped, layer.mean))

    def scalars(self) -> dict[str, float]:
        """What is logged, by name."""
        named = {"mean": self._average("mean"), "max": max(x.largest for x in self.layers)}
        worst = self.worst
        if self.kind == "kernel_offset":
            named["clipped"] = self._average("clipped")
        if worst.clipped:
            named[f"most_clipped/{worst.layer}"] = worst.clipped
        else:
            named[f"largest_mean/{worst.layer}"] = worst.mean
        return {f"{self.kind}/{name}": value for name, value in named.items()}

    def __str__(self) -> str:
        worst, unit = self.worst, UNITS[self.kind]
        clipped = of_worst = ""
        if self.kind == "kernel_offset":
            clipped = f", {self._average('clipped'):.1%} of taps clipped"
            of_worst = f", {worst.clipped:.1%} clipped"
        return (
            f"{self.kind.replace('_', ' ')}s: mean {self._average('mean'):.3g} {unit}, largest "
            f"{max(layer.largest for layer in self.layers):.3g}{clipped}; worst: {worst.layer} "
            f"(mean {worst.mean:.3g}, largest {worst.largest:.3g}{of_worst})"
        )


def _clipped(offset: Tensor, layer: ScopeConv2d) -> Tensor:
    """Whether each tap is outside the scope; of offsets [N, 2*K, ...], [N, K, ...]."""
    row, column = outside_scope(offset, layer.scope_size, layer.kernel_size)
    return row | column


@torch.no_grad()
def _measure(offset: Tensor, kind: str, layer: ScopeConv2d) -> Tensor:
    """[3]: ``clipped``, ``mean`` and ``largest`` of a generator's output, on its device."""
    offset = offset.detach().float()
    length = offset.abs().nan_to_num(nan=math.inf, posinf=math.inf)
    mean = length.mean()
    clipped = (
        _clipped(offset, layer).float().mean()
        if kind == "kernel_offset"
        else torch.zeros_like(mean)
    )
    return torch.stack([clipped, mean, length.amax()])


def warn_of_rigid_layers(model: nn.Module) -> None:
    """Says which layers can never adapt, as what would adapt them is zero and frozen."""
    rigid = [
        name
        for name, layer in model.named_modules()
        if isinstance(layer, AdaptiveConv2d)
        and not any(g.weight.requires_grad or g.weight.any() for g in layer.generators)
    ]
    if rigid:
        LOGGER.warning(
            "MODEL.BACKBONE.FREEZE_AT: %d layers are frozen at their start, so that they stay "
            "rigid for ever: 0 lets them learn, as weights of a network with the same layers have "
            "done before. They are %s",
            len(rigid),
            ", ".join(rigid),
        )


class OffsetMonitor(HookBase):
    """Logs the main process's offsets in the steps in which detectron2 writes metrics.

    ``kernel_offset/mean``, ``/max`` and ``/clipped``, in scope cells and as the share of taps,
    ``data_offset/mean`` and ``/max``, in pixels; and the worst layer under a name that has it:
    ``kernel_offset/most_clipped/LAYER``, or ``/largest_mean/LAYER`` if no tap is clipped.

    Every ``MODEL.DEFORM_KERNEL.VIS_PERIOD`` steps also the histograms of each layer's, for
    TensorBoard: ``kernel_offset/LAYER`` and ``data_offset/LAYER``.

    Attributes:
        latest, iteration: the last look of :meth:`after_step`, and when that was.
    """

    def __init__(self, model: nn.Module):
        self._generators = [
            (kind, name, layer)
            for name, layer in model.named_modules()
            for kind in UNITS
            if hasattr(layer, f"{kind}_generator")
        ]
        self._handles = []
        self._measured = {}
        self._draws = False
        self._drawn = {}
        self.latest = []
        self.iteration = None

    def watch(self) -> None:
        """Measures the next forward pass, until :meth:`stop`."""
        self.stop()
        self._measured, self._drawn = {}, {}
        for kind, name, layer in self._generators:
            note = partial(self._note, kind, name, layer)
            handle = getattr(layer, f"{kind}_generator").register_forward_hook(note)
            self._handles.append(handle)

    def _note(self, kind, name, layer, generator, inputs, output) -> None:
        # With gradient checkpointing, generators run again in the backward pass.
        if (kind, name) not in self._measured:
            reach = max(layer.scope_size if kind == "kernel_offset" else output.shape[2:])
            self._measured[kind, name] = _measure(output, kind, layer), output.numel(), reach
            if self._draws:
                self._drawn[f"{kind}/{name}"] = output.detach().flatten().float()

    def stop(self) -> list[Offsets]:
        """Ends :meth:`watch`: what it has seen, of each kind that there is."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        if not self._measured:
            return []
        # One transfer for all.
        values = torch.stack([value for value, *_ in self._measured.values()]).tolist()
        found = {}
        for value, ((kind, name), (_, *size)) in zip(values, self._measured.items(), strict=True):
            found.setdefault(kind, []).append(LayerOffsets(name, *value, *size))
        self._measured = {}
        return [Offsets(kind, layers) for kind, layers in found.items()]

    def before_train(self):
        self._hidden = self.trainer.cfg.MODEL.BACKBONE.COMPILE
        self._period = self.trainer.cfg.MODEL.DEFORM_KERNEL.VIS_PERIOD
        if self._hidden and self._generators:
            LOGGER.info("Offsets are not logged: MODEL.BACKBONE.COMPILE hides them")

    def before_step(self):
        step, last = self.trainer.iter + 1, self.trainer.max_iter
        self._draws = self._period > 0 and step % self._period == 0
        due = self._draws or step % PERIOD == 0 or step == last
        if comm.is_main_process() and not self._hidden and due:
            self.watch()

    def after_step(self):
        if found := self.stop():
            for offsets in found:
                for name, value in offsets.scalars().items():
                    self.trainer.storage.put_scalar(name, value, smoothing_hint=False)
                LOGGER.info("%s", offsets)
            self.latest, self.iteration = found, self.trainer.iter
        for name, values in self._drawn.items():
            if (finite := values[values.isfinite()]).numel():
                self.trainer.storage.put_histogram(name, finite)
        self._drawn = {}

    def after_train(self):
        self.stop()
