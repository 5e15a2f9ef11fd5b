"""detectron2's default trainer, on GPUs or CPU processes, that resumes exactly."""

from __future__ import annotations

import json
import logging
import math
import os
import weakref
from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from detectron2.config import CfgNode
from detectron2.engine import DefaultTrainer, HookBase, TrainerBase, create_ddp_model
from detectron2.engine.hooks import EvalHook
from detectron2.solver.build import maybe_add_gradient_clipping
from detectron2.utils import comm
from detectron2.utils.env import seed_all_rng
from detectron2.utils.logger import setup_logger
from fvcore.nn.precise_bn import get_bn_modules
from torch import nn
from torch.optim.lr_scheduler import LRScheduler

from ..data.stream import SampleStream, seed_from
from ..modeling import to_channels_last
from ..weights import write_text
from . import schedule
from .amp import build_loop
from .average import WeightAverage
from .divergence import DivergenceGuard
from .monitoring import OffsetMonitor, warn_of_rigid_layers
from .optimizer import build_optimizer, parameter_groups
from .record import FINAL, RunCheckpointer
from .resources import explained
from .signals import EvaluationHook, StopHook, StopRequest

# Below detectron2's, whose handlers write to the terminal and to log.txt.
LOGGER = logging.getLogger("detectron2.dk_detectron.engine.trainer")

EVALUATION_FILE = "evaluation.json"
OPTIMIZERS = ("SGD", "AdamW")


class BaseTrainer(DefaultTrainer):
    """``DefaultTrainer`` that also runs distributed on CPUs, and resumes exactly.

    Whatever is random in an iteration depends on ``SEED``, the iteration and the process only: the
    samples and their augmentation (``data/stream.py``) and what the model draws. So the iterations
    after a resumption are those that would have come without the interruption.

    ``OUTPUT_DIR/evaluation.json`` holds the metrics of the last evaluation.
    """

    iter: int

    def __init__(self, cfg: CfgNode):
        # DefaultTrainer.__init__, but for `device_ids`, which distributed training on CPUs refuses.
        TrainerBase.__init__(self)
        if not logging.getLogger("detectron2").isEnabledFor(logging.INFO):
            setup_logger()
        self.reference = schedule.reference(cfg)
        cfg = self.auto_scale_workers(cfg, comm.get_world_size())
        if cfg.SEED < 0:
            cfg = _with_seed(cfg, comm.shared_random_seed())
        model = self.build_model(cfg)
        optimizer = self.build_optimizer(cfg, model)
        data_loader = self.build_train_loader(cfg)
        device_ids = None if cfg.MODEL.DEVICE == "cpu" else [comm.get_local_rank()]
        model = create_ddp_model(model, broadcast_buffers=False, device_ids=device_ids)
        self._trainer = build_loop(cfg, model, data_loader, optimizer)
        self.scheduler = self.build_lr_scheduler(cfg, optimizer)
        self.checkpointer = RunCheckpointer(
            model, cfg.OUTPUT_DIR, self.classes(cfg), trainer=weakref.proxy(self)
        )
        self.start_iter = 0
        self.max_iter = cfg.SOLVER.MAX_ITER
        self.cfg = cfg
        self.ema: WeightAverage | None = None
        self.stop_request = StopRequest()
        self.register_hooks(self.build_hooks())

    def build_hooks(self) -> list[HookBase]:
        """detectron2's, those that watch, and the weights' average if ``SOLVER.EMA_DECAY`` asks.

        Raises:
            ValueError: ``TEST.PRECISE_BN`` is enabled for a network without such statistics.
        """
        if self.cfg.TEST.PRECISE_BN.ENABLED and not get_bn_modules(self.model):
            raise ValueError(
                "TEST.PRECISE_BN.ENABLED: expected False, since no norm of the network has "
                "statistics of batches, got True"
            )
        hooks = super().build_hooks()
        (place,) = (i for i, hook in enumerate(hooks) if isinstance(hook, EvalHook))
        self.evaluation_hook = EvaluationHook(self.cfg.TEST.EVAL_PERIOD, self.evaluate)
        hooks[place : place + 1] = [StopHook(), self.evaluation_hook]
        monitor = OffsetMonitor(self.checkpointer.model)
        self.guard = DivergenceGuard(self.checkpointer, monitor)
        # After the timer, which goes first; before checkpoints and metrics are written.
        hooks[1:1] = [monitor, self.guard]
        if self.cfg.SOLVER.EMA_DECAY:
            self.ema = WeightAverage(
                self.checkpointer.model, self.cfg.SOLVER.EMA_DECAY, self.cfg.OUTPUT_DIR
            )
            hooks.insert(0, self.ema)
        return hooks

    def train(self) -> OrderedDict | None:
        """detectron2's. A signal stops it between two steps, with a checkpoint to go on from.

        Raises:
            Stopped: that has happened.
            OutOfMemoryError, WorkerError, DiskError: what has given out, and what helps.
        """
        if self.start_iter >= self.max_iter and FINAL in self.unfinished():
            self.checkpointer.save(FINAL.removesuffix(".pth"), iteration=self.iter)
        with explained(self.cfg, training=True), self.stop_request.listening():
            return super().train()

    def after_train(self) -> None:
        # detectron2 counts one more if there was no step left to do.
        self.iter = min(self.iter, max(self.start_iter, self.max_iter))
        super().after_train()
        if self.evaluation_hook.stopped:
            raise self.evaluation_hook.stopped

    def run_step(self) -> None:
        seed_all_rng(seed_from(self.cfg.SEED, comm.get_rank(), self.iter))
        with self.guard.explains():
            super().run_step()

    def after_step(self) -> None:
        with self.guard.explains():
            super().after_step()

    def state_dict(self) -> dict:
        own = {"seed": self.cfg.SEED, "processes": comm.get_world_size()}
        return {**super().state_dict(), **own, "reference": self.reference}

    def load_state_dict(self, state_dict: dict) -> None:
        """detectron2's, but learning rates are those of the configuration.

        Raises:
            ValueError: for another number of processes, the schedule would be scaled otherwise; or
                the run is to be shorter than it already is.
        """
        schedule.check_processes(state_dict, self.reference)
        schedule.check_length(state_dict, self.max_iter)
        base_lrs = self.scheduler.base_lrs
        super().load_state_dict(state_dict)
        self.scheduler.base_lrs = base_lrs
        for group, lr in zip(self.optimizer.param_groups, self.scheduler.get_lr(), strict=True):
            group["lr"] = lr
        seed = state_dict.get("seed", self.cfg.SEED)
        if seed != self.cfg.SEED:
            self.cfg = _with_seed(self.cfg, seed)
            self._trainer.reset_data_loader(partial(self.build_train_loader, self.cfg))

    def resume_or_load(self, resume: bool = True) -> None:
        """detectron2's; the data, and an average that is new to the run, go on from there."""
        super().resume_or_load(resume=resume)
        warn_of_rigid_layers(self.checkpointer.model)
        stream = getattr(self.data_loader, "batch_sampler", None)
        if isinstance(stream, SampleStream):
            stream.start = self.start_iter
        elif self.start_iter:
            LOGGER.warning(
                "build_train_loader: its loader cannot be entered at iteration %d, so the data "
                "begin anew: the run goes on otherwise than without the interruption",
                self.start_iter,
            )
        if self.ema and self.ema.start_at(self.checkpointer.model) and self.start_iter:
            LOGGER.warning(
                "SOLVER.EMA_DECAY: the run to resume had no moving average, which starts at the "
                "weights of iteration %d",
                self.start_iter,
            )

    def unfinished(self) -> list[str]:
        """The files that the end of a run, whose iterations are all done, has still to leave."""
        names = [FINAL, EVALUATION_FILE]
        if self.ema:
            names.append(os.path.basename(self.ema.path))
        missing = [name for name in names if not Path(self.cfg.OUTPUT_DIR, name).exists()]
        if self.checkpointer.resumed != names[0] and names[0] not in missing:
            missing.append(names[0])  # it is damaged
        return missing

    def evaluate(self) -> OrderedDict:
        """Evaluates the weights and, under names that end in ``_ema``, their moving average.

        What is in ``OUTPUT_DIR/inference`` afterwards is of the weights. After the last iteration,
        with test-time augmentation as well, if ``TEST.AUG`` asks for it.
        """
        final = self.iter >= self.max_iter
        if final and comm.is_main_process():
            # Metrics of an earlier iteration must not be taken for these, if this is interrupted.
            Path(self.cfg.OUTPUT_DIR, EVALUATION_FILE).unlink(missing_ok=True)
        measure: Callable = self.measure_in_full if final else self.measure
        averaged = measure(self.cfg, self.ema.averaged.module) if self.ema else {}
        results = measure(self.cfg, self.model)
        if averaged:
            results.update({f"{name}_ema": metrics for name, metrics in averaged.items()})
        write_evaluation(self.cfg, results)
        self._last_eval_results = results
        return results

    @staticmethod
    def auto_scale_workers(cfg: CfgNode, num_workers: int) -> CfgNode:
        """detectron2's, which rounds no number of steps down to none."""
        return schedule.scale(cfg, num_workers)

    @classmethod
    def build_model(cls, cfg: CfgNode) -> nn.Module:
        model = super().build_model(cfg)
        if cfg.MODEL.BACKBONE.COMPILE:
            model.backbone.compile(dynamic=True)  # in place, so that names stay as they are
        return to_channels_last(model) if cfg.MODEL.CHANNELS_LAST else model

    @classmethod
    def classes(cls, cfg: CfgNode) -> list[dict]:
        """What the network tells apart, in the order of its outputs: "id" and "name" of each.

        None is known unless a subclass knows them.
        """
        return []

    @classmethod
    def build_optimizer(cls, cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
        """``SOLVER.OPTIMIZER``, with detectron2's parameter groups.

        The learning rate of offset generators is multiplied by ``SOLVER.OFFSET_LR_FACTOR``, the
        norm of their gradients limited by ``SOLVER.CLIP_OFFSET_GRADIENTS``. Their biases, which
        hold where the taps rest, do not decay.
        """
        solver = cfg.SOLVER
        params = parameter_groups(
            model,
            base_lr=solver.BASE_LR,
            weight_decay=solver.WEIGHT_DECAY,
            weight_decay_norm=solver.WEIGHT_DECAY_NORM,
            weight_decay_bias=solver.WEIGHT_DECAY_BIAS,
            offset_lr_factor=solver.OFFSET_LR_FACTOR,
            bias_lr_factor=solver.BIAS_LR_FACTOR,
        )
        options = {"lr": solver.BASE_LR, "weight_decay": solver.WEIGHT_DECAY}
        if solver.OPTIMIZER == "SGD":
            options |= {"momentum": solver.MOMENTUM, "nesterov": solver.NESTEROV}
        return build_optimizer(
            params,
            kind=maybe_add_gradient_clipping(cfg, getattr(torch.optim, solver.OPTIMIZER)),
            clip_offset_gradients=solver.CLIP_OFFSET_GRADIENTS,
            **options,
        )

    @classmethod
    def build_lr_scheduler(cls, cfg: CfgNode, optimizer: torch.optim.Optimizer) -> LRScheduler:
        """detectron2's; ``SOLVER.STEPS`` that a shorter run does not come to are left out.

        Raises:
            ValueError: warm-up takes all iterations.
        """
        schedule.check_warmup(cfg)
        scheduler = super().build_lr_scheduler(schedule.without_late_steps(cfg), optimizer)
        schedule.warn_of_low_rates(cfg, scheduler)
        return scheduler

    @classmethod
    def measure(cls, cfg: CfgNode, model: nn.Module, evaluators=None) -> OrderedDict:
        """Evaluates, as detectron2's :meth:`test` does, and writes nothing into ``OUTPUT_DIR``.

        Raises:
            OutOfMemoryError, WorkerError, DiskError: what has given out, and what helps.
        """
        if comm.get_world_size() > 1:
            # Every process has normalisation statistics of its own; the first one's are saved.
            for buffer in model.buffers():
                torch.distributed.broadcast(buffer, 0)
        with explained(cfg, training=False):
            return super().test(cfg, model, evaluators)

    @classmethod
    def measure_in_full(cls, cfg: CfgNode, model: nn.Module) -> OrderedDict:
        """:meth:`measure`; with ``TEST.AUG`` also augmented, under names that end in ``_TTA``."""
        results = cls.measure(cfg, model)
        if cfg.TEST.AUG.ENABLED:
            augmented = cls.measure_with_TTA(cfg, model)
            results.update({f"{name}_TTA": metrics for name, metrics in augmented.items()})
        return results

    @classmethod
    def test(cls, cfg: CfgNode, model: nn.Module, evaluators=None) -> OrderedDict:
        """:meth:`measure`, or in full unless there are ``evaluators``; writes what it finds."""
        results = (
            cls.measure(cfg, model, evaluators) if evaluators else cls.measure_in_full(cfg, model)
        )
        write_evaluation(cfg, results)
        return results


def _with_seed(cfg: CfgNode, seed: int) -> CfgNode:
    cfg = cfg.clone()
    cfg.defrost()
    cfg.SEED = seed
    cfg.freeze()
    return cfg


def write_evaluation(cfg: CfgNode, results: dict) -> None:
    """Writes ``OUTPUT_DIR/evaluation.json``, in the main process."""
    if comm.is_main_process():
        path = Path(cfg.OUTPUT_DIR, EVALUATION_FILE)
        write_text(path, json.dumps(_plain(results), indent=2))


def by_task(results: dict[str, dict]) -> dict[str, dict]:
    """Metrics by task; of several data sets, by "data set, task"."""
    found = {}
    for key, value in results.items():
        several = any(isinstance(metrics, dict) for metrics in value.values())
        found |= {f"{key}, {task}": m for task, m in value.items()} if several else {key: value}
    return found


def _plain(results):
    """What JSON has: numbers of Python's own, and None for those that are not finite.

    COCO's metrics are NaN where no object has the size in question; other evaluators may give
    numbers of numpy or torch.
    """
    if hasattr(results, "tolist"):
        results = results.tolist()
    if isinstance(results, dict):
        return {key: _plain(value) for key, value in results.items()}
    if isinstance(results, list | tuple):
        return [_plain(value) for value in results]
    return None if isinstance(results, float) and not math.isfinite(results) else results
