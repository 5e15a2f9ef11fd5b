"""Aerial photographs with hand-drawn tree crowns, out of the deepforest package, as COCO tiles."""

from __future__ import annotations

import hashlib
import io
import itertools
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
# Training tiles overlap by half, so that a crown that one of them cuts is whole in another;
# validation tiles do not overlap, so that every crown counts once.
OVERLAP = {"train": 0.5, "val": 0.0}
# A crown belongs to a tile if this much of its box is inside; less of one is a region to ignore.
LEAST_INSIDE = 0.5


def download_wheel(folder: Path) -> Path:
    """Fetches the pinned wheel with pip, without installing it.

    Raises:
        RuntimeError: pip failed: no network, or another file than the pinned one.
    """
    requirements = folder / "requirements.txt"
    requirements.write_text(f"{REQUIREMENT} --hash=sha256:{SHA256}\n")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--require-hashes", "--quiet"]
    # It is only unzipped: which Python it would run on does not matter.
    command += ["--ignore-requires-python", "--only-binary=:all:"]
    command += ["--dest", str(folder), "--requirement", str(requirements)]
    result = subprocess.run(command, stderr=subprocess.PIPE, text=True)
    if result.returncode:
        raise RuntimeError(
            f"{REQUIREMENT}: pip could not download it; without a network, give the file "
            f"with --wheel.\n{result.stderr.strip()}"
        )
    return next(folder.glob("*.whl"))


def check_wheel(wheel: Path) -> None:
    """Raises ``ValueError`` unless the file is the pinned one."""
    found = hashlib.sha256(wheel.read_bytes()).hexdigest()
    if found != SHA256:
        raise ValueError(f"{wheel}: expected {REQUIREMENT} with sha256 {SHA256}, got {found}")


def read_boxes(xml: bytes) -> np.ndarray:
    """The boxes of a Pascal VOC annotation, xyxy in pixels, [boxes, 4]."""
    boxes = ElementTree.fromstring(xml).iter("bndbox")
    corners = [[float(b.findtext(k, "")) for k in ("xmin", "ymin", "xmax", "ymax")] for b in boxes]
    # VOC counts pixels from 1 and includes the last one.
    return np.array(corners).reshape(-1, 4) - [1, 1, 0, 0]


def tile_boxes(
    boxes: np.ndarray, x: int, y: int, width: int, height: int
) -> tuple[np.ndarray, np.ndarray]:
    """Boxes (xyxy) clipped to a tile, in its coordinates, and whether most of each is outside."""
    limits = np.array([width, height, width, height])
    clipped = np.clip(boxes - [x, y, x, y], 0, limits)
    inside = np.prod(clipped[:, 2:] - clipped[:, :2], axis=1)
    whole = np.prod(boxes[:, 2:] - boxes[:, :2], axis=1)
    seen = inside > 0
    return clipped[seen], (inside < LEAST_INSIDE * whole)[seen]


def tile_edges(size: int, overlap: float) -> list[tuple[int, int]]:
    """(start, end) of the fewest equal tiles of at most TILE pixels that cover an axis."""
    length = min(TILE, size)
    count = 1 if size <= TILE else int(np.ceil((size - length) / (length * (1 - overlap)))) + 1
    if not overlap:
        edges = np.linspace(0, size, count + 1).round().astype(int).tolist()
        return list(zip(edges, edges[1:], strict=False))
    starts = np.linspace(0, size - length, count).round().astype(int).tolist()
    return [(start, start + length) for start in starts]


def write_split(folder: Path, split: str, photograph: Image.Image, boxes: np.ndarray) -> None:
    """Cuts a photograph into tiles; writes them and their annotations."""
    (folder / split).mkdir(parents=True)
    images, annotations = [], []
    rows = tile_edges(photograph.height, OVERLAP[split])
    columns = tile_edges(photograph.width, OVERLAP[split])
    for (y, y_end), (x, x_end) in itertools.product(rows, columns):
        name = f"{y:05d}_{x:05d}.png"
        photograph.crop((x, y, x_end, y_end)).save(folder / split / name)
        width, height = x_end - x, y_end - y
        images.append({"id": len(images) + 1, "file_name": name, "width": width, "height": height})
        clipped, ignored = tile_boxes(boxes, x, y, width, height)
        for (x1, y1, x2, y2), ignore in zip(clipped.tolist(), ignored.tolist(), strict=True):
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": len(images),
                    "category_id": CATEGORIES[0]["id"],
                    "bbox": [x1, y1, x2 - x1, y2 - y1],
                    "area": (x2 - x1) * (y2 - y1),
                    "iscrowd": int(ignore),
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
