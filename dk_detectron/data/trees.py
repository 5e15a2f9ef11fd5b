"""Aerial photographs with hand-drawn tree crowns, out of the deepforest package, as COCO tiles."""

from __future__ import annotations

import io
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
import zipfile
from pathlib import Path

import numpy as np
from PIL import Image

from .writing import write_coco

REQUIREMENT = "deepforest==1.5.2"
SHA256 = "705f08a80f33514044010865f61eefe5037d5492055c47574d213db74bebdf25"
PHOTOGRAPHS = {
    "train": "2019_YELL_2_528000_4978000_image_crop2",
    "val": "2019_YELL_2_541000_4977000_image_crop",
}
CATEGORIES = [{"id": 1, "name": "tree", "supercategory": "plant"}]

TILE = 400
# Training tiles overlap, so that a crown that one cuts is whole in another; validation tiles do not, so
# that every crown counts once.
STEP = {"train": 200, "val": 400}
# A crown belongs to a tile if this much of its box is inside.
LEAST_INSIDE = 0.5


def download_wheel(folder: Path) -> Path:
    """Fetches the pinned wheel with pip, without installing it.

    Raises:
        RuntimeError: pip failed: no network, or another file than the pinned one.
    """
    requirements = folder / "requirements.txt"
    requirements.write_text(f"{REQUIREMENT} --hash=sha256:{SHA256}\n")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--require-hashes", "--quiet"]
    command += ["--only-binary=:all:", "--dest", str(folder), "--requirement", str(requirements)]
    result = subprocess.run(command, stderr=subprocess.PIPE, text=True)
    if result.returncode:
        raise RuntimeError(
            f"{REQUIREMENT}: pip could not download it; on a machine without a network give the file "
            f"with --wheel.\n{result.stderr.strip()}"
        )
    return next(folder.glob("*.whl"))


def read_boxes(xml: bytes) -> np.ndarray:
    """The boxes of a Pascal VOC annotation, xyxy in pixels, [boxes, 4]."""
    boxes = ElementTree.fromstring(xml).iter("bndbox")
    corners = [[float(b.findtext(k)) for k in ("xmin", "ymin", "xmax", "ymax")] for b in boxes]
    return np.array(corners).reshape(-1, 4)


def tile_boxes(boxes: np.ndarray, x: int, y: int, width: int, height: int) -> np.ndarray:
    """The boxes (xyxy) that lie mostly in a tile, clipped to it and in its coordinates."""
    limits = np.array([width, height, width, height])
    clipped = np.clip(boxes - [x, y, x, y], 0, limits)
    inside = np.prod(clipped[:, 2:] - clipped[:, :2], axis=1)
    whole = np.prod(boxes[:, 2:] - boxes[:, :2], axis=1)
    return clipped[(whole > 0) & (inside >= LEAST_INSIDE * whole)]


def _starts(size: int, step: int) -> list[int]:
    """Where tiles start along an axis: the last one ends at the border."""
    if step < TILE:
        return sorted({*range(0, max(size - TILE, 0), step), max(size - TILE, 0)})
    return list(range(0, size, step))


def write_split(folder: Path, split: str, photograph: Image.Image, boxes: np.ndarray) -> None:
    """Cuts a photograph into tiles; writes them and their annotations."""
    (folder / split).mkdir(parents=True)
    images, annotations = [], []
    for y in _starts(photograph.height, STEP[split]):
        for x in _starts(photograph.width, STEP[split]):
            tile = photograph.crop((x, y, min(x + TILE, photograph.width), min(y + TILE, photograph.height)))
            name = f"{y:05d}_{x:05d}.png"
            tile.save(folder / split / name)
            image_id = len(images) + 1
            images.append(
                {"id": image_id, "file_name": name, "width": tile.width, "height": tile.height}
            )
            for x1, y1, x2, y2 in tile_boxes(boxes, x, y, tile.width, tile.height).tolist():
                annotations.append(
                    {
                        "id": len(annotations) + 1,
                        "image_id": image_id,
                        "category_id": CATEGORIES[0]["id"],
                        "bbox": [x1, y1, x2 - x1, y2 - y1],
                        "area": (x2 - x1) * (y2 - y1),
                        "segmentation": [[x1, y1, x2, y1, x2, y2, x1, y2]],
                        "iscrowd": 0,
                    }
                )
    write_coco(folder / "annotations" / f"instances_{split}.json", images, CATEGORIES, annotations)


def write_dataset(folder: Path, wheel: Path | None = None) -> None:
    """Fills ``folder`` from the wheel, downloaded unless given.

    Raises:
        RuntimeError: the wheel cannot be had.
        ValueError: it is not a wheel with the photographs.
    """
    with tempfile.TemporaryDirectory() as temporary:
        wheel = wheel or download_wheel(Path(temporary))
        try:
            with zipfile.ZipFile(wheel) as archive:
                for split, name in PHOTOGRAPHS.items():
                    photograph = Image.open(io.BytesIO(archive.read(f"deepforest/data/{name}.png")))
                    boxes = read_boxes(archive.read(f"deepforest/data/{name}.xml"))
                    write_split(folder, split, photograph.convert("RGB"), boxes)
        except (zipfile.BadZipFile, KeyError) as error:
            raise ValueError(f"{wheel}: expected the wheel of {REQUIREMENT}: {error}") from error
