"""Draws a run's detections beside the ground truth, and prints its metrics.

    %(prog)s --config-file output/demo/config.yaml

Reads OUTPUT_DIR/inference and OUTPUT_DIR/evaluation.json, which tools/train_net.py leaves behind,
and writes OUTPUT_DIR/pictures anew. Without an evaluation, of a run that was interrupted, it
predicts with the last checkpoint.
"""

import argparse
import json
import os
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import numpy as np
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import Instances
from tabulate import tabulate
from tqdm import tqdm

from ..data.datasets import resolve
from ..data.inputs import distinct_names
from ..data.writing import replacing_folder
from ..engine import EVALUATION_FILE, Predictor
from ..engine.detection import inference_folder
from ..engine.drawing import draw_pair, give_colours, to_instances, write_picture
from ..engine.outputs import RESULTS_FILE
from ..engine.record import compare_classes, get_own_config
from ..engine.trainer import by_task
from ..model_zoo import merge_options


def detections(cfg: CfgNode, dataset: str, threshold: float) -> Callable[[dict], Instances]:
    """What gives those of a record: from the last evaluation, else by the last checkpoint."""
    results = inference_folder(cfg.OUTPUT_DIR, dataset) / RESULTS_FILE
    metadata = MetadataCatalog.get(dataset)
    if not results.is_file():
        predictor = Predictor(cfg.OUTPUT_DIR, threshold=threshold)
        compare_classes(predictor.weights, predictor.classes, metadata.get("thing_classes") or ())
        print(f"{results}: no evaluation yet; predicting with {predictor.weights}")
        return lambda record: predictor(record["file_name"])
    found = defaultdict(list)
    for prediction in json.loads(results.read_text()):
        if prediction["score"] >= threshold:
            found[prediction["image_id"]].append(prediction)
    return lambda record: to_instances(
        found[record["image_id"]], (record["height"], record["width"]), metadata
    )


def draw(cfg: CfgNode, count: int, threshold: float) -> Path:
    """Draws ``count`` images of each data set, evenly spread, and returns their folder."""
    chosen = []
    for dataset in cfg.DATASETS.TEST:
        resolve(dataset)
        records = DatasetCatalog.get(dataset)
        places = np.linspace(0, len(records) - 1, min(count, len(records))).round().astype(int)
        chosen += [(dataset, records[place]) for place in places]
    names = distinct_names([record["file_name"] for _, record in chosen])
    found = {dataset: detections(cfg, dataset, threshold) for dataset in cfg.DATASETS.TEST}
    with replacing_folder(Path(cfg.OUTPUT_DIR, "pictures")) as folder:
        for (dataset, record), name in zip(tqdm(chosen, desc="Drawing"), names, strict=True):
            metadata = give_colours(MetadataCatalog.get(dataset))
            instances = found[dataset](record)
            if instances.has("pred_masks"):
                instances.remove("pred_masks")
            write_picture(folder / f"{name}.png", draw_pair(record, instances, metadata))
    return Path(cfg.OUTPUT_DIR, "pictures")


def print_metrics(path: Path) -> None:
    for task, metrics in by_task(json.loads(path.read_text())).items():
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
    parser.add_argument("--opts", nargs="+", default=(), help="KEY VALUE pairs over the file's")
    args = parser.parse_args()
    if args.count < 1:
        parser.error(f"--count: expected 1 or more, got {args.count}")
    cfg = get_own_config(args.config_file)
    merge_options(cfg, args.opts)
    print(f"Pictures: {draw(cfg, args.count, args.threshold)}{os.sep}")
    evaluation = Path(cfg.OUTPUT_DIR, EVALUATION_FILE)
    if evaluation.is_file():
        print_metrics(evaluation)


if __name__ == "__main__":
    main()
