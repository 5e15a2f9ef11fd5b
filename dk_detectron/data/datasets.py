"""The embedded data sets under their names, as detectron2 registers its own: lazily, from one folder.

    shapes_train, shapes_val, shapes_test    tools/prepare_shapes.py
    trees_train, trees_val                   tools/prepare_trees.py
"""

from __future__ import annotations

import os
from pathlib import Path

from detectron2.data import MetadataCatalog
from detectron2.data.datasets import register_coco_instances

SPLITS = {
    "shapes_train": "instances_train.json",
    "shapes_val": "instances_val.json",
    "shapes_test": "image_info_test.json",
    "trees_train": "instances_train.json",
    "trees_val": "instances_val.json",
}


def datasets_root() -> Path:
    """The folder of all data sets, detectron2's ``DETECTRON2_DATASETS``."""
    return Path(os.environ.get("DETECTRON2_DATASETS", "datasets")).expanduser()


def register_all(root: Path) -> None:
    """Registers every split; what is not on disk is missed only when it is used."""
    for name, json_file in SPLITS.items():
        dataset, split = name.split("_")
        folder = root / dataset
        metadata = {"how_to_get": f"make it with `python tools/prepare_{dataset}.py`"}
        register_coco_instances(
            name, metadata, str(folder / "annotations" / json_file), str(folder / split)
        )
        MetadataCatalog.get(name).evaluator_type = "coco"


register_all(datasets_root())
