"""Training and evaluation of detectors."""

from __future__ import annotations

import os

from detectron2.config import CfgNode
from detectron2.data import (
    DatasetCatalog,
    DatasetFromList,
    DatasetMapper,
    MapDataset,
    MetadataCatalog,
    build_detection_train_loader,
)
from detectron2.data import transforms as T
from detectron2.data.build import trivial_batch_collator
from detectron2.evaluation import COCOEvaluator
from torch.utils.data import DataLoader

from ..data.datasets import check_on_disk
from ..data.stream import build_stream_loader, seeded
from .trainer import BaseTrainer


class Trainer(BaseTrainer):
    """Trains a detector, and evaluates it on data sets in COCO format."""

    @classmethod
    def check_datasets(cls, cfg: CfgNode, names) -> None:
        """Raises if a data set is unknown or not on disk: before training, not after it."""
        for name in names:
            if name not in DatasetCatalog.list():
                raise ValueError(
                    "DATASETS: expected a registered data set, such as shapes_train or "
                    f"coco_2017_train, got {name!r}"
                )
            check_on_disk(name)

    @classmethod
    def build_train_loader(cls, cfg: CfgNode) -> DataLoader:
        """detectron2's data, with the colours varied by ``INPUT.COLOR_JITTER``, as a stream."""
        mapper = DatasetMapper.from_config(cfg, is_train=True)
        if jitter := cfg.INPUT.COLOR_JITTER:
            mapper["augmentations"] += [
                kind(1 - jitter, 1 + jitter)
                for kind in (T.RandomBrightness, T.RandomContrast, T.RandomSaturation)
            ]
        # detectron2's samplers draw their seed from numpy.
        with seeded(cfg.SEED):
            parts = build_detection_train_loader.from_config(cfg, mapper=DatasetMapper(**mapper))
        records = parts["dataset"]
        grouping = parts["aspect_ratio_grouping"]
        return build_stream_loader(
            MapDataset(DatasetFromList(records, copy=False), parts["mapper"]),
            parts["sampler"],
            total_batch_size=parts["total_batch_size"],
            seed=cfg.SEED,
            groups=[r["width"] > r["height"] for r in records] if grouping else None,
            num_workers=parts["num_workers"],
            collate_fn=trivial_batch_collator,
        )

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
