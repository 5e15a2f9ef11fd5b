"""Draws a run's detections beside the ground truth, and prints its metrics.

    %(prog)s --config-file output/demo/config.yaml

Reads OUTPUT_DIR/inference and OUTPUT_DIR/evaluation.json, which tools/train_net.py leaves behind,
and writes OUTPUT_DIR/pictures.
"""

import argparse
import json
import os
from collections import defaultdict
from pathlib import Path

import cv2
import numpy as np
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, Metadata, MetadataCatalog
from detectron2.data.detection_utils import read_image
from detectron2.structures import Boxes, BoxMode, Instances
from detectron2.utils.visualizer import ColorMode, Visualizer
from matplotlib import colormaps
from tabulate import tabulate
from tqdm import tqdm

from ..data.datasets import resolve
from ..engine import EVALUATION_FILE
from ..engine.detection import inference_folder
from ..model_zoo import load_config

SHORT_SIDE = 480
MODE = ColorMode.SEGMENTATION  # one colour per class


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


def draw_pair(record: dict, predictions: list[dict], metadata: Metadata) -> np.ndarray:
    """Ground truth on the left, detections on the right; RGB."""
    image = read_image(record["file_name"], "RGB")
    scale = SHORT_SIDE / min(image.shape[:2])
    instances = to_instances(predictions, image.shape[:2], metadata)
    # Boxes alone, as on the right: a mask would recolour the objects.
    keys = "bbox", "bbox_mode", "category_id"
    boxes = record | {"annotations": [{k: a[k] for k in keys} for a in record["annotations"]]}
    left = Visualizer(image, metadata, scale, MODE).draw_dataset_dict(boxes).get_image()
    right = Visualizer(image, metadata, scale, MODE).draw_instance_predictions(instances)
    right = right.get_image()
    gap = np.full((left.shape[0], 8, 3), 255, dtype=np.uint8)
    return np.concatenate([left, gap, right], axis=1)


def draw(cfg: CfgNode, dataset: str, count: int, threshold: float) -> Path:
    """Draws ``count`` images, evenly spread over the data set, and returns their folder."""
    results = inference_folder(cfg.OUTPUT_DIR, dataset) / "coco_instances_results.json"
    if not results.is_file():
        raise FileNotFoundError(
            f"{results}: expected the detections that tools/train_net.py writes"
        )
    predictions = defaultdict(list)
    for prediction in json.loads(results.read_text()):
        if prediction["score"] >= threshold:
            predictions[prediction["image_id"]].append(prediction)
    resolve(dataset)
    records = DatasetCatalog.get(dataset)
    metadata = MetadataCatalog.get(dataset)
    if not metadata.get("thing_colors"):
        palette = colormaps["Set1"](range(colormaps["Set1"].N))[:, :3]
        colours = (palette[i % len(palette)] for i in range(len(metadata.thing_classes)))
        metadata.thing_colors = [tuple(int(255 * c) for c in colour) for colour in colours]
    folder = Path(cfg.OUTPUT_DIR, "pictures")
    folder.mkdir(parents=True, exist_ok=True)
    chosen = np.linspace(0, len(records) - 1, min(count, len(records))).round().astype(int)
    for i in tqdm(chosen, desc="Drawing"):
        picture = draw_pair(records[i], predictions[records[i]["image_id"]], metadata)
        path = folder / f"{Path(records[i]['file_name']).stem}.png"
        cv2.imwrite(str(path), cv2.cvtColor(picture, cv2.COLOR_RGB2BGR))
    return folder


def print_metrics(path: Path) -> None:
    for task, metrics in json.loads(path.read_text()).items():
        rows = [[name, value] for name, value in metrics.items()]
        print(f"\n{task}, from {path}:\n")
        print(tabulate(rows, ["metric", "%"], tablefmt="github", floatfmt=".1f"))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--config-file", required=True, help="the run's OUTPUT_DIR/config.yaml")
    parser.add_argument("--count", type=int, default=12, help="number of pictures (default: 12)")
    parser.add_argument("--threshold", type=float, default=0.6, help="least score (default: 0.6)")
    args = parser.parse_args()
    cfg = load_config(args.config_file)
    for dataset in cfg.DATASETS.TEST:
        print(f"Pictures: {draw(cfg, dataset, args.count, args.threshold)}{os.sep}")
    evaluation = Path(cfg.OUTPUT_DIR, EVALUATION_FILE)
    if evaluation.is_file():
        print_metrics(evaluation)


if __name__ == "__main__":
    main()
