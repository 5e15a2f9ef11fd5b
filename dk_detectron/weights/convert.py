"""Weights fitted to a network: every tensor accounted for, rigid ones made deformable."""

from __future__ import annotations

from collections import Counter
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path

from detectron2.utils.file_io import PathManager
from tabulate import tabulate
from torch import Tensor, nn

from ..layers import AdaptiveConv2d, ScopeConv2d
from .files import (
    CheckpointError,
    NonFiniteCheckpointError,
    non_finite,
    read_checkpoint,
    refuse_pickle,
    write_checkpoint,
)
from .names import (
    BACKBONE_PREFIXES,
    FIRST_WEIGHT,
    GENERATOR,
    TORCHVISION_RESNET,
    generator_of,
    may_be_unused,
    model_names,
    part,
    unwrap,
)

# How many batches a norm has seen: only training goes by it, and FrozenBN does not have it.
COUNTER = ".num_batches_tracked"
# Of the unexpected in a report.
MAX_LINES = 20


@dataclass
class Report:
    """What became of every tensor of a source and of a model.

    Attributes:
        source, kind: the source's name, and what it is of.
        matched, resampled, initialised: names in the model: taken as they were, made from a rigid
            weight or a smaller scope, and not in the source.
        unused: names in the source of what the model does not have.
        unexpected: those of the last two that a fitting source would not leave, each in words.
        sensitivity: of each resampled layer with a scope, by name.
    """

    source: str
    kind: str
    matched: list[str] = field(default_factory=list)
    resampled: list[str] = field(default_factory=list)
    initialised: list[str] = field(default_factory=list)
    unused: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    sensitivity: dict[str, float] = field(default_factory=dict)

    def __str__(self) -> str:
        """A table, how the resampled layers stand, and what is unexpected."""
        rows = []
        for row in "matched", "resampled", "initialised", "unused":
            parts = Counter(map(part, getattr(self, row)))
            where = ", ".join(f"{part} {count}" for part, count in parts.items())
            rows.append([row, sum(parts.values()), where])
        text = tabulate(rows, [self.kind, "tensors", "where"], tablefmt="github")
        if self.sensitivity:
            layers = ", ".join(f"{name} {100 * s:.0f} %" for name, s in self.sensitivity.items())
            text += f"\n\nChange of the kernels if all taps move by 0.2 cells: {layers}"
        if self.unexpected:
            lines = self.unexpected[:MAX_LINES]
            if more := len(self.unexpected) - len(lines):
                lines.append(f"and {more} more")
            text += "\n\nUnexpected:\n" + "\n".join(f"  {line}" for line in lines)
        return text

    def check_complete(self) -> None:
        """Raises ``CheckpointError`` if a part of the model would have weights that nobody trained.

        Generators are no such part: those that :meth:`check` lets be missing start so that they
        change nothing.
        """
        missing = [name for name in self.initialised if not GENERATOR.search(name)]
        if missing:
            parts = Counter(map(part, missing))
            raise CheckpointError(
                f"{self.source}: expected trained weights of the whole network, got none of its "
                f"{', '.join(parts)}: they are of a backbone alone ({self.kind}). Train from them "
                "first, without --eval-only"
            )

    def check(self) -> None:
        """Raises ``CheckpointError`` if anything unexpected is left."""
        if self.unexpected:
            raise CheckpointError(
                f"{self.source}: expected a checkpoint of the configured network, got one with "
                f"unexpected tensors ({len(self.unexpected)})\n\n{self}\n\nIf it is not another "
                "network's: dk-convert-weights (tools/convert_weights.py) --allow-partial makes a "
                "checkpoint of what fits"
            )


def _fitted(
    model: nn.Module, state: dict[str, Tensor], origins: dict[str, str]
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """What :meth:`AdaptiveConv2d.fitted` makes, for every layer whose weight has another shape.

    Returns:
        The tensors that it makes, by name; and why it makes none, by the name of a weight.
    """
    made, refused = {}, {}
    for owner, layer in model.named_modules():
        if not isinstance(layer, AdaptiveConv2d):
            continue
        names = {key: origins.get(f"{owner}.{key}", "") for key in layer.state_dict()}
        entries = {key: state[origin] for key, origin in names.items() if origin in state}
        if "weight" not in entries or entries["weight"].shape == layer.weight.shape:
            continue
        try:
            fitted = layer.fitted(entries)
        except ValueError as error:
            refused[f"{owner}.weight"] = f"{names['weight']}: {str(error).removeprefix('weight: ')}"
            continue
        for key, tensor in fitted.items():
            if tensor is not entries.get(key):
                made[f"{owner}.{key}"] = tensor
    return made, refused


def _sensitivity(layer: ScopeConv2d, owner: str, converted: dict[str, Tensor]) -> float:
    """That of ``layer`` with its converted weights."""
    layer = deepcopy(layer).to("cpu")
    inside = {n.removeprefix(f"{owner}."): t for n, t in converted.items() if n.startswith(owner)}
    own = layer.state_dict()
    layer.load_state_dict(own | {key: t for key, t in inside.items() if key in own})
    return layer.sensitivity()


def _needed_generators(model: nn.Module, report: Report) -> set[str]:
    """Names of those without which what the source has would compute something else.

    The rest of a generator that it has a part of; and what says where a scope is read, or how
    experts are mixed, where these come from training.
    """
    needed = set(map(generator_of, report.matched + report.resampled))
    given = set(report.matched)
    for owner, layer in model.named_modules():
        if not isinstance(layer, AdaptiveConv2d) or f"{owner}.weight" not in given:
            continue
        if list(layer.weight.shape) != layer.rigid_shape:
            needed |= {f"{owner}.{kind}_generator" for kind in ("kernel_offset", "gate")}
    return needed


def convert(
    state: dict[str, Tensor], model: nn.Module, source: str = "checkpoint"
) -> tuple[dict[str, Tensor], Report]:
    """Fits a network's weights to a detector or classifier of the same family.

    A rigid weight that meets a layer with a scope or experts becomes theirs, and its generators
    what belongs to it; a scope that meets a layer with a larger one is put into its middle
    (:meth:`AdaptiveConv2d.fitted`); so that the model computes what the source did. Deterministic;
    neither argument is changed.

    Args:
        state: weights of torchvision's ResNet, torchvision's or timm's MobileNet-V2, or of this
            project.
        model: what to fit them to.
        source: what to call ``state`` in messages, such as its path.

    Returns:
        The model's weights that ``state`` gives, by name, on the CPU, in the model's types; and a
        report, whose :meth:`Report.check` says whether all is well.

    Raises:
        CheckpointError: ``state`` or ``model`` is of no known kind, or a weight is not finite.
    """
    target = model.state_dict()
    prefix = next((p for p in BACKBONE_PREFIXES if p + FIRST_WEIGHT in target), None)
    if prefix is None:
        raise CheckpointError(
            f"model: expected one with a backbone of this project (backbone.{FIRST_WEIGHT}, ...), "
            f"got {', '.join(list(target)[:4])}, ..."
        )
    state, outside = unwrap(state)
    kind, names = model_names(state, prefix, source)
    origins = {name: origin for origin, name in names.items()}
    _check_types({name: state[o] for name, o in origins.items() if name in target}, source)
    report = Report(source, kind)
    made, refused = _fitted(model, state, origins)
    converted, misfits = {}, set()
    for name, old in target.items():
        new = state[origins[name]] if name in origins else None
        if name in made:
            converted[name] = made[name].to(old.dtype)
            (report.initialised if new is None else report.resampled).append(name)
        elif new is None:
            report.initialised.append(name)
        elif new.shape == old.shape:
            converted[name] = new.to(old.dtype)
            report.matched.append(name)
        else:
            misfits.add(name)
            report.initialised.append(name)
            shapes = f"expected shape {list(old.shape)}, got {list(new.shape)}"
            report.unexpected.append(refused.get(name, f"{origins[name]}: {shapes}"))
    for name, layer in model.named_modules():
        if isinstance(layer, ScopeConv2d) and f"{name}.weight" in made:
            report.sensitivity[name] = _sensitivity(layer, name, converted)
    _check_finite(converted, source)
    report.unused = [origin for origin, name in names.items() if name not in converted]
    for list_ in report.matched, report.initialised, report.unused:
        list_[:] = [name for name in list_ if not name.endswith(COUNTER)]
    needed = _needed_generators(model, report)
    report.unexpected += [
        f"{name}: not in the checkpoint"
        for name in report.initialised
        if name not in misfits
        and (generator in needed if (generator := generator_of(name)) else name.startswith(prefix))
    ]
    report.unexpected += [
        f"{origin}: not in the model"
        for origin in report.unused
        if names[origin] not in misfits and not may_be_unused(names[origin], target, prefix)
    ]
    if kind == TORCHVISION_RESNET and _strides_in_1x1(model, prefix):
        report.unexpected.append(
            "torchvision's ResNets have their stride in the 3x3: MODEL.RESNETS.STRIDE_IN_1X1 False"
        )
    report.unused += outside
    return converted, report


def _strides_in_1x1(model: nn.Module, prefix: str) -> bool:
    """Whether a bottleneck of the backbone has its stride there, which no weight shows."""
    return any(
        name.startswith(f"{prefix}res")
        and name.endswith(".conv1")
        and tuple(conv.kernel_size) == (1, 1)
        and tuple(conv.stride) != (1, 1)
        for name, conv in model.named_modules()
    )


def _check_types(found: dict[str, Tensor], source: str) -> None:
    """Raises on weights that would be rounded in silence."""
    odd = [n for n, t in found.items() if not t.is_floating_point() and not n.endswith(COUNTER)]
    if odd:
        raise CheckpointError(
            f"{source}: expected weights of floating point, got {len(odd)} that are not, such as "
            f"{odd[0]} of {found[odd[0]].dtype}: convert a quantised network back first"
        )


def _check_finite(converted: dict[str, Tensor], source: str) -> None:
    """Raises on weights that no training should have left."""
    if bad := non_finite(converted):
        raise NonFiniteCheckpointError(
            f"{source}: expected finite weights, got {len(bad)} of {len(converted)} tensors with "
            f"infinities or NaN, first {bad[0]}: of a training that has diverged"
        )


def convert_file(
    source: str | Path, target: str | Path, model: nn.Module, allow_partial: bool = False
) -> Report:
    """Writes the checkpoint ``target`` of what the file ``source`` gives ``model``.

    Args:
        source: a file or URL.
        target: where to write, .pth; replaced once the whole of it is written.
        allow_partial: do so even though something unexpected is left.

    Raises:
        FileNotFoundError, CheckpointError: nothing has been written.
    """
    source = str(source)
    refuse_pickle(source)
    if Path(target).suffix != ".pth":
        raise CheckpointError(f"{target}: expected a name that ends in .pth to write to")
    path = PathManager.get_local_path(source)
    if Path(path).resolve() == Path(target).resolve():
        raise CheckpointError(f"{target}: expected another file to write to than {source}")
    converted, report = convert(read_checkpoint(path)["model"], model, source)
    if not allow_partial:
        report.check()
    Path(target).parent.mkdir(parents=True, exist_ok=True)
    write_checkpoint({"model": converted}, target)
    return report
