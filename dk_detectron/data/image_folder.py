"""Classification data: pictures in one folder for each class, as torchvision's ImageFolder reads.

imagenet_train, imagenet_val                    $DETECTRON2_DATASETS/imagenet/{train,val}
shapes_classes_train, shapes_classes_val        dk-prepare-shapes --classes

Where a configuration names a data set, the path of any other such folder does as well.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, DatasetFromList, MetadataCatalog
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.datasets import ImageFolder
from torchvision.datasets.folder import IMG_EXTENSIONS, has_file_allowed_extension
from torchvision.transforms import v2

from .datasets import check_on_disk, datasets_root
from .pictures import read_picture

# Below detectron2's, whose handlers write to the terminal and to log.txt.
LOGGER = logging.getLogger("detectron2.dk_detectron.data.image_folder")

HOW_TO_GET = {
    "imagenet": "put the class folders n01440764 ... n15075141 there, for val too",
    "shapes_classes": "make it with dk-prepare-shapes (tools/prepare_shapes.py) --classes",
}


# INPUT.RANDOM_FLIP, which may also be "none".
FLIPS = {"horizontal": v2.RandomHorizontalFlip, "vertical": v2.RandomVerticalFlip}


class Pictures(NamedTuple):
    """A data set.

    Attributes:
        classes: names of the class folders, sorted: the labels in their order.
        samples: (path, label) of every picture.
    """

    classes: list[str]
    samples: list[tuple[str, int]]


def register_image_folder(name: str, root: str | Path, how_to_get: str | None = None) -> None:
    """Gives a folder of class folders a name for configurations; it is read when it is used.

    Args:
        how_to_get: the cure that the error names when it is missing.
    """
    DatasetCatalog.register(name, partial(read_image_folder, str(root)))
    MetadataCatalog.get(name).set(image_root=str(root), evaluator_type="classification")
    if how_to_get:
        MetadataCatalog.get(name).set(how_to_get=how_to_get)


def register_all(root: Path) -> None:
    """Registers the data sets of the table above."""
    for dataset, how_to_get in HOW_TO_GET.items():
        for split in "train", "val":
            register_image_folder(f"{dataset}_{split}", root / dataset / split, how_to_get)


class ClassFolders(ImageFolder):
    """``ImageFolder`` without what programs and systems leave among pictures.

    Attributes:
        left_out: such folders, and pictures by their names, in ``root``.
        others: what is no picture by its name.
    """

    def __init__(self, root: str):
        self.left_out: list[str] = []
        self.others: list[str] = []
        super().__init__(root, is_valid_file=lambda path: self._is_picture(path, root))

    def find_classes(self, directory: str) -> tuple[list[str], dict[str, int]]:
        names, _ = super().find_classes(directory)
        self.left_out += filter(is_left_behind, names)
        names = [name for name in names if not is_left_behind(name)]
        return names, {name: label for label, name in enumerate(names)}

    def _is_picture(self, path: str, root: str) -> bool:
        name = os.path.relpath(path, root)
        is_picture = has_file_allowed_extension(path, IMG_EXTENSIONS)
        if not any(map(is_left_behind, Path(name).parts)):
            if not is_picture:
                self.others.append(name)
            return is_picture
        if is_picture:
            self.left_out.append(name)
        return False


def is_left_behind(name: str) -> bool:
    """Whether a file or folder is hidden (``.ipynb_checkpoints``, ``._picture.jpg``), or one of
    those of macOS (``__MACOSX``) and of network disks (``@eaDir``)."""
    return name.startswith((".", "__MACOSX", "@eaDir"))


@lru_cache
def read_image_folder(root: str) -> Pictures:
    """Lists a folder, once; what is left out is logged.

    Raises:
        FileNotFoundError: there is no class folder, or one holds no pictures.
    """
    try:
        folder = ClassFolders(root)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"{root}: expected one folder of pictures for each class: {error} Pictures are "
            f"{', '.join(IMG_EXTENSIONS)}"
        ) from None
    kinds = {
        "hidden files and folders": folder.left_out,
        f"files that are not named as pictures are ({', '.join(IMG_EXTENSIONS)})": folder.others,
    }
    for kind, found in kinds.items():
        if found:
            some = ", ".join(found[:3]) + (", ..." if len(found) > 3 else "")
            LOGGER.warning("%s: %d %s, left out: %s", root, len(found), kind, some)
    return Pictures(folder.classes, folder.samples)


def load_pictures(name: str) -> Pictures:
    """The data set of a registered name, or of the path of a folder.

    Raises:
        ValueError: it is neither, or another kind of data set.
        FileNotFoundError: it is not on disk, or without class folders.
    """
    if name in DatasetCatalog.list():
        if MetadataCatalog.get(name).get("evaluator_type") == "classification":
            check_on_disk(name)
            return DatasetCatalog.get(name)
    elif os.path.isdir(name):
        return read_image_folder(name)
    raise ValueError(
        "DATASETS: expected a registered set of labelled pictures, such as imagenet_train, or the "
        f"path of a folder of class folders, got {name!r}"
    )


def check_classes(names: list[str]) -> None:
    """Raises ``ValueError`` unless all data sets have the same classes."""
    found = {name: load_pictures(name).classes for name in names}
    (first, expected), *others = found.items()
    for name, classes in others:
        if missing := set(expected) ^ set(classes):
            some = ", ".join(sorted(missing)[:5]) + (", ..." if len(missing) > 5 else "")
            raise ValueError(
                f"DATASETS: expected the same class folders in {first!r} ({len(expected)}) and "
                f"{name!r} ({len(classes)}), only one of them has: {some}"
            )


def training_transform(cfg: CfgNode) -> v2.Compose:
    """Scale, aspect ratio, side and colour varied (appendix D); to uint8 [3, size, size]."""
    # fmt: off
    size   = cfg.INPUT.CROP_SIZE
    flip   = cfg.INPUT.RANDOM_FLIP
    jitter = cfg.INPUT.COLOR_JITTER
    # fmt: on
    steps: list[Any] = [v2.RandomResizedCrop(size)]
    if flip != "none":
        steps.append(FLIPS[flip]())
    if jitter:
        steps.append(v2.ColorJitter(jitter, jitter, jitter))
    return v2.Compose([*steps, v2.PILToTensor()])


def evaluation_transform(cfg: CfgNode) -> v2.Compose:
    """The shorter side resized, the centre cut out; to uint8 [3, size, size]."""
    return v2.Compose(
        [
            v2.Resize(cfg.INPUT.MIN_SIZE_TEST),
            v2.CenterCrop(cfg.INPUT.CROP_SIZE),
            v2.PILToTensor(),
        ]
    )


class PictureDataset(Dataset):
    """What a model takes, for every picture: "image" (uint8 [3, H, W]), "label", "file_name"."""

    def __init__(
        self,
        samples: list[tuple[str, int]],
        transform: Callable[[Image.Image], Tensor],
        *,
        bgr: bool = False,
    ):
        """
        Args:
            samples: of one or more :class:`Pictures`.
            bgr: whether the model wants blue first.
        """
        # Serialised: else every worker comes to copy the whole list (detectron2 explains why).
        self.samples = DatasetFromList(samples, copy=False)
        self.transform = transform
        self.bgr = bgr

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> dict:
        """
        Raises:
            UnreadableError: the picture cannot be read; the file is named.
        """
        path, label = self.samples[index]
        image = self.transform(read_picture(path))
        return {"image": image.flip(0) if self.bgr else image, "label": label, "file_name": path}


def collate(samples: list[dict]) -> dict[str, Tensor | list[str] | None]:
    """A batch of those samples that have an image.

    Returns:
        "image" [N, 3, H, W] (None if N is 0), "label" [N], "file_name" (N of them), "skipped".
    """
    read = [sample for sample in samples if "image" in sample]
    return {
        "image": torch.stack([sample["image"] for sample in read]) if read else None,
        "label": torch.tensor([sample["label"] for sample in read]),
        "file_name": [sample["file_name"] for sample in read],
        "skipped": [message for sample in samples for message in sample["skipped"]],
    }


register_all(datasets_root())
