"""The embedded data sets under their names, registered lazily as detectron2 registers its own.

shapes_train, shapes_val, shapes_test    dk-prepare-shapes
trees_train, trees_val                   dk-prepare-trees
"""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import load_coco_json
from detectron2.utils.file_io import PathManager

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
    for name, file in SPLITS.items():
        dataset, split = name.split("_")
        json_file = str(root / dataset / "annotations" / file)
        image_root = str(root / dataset / split)
        DatasetCatalog.register(name, partial(load, json_file, image_root, name))
        MetadataCatalog.get(name).set(
            json_file=json_file,
            image_root=image_root,
            evaluator_type="coco",
            how_to_get=f"make it with dk-prepare-{dataset} (tools/prepare_{dataset}.py)",
        )


def check_on_disk(name: str) -> None:
    """Raises ``FileNotFoundError`` unless the files of a registered data set are there."""
    metadata = MetadataCatalog.get(name)
    for key in "json_file", "image_root":
        path = metadata.get(key)
        if path is not None and not PathManager.exists(path):
            cure = metadata.get("how_to_get", "set DETECTRON2_DATASETS to the folder that holds it")
            raise FileNotFoundError(f"DATASETS: {name!r} expects its {key} at {path}; {cure}")


def load(json_file: str, image_root: str, name: str) -> list[dict]:
    """detectron2's records of a split.

    Raises:
        FileNotFoundError: it is not on disk.
    """
    if not os.path.isfile(json_file):
        cure = MetadataCatalog.get(name).how_to_get
        raise FileNotFoundError(f"{name}: expected its annotations at {json_file}; {cure}")
    return load_coco_json(json_file, image_root, name)


register_all(datasets_root())
