"""From a command line to a checked configuration, and to training or evaluation."""

from __future__ import annotations

import logging
import os
from functools import partial

import torch
from detectron2.config import CfgNode
from detectron2.engine import default_argument_parser, default_setup

from ..model_zoo import get_config, get_config_file
from ..weights import LAST_CHECKPOINT, Checkpointer, refuse_pickle
from .amp import check_amp
from .detection import Trainer
from .launch import launch
from .trainer import OPTIMIZERS, BaseTrainer


def command_line(trainer: type[BaseTrainer], epilog: str) -> None:
    """detectron2's standard command line, over one or more processes."""
    args = default_argument_parser(epilog=epilog).parse_args()
    launch(partial(main, trainer_class=trainer), args)


def main(args, trainer_class: type[BaseTrainer]):
    """Trains, or evaluates if ``args.eval_only``, in one process."""
    cfg = setup(args, trainer_class)
    if args.eval_only:
        model = trainer_class.build_model(cfg)
        checkpointer = Checkpointer(model, save_dir=cfg.OUTPUT_DIR)
        checkpointer.resume_or_load(cfg.MODEL.WEIGHTS, resume=args.resume)
        return trainer_class.test(cfg, model)
    trainer = trainer_class(cfg)
    trainer.resume_or_load(resume=args.resume)
    return trainer.train()


def setup(args, trainer_class: type[BaseTrainer] | None = None) -> CfgNode:
    """From the command line to a checked, frozen configuration, with logging and random seeds set.

    Args:
        trainer_class: whose data sets are meant; a detector's by default.

    Raises:
        ValueError, FileNotFoundError: the configuration cannot work; nothing has been written yet.
    """
    args.config_file = get_config_file(args.config_file)  # detectron2 reads it again, for its log
    cfg = get_config(args.config_file)
    cfg.merge_from_list(args.opts)
    if cfg.MODEL.DEVICE == "cuda" and not torch.cuda.is_available():
        logging.getLogger(__name__).warning("MODEL.DEVICE: no GPU is available, using the CPU")
        cfg.MODEL.DEVICE = "cpu"
    if cfg.SOLVER.OPTIMIZER not in OPTIMIZERS:
        raise ValueError(
            f"SOLVER.OPTIMIZER: expected one of {', '.join(OPTIMIZERS)}, "
            f"got {cfg.SOLVER.OPTIMIZER!r}"
        )
    check_amp(cfg)
    if not cfg.SOLVER.CLIP_OFFSET_GRADIENTS >= 0:
        raise ValueError(
            "SOLVER.CLIP_OFFSET_GRADIENTS: expected a norm, or 0 for no limit, "
            f"got {cfg.SOLVER.CLIP_OFFSET_GRADIENTS}"
        )
    if not 0 <= cfg.SOLVER.EMA_DECAY < 1:
        raise ValueError(f"SOLVER.EMA_DECAY: expected 0 <= decay < 1, got {cfg.SOLVER.EMA_DECAY}")
    needed = "TEST" if args.eval_only else "TRAIN"
    if not cfg.DATASETS[needed]:
        raise ValueError(f"DATASETS.{needed}: expected a data set, got none")
    (trainer_class or Trainer).check_datasets(
        cfg, cfg.DATASETS.TEST if args.eval_only else cfg.DATASETS.TRAIN + cfg.DATASETS.TEST
    )
    check_weights(cfg, needed=args.eval_only, resume=args.resume)
    cfg.freeze()
    default_setup(cfg, args)
    return cfg


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
    elif "FrozenBN" in _norms(cfg):
        raise ValueError(
            "MODEL.WEIGHTS is empty, but the backbone's norm is FrozenBN, which learns nothing "
            "from scratch: give MODEL.WEIGHTS, or set MODEL.RESNETS.NORM / MODEL.MOBILENETV2.NORM "
            "to BN, SyncBN or GN and MODEL.BACKBONE.FREEZE_AT to 0"
        )


def _norms(cfg: CfgNode) -> list[str]:
    mobilenet = "mobilenetv2" in cfg.MODEL.BACKBONE.NAME
    return [cfg.MODEL.MOBILENETV2.NORM if mobilenet else cfg.MODEL.RESNETS.NORM, cfg.MODEL.FPN.NORM]
