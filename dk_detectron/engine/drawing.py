"""Detections and objects drawn on their pictures."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
from detectron2.data import Metadata
from detectron2.data.detection_utils import read_image
from detectron2.structures import Boxes, BoxMode, Instances
from detectron2.utils.visualizer import ColorMode, Visualizer
from matplotlib import colormaps

from ..weights import replacing

SHORT_SIDE = 480  # of a drawn picture
MODE = ColorMode.SEGMENTATION  # one colour per class


def give_colours(metadata: Metadata) -> Metadata:
    """Has every class a colour of its own, as far as they reach."""
    if not metadata.get("thing_colors"):
        palette = colormaps["Set1"](range(colormaps["Set1"].N))[:, :3]
        colours = (palette[i % len(palette)] for i in range(len(metadata.thing_classes)))
        metadata.thing_colors = [tuple(int(255 * c) for c in colour) for colour in colours]
    return metadata


def write_picture(path: Path, picture: np.ndarray) -> None:
    """Writes uint8 [H, W, 3], BGR, as what the suffix says: whole, or not at all."""
    # Not imwrite, which keeps silent about a full disk.
    _, content = cv2.imencode(path.suffix, picture)
    with replacing(path) as temporary:
        Path(temporary).write_bytes(content.tobytes())


def to_instances(predictions: list[dict], size: tuple[int, int], metadata: Metadata) -> Instances:
    """COCO-format results of one image -> detectron2's structure."""
    instances = Instances(size)
    boxes = np.array([p["bbox"] for p in predictions]).reshape(-1, 4)
    instances.pred_boxes = Boxes(BoxMode.convert(boxes, BoxMode.XYWH_ABS, BoxMode.XYXY_ABS))
    instances.scores = np.array([p["score"] for p in predictions])
    to_contiguous = metadata.thing_dataset_id_to_contiguous_id
    instances.pred_classes = np.array(
        [to_contiguous[p["category_id"]] for p in predictions], dtype=int
    )
    return instances


def draw_pair(record: dict, instances: Instances, metadata: Metadata) -> np.ndarray:
    """Ground truth on the left, detections on the right; BGR."""
    image = read_image(record["file_name"], "RGB")
    scale = SHORT_SIDE / min(image.shape[:2])
    # Boxes alone, as on the right: a mask would recolour the objects.
    keys = "bbox", "bbox_mode", "category_id"
    boxes = record | {"annotations": [{k: a[k] for k in keys} for a in record["annotations"]]}
    left = Visualizer(image, metadata, scale, MODE).draw_dataset_dict(boxes).get_image()
    right = Visualizer(image, metadata, scale, MODE).draw_instance_predictions(instances)
    right = right.get_image()
    gap = np.full((left.shape[0], 8, 3), 255, dtype=np.uint8)
    return np.concatenate([left, gap, right], axis=1)[:, :, ::-1]
