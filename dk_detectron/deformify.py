"""Any network's convolutions made adaptive, in place, and rigid again."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cache, partial
from typing import Any

import torch
from tabulate import tabulate
from torch import nn

from .convolutions import (
    FOLLOWERS,
    attachment,
    convolutions,
    followers,
    hands_on_features,
    obstacle,
    owners,
    tied,
)
from .layers import KINDS, AdaptiveConv2d, LocalConv2d
from .layers.costs import count_multiply_adds, count_parameters

# A dense convolution of no more input channels sees the picture itself: a stem.
PICTURE_CHANNELS = 4
# Of the names in a line of a report.
MAX_NAMES = 4
NOT_CHOSEN = "not chosen by where"
# Classes that learn of no parameter after they have wrapped a module; not every torch has them.
WRAPPERS = {"DistributedDataParallel", "FullyShardedDataParallel", "FSDPModule"}

# Patterns of names, or a choice by name and convolution.
Where = str | Sequence[str] | Callable[[str, nn.Conv2d], bool]


@dataclass
class Report:
    """What :func:`deformify` has done.

    Attributes:
        kind: of the new layers.
        changed: names of the layers that are new.
        kept: why, by the names of the convolutions that are as they were.
        parameters: before and after.
        multiply_adds: before and after, of the given ``inputs``; else None.
    """

    kind: str
    changed: list[str]
    kept: dict[str, str]
    parameters: tuple[int, int]
    multiply_adds: tuple[int, int] | None = None

    def __str__(self) -> str:
        """A table of what changed, what did not and why; and what the change costs."""
        rows = [[f"now {self.kind}", len(self.changed), _some(self.changed)]]
        for reason in dict.fromkeys(self.kept.values()):
            names = [name for name, why in self.kept.items() if why == reason]
            rows.append([f"kept: {reason}", len(names), _some(names)])
        text = tabulate(rows, ["convolutions", "", "such as"], tablefmt="github")
        for name, costs in ("parameters", self.parameters), ("multiply-adds", self.multiply_adds):
            if costs:
                before, after = costs
                text += f"\n{name}: {before:,} + {after - before:,} = {after:,}"
        return text


def _some(names: Sequence[str]) -> str:
    more = len(names) - MAX_NAMES
    return ", ".join(names[:MAX_NAMES]) + (f" and {more} more" if more > 0 else "")


def deformify(
    model: nn.Module,
    kind: str | Callable[..., Any] = "local",
    where: Where | None = None,
    inputs: tuple | None = None,
    **options: Any,
) -> Report:
    """Makes convolutions of ``model`` adaptive, in place, without changing what it computes.

    Each is the same object afterwards, of another class: its name, its hooks, its norm, whether it
    learns, and everything that refers to it stay. Its weight becomes what
    :meth:`AdaptiveConv2d.set_rigid_weight` makes of it; its generators are new, so that an
    optimizer has to be built afterwards, and the network be wrapped for several processes. It still
    loads the weights of the rigid one, which has the same names but for the generators. What no
    adaptive layer could compute or hold is left as it is, with the reason in the report.

    The paper adapts the depthwise 3x3 convolutions of the residual blocks, and leaves the stem and
    the heads alone (section 4). The default choice therefore is every convolution of 3x3
    and larger, depthwise, grouped or dense, but stems (dense, of at most 4 input channels); of a
    detector, name its backbone.

    Args:
        kind: "local" or "global" deformable kernel, "conditional", "dcn", "dcn+local", or a
            constructor with ``nn.Conv2d``'s arguments.
        where: patterns of names, such as "backbone.bottom_up.res[345].*", that narrow the default
            choice; or a predicate of name and convolution, which decides alone. Of a convolution
            with several names, any may be chosen.
        inputs: of the model, a batch of one, with which to count its multiply-adds.
        options: what the layers take beyond ``nn.Conv2d``'s arguments, such as ``scope_size``,
            ``num_experts`` or ``offset_generator`` (but "shared": the network would have to hand on
            what its layers share).

    Raises:
        ValueError: an unknown kind, a pattern that no convolution's name has, nothing to change,
            options that fit none of the chosen, lazy modules that have seen no input yet, or a
            model that is wrapped for several processes; the model is as it was.
        TypeError: an option that the kind does not have; the model is as it was.
    """
    _check_unwrapped(model)
    if isinstance(kind, str) and kind not in KINDS:
        raise ValueError(f"kind: expected one of {', '.join(KINDS)}, got {kind!r}")
    constructor = partial(KINDS[kind] if isinstance(kind, str) else kind, **options)
    found = convolutions(model)
    choose = _chooser(where, [name for names in found.values() for name in names])
    layers, kept, misfits, held = {}, {}, [], owners(model)
    for conv, names in found.items():
        reason = obstacle(conv, held) or choose(names, conv)
        if not reason:
            try:
                layers[conv] = _adapted(conv, constructor)
            except ValueError as error:
                reason = str(error)
                misfits.append(reason)
        if reason:
            kept[names[0]] = reason
    before = count_parameters(model), _multiply_adds(model, inputs)
    report = Report(_kind_name(kind), [found[c][0] for c in layers], kept, (before[0], before[0]))
    if not layers:
        reason = misfits[0] if misfits else "where: expected convolutions to change, got none"
        raise ValueError(f"{reason}:\n{report}")
    _check_generators(layers.values())
    for conv, layer in layers.items():
        _become(conv, layer)
    report.parameters = before[0], count_parameters(model)
    if inputs is not None:
        report.multiply_adds = before[1], _multiply_adds(model, inputs)
    return report


def undeformify(model: nn.Module) -> list[str]:
    """The inverse of :func:`deformify`: makes all adaptive convolutions rigid, in place.

    Returns:
        Their names.

    Raises:
        ValueError: some are no rigid convolutions any more, as their generators have learnt, or
            hold or share what those cannot; or the model is wrapped for several processes. It is as
            it was.
    """
    _check_unwrapped(model)
    rigid, learnt, held = {}, [], owners(model)
    layers = {n: m for n, m in model.named_modules() if isinstance(m, AdaptiveConv2d)}
    for name, layer in layers.items():
        parts = [part for part, module in layer.named_children() if module in layer.generators]
        if reason := attachment(layer, [*FOLLOWERS, *parts]) or tied(layer, held):
            raise ValueError(f"model: expected layers that can become rigid, got {name}: {reason}")
        try:
            rigid[name] = _rigid(layer)
        except ValueError:
            learnt.append(name)
    if learnt:
        raise ValueError(
            f"model: expected offsets and gates as they start, got {len(learnt)} of {len(layers)} "
            f"layers that follow their input: {', '.join(learnt)}. Load weights from before their "
            "training, or keep them"
        )
    for name, conv in rigid.items():
        _become(layers[name], conv)
    for module in model.modules():
        if hands_on_features(module):
            module.shared_offset_generator = None  # type: ignore[assignment]
    return list(rigid)


def _check_unwrapped(model: nn.Module) -> None:
    """Raises ``ValueError`` on what would not average, or shard, the new parameters."""
    for module in model.modules():
        if WRAPPERS & {kind.__name__ for kind in type(module).__mro__}:
            raise ValueError(
                f"model: expected none that is wrapped, got a {type(module).__name__}, which would "
                "not know the new parameters: deformify, or undeformify, before wrapping"
            )


def _from_3x3_on(names: Sequence[str], conv: nn.Conv2d) -> str:
    """The default choice: why not, or empty."""
    if max(conv.kernel_size) < 3:
        return "x".join(map(str, conv.kernel_size))
    if conv.groups == 1 and conv.in_channels <= PICTURE_CHANNELS:
        return "a stem: it sees the picture itself"
    return ""


def _chooser(where: Where | None, names: list[str]) -> Callable[[Sequence[str], nn.Conv2d], str]:
    """Why not, by all names of a convolution and itself, or empty."""
    if where is None:
        return _from_3x3_on
    if callable(where):
        return lambda names, conv: "" if any(where(n, conv) for n in names) else NOT_CHOSEN
    patterns = [where] if isinstance(where, str) else list(where)
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise ValueError(
                f"where: expected patterns of convolutions' names, such as {_some(names)}, got "
                f"{pattern!r}, which is none's"
            )

    def choose(names: Sequence[str], conv: nn.Conv2d) -> str:
        if not any(fnmatchcase(name, pattern) for name in names for pattern in patterns):
            return NOT_CHOSEN
        return _from_3x3_on(names, conv)

    return choose


def _arguments(conv: Any) -> dict:
    names = "in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups"
    arguments = {name: getattr(conv, name) for name in names}
    return arguments | {"device": conv.weight.device, "dtype": conv.weight.dtype}


@torch.inference_mode(False)  # or the new parameters could not be trained
def _adapted(conv: Any, constructor: Callable[..., AdaptiveConv2d]) -> AdaptiveConv2d:
    layer = constructor(
        **_arguments(conv),
        bias=False,
        padding_mode=conv.padding_mode,
        **followers(conv),
    )
    layer.set_rigid_weight(conv.weight.detach())
    layer.bias = conv.bias
    for parameter in (layer.weight, *(p for g in layer.generators for p in g.parameters())):
        parameter.requires_grad_(conv.weight.requires_grad)
    return layer


def _check_generators(layers: Iterable[AdaptiveConv2d]) -> None:
    """Raises ``ValueError`` on layers that need what only this project's backbones hand on."""
    if any(isinstance(m, LocalConv2d) and m.offset_generator == "shared" for m in layers):
        raise ValueError(
            "offset_generator: expected 'full' or 'separable' in a network that is not built by "
            "mobilenet_v2 or resnet_dw, whose blocks hand on what layers share, got 'shared'"
        )


@torch.inference_mode(False)
def _rigid(layer: AdaptiveConv2d) -> nn.Conv2d:
    from detectron2.layers import Conv2d

    followers = {name: getattr(layer, name) for name in FOLLOWERS}
    plain = layer.norm is None and layer.activation is None
    conv = (nn.Conv2d if plain else partial(Conv2d, **followers))(**_arguments(layer), bias=False)
    conv.weight.data = layer.rigid_weight()
    conv.weight.requires_grad_(layer.weight.requires_grad)
    conv.bias = layer.bias
    return conv


def _become(module: nn.Module, other: nn.Module) -> None:
    """Makes ``module`` what ``other`` is; whoever holds or hooks it need not know."""
    own = _attributes()
    kept = {name: v for name, v in vars(module).items() if name not in own or "hook" in name}
    training = module.training
    module.__class__ = type(other)
    vars(module).clear()
    vars(module).update(vars(other) | kept)
    module.training = training
    if isinstance(module, AdaptiveConv2d):
        for generator in module.generators:
            generator.train(training)


@cache
def _attributes() -> frozenset[str]:
    """Those of convolutions and of adaptive layers; any other was put there by whoever uses it."""
    with torch.device("meta"):  # no random number is drawn
        modules = [nn.Conv2d(1, 1, 1), *(kind(1, 1, 1) for kind in KINDS.values())]
    return frozenset(name for module in modules for name in vars(module))


def _multiply_adds(model: nn.Module, inputs: tuple | None) -> int:
    return 0 if inputs is None else sum(count_multiply_adds(model, *inputs).values())


def _kind_name(kind: str | Callable) -> str:
    kind = KINDS[kind] if isinstance(kind, str) else kind
    kind = kind.func if isinstance(kind, partial) else kind
    return getattr(kind, "__name__", repr(kind))
