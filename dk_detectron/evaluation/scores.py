"""COCO's average precisions of results, by class, size and threshold, with their curves."""

from __future__ import annotations

import io
import math
from collections.abc import Collection, Sequence
from contextlib import redirect_stdout

import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

AREAS = "all", "small", "medium", "large"


def without_images(truth: COCO, left_out: Collection[int]) -> COCO:
    """The ground truth of all other images; itself if none is left out."""
    if not left_out:
        return truth
    kept = COCO()
    kept.dataset = {
        **truth.dataset,
        "images": [x for x in truth.dataset["images"] if x["id"] not in left_out],
        "annotations": [
            x for x in truth.dataset.get("annotations", []) if x["image_id"] not in left_out
        ],
    }
    with redirect_stdout(io.StringIO()):
        kept.createIndex()
    return kept


class Scores:
    """
    Attributes:
        categories: their identifiers, in the order of the curves.
        recalls: [R], from 0 to 1.
    """

    def __init__(self, truth: COCO, results: Sequence[dict]):
        """
        Args:
            results: with boxes, in COCO's format.
        """
        found = COCO()
        boxes = [
            {**result, "id": number, "area": math.prod(result["bbox"][2:]), "iscrowd": 0}
            for number, result in enumerate(results, start=1)
        ]
        found.dataset = {**truth.dataset, "annotations": boxes}
        with redirect_stdout(io.StringIO()):
            found.createIndex()
            evaluation = COCOeval(truth, found, "bbox")
            evaluation.evaluate()
            evaluation.accumulate()
        self.categories: list[int] = list(evaluation.params.catIds)
        self.recalls: np.ndarray = evaluation.params.recThrs
        self._thresholds = np.asarray(evaluation.params.iouThrs)
        # [thresholds, recalls, classes, areas], of up to 100 detections; -1 of no objects.
        self._precision: np.ndarray = evaluation.eval["precision"][..., -1]

    def ap(
        self, *, threshold: float | None = None, category: int | None = None, area: str = "all"
    ) -> float:
        """The mean of the precision; NaN where there are no objects.

        Args:
            threshold: of the intersection over union; by default COCO's ten from 0.5 to 0.95.
            category: by default, all.
        """
        chosen = self._chosen(threshold, category, area)
        return float(chosen[chosen > -1].mean()) if (chosen > -1).any() else math.nan

    def precision(self, *, threshold: float) -> np.ndarray:
        """[R]: at each recall, the mean over the classes."""
        chosen = self._chosen(threshold, None, "all")[0]
        with_objects = (chosen > -1).all(0)
        return chosen[:, with_objects].mean(1) if with_objects.any() else 0 * self.recalls

    def _chosen(self, threshold: float | None, category: int | None, area: str) -> np.ndarray:
        """[thresholds, recalls, classes]"""
        precision = self._precision[..., AREAS.index(area)]
        if category is not None:
            precision = precision[:, :, [self.categories.index(category)]]
        if threshold is not None:
            precision = precision[[int(abs(self._thresholds - threshold).argmin())]]
        return precision
