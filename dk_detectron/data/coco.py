"""The one reading of a file in COCO's format: repaired where it can be, and everything counted.

Training, evaluation and the check of a data set all go through :func:`survey`. What it found is
kept by the hash of the file. A file that needed repair has a repaired copy beside that, for
detectron2 and pycocotools to read; one that needed none is read as it is.
"""

from __future__ import annotations

import gc
import gzip
import hashlib
import json
import os
import zlib
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

from detectron2.utils.file_io import PathManager

from .cache import cache_file, read, write
from .entries import Entries
from .faults import Findings

SIZES = 32**2, 96**2  # COCO's small, medium and large


@dataclass
class Survey:
    """What a file holds, and what is wrong with it.

    Attributes:
        path: of the file to read; the repaired copy if there is one.
        images: file name, width and height of each.
        classes: names of the categories, in the order of their ids.
        boxes: of each class, those to learn from: small, medium and large ones.
        crowds: number of annotations with ``iscrowd``, which are not learnt.
        empty: number of images without an object to learn from.
        without_mask, without_keypoints: number of annotations that have none.
        keypoints: how many of them the other annotations have, in order.
        polygons, run_lengths: whether masks to learn from are such, or RLEs.
        faults: what makes the file unusable.
        repairs: what was repaired.
        notes: what is odd but does no harm, because detectron2 deals with it.
    """

    path: str
    images: list[tuple[str, int, int]] = field(default_factory=list)
    classes: list[str] = field(default_factory=list)
    boxes: list[list[int]] = field(default_factory=list)
    annotations: int = 0
    crowds: int = 0
    empty: int = 0
    without_mask: int = 0
    without_keypoints: int = 0
    keypoints: list[int] = field(default_factory=list)
    polygons: bool = False
    run_lengths: bool = False
    has_annotations: bool = True
    faults: list[str] = field(default_factory=list)
    repairs: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def survey(json_file: str) -> Survey:
    """Reads a file, or remembers what came of it.

    Raises:
        OSError: it cannot be read.
        ValueError: it is not COCO's JSON.
    """
    json_file = PathManager.get_local_path(json_file)
    try:
        status = os.stat(json_file)
    except FileNotFoundError:
        raise FileNotFoundError(f"{json_file}: no such file") from None
    return _survey(json_file, status.st_mtime_ns, status.st_size)


@lru_cache(maxsize=16)
def _survey(json_file: str, *unchanged: int) -> Survey:
    raw = Path(json_file).read_bytes()
    key = hashlib.blake2b(raw, digest_size=16).hexdigest()
    kept, copy = cache_file("survey", key), cache_file("repaired", key)
    if content := read(kept):
        found = Survey(**content)
        if not found.repairs or found.faults:
            found.path = json_file  # one of the same content may have been elsewhere
            return found
        if copy.is_file():
            found.path = str(copy)
            return found
    with _without_collection():
        found = _judge(json_file, raw, copy)
    write(kept, vars(found))
    return found


def _judge(json_file: str, raw: bytes, copy: Path) -> Survey:
    """What a file of these bytes holds; a repaired copy is written where one is of use."""
    entries = Entries()
    content = parse(json_file, raw, entries.repairs)
    entries.read(content)
    found = _summarise(json_file, content, entries)
    if found.repairs and not found.faults:
        found.path = str(copy)
        write(copy, content)
    return found


@contextmanager
def _without_collection() -> Iterator[None]:
    """Python's garbage collector would go through millions of new objects again and again.

    They must be gone at the end, or it goes through them then.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def parse(json_file: str, raw: bytes, repairs: Findings) -> dict:
    """The lists in a file of these bytes: images, categories, and annotations but in a test set.

    Args:
        repairs: takes what was done to read it.

    Raises:
        ValueError: it is not COCO's JSON.
    """
    try:
        if raw[:2] == b"\x1f\x8b":
            raw = gzip.decompress(raw)
            repairs.add("file compressed by gzip, unpacked", json_file)
        encoding = json.detect_encoding(raw)
        if encoding != "utf-8":
            repairs.add(f"file in {encoding}, read as such", json_file)
        content = json.loads(raw)
    except (OSError, EOFError, RecursionError, ValueError, zlib.error) as error:
        raise ValueError(f"{json_file}: not whole, or no JSON: {error}") from error
    kinds = ["images", "categories", "annotations"]
    if isinstance(content, dict) and "annotations" not in content:  # a test set's file has none
        kinds.pop()
    for kind in kinds:
        if not isinstance(content, dict) or not isinstance(content.get(kind), list):
            raise ValueError(f"{json_file}: expected COCO's JSON, found no list of {kind}")
    if not content["images"] or not content["categories"]:
        raise ValueError(f"{json_file}: expected images and categories, found an empty list")
    return content


def _summarise(json_file: str, content: dict, entries: Entries) -> Survey:
    annotations = content.get("annotations", [])
    order = sorted(entries.categories)
    boxes: dict[int, list[int]] = {identifier: [0, 0, 0] for identifier in order}
    learnt, without_mask, kinds = set(), 0, set()
    keypoints: Counter[int] = Counter()
    for annotation in annotations if not entries.faults.counts else ():
        mask = annotation.get("segmentation")
        without_mask += not mask
        keypoints[len(annotation.get("keypoints") or ()) // 3] += 1
        if not annotation["iscrowd"]:
            area = annotation["area"]
            boxes[annotation["category_id"]][(area >= SIZES[0]) + (area >= SIZES[1])] += 1
            learnt.add(annotation["image_id"])
            if mask:
                kinds.add(type(mask))
    return Survey(
        json_file,
        images=[(i["file_name"], i["width"], i["height"]) for i in entries.images.values()],
        classes=[entries.categories[identifier]["name"] for identifier in order],
        boxes=[boxes[identifier] for identifier in order],
        annotations=len(annotations),
        crowds=entries.crowds,
        empty=len(entries.images) - len(learnt),
        without_mask=without_mask,
        without_keypoints=keypoints.pop(0, 0),
        keypoints=sorted(keypoints),
        polygons=list in kinds,
        run_lengths=dict in kinds,
        has_annotations="annotations" in content,
        faults=entries.faults.lines(),
        repairs=entries.repairs.lines(),
        notes=entries.notes.lines(),
    )
