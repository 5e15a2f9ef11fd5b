"""Batch, rate and schedule, as ``SOLVER.REFERENCE_WORLD_SIZE`` scales them to the processes."""

from __future__ import annotations

import logging

from detectron2.config import CfgNode
from detectron2.engine import DefaultTrainer
from detectron2.utils import comm
from torch.optim.lr_scheduler import LRScheduler

# Below detectron2's, whose handlers write to the terminal and to log.txt.
LOGGER = logging.getLogger("detectron2.dk_detectron.engine.schedule")

# A share of SOLVER.BASE_LR that is no peak of a schedule.
FAR_BELOW = 0.5
# Of the keys that are scaled, those of which 0 means something else.
LENGTHS = ("SOLVER", "MAX_ITER"), ("SOLVER", "CHECKPOINT_PERIOD"), ("TEST", "EVAL_PERIOD")


def scale(cfg: CfgNode, processes: int) -> CfgNode:
    """detectron2's ``auto_scale_workers``, which rounds no number of steps down to none."""
    scaled = DefaultTrainer.auto_scale_workers(cfg, processes)
    if scaled is cfg:
        return cfg
    scaled.defrost()
    for section, key in LENGTHS:
        if cfg[section][key]:
            scaled[section][key] = max(1, scaled[section][key])
    scaled.freeze()
    return scaled


def check_warmup(cfg: CfgNode) -> None:
    """Raises ``ValueError`` if warm-up takes all iterations, and the schedule has no rate then."""
    solver = cfg.SOLVER
    fixed = solver.LR_SCHEDULER_NAME == "WarmupStepWithFixedGammaLR"
    if (fixed or solver.RESCALE_INTERVAL) and solver.WARMUP_ITERS >= solver.MAX_ITER:
        raise ValueError(
            f"SOLVER: expected fewer iterations of warm-up than the {solver.MAX_ITER} of training, "
            f"got {solver.WARMUP_ITERS}; set SOLVER.WARMUP_EPOCHS or SOLVER.WARMUP_ITERS"
        )


def warn_of_low_rates(cfg: CfgNode, scheduler: LRScheduler) -> None:
    """Says so if all rates of a schedule are far below ``SOLVER.BASE_LR``.

    Without ``SOLVER.RESCALE_INTERVAL`` warm-up leads to what a schedule has come down to meanwhile.
    """
    solver = cfg.SOLVER
    warmed = min(solver.WARMUP_ITERS, solver.MAX_ITER - 1)
    multiplier = getattr(scheduler, "_multiplier", None)  # another trainer's may have none
    if multiplier and (peak := max(map(multiplier, (0, warmed / solver.MAX_ITER)))) < FAR_BELOW:
        LOGGER.warning(
            "SOLVER.WARMUP_ITERS: when warm-up ends, after %d of %d iterations, the schedule has "
            "come down so far that no learning rate is above %.2g of SOLVER.BASE_LR: lower it",
            warmed,
            solver.MAX_ITER,
            peak,
        )


def without_late_steps(cfg: CfgNode) -> CfgNode:
    """Without those of ``SOLVER.STEPS`` that come after the last iteration, if they are used."""
    steps, length = cfg.SOLVER.STEPS, cfg.SOLVER.MAX_ITER
    early = tuple(step for step in steps if step < length)
    if cfg.SOLVER.LR_SCHEDULER_NAME != "WarmupMultiStepLR" or early == tuple(steps):
        return cfg
    LOGGER.warning("SOLVER.STEPS: %s, without those that %d iterations end before", early, length)
    cfg = cfg.clone()
    cfg.defrost()
    cfg.SOLVER.STEPS = early
    return cfg


def check_length(state: dict, length: int) -> None:
    """Raises ``ValueError`` if a run has done more iterations than it is to have.

    Args:
        state: of a trainer, in a checkpoint.
    """
    if (done := state["iteration"] + 1) > length:
        raise ValueError(
            f"SOLVER.MAX_ITER: expected at least {done} iterations, which the run to resume has "
            f"done, got {length}: raise it (SOLVER.EPOCHS of a classifier), or start another run"
        )


def reference(cfg: CfgNode) -> int:
    """The number of processes for which batch, rate and schedule are, as they stand."""
    return cfg.SOLVER.REFERENCE_WORLD_SIZE or comm.get_world_size()


def check_processes(state: dict, reference: int) -> None:
    """Warns if the run to resume had another number of processes.

    Args:
        state: of a trainer, in a checkpoint. Those of version 0.1 know neither number.
        reference: of the trainer that resumes.

    Raises:
        ValueError: batch, rate and schedule would be scaled otherwise in the middle of the run.
    """
    now = comm.get_world_size()
    before = state.get("processes", now)
    if before == now:
        return
    fitting, rest = divmod(state.get("reference", before) * now, before)
    if "reference" in state and (rest or fitting != reference):
        cure = "" if rest else f", or set SOLVER.REFERENCE_WORLD_SIZE {fitting}"
        raise ValueError(
            f"--num-gpus: expected {before} process(es), to which batch, rate and schedule of the "
            f"run to resume are scaled (SOLVER.REFERENCE_WORLD_SIZE {state['reference']}), got "
            f"{now}, for which its iterations would be others: resume with {before} "
            f"process(es){cure}"
        )
    LOGGER.warning(
        "The run to resume had %d processes and has %d now: it goes on with other samples than "
        "without the interruption",
        before,
        now,
    )
