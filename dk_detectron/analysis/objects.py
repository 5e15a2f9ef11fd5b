"""Pictures as a network gets them, with the objects of a data set in COCO's format on them."""

from __future__ import annotations

import io
from collections.abc import Callable, Collection, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass, replace
from pathlib import Path

import cv2
import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.data.detection_utils import read_image
from detectron2.data.transforms import ResizeShortestEdge
from PIL import Image
from pycocotools.coco import COCO
from torch import Tensor

from ..data.coco import SIZES, survey
from ..data.datasets import check_on_disk, is_coco, resolve
from ..data.pictures import check_format

BUCKETS = "small", "medium", "large"


@dataclass(frozen=True)
class Object:
    """An object on a picture.

    Attributes:
        identifier: of its annotation.
        category: its class' name.
        area: in pixels of the file, as annotated.
        box: (x0, y0, x1, y1), in pixels of the picture, within it; of a mere point, without size.
        mask: [H, W], booleans; None if there is none.
    """

    identifier: int
    category: str
    area: float
    box: tuple[float, float, float, float]
    mask: np.ndarray | None = None

    @property
    def centre(self) -> tuple[float, float]:
        x0, y0, x1, y1 = self.box
        return (x0 + x1) / 2, (y0 + y1) / 2

    @property
    def is_point(self) -> bool:
        return self.box[:2] == self.box[2:]

    @property
    def bucket(self) -> str:
        """COCO's "small", "medium" or "large"."""
        return BUCKETS[(self.area >= SIZES[0]) + (self.area >= SIZES[1])]


@dataclass(frozen=True)
class Picture:
    """A picture at the size that a network gets.

    Attributes:
        name: of its file.
        pixels: [H, W, 3], RGB, uint8.
        scale: its width over that of the file.
        bgr: whether the network wants blue first.
    """

    name: str
    pixels: np.ndarray
    scale: float
    bgr: bool
    objects: tuple[Object, ...] = ()

    @property
    def image(self) -> Tensor:
        """What the network takes: float [3, H, W], 0 to 255."""
        pixels = self.pixels[:, :, ::-1] if self.bgr else self.pixels
        return torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1))).float()

    def rotated(self) -> Picture:
        """Turned by -90 degrees, which is clockwise."""
        height = self.pixels.shape[0]

        def turn(thing: Object) -> Object:
            x0, y0, x1, y1 = thing.box
            mask = None if thing.mask is None else np.rot90(thing.mask, -1)
            return replace(thing, box=(height - y1, x0, height - y0, x1), mask=mask)

        pixels = np.ascontiguousarray(np.rot90(self.pixels, -1))
        return replace(self, pixels=pixels, objects=tuple(map(turn, self.objects)))

    def scaled(self, factor: float) -> Picture:
        """Enlarged by a factor, for the network as well."""
        height, width = (max(1, round(factor * n)) for n in self.pixels.shape[:2])
        pixels = cv2.resize(self.pixels, (width, height), interpolation=cv2.INTER_LINEAR)
        by = width / self.pixels.shape[1], height / self.pixels.shape[0]
        return replace(
            self,
            pixels=pixels,
            scale=self.scale * by[0],
            objects=tuple(_enlarged(thing, by, (width, height)) for thing in self.objects),
        )


def _enlarged(thing: Object, by: tuple[float, float], size: tuple[int, int]) -> Object:
    x0, y0, x1, y1 = thing.box
    mask = thing.mask
    if mask is not None:
        mask = cv2.resize(mask.astype(np.uint8), size, interpolation=cv2.INTER_NEAREST) > 0
    box = x0 * by[0], y0 * by[1], x1 * by[0], y1 * by[1]
    return replace(thing, box=box, mask=mask)


# How pictures are deformed in Figure 6, and fields [H, W] turned back.
DEFORMATIONS: dict[str, tuple[Callable, Callable]] = {
    "original": (lambda picture: picture, lambda field, shape: field),
    "rotated by -90°": (Picture.rotated, lambda field, shape: np.rot90(field)),
    "scaled by 1.5": (
        lambda picture: picture.scaled(1.5),
        lambda field, shape: cv2.resize(field, shape[::-1], interpolation=cv2.INTER_AREA),
    ),
}


def read_picture(path: str | Path, cfg: CfgNode, objects: Sequence[Object] = ()) -> Picture:
    """Reads a file at the size of a network's tests: ``INPUT.MIN_SIZE_TEST``, ``MAX_SIZE_TEST``.

    Args:
        objects: on the file's own pixels.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no picture of 8 bits that can be read, or far too thin.
    """
    check_format(cfg.INPUT.FORMAT)
    try:
        with Image.open(path) as file:
            mode = file.mode
        pixels = read_image(str(path), "RGB")
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such file") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path}: expected a picture, got what cannot be read: {error}") from error
    if mode.startswith("I") or mode == "F":
        raise ValueError(f"{path}: expected a picture of 8 bits, got mode {mode}: convert it")
    height, width = pixels.shape[:2]
    test = cfg.INPUT.MIN_SIZE_TEST
    resize = ResizeShortestEdge([test, test], cfg.INPUT.MAX_SIZE_TEST).get_transform(pixels)
    size = getattr(resize, "new_w", width), getattr(resize, "new_h", height)
    if 0 in size:
        raise ValueError(
            f"{path}: expected sides of a ratio of at most INPUT.MAX_SIZE_TEST, got "
            f"{width}x{height}, of which nothing is left"
        )
    by = size[0] / width, size[1] / height
    resized = np.ascontiguousarray(resize.apply_image(pixels))
    things = tuple(_enlarged(thing, by, size) for thing in objects)
    return Picture(Path(path).name, resized, by[0], cfg.INPUT.FORMAT == "BGR", things)


class CocoPictures:
    """The pictures of a data set in COCO's format, and their objects; crowds are none.

    Attributes:
        name: of the data set.
        truth: pycocotools' view of it.
        images: COCO's entries, by their identifiers.
        categories: names of the classes, in the order of their identifiers.
    """

    def __init__(self, name: str):
        """
        Args:
            name: as in ``DATASETS.TEST``: a registered one, or coco:JSON:IMAGES.

        Raises:
            ValueError, FileNotFoundError: it is unknown, not on disk, of no use or another format.
        """
        resolve(name)
        check_on_disk(name)
        if not is_coco(name):
            raise ValueError(f"--dataset: expected a data set in COCO's format, got {name!r}")
        metadata = MetadataCatalog.get(name)
        found = survey(metadata.json_file)
        if found.faults:
            raise ValueError(f"{metadata.json_file}: " + "; ".join(found.faults))
        self.name = name
        self._root = Path(metadata.image_root)
        with redirect_stdout(io.StringIO()):
            self.truth = COCO(found.path)
        self.images: dict[int, dict] = self.truth.imgs
        self.categories = [self.truth.cats[i]["name"] for i in sorted(self.truth.cats)]

    def annotations(self, image_id: int) -> list[dict]:
        """COCO's entries of the objects on a picture: those that have a box within it."""
        return [
            annotation
            for annotation in self.truth.imgToAnns.get(image_id, [])
            if not annotation["iscrowd"] and self._box(annotation) is not None
        ]

    def category(self, annotation: dict) -> str:
        return self.truth.cats[annotation["category_id"]]["name"]

    def _box(self, annotation: dict) -> tuple[float, float, float, float] | None:
        x, y, width, height = annotation["bbox"]
        image = self.images[annotation["image_id"]]
        x0, y0, x1, y1 = max(x, 0), max(y, 0), *(
            min(end, image[side])
            for end, side in ((x + width, "width"), (y + height, "height"))
        )  # fmt: skip
        return (x0, y0, x1, y1) if x1 > x0 and y1 > y0 else None

    def read(self, image_id: int, cfg: CfgNode, only: Sequence[int] | None = None) -> Picture:
        """A picture with its objects, or those of ``only`` these annotations.

        Raises:
            ValueError, FileNotFoundError: as :func:`read_picture`, and if the file has another size
                than the JSON says.
        """
        image = self.images[image_id]
        objects = []
        for annotation in self.annotations(image_id):
            if only is not None and annotation["id"] not in only:
                continue
            box = self._box(annotation)
            assert box
            mask = self.truth.annToMask(annotation) if annotation.get("segmentation") else None
            area = annotation["area"]
            category = self.category(annotation)
            objects.append(Object(annotation["id"], category, area, box, mask))
        path = self._root / image["file_name"]
        picture = read_picture(path, cfg, objects)
        height, width = (n / picture.scale for n in picture.pixels.shape[:2])
        if abs(width - image["width"]) > 0.5 or abs(height / image["height"] - 1) > 0.1:
            raise ValueError(
                f"{path}: expected {image['width']}x{image['height']}, as the JSON says, got about "
                f"{width:.0f}x{height:.0f}; dk-check-dataset tells more"
            )
        return picture

    def spread(self, count: int, without: Collection[int] = ()) -> list[tuple[int, int]]:
        """(image, annotation) of so many objects, from the largest to the smallest, evenly by rank.

        Args:
            without: images that are left out.

        Raises:
            ValueError: there are no objects.
        """
        found = sorted(
            (-a["area"], a["id"], image_id) for image_id in self.images if image_id not in without
            for a in self.annotations(image_id)
        )  # fmt: skip
        if not found:
            raise ValueError(f"{self.name}: expected objects, got none that is not a crowd")
        # The middles of so many equal parts: neither extreme.
        count = min(count, len(found))
        chosen = (found[int((i + 0.5) * len(found) / count)] for i in range(count))
        return [(image_id, identifier) for _, identifier, image_id in chosen]
