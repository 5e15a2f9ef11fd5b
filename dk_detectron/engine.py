"""detectron2's default trainer, on GPUs or CPU processes, with this project's parameter groups."""

from __future__ import annotations

import json
import logging
import math
import os
import weakref
from collections import OrderedDict
from functools import partial

import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.data import (
    DatasetCatalog,
    DatasetMapper,
    MetadataCatalog,
    build_detection_train_loader,
)
from detectron2.data import transforms as T
from detectron2.engine import (
    DefaultTrainer,
    TrainerBase,
    create_ddp_model,
    default_setup,
)
from detectron2.evaluation import COCOEvaluator
from detectron2.solver.build import get_default_optimizer_params, maybe_add_gradient_clipping
from detectron2.utils import comm
from detectron2.utils.file_io import PathManager
from detectron2.utils.logger import setup_logger
from torch import nn

from .amp import build_loop, check_amp
from .checkpoint import Checkpointer, refuse_pickle
from .config import add_dk_config

EVALUATION_FILE = "evaluation.json"
OPTIMIZERS = ("SGD", "AdamW")


def setup(args) -> CfgNode:
    """From the command line to a checked, frozen configuration, with logging and random seeds set.

    Raises:
        ValueError, FileNotFoundError: the configuration cannot work; nothing has been written yet.
    """
    if args.config_file and not os.path.isfile(args.config_file):
        raise FileNotFoundError(f"--config-file: expected a YAML file, got {args.config_file!r}")
    cfg = get_cfg()
    add_dk_config(cfg)
    cfg.merge_from_file(args.config_file)
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
    check_datasets(cfg.DATASETS.TEST if args.eval_only else cfg.DATASETS.TRAIN + cfg.DATASETS.TEST)
    check_weights(cfg, needed=args.eval_only, resume=args.resume)
    cfg.freeze()
    default_setup(cfg, args)
    return cfg


def check_datasets(names) -> None:
    """Raises if a data set is unknown or not on disk: before training, not after it."""
    for name in names:
        if name not in DatasetCatalog.list():
            raise ValueError(
                "DATASETS: expected a registered data set, such as shapes_train or "
                f"coco_2017_train, got {name!r}"
            )
        metadata = MetadataCatalog.get(name)
        for key in "json_file", "image_root":
            path = metadata.get(key)
            if path is not None and not PathManager.exists(path):
                cure = metadata.get(
                    "how_to_get", "set DETECTRON2_DATASETS to the folder that holds it"
                )
                raise FileNotFoundError(f"DATASETS: {name!r} expects its {key} at {path}; {cure}")


def check_weights(cfg: CfgNode, *, needed: bool, resume: bool) -> None:
    """Raises if ``MODEL.WEIGHTS`` names no file, or training could not learn without."""
    if resume and os.path.exists(os.path.join(cfg.OUTPUT_DIR, "last_checkpoint")):
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


class Trainer(DefaultTrainer):
    """``DefaultTrainer`` that also runs distributed on CPUs, and evaluates on COCO-format data.

    ``OUTPUT_DIR/evaluation.json`` holds the metrics of the last evaluation.
    """

    def __init__(self, cfg: CfgNode):
        # DefaultTrainer.__init__, but for `device_ids`, which distributed training on CPUs refuses.
        TrainerBase.__init__(self)
        if not logging.getLogger("detectron2").isEnabledFor(logging.INFO):
            setup_logger()
        cfg = self.auto_scale_workers(cfg, comm.get_world_size())
        model = self.build_model(cfg)
        optimizer = self.build_optimizer(cfg, model)
        data_loader = self.build_train_loader(cfg)
        device_ids = None if cfg.MODEL.DEVICE == "cpu" else [comm.get_local_rank()]
        model = create_ddp_model(model, broadcast_buffers=False, device_ids=device_ids)
        self._trainer = build_loop(cfg, model, data_loader, optimizer)
        self.scheduler = self.build_lr_scheduler(cfg, optimizer)
        self.checkpointer = Checkpointer(model, cfg.OUTPUT_DIR, trainer=weakref.proxy(self))
        self.start_iter = 0
        self.max_iter = cfg.SOLVER.MAX_ITER
        self.cfg = cfg
        self.register_hooks(self.build_hooks())

    @classmethod
    def build_model(cls, cfg: CfgNode) -> nn.Module:
        model = super().build_model(cfg)
        if cfg.MODEL.BACKBONE.COMPILE:
            model.backbone.compile(dynamic=True)  # in place, so that names stay as they are
        # Convolutions hand on the layout of their weights.
        return model.to(memory_format=torch.channels_last) if cfg.MODEL.CHANNELS_LAST else model

    @classmethod
    def build_train_loader(cls, cfg: CfgNode):
        """detectron2's, with the colours varied by ``INPUT.COLOR_JITTER``."""
        arguments = DatasetMapper.from_config(cfg, is_train=True)
        if jitter := cfg.INPUT.COLOR_JITTER:
            arguments["augmentations"] += [
                kind(1 - jitter, 1 + jitter)
                for kind in (T.RandomBrightness, T.RandomContrast, T.RandomSaturation)
            ]
        return build_detection_train_loader(cfg, mapper=DatasetMapper(**arguments))

    @classmethod
    def build_optimizer(cls, cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
        """``SOLVER.OPTIMIZER``, with detectron2's parameter groups.

        The learning rate of offset generators is multiplied by ``SOLVER.OFFSET_LR_FACTOR``.
        """
        # fmt: off
        base_lr       = cfg.SOLVER.BASE_LR
        weight_decay  = cfg.SOLVER.WEIGHT_DECAY
        offset_factor = cfg.SOLVER.OFFSET_LR_FACTOR
        bias_factor   = cfg.SOLVER.BIAS_LR_FACTOR
        # fmt: on

        def lr_factor(name: str) -> float:
            # The bias factor is folded in here, because detectron2's own would undo the other.
            return (offset_factor if "offset_generator." in name else 1.0) * (
                bias_factor if name.endswith(".bias") else 1.0
            )

        params = get_default_optimizer_params(
            model,
            base_lr=base_lr,
            weight_decay=weight_decay,
            weight_decay_norm=cfg.SOLVER.WEIGHT_DECAY_NORM,
            weight_decay_bias=cfg.SOLVER.WEIGHT_DECAY_BIAS,
            lr_factor_func=lr_factor,
        )
        optimizer = partial(
            maybe_add_gradient_clipping(cfg, getattr(torch.optim, cfg.SOLVER.OPTIMIZER)),
            params,
            lr=base_lr,
            weight_decay=weight_decay,
        )
        if cfg.SOLVER.OPTIMIZER == "AdamW":
            return optimizer()
        return optimizer(momentum=cfg.SOLVER.MOMENTUM, nesterov=cfg.SOLVER.NESTEROV)

    @classmethod
    def build_evaluator(cls, cfg: CfgNode, dataset_name: str) -> COCOEvaluator:
        evaluator_type = MetadataCatalog.get(dataset_name).evaluator_type
        if evaluator_type != "coco":
            raise ValueError(
                f"DATASETS.TEST: expected data sets in COCO format, got {dataset_name!r} with "
                f"evaluator type {evaluator_type!r}"
            )
        # The official COCO API, since its numbers are the ones to publish.
        output_dir = os.path.join(cfg.OUTPUT_DIR, "inference", dataset_name)
        return COCOEvaluator(dataset_name, output_dir=output_dir, use_fast_impl=False)

    @classmethod
    def test(cls, cfg: CfgNode, model: nn.Module, evaluators=None) -> OrderedDict:
        results = super().test(cfg, model, evaluators)
        if comm.is_main_process():
            path = os.path.join(cfg.OUTPUT_DIR, EVALUATION_FILE)
            with open(path + ".tmp", "w") as f:
                json.dump(_without_nan(results), f, indent=2)
            os.replace(path + ".tmp", path)
        return results


def _without_nan(results):
    """JSON has no NaN, which COCO's metrics use where no object has the size in question."""
    if isinstance(results, dict):
        return {key: _without_nan(value) for key, value in results.items()}
    return None if isinstance(results, float) and math.isnan(results) else results
