"""Training and evaluation of detectors."""

from __future__ import annotations

import re
from collections import OrderedDict
from functools import partial
from importlib.util import find_spec
from pathlib import Path

from detectron2.config import CfgNode
from detectron2.data import (
    DatasetFromList,
    MapDataset,
    MetadataCatalog,
    build_detection_test_loader,
    build_detection_train_loader,
)
from detectron2.data import transforms as T
from detectron2.data.build import trivial_batch_collator
from detectron2.modeling import GeneralizedRCNNWithTTA
from detectron2.utils import comm
from torch import nn
from tqdm import tqdm

from ..data.checking import Report, class_conflict, gate, shared_images
from ..data.coco import Survey, survey
from ..data.datasets import adopt, check_on_disk, is_coco, repaired, resolve
from ..data.stream import build_stream_loader, seeded
from ..data.unreadable import CountingLoader, Mapper, Readable
from .evaluator import DetectionEvaluator
from .trainer import BaseTrainer


class Trainer(BaseTrainer):
    """Trains a detector, and evaluates it on data sets in COCO format."""

    @classmethod
    def check_datasets(cls, cfg: CfgNode, names) -> list[str]:
        """Looks at all data before work starts.

        Names of the form ``coco:JSON:IMAGES`` are registered.

        Returns:
            Of each data set, what is in it and what has been repaired, for the log.

        Raises:
            FileNotFoundError, ValueError: data that are unknown, not on disk, not sound, or not of
                the same classes.
        """
        own, ours = cls.build_evaluator, Trainer.build_evaluator
        has_own_evaluator = own.__func__ is not ours.__func__  # type: ignore[attr-defined]
        for name in names:
            resolve(name)
            check_on_disk(name)
            if name in cfg.DATASETS.TEST and not has_own_evaluator:
                check_evaluated(name)
        # The first process of a machine looks; the others find what it remembers.
        if comm.get_local_rank():
            comm.synchronize()
        reports = [
            gate(
                name,
                partial(tqdm, desc=name, unit="image", leave=False, disable=None),
                skip=cfg.DATALOADER.SKIP_CORRUPT,
            )
            for name in dict.fromkeys(names)
            if is_coco(name)
        ]
        if not comm.get_local_rank():
            comm.synchronize()
        if reports and (conflict := class_conflict(reports)):
            raise ValueError(conflict)
        for report in reports:
            _check_uses(cfg, report)
            adopt(report.name, without=report.left_out)
        tables = ["\n".join([report.table(), *report.lines()]) for report in reports]
        return tables + shared_images(reports)

    @staticmethod
    def class_names(names) -> list[str]:
        """The classes of data sets that have been checked, if they have any."""
        for name in names:
            metadata = MetadataCatalog.get(name)
            if is_coco(name):
                return survey(metadata.json_file).classes
            if classes := metadata.get("thing_classes"):
                return classes
        return []

    @staticmethod
    def class_key(cfg: CfgNode) -> str:
        """Where the number of classes stands in ``cfg``."""
        one_stage = cfg.MODEL.META_ARCHITECTURE in ("RetinaNet", "FCOS")
        return f"MODEL.{'RETINANET' if one_stage else 'ROI_HEADS'}.NUM_CLASSES"

    @classmethod
    def build_train_loader(cls, cfg: CfgNode) -> CountingLoader:
        """detectron2's data, with the colours varied by ``INPUT.COLOR_JITTER``, as a stream."""
        mapper = Mapper.from_config(cfg, is_train=True)
        if jitter := cfg.INPUT.COLOR_JITTER:
            mapper["augmentations"] += [
                kind(1 - jitter, 1 + jitter)
                for kind in (T.RandomBrightness, T.RandomContrast, T.RandomSaturation)
            ]
        if cfg.MODEL.MASK_ON and _has_run_lengths(cfg):
            mapper["instance_mask_format"] = "bitmask"  # which both kinds can become
        # detectron2's samplers draw their seed from numpy.
        with seeded(cfg.SEED):
            parts = build_detection_train_loader.from_config(cfg, mapper=Mapper(**mapper))
        records = parts["dataset"]
        grouping = parts["aspect_ratio_grouping"]
        return build_stream_loader(
            _readable(cfg, parts, replace=True),
            parts["sampler"],
            total_batch_size=parts["total_batch_size"],
            seed=cfg.SEED,
            groups=[r["width"] > r["height"] for r in records] if grouping else None,
            loader=CountingLoader,
            num_workers=parts["num_workers"],
            collate_fn=trivial_batch_collator,
        )

    @classmethod
    def build_test_loader(cls, cfg: CfgNode, dataset_name: str) -> CountingLoader:
        """detectron2's, of one image at a time."""
        mapper = Mapper(cfg, is_train=False)
        parts = build_detection_test_loader.from_config(cfg, dataset_name, mapper=mapper)
        return CountingLoader(
            _readable(cfg, parts, replace=False),
            sampler=parts["sampler"],
            num_workers=parts["num_workers"],
            collate_fn=trivial_batch_collator,
        )

    @classmethod
    def classes(cls, cfg: CfgNode) -> list[dict]:
        """The categories of the training data."""
        metadata = MetadataCatalog.get(cfg.DATASETS.TRAIN[0])
        names = metadata.get("thing_classes", [])
        ids = metadata.get("thing_dataset_id_to_contiguous_id", {})
        places = {place: identifier for identifier, place in ids.items()}
        return [{"id": places.get(i, i), "name": name} for i, name in enumerate(names)]

    @classmethod
    def build_evaluator(
        cls, cfg: CfgNode, dataset_name: str, output_folder: str | None = None
    ) -> DetectionEvaluator:
        """
        Args:
            output_folder: for the results; by default :func:`inference_folder`.
        """
        check_evaluated(dataset_name)
        folder = output_folder or str(inference_folder(cfg.OUTPUT_DIR, dataset_name))
        heads = {"segm": cfg.MODEL.MASK_ON, "keypoints": cfg.MODEL.KEYPOINT_ON}
        tasks = ["bbox", *(task for task, is_on in heads.items() if is_on)]
        with repaired(dataset_name):
            return DetectionEvaluator(
                dataset_name,
                if_nothing=tasks,
                output_dir=folder,
                kpt_oks_sigmas=cfg.TEST.KEYPOINT_OKS_SIGMAS,
            )

    @classmethod
    def measure_with_TTA(cls, cfg: CfgNode, model: nn.Module) -> OrderedDict:
        """Evaluates with test-time augmentation, as detectron2's own ``train_net.py`` does."""
        evaluators = [
            cls.build_evaluator(
                cfg, name, str(inference_folder(cfg.OUTPUT_DIR, name, "inference_TTA"))
            )
            for name in cfg.DATASETS.TEST
        ]
        return cls.measure(cfg, GeneralizedRCNNWithTTA(cfg, model), evaluators)


def _readable(cfg: CfgNode, parts: dict, *, replace: bool) -> Readable:
    """Of a loader's parts, the data set that it loads from."""
    return Readable(
        MapDataset(DatasetFromList(parts["dataset"], copy=False), parts["mapper"]),
        skip=cfg.DATALOADER.SKIP_CORRUPT,
        replace=replace,
        hint="; dk-check-dataset (tools/check_dataset.py) names all that are damaged",
    )


def check_evaluated(name: str) -> None:
    """Raises ``ValueError`` for a data set that is not evaluated as COCO is."""
    if (kind := MetadataCatalog.get(name).get("evaluator_type")) != "coco":
        raise ValueError(
            f"DATASETS.TEST: expected data sets in COCO format, got {name!r} with evaluator type "
            f"{kind!r}: register it by detectron2's register_coco_instances, name it "
            'coco:JSON:IMAGES, or train without evaluation by DATASETS.TEST "()"'
        )


def inference_folder(output_dir: str, dataset_name: str, parent: str = "inference") -> Path:
    """Where the results on a data set are; ``coco:JSON:IMAGES`` is one folder, not several."""
    return Path(output_dir, parent, re.sub(r"[^\w.-]+", "_", dataset_name))


def _has_run_lengths(cfg: CfgNode) -> bool:
    return any(
        survey(MetadataCatalog.get(name).json_file).run_lengths
        for name in cfg.DATASETS.TRAIN
        if is_coco(name)
    )


def _check_uses(cfg: CfgNode, report: Report) -> None:
    """Raises ``ValueError`` if sound data are of no use for this configuration."""
    found = report.survey
    assert found
    boxes = sum(map(sum, found.boxes))
    if report.name in cfg.DATASETS.TRAIN and not boxes:
        raise ValueError(f"DATASETS.TRAIN: expected objects to learn in {report.name}, got none")
    if report.name in cfg.DATASETS.TEST and found.has_annotations and not boxes:
        raise ValueError(
            f"DATASETS.TEST: expected objects to find in {report.name}, or a file without "
            f"annotations, got none among {found.annotations:,} annotations"
        )
    if cfg.MODEL.MASK_ON and found.has_annotations and found.without_mask:
        raise ValueError(
            f"MODEL.MASK_ON: expected a mask for every object, {report.name} has "
            f"{found.without_mask:,} annotations without; complete or remove them, or train boxes "
            "alone with MODEL.MASK_ON False"
        )
    crops = report.name in cfg.DATASETS.TRAIN and cfg.INPUT.CROP.ENABLED
    if crops and cfg.MODEL.MASK_ON and found.polygons and not find_spec("shapely"):
        raise ValueError(
            "INPUT.CROP.ENABLED: expected the package shapely, by which detectron2 crops polygons "
            f"such as those of {report.name}, got none: pip install shapely, or set "
            "INPUT.CROP.ENABLED False"
        )
    if cfg.MODEL.KEYPOINT_ON and found.has_annotations:
        _check_keypoints(cfg, report.name, found)


def _check_keypoints(cfg: CfgNode, name: str, found: Survey) -> None:
    """Raises ``ValueError`` unless the keypoints are those of the network, which takes any."""
    number, metadata = cfg.MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS, MetadataCatalog.get(name)
    if found.without_keypoints:
        raise ValueError(
            f"MODEL.KEYPOINT_ON: expected keypoints for every object, {name} has "
            f"{found.without_keypoints:,} annotations without; complete (0, 0, 0 is one that is "
            "not labelled) or remove them, or train boxes alone with MODEL.KEYPOINT_ON False"
        )
    if found.keypoints != [number]:
        raise ValueError(
            "MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS: expected as many as each object has in "
            f"{name}, {' or '.join(map(str, found.keypoints))}, got {number}"
        )
    if name in cfg.DATASETS.TRAIN and (
        len(metadata.get("keypoint_names") or ()) != number
        or metadata.get("keypoint_flip_map") is None
    ):
        raise ValueError(
            f"MODEL.KEYPOINT_ON: expected the names of {number} keypoints, and which change places "
            f"in a mirror, as detectron2's metadata of {name}, got "
            f"{metadata.get('keypoint_names')} and {metadata.get('keypoint_flip_map')}: "
            "MetadataCatalog.get(NAME).set(keypoint_names=[...], keypoint_flip_map=[(LEFT, RIGHT), "
            "...]) in a script of your own that calls dk_detectron.engine's main"
        )
