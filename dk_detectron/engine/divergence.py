"""What to know and to do when training has diverged, and a good checkpoint to go on from."""

from __future__ import annotations

import math
import os
import re
import statistics
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.engine import HookBase
from detectron2.utils import comm
from torch import Tensor, nn

from ..weights import Checkpointer, non_finite
from .monitoring import OffsetMonitor, Offsets
from .optimizer import GENERATOR

# The loss is blowing up when the median of a window of steps is this many times the lowest so far.
# Twice is healthy: a detector from scratch begins by calling everything background, at a low loss.
WINDOW, GROWTH = 20, 3.0
# A single loss that is this many times as high is no chance.
OUTLIER = 10.0

# Seconds for which another process leaves it to the main one to say why the job stops.
PATIENCE = 60


class DivergedError(FloatingPointError):
    """A loss or a weight is not finite; the message says what is known, and what helps."""


def _magnitude(value: Any) -> float:
    """The largest absolute value in tensors, lists and dicts of them; infinite if any is NaN."""
    if isinstance(value, Tensor):
        largest = value.abs().max().item() if value.numel() else 0.0
        return math.inf if math.isnan(largest) else largest
    if isinstance(value, dict):
        value = list(value.values())
    return max(map(_magnitude, value), default=0.0) if isinstance(value, list | tuple) else 0.0


@contextmanager
def _outputs(model: nn.Module) -> Iterator[list[tuple[float, str]]]:
    """Collects the size and the module of every output, in their order."""
    found = []

    def note(name, module, inputs, output):
        # What the work of a module between its children has spoilt first shows in a child's input.
        blamed = name if math.isfinite(_magnitude(inputs)) else name.rpartition(".")[0]
        found.append((_magnitude(output), blamed))

    handles = [
        module.register_forward_hook(partial(note, name)) for name, module in model.named_modules()
    ]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def _pictures(batch: dict | list[dict]) -> list[str]:
    """File names, of a classifier's or a detector's batch."""
    if isinstance(batch, dict):
        return batch.get("file_name", [])
    return [record["file_name"] for record in batch if "file_name" in record]


def _culprit(outputs: list[tuple[float, str]]) -> str:
    """In words, of :func:`_outputs`."""
    for size, name in outputs:
        if not math.isfinite(size):
            return f"first output that is not finite: {name or 'the loss'}"
    size, name = max(outputs, default=(0.0, "nothing"))
    return f"every output in this process is finite; the largest, {size:.3g}, is of {name}"


def _finite(offsets: Offsets) -> Offsets:
    """Without layers that only tell of what came before them."""
    return Offsets(offsets.kind, [x for x in offsets.layers if math.isfinite(x.largest)])


class DivergenceGuard(HookBase):
    """Ends a run that has diverged with all that is known, and a good checkpoint to go on from.

    Part of the checkpoints: the losses of a window, the lowest median of a whole one so far, and
    which iteration's loss was an outlier, until one is normal again.
    """

    def __init__(self, checkpointer: Checkpointer, monitor: OffsetMonitor):
        self.checkpointer = checkpointer
        self.monitor = monitor
        self.losses = deque(maxlen=WINDOW)
        self.lowest = math.inf
        self.since = None
        self._batch = []

    def state_dict(self):
        return {"losses": list(self.losses), "lowest": self.lowest, "since": self.since}

    def load_state_dict(self, state_dict):
        self.losses = deque(state_dict["losses"], maxlen=WINDOW)
        self.lowest, self.since = state_dict["lowest"], state_dict["since"]

    def before_train(self):
        self._handle = self.trainer.model.register_forward_pre_hook(self._keep_batch)
        # A last checkpoint that another run has left is not this one's to judge.
        self._foreign = None if self.trainer.start_iter else self.checkpointer.last_tagged()

    def _keep_batch(self, model, inputs):
        # A classifier then calls itself with the pixels alone.
        if model.training and not isinstance(inputs[0], Tensor):
            self._batch = inputs[0]

    def before_step(self):
        self._rates = self._current_rates()
        self._bad = self.trainer.iter  # the first iteration that is not known to be all right

    def after_step(self):
        self._bad = self.trainer.iter + 1
        if comm.is_main_process():
            self._add(self.trainer.storage.history("total_loss").latest())

    def _add(self, loss: float) -> None:
        self.losses.append(loss)
        if len(self.losses) == WINDOW:
            self.lowest = min(self.lowest, statistics.median(self.losses))
        # Until then: the first loss, mostly that of an untrained network.
        normal = self.lowest if math.isfinite(self.lowest) else self.losses[0]
        if loss <= GROWTH * normal:
            self.since = None
        elif loss > OUTLIER * normal and self.since is None:
            self.since = self.trainer.iter

    def after_train(self):
        self._handle.remove()
        self._batch = []

    def _current_rates(self) -> dict[str, float]:
        """Of weights, which biases may have a multiple of."""
        rates = {}
        for group in self.trainer.optimizer.param_groups:
            for name in group.get("param_names", ["weight"]):
                if name.endswith("weight"):
                    part = "offset generators" if GENERATOR in name else "weights"
                    rates.setdefault(part, group["lr"])
        return rates

    @contextmanager
    def explains(self) -> Iterator[None]:
        """Around a step.

        Raises:
            DivergedError: in the place of detectron2's errors about what is not finite.
        """
        try:
            yield
        except (FloatingPointError, AssertionError) as error:
            # Of assertions, that of detectron2's boxes.
            if isinstance(error, AssertionError) and "infinite or NaN" not in str(error):
                raise
            if not comm.is_main_process():
                # It ends the job for the same reason, unless only the pictures here are to blame.
                time.sleep(PATIENCE)
            raise DivergedError(self._story(error)) from None

    def _story(self, error: Exception) -> str:
        trainer, monitor = self.trainer, self.monitor
        weights = non_finite(dict(self.checkpointer.model.named_parameters()))
        culprit, offsets = self._run_again()
        offsets = [found for found in map(_finite, offsets) if found.layers]
        to_blame = GENERATOR in culprit or any(
            layer.reach < layer.mean < math.inf
            for found in [*offsets, *monitor.latest]
            for layer in found.layers
        )
        lines = [
            f"training has diverged at iteration {trainer.iter}: {str(error).splitlines()[0]}",
            self._losses(str(error)),
            "learning rate: "
            + ", ".join(f"{rate:.4g} of {part}" for part, rate in self._rates.items()),
            f"weights that are not finite: {len(weights)}, first {weights[0]}" if weights else "",
            culprit,
            *(f"in this batch, {found}" for found in offsets),
            *(f"at iteration {monitor.iteration}, {text}" for text in monitor.latest),
            "pictures of this batch: " + (", ".join(_pictures(self._batch)) or "without names"),
            "to change: " + cure(trainer.cfg, to_blame),
            self._rewind(),
        ]
        return "\n  ".join(filter(None, lines))

    def _losses(self, message: str) -> str:
        """Of this iteration, which only detectron2's message has; or of the last that had any."""
        losses = re.findall(r"'(\w+)': (?:np\.float64\()?([-+.\w]+)", message)
        iteration = self.trainer.iter
        if not losses:
            latest = self.trainer.storage.latest()
            losses = [(name, value) for name, (value, _) in latest.items() if "loss" in name]
            iteration = max((latest[name][1] for name, _ in losses), default=iteration)
        text = ", ".join(f"{name} {float(loss):.4g}" for name, loss in losses)
        return f"losses at iteration {iteration}: {text or 'none yet'}"

    def _run_again(self) -> tuple[str, list[Offsets]]:
        """The batch once more, through the same weights: the first or largest culprit; offsets."""
        model = self.checkpointer.model
        if comm.get_world_size() > 1 and any(
            "SyncBatchNorm" in type(module).__name__ for module in model.modules()
        ):
            return "the batch cannot run again to find the layer: SyncBN needs all processes", []
        precision = getattr(self.trainer._trainer, "precision", None)
        device = next(model.parameters()).device.type
        self.monitor.watch()
        failure = ""
        with (
            torch.no_grad(),
            torch.compiler.set_stance("force_eager"),
            torch.autocast(device, precision, enabled=precision is not None),
            _outputs(model) as outputs,
        ):
            try:
                model(self._batch)
            except FloatingPointError:
                pass
            except Exception as error:  # which must not hide what it is about
                failure = f" (the model then raised {type(error).__name__}: {error})"
        return _culprit(outputs) + failure, self.monitor.stop()

    def _is_good(self, checkpoint: dict) -> bool:
        """Whether to go on from it: finite, and the loss was not blowing up, nor did so at once.

        Of one from before there was this hook, it is not known how the loss had been.
        """
        onset = self._bad if self.since is None else self.since
        if checkpoint.get("iteration", math.inf) + 1 >= onset:
            return False
        state = checkpoint.get("trainer", {}).get("hooks", {}).get(type(self).__qualname__)
        if state and (
            state["since"] is not None
            or statistics.median(state["losses"]) > GROWTH * state["lowest"]
        ):
            return False
        return not non_finite(checkpoint["model"])

    def _rewind(self) -> str:
        """Leaves --resume a good checkpoint, or none; says which."""
        checkpointer = self.checkpointer
        if checkpointer.last_tagged() in (None, self._foreign):
            return "this run has no checkpoint yet to --resume from: start again"
        last = os.path.basename(checkpointer.get_checkpoint_file())
        good = checkpointer.rewind(self._is_good)
        if good is None:
            return "no checkpoint is good: start again, in another OUTPUT_DIR"
        if good == last:
            return f"--resume goes on from {good}, which is good"
        return f"--resume goes on from {good}, the last that is good, instead of {last}"


def cure(cfg: CfgNode, offsets: bool) -> str:
    """The keys to change, if ``offsets`` are to blame or not."""
    warmup = "WARMUP_EPOCHS" if cfg.SOLVER.EPOCHS else "WARMUP_ITERS"
    clipping = cfg.SOLVER.CLIP_GRADIENTS
    keys = f"lower SOLVER.BASE_LR, raise SOLVER.{warmup}, or " + (
        f"lower SOLVER.CLIP_GRADIENTS.CLIP_VALUE (now {clipping.CLIP_VALUE:g})"
        if clipping.ENABLED
        else "set SOLVER.CLIP_GRADIENTS.ENABLED True"
    )
    if not offsets:
        return keys
    limit = cfg.SOLVER.CLIP_OFFSET_GRADIENTS
    how = f"lower SOLVER.CLIP_OFFSET_GRADIENTS (now {limit:g})"
    return (
        f"{how if limit else 'set SOLVER.CLIP_OFFSET_GRADIENTS, such as 0.05'}, or lower "
        f"SOLVER.OFFSET_LR_FACTOR (now {cfg.SOLVER.OFFSET_LR_FACTOR:g}); else {keys}"
    )
