"""From a command line to a checked configuration, and to training or evaluation."""

from __future__ import annotations

import argparse
import logging
from functools import partial

import torch
from detectron2.config import CfgNode
from detectron2.engine import default_argument_parser, default_setup
from detectron2.evaluation import verify_results
from detectron2.utils import comm

from ..model_zoo import get_config_file, merge_options
from ..weights import Checkpointer
from .checks import (
    changes_since,
    check_batch,
    check_evaluation,
    check_input,
    check_norms,
    check_parts,
    check_solver,
    check_weights,
    keep_seed,
    settle_classes,
    starts_from_run,
    stated_keys,
)
from .detection import Trainer
from .ignored import check_ignored
from .launch import launch
from .record import compare_classes, get_own_config, keep_training, record_training, refresh_config
from .run_directory import check_unused, claim, is_new, set_aside
from .trainer import BaseTrainer

# Below detectron2's, whose handlers write to the terminal and to log.txt.
LOGGER = logging.getLogger("detectron2.dk_detectron.engine.command_line")
# Where detectron2's own speaks of what this trainer does not take, or leaves out what it does.
HELP = {
    "config_file": "a YAML file, or the name of a configuration of dk_detectron",
    "resume": "go on from the last checkpoint in OUTPUT_DIR",
    "opts": "KEY VALUE pairs over the configuration, such as SOLVER.MAX_ITER 1000",
}


def command_line(trainer: type[BaseTrainer], epilog: str) -> None:
    """detectron2's standard command line, over one or more processes."""
    parser = default_argument_parser(epilog=epilog)
    # detectron2's own is one port for all jobs of a user, of which the second would fail.
    parser.set_defaults(dist_url="auto")
    for action in parser._actions:
        action.help = HELP.get(action.dest, action.help)
    args = parse_flags_anywhere(parser)
    launch(partial(main, trainer_class=trainer), args)


def parse_flags_anywhere(
    parser: argparse.ArgumentParser, arguments: list[str] | None = None
) -> argparse.Namespace:
    """Also flags behind the KEY VALUE pairs, ``opts``, which would take all that follows them."""
    args = parser.parse_args(arguments)
    pairs: list[str] = []
    while flags := [i for i, word in enumerate(args.opts) if word.startswith("--")]:
        pairs += args.opts[: flags[0]]
        args = parser.parse_args(args.opts[flags[0] :], args)
    args.opts = pairs + args.opts
    return args


def main(args, trainer_class: type[BaseTrainer]):
    """Trains, or evaluates if ``args.eval_only``, in one process."""
    cfg = setup(args, trainer_class)
    if args.eval_only:
        model = trainer_class.build_model(cfg)
        checkpointer = Checkpointer(model, save_dir=cfg.OUTPUT_DIR)
        checkpoint = checkpointer.resume_or_load(cfg.MODEL.WEIGHTS, resume=args.resume)
        names = trainer_class.class_names(cfg.DATASETS.TEST)
        compare_classes(cfg.MODEL.WEIGHTS, checkpoint.get("classes"), names)
        if checkpointer.report:
            checkpointer.report.check_complete()
        results = trainer_class.test(cfg, model)
        if comm.is_main_process():
            verify_results(cfg, results)
        return results
    trainer = trainer_class(cfg)
    trainer.resume_or_load(resume=args.resume)
    if not is_new(cfg.OUTPUT_DIR, resume=args.resume):
        _record(cfg, resumes=True)
    if trainer.start_iter < trainer.max_iter:
        return trainer.train()
    # As the main process finds it: other machines may have folders of their own.
    if missing := comm.all_gather(trainer.unfinished())[0]:
        LOGGER.warning(
            "The run in %s has done all iterations, but stopped before it left %s: now it does",
            cfg.OUTPUT_DIR,
            ", ".join(missing),
        )
        return trainer.train()
    LOGGER.warning(
        "The run in %s has finished, after %d of %d iterations: raise SOLVER.%s to go on, or "
        "evaluate it with --eval-only",
        cfg.OUTPUT_DIR,
        trainer.start_iter,
        trainer.max_iter,
        "EPOCHS" if cfg.SOLVER.EPOCHS else "MAX_ITER (and SOLVER.STEPS)",
    )
    return None


def setup(args, trainer_class: type[BaseTrainer] | None = None) -> CfgNode:
    """From the command line to a checked, frozen configuration, with logging and random seeds set.

    The record of a run that is to be resumed stays as it is: :func:`main` renews it, once the
    checkpoint has been loaded.

    Args:
        trainer_class: whose data sets are meant; a detector's by default.

    Raises:
        ValueError, FileNotFoundError: the configuration cannot work; nothing has been written yet.
        FileExistsError: an earlier run has checkpoints in the folder, and is not to be resumed.
    """
    args.config_file = get_config_file(args.config_file)  # detectron2 reads it again, for its log
    cfg = get_own_config(args.config_file, resume=args.resume)
    merge_options(cfg, args.opts)
    if cfg.MODEL.DEVICE == "cuda" and not torch.cuda.is_available():
        logging.getLogger(__name__).warning("MODEL.DEVICE: no GPU is available, using the CPU")
        cfg.MODEL.DEVICE = "cpu"
    if not cfg.OUTPUT_DIR:
        raise ValueError("OUTPUT_DIR: expected a folder to write to, got nothing")
    check_parts(cfg)
    check_solver(cfg)
    check_input(cfg)
    check_norms(cfg)
    check_evaluation(cfg)
    if not args.eval_only:
        check_batch(cfg)
        check_unused(cfg.OUTPUT_DIR, resume=args.resume)
    needed = "TEST" if args.eval_only else "TRAIN"
    if not cfg.DATASETS[needed]:
        raise ValueError(f"DATASETS.{needed}: expected a data set, got none")
    names = cfg.DATASETS.TEST if args.eval_only else cfg.DATASETS.TRAIN + cfg.DATASETS.TEST
    trainer_class = trainer_class or Trainer
    data = trainer_class.check_datasets(cfg, names)
    check_ignored(cfg)
    check_weights(cfg, needed=args.eval_only, resume=args.resume)
    if classes := trainer_class.class_names(names):
        stated = stated_keys(args.config_file, args.opts)
        data += settle_classes(cfg, trainer_class.class_key(cfg), classes, stated)
    seed = keep_seed(cfg) if args.resume and not args.eval_only else None
    changes = changes_since(cfg) if args.resume else []
    cfg.freeze()
    if not args.eval_only:
        claim(cfg.OUTPUT_DIR)
        check_unused(cfg.OUTPUT_DIR, resume=args.resume)  # another job may just have ended
    if comm.is_main_process():
        keep_training(cfg.OUTPUT_DIR)
    starts = not args.eval_only and is_new(cfg.OUTPUT_DIR, resume=args.resume)
    aside = set_aside(cfg.OUTPUT_DIR) if starts else None
    default_setup(cfg, args)
    if starts:
        _record(cfg, resumes=False)
    elif comm.is_main_process():
        refresh_config(cfg.OUTPUT_DIR)  # which default_setup has just overwritten
    if aside:
        LOGGER.info("Metrics of a run that had no checkpoint yet are now in %s", aside)
    for text in data:
        LOGGER.info("%s", text)
    if changes:
        LOGGER.warning(
            "Resuming with other settings than the run had, which take over from here:\n  %s",
            "\n  ".join(changes),
        )
    if seed:
        LOGGER.warning("%s", seed)
    if starts and args.resume:
        LOGGER.warning("--resume: no checkpoint in %s to go on from: a run starts", cfg.OUTPUT_DIR)
    if starts and (text := starts_from_run(cfg, args.config_file)):
        LOGGER.warning("%s", text)
    return cfg


def _record(cfg: CfgNode, *, resumes: bool) -> None:
    if comm.is_main_process():
        record_training(cfg, resumes=resumes)
        refresh_config(cfg.OUTPUT_DIR)
