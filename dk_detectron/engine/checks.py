"""What is wrong with a configuration, said before any work."""

from __future__ import annotations

import os
from collections.abc import Sequence
from difflib import get_close_matches
from functools import reduce
from operator import getitem
from pathlib import Path

from detectron2.config import CfgNode
from detectron2.modeling import (
    BACKBONE_REGISTRY,
    META_ARCH_REGISTRY,
    ROI_HEADS_REGISTRY,
    GeneralizedRCNN,
)
from detectron2.utils import comm

from ..config import is_classifier
from ..data.image_folder import FLIPS
from ..data.pictures import check_format
from ..data.stream import local_batch_size, nearest_multiples
from ..modeling import NORMS
from ..weights import LAST_CHECKPOINT, refuse_pickle
from .amp import check_amp
from .record import CONFIG_FILE, TRAINING_FILE, run_of
from .trainer import OPTIMIZERS

# Those that detectron2 has.
LR_SCHEDULERS = "WarmupMultiStepLR", "WarmupCosineLR", "WarmupStepWithFixedGammaLR"
WARMUP_METHODS = "linear", "constant"
CLIP_TYPES = "value", "norm"
PARTS = {
    "META_ARCHITECTURE": META_ARCH_REGISTRY,
    "BACKBONE.NAME": BACKBONE_REGISTRY,
    "ROI_HEADS.NAME": ROI_HEADS_REGISTRY,
}
# As many as COCO's people have, whose spreads are pycocotools' own.
KEYPOINTS = 17
# Between a run and the same resumed: where it is, and weights that then are not read.
UNCOMPARED = "OUTPUT_DIR", "MODEL.WEIGHTS"


def check_parts(cfg: CfgNode) -> None:
    """Raises ``ValueError`` if a part of the network has a name that is not registered."""
    for key, registry in PARTS.items():
        name, known = reduce(getitem, key.split("."), cfg.MODEL), dict(registry)
        if name not in known:
            near = ", ".join(get_close_matches(name, known)) or ", ".join(sorted(known))
            raise ValueError(
                f"MODEL.{key}: expected a name that is registered, such as {near}, got {name!r}"
            )


def check_solver(cfg: CfgNode) -> None:
    """Raises ``ValueError`` on values of ``SOLVER`` that no training can have."""
    solver = cfg.SOLVER
    if solver.OPTIMIZER not in OPTIMIZERS:
        raise ValueError(
            f"SOLVER.OPTIMIZER: expected one of {', '.join(OPTIMIZERS)}, got {solver.OPTIMIZER!r}"
        )
    check_amp(cfg)
    if not solver.CLIP_OFFSET_GRADIENTS >= 0:
        raise ValueError(
            "SOLVER.CLIP_OFFSET_GRADIENTS: expected a norm, or 0 for no limit, "
            f"got {solver.CLIP_OFFSET_GRADIENTS}"
        )
    if not 0 <= solver.EMA_DECAY < 1:
        raise ValueError(f"SOLVER.EMA_DECAY: expected 0 <= decay < 1, got {solver.EMA_DECAY}")
    for key in "MAX_ITER", "CHECKPOINT_PERIOD":
        if solver[key] < 1:
            raise ValueError(f"SOLVER.{key}: expected a number of steps, got {solver[key]}")
    _check_schedule(solver)
    clip = solver.CLIP_GRADIENTS
    if clip.ENABLED and clip.CLIP_TYPE not in CLIP_TYPES:
        raise ValueError(
            f"SOLVER.CLIP_GRADIENTS.CLIP_TYPE: expected one of {', '.join(CLIP_TYPES)}, got "
            f"{clip.CLIP_TYPE!r}"
        )


def _check_schedule(solver: CfgNode) -> None:
    for key, known in ("LR_SCHEDULER_NAME", LR_SCHEDULERS), ("WARMUP_METHOD", WARMUP_METHODS):
        if solver[key] not in known:
            raise ValueError(
                f"SOLVER.{key}: expected one of {', '.join(known)}, got {solver[key]!r}"
            )
    steps, end = solver.STEPS, solver.BASE_LR_END
    is_stepwise = solver.LR_SCHEDULER_NAME == "WarmupMultiStepLR"
    if is_stepwise and list(steps) != sorted({step for step in steps if step > 0}):
        raise ValueError(f"SOLVER.STEPS: expected iterations in increasing order, got {steps}")
    if solver.LR_SCHEDULER_NAME == "WarmupCosineLR" and not 0 <= end <= solver.BASE_LR:
        raise ValueError(
            f"SOLVER.BASE_LR_END: expected a rate of at most SOLVER.BASE_LR {solver.BASE_LR}, got "
            f"{end}"
        )


def check_input(cfg: CfgNode) -> None:
    """Raises ``ValueError`` on values of ``INPUT`` that no pictures can be made by."""
    given = cfg.INPUT
    check_format(given.FORMAT)
    if given.RANDOM_FLIP not in ("none", *FLIPS):
        raise ValueError(
            f"INPUT.RANDOM_FLIP: expected one of none, {', '.join(FLIPS)}, got "
            f"{given.RANDOM_FLIP!r}"
        )
    if not 0 <= given.COLOR_JITTER <= 1:
        raise ValueError(f"INPUT.COLOR_JITTER: expected a share, 0 to 1, got {given.COLOR_JITTER}")
    sizes, style = list(given.MIN_SIZE_TRAIN), given.MIN_SIZE_TRAIN_SAMPLING
    if style not in ("choice", "range"):
        raise ValueError(f"INPUT.MIN_SIZE_TRAIN_SAMPLING: expected choice or range, got {style!r}")
    is_range = len(sizes) == 2 and sizes == sorted(sizes)
    if not sizes or min(sizes) < 0 or (style == "range" and not is_range):
        kind = "the least and the greatest size" if style == "range" else "sizes to choose from"
        raise ValueError(f"INPUT.MIN_SIZE_TRAIN: expected {kind}, in pixels, got {tuple(sizes)}")
    if given.CROP_SIZE < 1:
        raise ValueError(f"INPUT.CROP_SIZE: expected a number of pixels, got {given.CROP_SIZE}")
    if is_classifier(cfg) and given.MIN_SIZE_TEST < given.CROP_SIZE:
        raise ValueError(
            f"INPUT.MIN_SIZE_TEST: expected at least INPUT.CROP_SIZE {given.CROP_SIZE}, which is "
            "cut out of pictures of that shorter side and else has a black border, got "
            f"{given.MIN_SIZE_TEST}"
        )


def check_evaluation(cfg: CfgNode) -> None:
    """Raises ``ValueError`` if an evaluation would fail, after all training."""
    test, model = cfg.TEST, cfg.MODEL
    if test.EVAL_PERIOD < 0:
        raise ValueError(
            f"TEST.EVAL_PERIOD: expected a number of steps, or 0 to evaluate only after the last, "
            f"got {test.EVAL_PERIOD}"
        )
    if test.AUG.ENABLED and (
        not issubclass(META_ARCH_REGISTRY.get(model.META_ARCHITECTURE), GeneralizedRCNN)
        or model.KEYPOINT_ON
        or model.LOAD_PROPOSALS
    ):
        raise ValueError(
            "TEST.AUG.ENABLED: expected False, since detectron2 has test-time augmentation for "
            "boxes and masks of GeneralizedRCNN alone, without keypoints and precomputed "
            f"proposals, got True with MODEL.META_ARCHITECTURE {model.META_ARCHITECTURE!r}, "
            f"MODEL.KEYPOINT_ON {model.KEYPOINT_ON}, MODEL.LOAD_PROPOSALS {model.LOAD_PROPOSALS}"
        )
    spreads, keypoints = len(test.KEYPOINT_OKS_SIGMAS) or KEYPOINTS, model.ROI_KEYPOINT_HEAD
    if model.KEYPOINT_ON and keypoints.NUM_KEYPOINTS != spreads and cfg.DATASETS.TEST:
        raise ValueError(
            f"TEST.KEYPOINT_OKS_SIGMAS: expected {keypoints.NUM_KEYPOINTS} numbers, one for each "
            f"of MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS, got {len(test.KEYPOINT_OKS_SIGMAS)}: give "
            f"them; without any, they are those of COCO's {KEYPOINTS}"
        )
    if test.EXPECTED_RESULTS and len(cfg.DATASETS.TEST) != 1:
        raise ValueError(
            "TEST.EXPECTED_RESULTS: expected one data set in DATASETS.TEST to compare them with, "
            f"got {len(cfg.DATASETS.TEST)}"
        )
    tasks = _tasks(cfg)
    for expected in test.EXPECTED_RESULTS:
        if len(expected) != 4 or expected[0] not in tasks:
            raise ValueError(
                "TEST.EXPECTED_RESULTS: expected [task, metric, value, tolerance] with a task of "
                f"{', '.join(tasks)}, got {expected}"
            )


def _tasks(cfg: CfgNode) -> list[str]:
    """The names of what evaluation gives metrics of."""
    model = cfg.MODEL
    if is_classifier(cfg):
        tasks = ["classification"]
    else:
        tasks = ["bbox", *["segm"] * model.MASK_ON, *["keypoints"] * model.KEYPOINT_ON]
    if cfg.TEST.AUG.ENABLED:
        tasks += [f"{task}_TTA" for task in tasks]
    if cfg.SOLVER.EMA_DECAY:
        tasks += [f"{task}_ema" for task in tasks]
    return tasks


def stated_keys(config_file: str, opts: Sequence) -> set[str]:
    """The keys that a configuration file, those that it is based on, or ``opts`` give."""
    return {*flat(CfgNode.load_yaml_with_base(config_file)), *opts[::2]}


def settle_classes(cfg: CfgNode, key: str, classes: Sequence[str], stated: set[str]) -> list[str]:
    """The number of classes is that of the data; who states it must state the same.

    Args:
        key: of the number in ``cfg``.
        classes: of the data.

    Returns:
        What has been taken from the data, for the log.

    Raises:
        ValueError: another number is stated.
    """
    number = reduce(getitem, key.split("."), cfg)
    if number == len(classes):
        return []
    some = ", ".join(classes[:5]) + (", ..." if len(classes) > 5 else "")
    if key in stated:
        raise ValueError(
            f"{key}: expected {len(classes)}, the number of classes in the data ({some}), got "
            f"{number}: correct it, or leave it out, and it is taken from the data"
        )
    cfg.merge_from_list([key, len(classes)])
    return [f"{key}: {len(classes)}, as in the data ({some})"]


def check_batch(cfg: CfgNode) -> None:
    """Raises ``ValueError`` if the batch does not divide among the processes."""
    batch, reference = cfg.SOLVER.IMS_PER_BATCH, cfg.SOLVER.REFERENCE_WORLD_SIZE
    processes = comm.get_world_size()
    if not reference or reference == processes:
        local_batch_size(batch)
    elif batch % reference:
        raise ValueError(
            f"SOLVER.IMS_PER_BATCH: expected a multiple of SOLVER.REFERENCE_WORLD_SIZE = "
            f"{reference}, from which batch, rate and schedule are scaled to {processes} "
            f"process(es), got {batch}: take {nearest_multiples(batch, reference)}, or set "
            "SOLVER.REFERENCE_WORLD_SIZE 0, so that they are used as they stand"
        )


def norms(cfg: CfgNode) -> dict[str, str]:
    """The norms of the backbone and its pyramid, by key."""
    mobilenet = "mobilenetv2" in cfg.MODEL.BACKBONE.NAME
    backbone = "MOBILENETV2" if mobilenet else "RESNETS"
    return {
        f"MODEL.{backbone}.NORM": cfg.MODEL[backbone].NORM,
        "MODEL.FPN.NORM": cfg.MODEL.FPN.NORM,
    }


def check_norms(cfg: CfgNode) -> None:
    """Raises ``ValueError`` if a norm is unknown, or cannot run on the processes that there are."""
    for key, norm in norms(cfg).items():
        if norm not in NORMS:
            known = ", ".join(map(repr, NORMS))
            raise ValueError(f"{key}: expected one of {known}, got {norm!r}")
        if (
            norm in ("SyncBN", "nnSyncBN")
            and cfg.MODEL.DEVICE == "cpu"
            and comm.get_world_size() > 1
        ):
            raise ValueError(
                f"{key}: expected a norm that runs on CPU processes, such as BN, GN or "
                f"naiveSyncBN, got {norm!r}, which synchronises GPUs"
            )


def check_weights(cfg: CfgNode, *, needed: bool, resume: bool) -> None:
    """Raises if ``MODEL.WEIGHTS`` names no file, or training could not learn without."""
    if resume and os.path.exists(os.path.join(cfg.OUTPUT_DIR, LAST_CHECKPOINT)):
        return
    weights = cfg.MODEL.WEIGHTS
    if weights:
        refuse_pickle(weights)
        if "://" not in weights and not os.path.isfile(weights):
            raise FileNotFoundError(
                f"MODEL.WEIGHTS: expected a checkpoint, got {weights!r}: no such file"
            )
    elif needed:
        raise ValueError("MODEL.WEIGHTS: expected a checkpoint to evaluate, got nothing")
    elif "FrozenBN" in norms(cfg).values():
        raise ValueError(
            "MODEL.WEIGHTS is empty, but the backbone's norm is FrozenBN, which learns nothing "
            "from scratch: give MODEL.WEIGHTS, or set MODEL.RESNETS.NORM / MODEL.MOBILENETV2.NORM "
            "to BN, SyncBN or GN and MODEL.BACKBONE.FREEZE_AT to 0"
        )


def starts_from_run(cfg: CfgNode, config_file: str) -> str | None:
    """What to know if training starts from the result of a run, by that run's config.yaml."""
    folder = run_of(Path(config_file).resolve())
    if not folder or Path(cfg.MODEL.WEIGHTS).resolve().parent != folder:
        return None
    return (
        f"Training starts from {cfg.MODEL.WEIGHTS}, the result of the run whose {CONFIG_FILE} this "
        f"is: --config-file {folder / TRAINING_FILE} starts as that run did"
    )


def _before(cfg: CfgNode) -> dict:
    """What :func:`flat` gives of the run in ``OUTPUT_DIR`` that is to be resumed, if there is."""
    folder = Path(cfg.OUTPUT_DIR)
    # Before version 0.2 there was no other record than config.yaml.
    records = [folder / name for name in (TRAINING_FILE, CONFIG_FILE) if (folder / name).exists()]
    if not (folder / LAST_CHECKPOINT).exists() or not records:
        return {}
    return flat(CfgNode.load_yaml_with_base(str(records[0])))


def keep_seed(cfg: CfgNode) -> str | None:
    """Has a run that is to be resumed keep its ``SEED``; what to know if another was given."""
    given, seed = cfg.SEED, _before(cfg).get("SEED", cfg.SEED)
    if given == seed:
        return None
    cfg.SEED = seed
    return (
        f"SEED: the run in {cfg.OUTPUT_DIR} keeps its own, {seed}, which its data follow; {given} "
        "is for another run, in another OUTPUT_DIR"
    )


def changes_since(cfg: CfgNode) -> list[str]:
    """How ``cfg`` differs from the run in ``OUTPUT_DIR`` that is to be resumed, "KEY: old -> new".

    Raises:
        ValueError: it cannot go on like this.
    """
    before = _before(cfg)
    now = flat(CfgNode.load_cfg(cfg.dump()))
    changed = {
        key: (before[key], value)
        for key, value in now.items()
        if key in before and before[key] != value and key not in UNCOMPARED
    }
    if "SOLVER.OPTIMIZER" in changed:
        old, new = changed["SOLVER.OPTIMIZER"]
        raise ValueError(
            f"SOLVER.OPTIMIZER: expected {old!r}, that of the run to resume in {cfg.OUTPUT_DIR}, "
            f"got {new!r}, which has other states: start a run from its weights, with "
            "MODEL.WEIGHTS and another OUTPUT_DIR"
        )
    return [f"{key}: {old!r} -> {new!r}" for key, (old, new) in changed.items()]


def flat(node: dict, prefix: str = "") -> dict:
    """A.B for what is nested in a configuration."""
    found = {}
    for key, value in node.items():
        if isinstance(value, dict):
            found |= flat(value, f"{prefix}{key}.")
        else:
            found[prefix + key] = list(value) if isinstance(value, tuple) else value
    return found
