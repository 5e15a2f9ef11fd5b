"""Checkpoints: read safely, fitted to the model, written whole.

Any checkpoint goes through :func:`convert`, which gives a deformable network the weights of a rigid
one of the same family (exact warm start), and accounts for every tensor on both sides.
"""

from __future__ import annotations

import os
import pickle
import re
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path

import safetensors.torch
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.utils.file_io import PathManager
from tabulate import tabulate
from torch import Tensor, nn
from torch.nn.modules.utils import consume_prefix_in_state_dict_if_present

from .layers import AdaptiveConv2d, ScopeConv2d
from .modeling.mobilenet_v2 import GROUPS, STEM_GROUP

# A backbone under a feature pyramid, one of its own, and one that was saved bare.
BACKBONE_PREFIXES = ("backbone.bottom_up.", "backbone.", "")
# The first convolution of every backbone of this project, and of detectron2's ResNet.
FIRST_WEIGHT = "stem.conv1.weight"
CLASSIFIER = "linear."
# Of any detector: pyramids, RPN and heads, RetinaNet's P6 and P7, and its head.
DETECTION_PARTS = (
    "backbone.fpn_",
    "backbone.top_block.",
    "proposal_generator.",
    "roi_heads.",
    "head.",
)
GENERATOR = re.compile(r"(kernel_offset|data_offset|gate)_generator(?=\.)")
# The file that names the checkpoint which --resume takes.
LAST_CHECKPOINT = "last_checkpoint"
# How many batches a norm has seen: only training goes by it, and FrozenBN does not have it.
COUNTER = ".num_batches_tracked"
# Of the perturbations in ``set_rigid_weight``: a source always becomes the same network.
SEED = 42
# Of the unexpected in a report.
MAX_LINES = 20


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; the message says why, and what helps."""


class UnreadableCheckpointError(CheckpointError):
    """A file that is truncated, corrupt, or no checkpoint at all."""


# Reading and writing


def refuse_pickle(path: str) -> None:
    """Raises ``CheckpointError`` for the names of detectron2's and Caffe2's pickle files."""
    if path.partition("?")[0].endswith((".pkl", ".pickle", ".pyth")):
        raise CheckpointError(
            f"{path}: expected .pth, .pt or .safetensors, got a pickle file, which can run any "
            "code when it is read. If you trust it, unpickle it yourself and save its tensors: "
            "torch.save({'model': {name: torch.as_tensor(array), ...}}, 'weights.pth')"
        )


def read_checkpoint(path: str) -> dict:
    """Reads a file without running any code from it.

    Returns:
        What the file holds, with the weights, by name and without "module.", under "model".

    Raises:
        FileNotFoundError: no such file.
        UnreadableCheckpointError: it is truncated, corrupt, or of another format.
        CheckpointError: it needs arbitrary unpickling, or holds no weights.
    """
    refuse_pickle(path)
    with open(path, "rb") as f:
        try:
            if path.endswith(".safetensors"):
                content = safetensors.torch.load_file(path)
            else:
                content = torch.load(f, map_location="cpu", weights_only=True)
        except MemoryError:
            raise
        except Exception as error:
            code = re.search(r"GLOBAL (\S+)", str(error))
            if isinstance(error, pickle.UnpicklingError) and code:
                raise CheckpointError(
                    f"{path}: expected tensors and plain values, got {code[1]}, which only runs "
                    "by unpickling, and that can run any code. If you trust the file, load it "
                    "yourself with weights_only=False and save its state dict with torch.save"
                ) from None
            reason = f"{type(error).__name__}: {error}".partition("\n")[0]
            raise UnreadableCheckpointError(
                f"{path}: expected a checkpoint, got a file that is truncated, corrupt or of "
                f"another format ({reason}); fetch or write it again"
            ) from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: expected a state dict, got a {type(content).__name__}")
    if content and all(isinstance(value, Tensor) for value in content.values()):
        content = {"model": content}
    elif "model" not in content and "state_dict" in content:
        content["model"] = content.pop("state_dict")
    state = content.get("model")
    if not isinstance(state, dict) or not all(
        isinstance(value, Tensor) for value in state.values()
    ):
        raise CheckpointError(
            f"{path}: expected tensors by name, alone or under 'model' or 'state_dict', got the "
            f"entries {', '.join(map(repr, list(content)[:8]))}"
        )
    consume_prefix_in_state_dict_if_present(state, "module.")
    return content


@contextmanager
def replacing(path: str | Path) -> Iterator[str]:
    """Yields the name to write under; the file takes the place of ``path`` once it is complete."""
    temporary = f"{path}.tmp"
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        Path(temporary).unlink(missing_ok=True)


def write_checkpoint(checkpoint: dict, path: str | Path) -> None:
    """``torch.save`` that leaves the whole file, or what was there before."""
    with replacing(path) as temporary:
        torch.save(checkpoint, temporary)


def non_finite(state: dict[str, Tensor]) -> list[str]:
    """The names of tensors that hold an infinity or NaN."""
    return [name for name, tensor in state.items() if not tensor.isfinite().all()]


# Conversion


def _blocks() -> Iterator[tuple[int, int, list[str]]]:
    """MobileNet-V2's residual blocks: group, place in the group, our names of the convolutions."""
    count = Counter()
    for i, group in enumerate((STEM_GROUP, *GROUPS)):
        for j in range(group.num_blocks):
            block = "stem.block" if group is STEM_GROUP else f"{group.stage}.{count[group.stage]}"
            count[group.stage] += 1
            first = 2 if group.expansion == 1 else 1  # without expansion there is no conv1
            yield i, j, [f"{block}.conv{k}" for k in range(first, 4)]


# The convolution to 1280 channels, a block of its own after the last.
FINAL_CONV = f"res5.{sum(g.num_blocks for g in GROUPS if g.stage == 'res5')}.conv1"


def _torchvision_convs() -> Iterator[tuple[str, str, str]]:
    """torchvision's MobileNet-V2: convolution, its norm, our name of both."""
    yield "features.0.0", "features.0.1", "stem.conv1"
    for i, (_, _, convs) in enumerate(_blocks(), start=1):
        block, last = f"features.{i}.conv", len(convs) - 1
        for k, conv in enumerate(convs[:-1]):
            yield f"{block}.{k}.0", f"{block}.{k}.1", conv
        yield f"{block}.{last}", f"{block}.{last + 1}", convs[-1]
    yield f"features.{i + 1}.0", f"features.{i + 1}.1", FINAL_CONV


def _timm_convs() -> Iterator[tuple[str, str, str]]:
    """timm's mobilenetv2_100: convolution, its norm, our name of both."""
    yield "conv_stem", "bn1", "stem.conv1"
    for i, j, convs in _blocks():
        kinds = ["conv_dw", "conv_pw"] if len(convs) == 2 else ["conv_pw", "conv_dw", "conv_pwl"]
        for k, (kind, conv) in enumerate(zip(kinds, convs, strict=True), start=1):
            yield f"blocks.{i}.{j}.{kind}", f"blocks.{i}.{j}.bn{k}", conv
    yield "conv_head", "bn2", FINAL_CONV


# Other libraries' networks: first weight, convolutions and classifier. Their norms have an epsilon
# of 1e-5, as have BN and FrozenBN here, so that statistics are taken as they are.
FOREIGN = {
    "torchvision's MobileNet-V2": ("features.0.0.weight", _torchvision_convs, "classifier.1"),
    "timm's MobileNet-V2": ("conv_stem.weight", _timm_convs, "classifier"),
}


def _model_names(state: dict[str, Tensor], prefix: str, source: str) -> tuple[str, dict[str, str]]:
    """What ``state`` is of, and its names in a model whose backbone's names start with ``prefix``.

    Raises:
        CheckpointError: it is of no known kind.
    """
    for kind, (first_weight, convs, classifier) in FOREIGN.items():
        if first_weight in state:
            modules = {classifier: CLASSIFIER[:-1]}
            for conv, norm, ours in convs():
                modules |= {conv: prefix + ours, norm: f"{prefix}{ours}.norm"}
            names = {}
            for name in state:
                module, _, tensor = name.rpartition(".")
                names[name] = f"{modules[module]}.{tensor}" if module in modules else name
            return kind, names
    for old in BACKBONE_PREFIXES:
        if old + FIRST_WEIGHT in state:
            return "this project's own", {
                name: prefix + name[len(old) :] if name.startswith(old) else name for name in state
            }
    raise CheckpointError(
        f"{source}: expected a MobileNet-V2 of torchvision (features.0.0.weight, ...) or timm "
        f"(conv_stem.weight, ...), or a checkpoint of this project (backbone.{FIRST_WEIGHT}, ...), "
        f"got another network: {', '.join(list(state)[:4])}, ..."
    )


def _may_be_unused(name: str, target: dict[str, Tensor], prefix: str) -> bool:
    """Whether a fitting source may have what ``target`` lacks; ``name`` as the model would say."""
    if name.startswith(prefix + FINAL_CONV):
        return not any(other.startswith(prefix + FINAL_CONV) for other in target)
    if f"{CLASSIFIER}weight" in target:
        return name.startswith(DETECTION_PARTS)
    return name.startswith(CLASSIFIER)


@dataclass
class Report:
    """What became of every tensor of a source and of a model.

    Attributes:
        source, kind: the source's name, and what it is of.
        matched, resampled, initialised: names in the model: taken as they were, made from a rigid
            weight, and not in the source.
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
            parts = Counter(map(_part, getattr(self, row)))
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

    def check(self) -> None:
        """Raises ``CheckpointError`` if anything unexpected is left."""
        if self.unexpected:
            raise CheckpointError(
                f"{self.source}: expected a checkpoint of the configured network, got one with "
                f"unexpected tensors ({len(self.unexpected)})\n\n{self}\n\nIf it is not another "
                "network's: tools/convert_weights.py --allow-partial makes a checkpoint of what "
                "fits"
            )


def _part(name: str) -> str:
    """The part of a network that a tensor belongs to, for summaries."""
    generator = GENERATOR.search(name)
    return (
        generator[0]
        if generator
        else re.match(r"backbone\.(bottom_up|fpn|top_block)|[^.]+", name)[0]
    )


def _started(layer: AdaptiveConv2d, rigid: Tensor) -> AdaptiveConv2d:
    """A copy of ``layer`` that is the rigid convolution."""
    # Perturbations cancel to the last digit of the type in which they are drawn.
    exact = torch.promote_types(layer.weight.dtype, torch.float32)
    layer = deepcopy(layer).to("cpu", exact)
    layer.set_rigid_weight(rigid.to(exact))
    return layer


def convert(
    state: dict[str, Tensor], model: nn.Module, source: str = "checkpoint"
) -> tuple[dict[str, Tensor], Report]:
    """Fits a network's weights to a detector or classifier of the same family.

    A rigid weight that meets a layer with a scope or experts becomes theirs
    (:meth:`AdaptiveConv2d.set_rigid_weight`), and its generators what belongs to it, so that the
    model computes what the source did. Deterministic; neither argument is changed.

    Args:
        state: weights of torchvision's or timm's MobileNet-V2, or of this project.
        model: what to fit them to.
        source: what to call ``state`` in messages, such as its path.

    Returns:
        The model's weights that ``state`` gives, by name, on the CPU, in the model's types; and a
        report, whose :meth:`Report.check` says whether all is well.

    Raises:
        CheckpointError: ``state`` or ``model`` is of no known kind.
    """
    target = model.state_dict()
    prefix = next((p for p in BACKBONE_PREFIXES if p + FIRST_WEIGHT in target), None)
    if prefix is None:
        raise CheckpointError(
            f"model: expected one with a backbone of this project (backbone.{FIRST_WEIGHT}, ...), "
            f"got {', '.join(list(target)[:4])}, ..."
        )
    kind, names = _model_names(state, prefix, source)
    origins = {name: origin for origin, name in names.items()}
    layers = {
        f"{name}.weight": layer
        for name, layer in model.named_modules()
        if isinstance(layer, AdaptiveConv2d)
    }
    report = Report(source, kind)
    converted, misfits = {}, set()
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(SEED)
        for name, old in target.items():
            new = state.get(origins.get(name))
            if new is None:
                report.initialised.append(name)
            elif new.shape == old.shape:
                converted[name] = new.to(old.dtype)
                report.matched.append(name)
            elif name in layers and list(new.shape) == layers[name].rigid_shape:
                layer = _started(layers[name], new)
                owner = name.removesuffix("weight")
                converted[name] = layer.weight.detach().to(old.dtype)
                for key, tensor in layer.state_dict().items():
                    if GENERATOR.match(key):  # where the taps rest
                        converted[owner + key] = tensor.to(target[owner + key].dtype)
                report.resampled.append(name)
                if isinstance(layer, ScopeConv2d):
                    report.sensitivity[owner[:-1]] = layer.sensitivity()
            else:
                misfits.add(name)
                report.initialised.append(name)
                report.unexpected.append(
                    f"{origins[name]}: expected shape {list(old.shape)}, got {list(new.shape)}"
                )
    report.unused = [origin for origin, name in names.items() if name not in converted]
    for list_ in report.matched, report.initialised, report.unused:
        list_[:] = [name for name in list_ if not name.endswith(COUNTER)]
    report.unexpected += [
        f"{name}: not in the checkpoint"
        for name in report.initialised
        if name.startswith(prefix) and not GENERATOR.search(name) and name not in misfits
    ]
    report.unexpected += [
        f"{origin}: not in the model"
        for origin in report.unused
        if names[origin] not in misfits and not _may_be_unused(names[origin], target, prefix)
    ]
    return converted, report


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


def state_by_name(optimizer: torch.optim.Optimizer, state_dict: dict) -> dict | None:
    """A load hook: the state of every parameter by its name, and the groups as configured.

    So a run goes on though another ``SOLVER.OFFSET_LR_FACTOR`` groups its parameters otherwise.
    Older checkpoints have no names: they are loaded as they are.

    Raises:
        CheckpointError: it has no names, and groups its parameters otherwise.
    """
    index, groups = {}, optimizer.state_dict()["param_groups"]
    if any("param_names" not in group for group in state_dict["param_groups"]):
        expected, got = (
            [len(g["params"]) for g in gs] for gs in (groups, state_dict["param_groups"])
        )
        if expected != got:
            raise CheckpointError(
                f"optimizer: expected groups of {expected} parameters to resume, got {got}, as "
                "version 0.1 of dk_detectron made them; start a run from these weights, with "
                "MODEL.WEIGHTS and another OUTPUT_DIR"
            )
        return None
    for group in state_dict["param_groups"]:
        index |= zip(group["param_names"], group["params"], strict=True)
    state = {
        new: state_dict["state"][index[name]]
        for group in groups
        for name, new in zip(group["param_names"], group["params"], strict=True)
        if index.get(name) in state_dict["state"]
    }
    return {"state": state, "param_groups": groups}


class Checkpointer(DetectionCheckpointer):
    """detectron2's, which also converts what it loads, and neither trusts nor leaves half a file.

    With something to load beside the model (a trainer), :meth:`load` resumes: then the checkpoint
    must be of exactly the same network.
    """

    def load(self, path: str, checkpointables: list[str] | None = None) -> dict:
        """As in the base class.

        Raises:
            CheckpointError: the file cannot be read, or is not of the model's network.
        """
        refuse_pickle(path or "")
        self._resuming = checkpointables is None and bool(self.checkpointables)
        try:
            return super().load(path, checkpointables)
        finally:
            self._parsed_url_during_load = None  # which the base class leaves behind an error

    def _load_file(self, filename: str) -> dict:
        checkpoint = read_checkpoint(filename)
        checkpoint["model"], report = convert(checkpoint["model"], self.model, filename)
        if self._resuming and (report.resampled or report.initialised or report.unused):
            raise CheckpointError(
                f"{filename}: expected a checkpoint of the very same network to resume from, got "
                "another's; resume with the configuration of the run, or start a run from it with "
                f"MODEL.WEIGHTS and another OUTPUT_DIR\n\n{report}"
            )
        report.check()
        self.logger.info("Loading %s:\n%s", filename, report)
        return checkpoint

    def _load_model(self, checkpoint: dict) -> None:
        # Over the whole of the model's own, so that torch sees a complete and current state dict.
        state = self.model.state_dict()
        state.update(checkpoint.pop("model"))
        self.model.load_state_dict(state)

    def resume_or_load(self, path: str, *, resume: bool = True) -> dict:
        """As in the base class; a last checkpoint that cannot be read gives way to those before.

        Raises:
            CheckpointError: none of them can be read.
        """
        if not (resume and self.has_checkpoint()):
            return self.load(path, checkpointables=[])
        candidates = self._resumable()
        for candidate in candidates:
            try:
                if not os.path.isfile(candidate):
                    raise UnreadableCheckpointError(f"{candidate}: no such file")
                return self.load(candidate)
            except UnreadableCheckpointError as error:
                self.logger.warning("Trying the checkpoint before, since: %s", error)
        raise CheckpointError(
            f"{self.save_dir}: expected a checkpoint to resume from, but can read none of "
            f"{', '.join(map(os.path.basename, candidates))}; start without --resume"
        )

    def _resumable(self) -> list[str]:
        """The last checkpoint, then those of fewer iterations, latest first."""

        def iteration(path: str) -> float:
            number = re.search(r"_(\d+)\.pth$", path)
            return int(number[1]) if number else float("inf")

        last = self.get_checkpoint_file()
        before = [p for p in self.get_all_checkpoint_files() if iteration(p) < iteration(last)]
        return [last, *sorted(before, key=iteration, reverse=True)]

    def last_tagged(self) -> int | None:
        """When the last checkpoint was tagged, in nanoseconds; None if there is none."""
        path = Path(self.save_dir, LAST_CHECKPOINT)
        return path.stat().st_mtime_ns if path.exists() else None

    def rewind(self, is_good: Callable[[dict], bool]) -> str | None:
        """Makes the latest good checkpoint the last one; if none is good, there is no last one.

        Args:
            is_good: judges what :func:`read_checkpoint` returns.

        Returns:
            Its file's name.
        """
        for path in self._resumable():
            try:
                good = is_good(read_checkpoint(path))
            except (FileNotFoundError, CheckpointError):
                continue
            if good:
                self.tag_last_checkpoint(os.path.basename(path))
                return os.path.basename(path)
        os.remove(os.path.join(self.save_dir, LAST_CHECKPOINT))
        return None

    def save(self, name: str, **kwargs) -> None:
        """As in the base class, but a file appears whole or not at all.

        Raises:
            FloatingPointError: a weight is not finite; nothing has been written.
        """
        if not self.save_dir or not self.save_to_disk:
            return
        checkpoint = {"model": self.model.state_dict()}
        if bad := non_finite(checkpoint["model"]):
            raise FloatingPointError(
                f"{name}.pth: expected finite weights to save, got {len(bad)} that are not, such "
                f"as {bad[0]}; nothing has been written"
            )
        checkpoint |= {key: item.state_dict() for key, item in self.checkpointables.items()}
        path = os.path.join(self.save_dir, f"{name}.pth")
        self.logger.info("Saving checkpoint to %s", path)
        write_checkpoint(checkpoint | kwargs, path)
        self.tag_last_checkpoint(f"{name}.pth")

    def tag_last_checkpoint(self, last_filename_basename: str) -> None:
        with replacing(os.path.join(self.save_dir, LAST_CHECKPOINT)) as temporary:
            Path(temporary).write_text(last_filename_basename)
