"""COCO's metrics, also of a detector that finds nothing."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import chain
from pathlib import Path

from detectron2.evaluation import COCOEvaluator
from detectron2.utils import comm
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from ..weights import write_text

# Beside the results: the identifiers of images that could not be read, which no metric is of.
LEFT_OUT_FILE = "left_out.json"


class DetectionEvaluator(COCOEvaluator):
    """detectron2's, with which a detector that finds nothing has an AP of 0 instead of none.

    As otherwise, NaN is left to what has no ground truth.
    """

    def __init__(self, dataset_name: str, *, if_nothing: Sequence[str] = ("bbox",), **options):
        """
        Args:
            if_nothing: the tasks to report if there is no detection; any other detection tells
                them by what it has.
            options: of ``COCOEvaluator``. By default with the official COCO API, since its numbers
                are the ones to publish.
        """
        super().__init__(dataset_name, **{"use_fast_impl": False, **options})
        self._if_nothing = sorted(if_nothing)

    def evaluate(self, img_ids: list[int] | None = None) -> dict:
        """Over the images that could be read, which are all unless some are left out."""
        found = comm.gather([prediction["image_id"] for prediction in self._predictions])
        seen = list(chain(*found))
        if self._output_dir and comm.is_main_process():
            left_out = sorted({*self._coco_api.imgs} - {*seen})
            write_text(Path(self._output_dir, LEFT_OUT_FILE), json.dumps(left_out))
        return super().evaluate(img_ids or seen)

    def _tasks_from_predictions(self, predictions: list[dict]) -> list[str]:
        return super()._tasks_from_predictions(predictions) if predictions else self._if_nothing

    def _derive_coco_results(
        self, coco_eval: COCOeval | None, iou_type: str, class_names: list[str] | None = None
    ) -> dict[str, float]:
        if coco_eval is None:
            coco_eval = _evaluate_nothing(self._coco_api, iou_type)
        return super()._derive_coco_results(coco_eval, iou_type, class_names)


def _evaluate_nothing(truth: COCO, iou_type: str) -> COCOeval:
    """COCO's evaluation of no detections, which ``COCO.loadRes`` does not read."""
    found = COCO()
    found.dataset = {**truth.dataset, "annotations": []}
    found.createIndex()
    evaluation = COCOeval(truth, found, iou_type)
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    return evaluation
