"""Data sets in COCO's format under their names, registered lazily as detectron2 registers its own.

shapes_train, shapes_val, shapes_test    dk-prepare-shapes
trees_train, trees_val                   dk-prepare-trees
coco:JSON:IMAGES                         any other: a file of annotations and a folder of pictures
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import load_coco_json
from detectron2.utils.file_io import PathManager

from .coco import survey

SPLITS = {
    "shapes_train": "instances_train.json",
    "shapes_val": "instances_val.json",
    "shapes_test": "image_info_test.json",
    "trees_train": "instances_train.json",
    "trees_val": "instances_val.json",
}
# Such a name says where the data are: in every process of a job it means the same.
PREFIX = "coco:"


def datasets_root() -> Path:
    """The folder of all data sets, detectron2's ``DETECTRON2_DATASETS``."""
    return Path(os.environ.get("DETECTRON2_DATASETS", "datasets")).expanduser()


def register_all(root: Path) -> None:
    """Registers every split; what is not on disk is missed only when it is used."""
    for name, file in SPLITS.items():
        dataset, split = name.split("_")
        register(name, str(root / dataset / "annotations" / file), str(root / dataset / split))
        MetadataCatalog.get(name).set(
            how_to_get=f"make it with dk-prepare-{dataset} (tools/prepare_{dataset}.py)"
        )


def register(name: str, json_file: str, image_root: str) -> None:
    """As detectron2's ``register_coco_instances``, but what is read is what `survey` repaired."""
    DatasetCatalog.register(name, partial(load, json_file, image_root, name))
    MetadataCatalog.get(name).set(json_file=json_file, image_root=image_root, evaluator_type="coco")


def resolve(name: str) -> None:
    """Registers a data set whose name says where it is; leaves one that is registered alone.

    Raises:
        ValueError: the name is neither registered nor ``coco:JSON:IMAGES``.
    """
    if name in DatasetCatalog.list():
        return
    json_file, _, image_root = name.removeprefix(PREFIX).partition(":")
    if not name.startswith(PREFIX) or not json_file or not image_root:
        raise ValueError(
            "DATASETS: expected a registered data set, such as shapes_train or coco_2017_train, "
            "or coco:JSON:IMAGES, such as coco:annotations/train.json:images/train, "
            f"got {name!r}"
        )
    register(name, *map(os.path.expanduser, (json_file, image_root)))


def is_coco(name: str) -> bool:
    """Whether a registered data set is in COCO's format, with a file and a folder."""
    metadata = MetadataCatalog.get(name)
    files = metadata.get("json_file"), metadata.get("image_root")
    return metadata.get("evaluator_type") == "coco" and None not in files


def require_coco(name: str) -> None:
    """:func:`resolve`, of what can be checked.

    Raises:
        ValueError: it is no data set in COCO's format.
    """
    try:
        resolve(name)
    except ValueError as error:
        raise ValueError(f"{name}: expected a data set; {error}") from None
    if not is_coco(name):
        raise ValueError(f"{name}: expected a data set that is registered in COCO's format")


def adopt(name: str, without: Collection[str] = ()) -> None:
    """Has a data set that detectron2 registered in COCO's format read as our own are.

    Args:
        without: file names of pictures that are left out, in one of our own as well.
    """
    if without or DatasetCatalog[name].__module__ == load_coco_json.__module__:
        metadata = MetadataCatalog.get(name)
        DatasetCatalog[name] = partial(
            load, metadata.json_file, metadata.image_root, name, without=without
        )


@contextmanager
def repaired(name: str) -> Iterator[None]:
    """Within it, the metadata of a data set name the repaired file, if there is one."""
    metadata = MetadataCatalog.get(name)
    original = metadata.get("json_file")
    if original is not None:
        vars(metadata)["json_file"] = survey(original).path  # metadata refuse to be set anew
    try:
        yield
    finally:
        if original is not None:
            vars(metadata)["json_file"] = original


def check_on_disk(name: str) -> None:
    """Raises ``FileNotFoundError`` unless the files of a registered data set are there."""
    metadata = MetadataCatalog.get(name)
    for key in "json_file", "image_root":
        path = metadata.get(key)
        if path is not None and not PathManager.exists(path):
            raise FileNotFoundError(
                f"DATASETS: {name!r} expects its {key} at {path}; {_cure(name)}"
            )


def _cure(name: str) -> str:
    """What to do where a registered data set is missing."""
    if name.startswith(PREFIX):
        return "correct the path, which is relative to the current folder"
    default = "correct the path, or set DETECTRON2_DATASETS to the folder that holds it"
    return MetadataCatalog.get(name).get("how_to_get", default)


def load(json_file: str, image_root: str, name: str, without: Collection[str] = ()) -> list[dict]:
    """detectron2's records of a split, after its repair, but for some pictures.

    Raises:
        FileNotFoundError: it is not on disk.
        ValueError: it is of no use; every fault is named.
    """
    if not PathManager.isfile(json_file):
        raise FileNotFoundError(f"{name}: expected its annotations at {json_file}; {_cure(name)}")
    found = survey(json_file)
    if found.faults:
        raise ValueError(f"{json_file}: " + "; ".join(found.faults))
    records = load_coco_json(found.path, image_root, name)
    left_out = {os.path.join(image_root, file) for file in without}
    return [record for record in records if record["file_name"] not in left_out]


register_all(datasets_root())
