"""Training and evaluation of image classifiers: the paper's pretraining (appendix D)."""

from __future__ import annotations

import torch
from detectron2.config import CfgNode
from detectron2.data.samplers import InferenceSampler, TrainingSampler
from detectron2.evaluation import DatasetEvaluator
from detectron2.utils import comm
from torch import Tensor
from torchvision.transforms import v2

from ..config import is_classifier
from ..data.image_folder import (
    PictureDataset,
    check_classes,
    collate,
    evaluation_transform,
    load_pictures,
    training_transform,
)
from ..data.stream import build_stream_loader, local_batch_size
from ..data.unreadable import CountingLoader, Readable
from .trainer import BaseTrainer


class AccuracyEvaluator(DatasetEvaluator):
    """Top-1 and top-5 accuracy, in percent, over all processes."""

    KS = (1, 5)

    def reset(self) -> None:
        self._images = 0
        self._correct = [0] * len(self.KS)

    def process(self, inputs: dict[str, Tensor], outputs: Tensor) -> None:
        """
        Args:
            inputs: a batch with "label" [N].
            outputs: logits [N, num_classes].
        """
        labels = inputs["label"].to(outputs.device)
        best = outputs.topk(min(max(self.KS), outputs.shape[1])).indices
        hits = best == labels[:, None]
        self._images += len(labels)
        for i, k in enumerate(self.KS):
            self._correct[i] += int(hits[:, :k].sum())

    def evaluate(self) -> dict | None:
        """
        Returns:
            In the main process, {"classification": {"top1", "top5", "images"}}.

        Raises:
            ValueError: there was no picture.
        """
        parts = comm.gather((self._images, *self._correct))
        if not comm.is_main_process():
            return None
        images, *correct = (sum(part) for part in zip(*parts, strict=True))
        if not images:
            raise ValueError("expected pictures to evaluate on, got none that can be read")
        accuracy = {f"top{k}": 100 * n / images for k, n in zip(self.KS, correct, strict=True)}
        return {"classification": {**accuracy, "images": images}}


class ClassificationTrainer(BaseTrainer):
    """Trains an ``ImageClassifier``, and evaluates its accuracy."""

    @classmethod
    def check_datasets(cls, cfg: CfgNode, names) -> list[str]:
        """Raises unless the data sets are on disk and have the same classes."""
        if not is_classifier(cfg):
            raise ValueError(
                "MODEL.META_ARCHITECTURE: expected ImageClassifier, as in configs/ImageNet, got "
                f"{cfg.MODEL.META_ARCHITECTURE!r}"
            )
        check_classes(names)
        return []

    @staticmethod
    def class_names(names) -> list[str]:
        """The classes of data sets that have been checked."""
        return load_pictures(names[0]).classes

    @staticmethod
    def class_key(cfg: CfgNode) -> str:
        """Where the number of classes stands in ``cfg``."""
        return "MODEL.CLASSIFIER.NUM_CLASSES"

    @staticmethod
    def auto_scale_workers(cfg: CfgNode, num_workers: int) -> CfgNode:
        """detectron2's, and from epochs to iterations; none of its periods is above an epoch."""
        cfg = BaseTrainer.auto_scale_workers(cfg, num_workers)
        if not cfg.SOLVER.EPOCHS:
            return cfg
        cfg = cfg.clone()
        cfg.defrost()
        images = sum(len(load_pictures(name).samples) for name in cfg.DATASETS.TRAIN)
        epoch = images / cfg.SOLVER.IMS_PER_BATCH
        cfg.SOLVER.MAX_ITER = max(1, round(cfg.SOLVER.EPOCHS * epoch))
        cfg.SOLVER.WARMUP_ITERS = round(cfg.SOLVER.WARMUP_EPOCHS * epoch)
        # Those of the configurations are an epoch of ImageNet, longer than a run on few pictures.
        for section, key in (cfg.SOLVER, "CHECKPOINT_PERIOD"), (cfg.TEST, "EVAL_PERIOD"):
            section[key] = min(section[key], max(1, round(epoch)))
        cfg.freeze()
        return cfg

    @classmethod
    def build_train_loader(cls, cfg: CfgNode) -> CountingLoader:
        samples = [s for name in cfg.DATASETS.TRAIN for s in load_pictures(name).samples]
        return build_stream_loader(
            _pictures(cfg, samples, training_transform(cfg), replace=True),
            TrainingSampler(len(samples), seed=cfg.SEED),
            total_batch_size=cfg.SOLVER.IMS_PER_BATCH,
            seed=cfg.SEED,
            loader=CountingLoader,
            **_loading(cfg),
        )

    @classmethod
    def build_test_loader(cls, cfg: CfgNode, dataset_name: str) -> CountingLoader:
        """The whole data set, divided among the processes."""
        samples = load_pictures(dataset_name).samples
        return CountingLoader(
            _pictures(cfg, samples, evaluation_transform(cfg), replace=False),
            batch_size=local_batch_size(cfg.SOLVER.IMS_PER_BATCH),
            sampler=InferenceSampler(len(samples)),
            generator=torch.Generator(),
            **_loading(cfg),
        )

    @classmethod
    def classes(cls, cfg: CfgNode) -> list[dict]:
        """The class folders of the training data."""
        names = cls.class_names(cfg.DATASETS.TRAIN)
        return [{"id": i, "name": name} for i, name in enumerate(names)]

    @classmethod
    def build_evaluator(cls, cfg: CfgNode, dataset_name: str) -> AccuracyEvaluator:
        return AccuracyEvaluator()


def _pictures(cfg: CfgNode, samples: list, transform: v2.Compose, *, replace: bool) -> Readable:
    pictures = PictureDataset(samples, transform, bgr=cfg.INPUT.FORMAT == "BGR")
    return Readable(pictures, skip=cfg.DATALOADER.SKIP_CORRUPT, replace=replace)


def _loading(cfg: CfgNode) -> dict:
    return {
        "num_workers": cfg.DATALOADER.NUM_WORKERS,
        "collate_fn": collate,
        "pin_memory": cfg.MODEL.DEVICE != "cpu",
    }
