"""Is a data set in COCO's format on disk, whole and sound; and if not, what to do."""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from detectron2.data import DatasetCatalog, MetadataCatalog
from PIL import ExifTags, Image

from .faults import Findings, box_fault, overhang

# Opening files waits for the disk, or the network behind it, far longer than for the processor.
THREADS = 32
BATCH = 2048


@dataclass(frozen=True)
class Release:
    """What COCO published: the number of images, and the archives to unzip."""

    images: int
    image_archive: str
    json_archive: str
    categories: int = 80


COCO = {
    "coco_2017_train": Release(
        118_287, "zips/train2017.zip", "annotations/annotations_trainval2017.zip"
    ),
    "coco_2017_val": Release(5_000, "zips/val2017.zip", "annotations/annotations_trainval2017.zip"),
    "coco_2017_test-dev": Release(
        20_288, "zips/test2017.zip", "annotations/image_info_test2017.zip"
    ),
}

IMAGE_KEYS = {"id": int, "file_name": str, "width": int, "height": int}
CATEGORY_KEYS = {"id": int, "name": str}
# What pycocotools needs for an evaluation; training can do without the last two.
ANNOTATION_KEYS = {
    "id": int, "image_id": int, "category_id": int, "bbox": list, "area": (int, float),
    "iscrowd": int,
}  # fmt: skip


@dataclass
class Report:
    """What `check_dataset` found.

    Attributes:
        problems: each with its cure.
        notes: what is odd but does no harm, because detectron2 deals with it.
    """

    name: str
    images: int = 0
    annotations: int = 0
    categories: int = 0
    problems: list[tuple[str, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def check_dataset(name: str, progress: Callable[..., Iterable] | None = None) -> Report:
    """Checks a registered data set: its JSON, its annotations, and every image that it lists.

    Images are opened but not decoded, unless something is odd about their end: a minute for COCO's
    118,287, which finds what interrupted downloads and full disks leave behind.

    Args:
        progress: shows it, called as `tqdm` is, with an iterable and its ``total``.

    Raises:
        ValueError: no data set in COCO's format is registered under the name.
    """
    if name not in DatasetCatalog.list():
        raise ValueError(
            f"{name}: expected a registered data set, such as shapes_val or coco_2017_train"
        )
    metadata = MetadataCatalog.get(name)
    json_file, image_root = metadata.get("json_file"), metadata.get("image_root")
    if metadata.get("evaluator_type") != "coco" or None in (json_file, image_root):
        raise ValueError(f"{name}: expected a data set that is registered in COCO's format")
    json_cure, image_cure = _cures(name, json_file, image_root)
    report = Report(name)
    try:
        content = _read(json_file)
    except (OSError, ValueError) as error:
        report.problems.append((str(error), json_cure))
        if not os.path.isdir(image_root):
            report.problems.append((f"{image_root}: no such folder", image_cure))
        return report

    faults, notes = Findings(), Findings()
    images = _check_entries(content["images"], "image", IMAGE_KEYS, faults)
    categories = _check_entries(content["categories"], "category", CATEGORY_KEYS, faults)
    annotations = _check_entries(content["annotations"], "annotation", ANNOTATION_KEYS, faults)
    _check_annotations(annotations, images, categories, faults, notes)
    report.images, report.categories = len(images), len(categories)
    report.annotations = len(annotations)
    if name in COCO:
        for what in "images", "categories":
            expected, found = getattr(COCO[name], what), getattr(report, what)
            if found != expected:
                message = f"{json_file}: expected {expected:,} {what}, got {found:,}"
                report.problems.append((message, json_cure))
    report.problems += [(f"{json_file}: {line}", json_cure) for line in faults.lines()]
    report.notes = notes.lines()

    if os.path.isdir(image_root):
        faults = _check_files(image_root, list(images.values()), progress)
        report.problems += [(f"{image_root}: {line}", image_cure) for line in faults.lines()]
    else:
        report.problems.append((f"{image_root}: no such folder", image_cure))
    return report


def _cures(name: str, json_file: str, image_root: str) -> tuple[str, str]:
    """What to do if the JSON is at fault, and if images are."""
    if name in COCO:
        # Every archive brings a folder of its own: annotations, train2017, ...
        folders = Path(json_file).parent.parent, Path(image_root).parent
        archives = COCO[name].json_archive, COCO[name].image_archive
        json_cure, image_cure = (
            f"wget -c http://images.cocodataset.org/{archive} && "
            f"unzip -qo {Path(archive).name} -d {shlex.quote(str(folder))}"
            for archive, folder in zip(archives, folders, strict=True)
        )
        return json_cure, image_cure
    if cure := MetadataCatalog.get(name).get("how_to_get"):
        return cure, cure
    return (
        "correct the file, or the json_file that the data set is registered with",
        "restore the images, or correct the image_root that the data set is registered with",
    )


def _read(json_file: str) -> dict:
    """The content of the file.

    Raises:
        OSError: it cannot be read.
        ValueError: it is not COCO's JSON.
    """
    try:
        with open(json_file, encoding="utf-8") as file:
            content = json.load(file)
    except FileNotFoundError:
        raise FileNotFoundError(f"{json_file}: no such file") from None
    except ValueError as error:
        raise ValueError(f"{json_file}: not whole, or no JSON: {error}") from error
    if isinstance(content, dict):
        content.setdefault("annotations", [])  # a test set's file has none
    if lacking := _lacks(content, {"images": list, "categories": list, "annotations": list}):
        raise ValueError(f"{json_file}: expected COCO's JSON, found no list of {lacking[0]}")
    if not content["images"] or not content["categories"]:
        raise ValueError(f"{json_file}: expected images and categories, found an empty list")
    return content


def _lacks(entry: object, keys: dict) -> list[str]:
    """The keys that the entry does not have, with a value of their type."""
    if not isinstance(entry, dict):
        return list(keys)
    return [key for key, kind in keys.items() if not isinstance(entry.get(key), kind)]


def _check_entries(entries: list, what: str, keys: dict, faults: Findings) -> dict[int, dict]:
    """The sound entries by identifier."""
    sound = {}
    for entry in entries:
        if lacking := _lacks(entry, keys):
            faults.add(f"{what} without a proper {', '.join(lacking)}", entry)
        elif entry["id"] in sound:
            faults.add(f"{what} whose id is taken", entry["id"])
        else:
            sound[entry["id"]] = entry
    return sound


def _check_annotations(
    annotations: dict[int, dict],
    images: dict[int, dict],
    categories: dict[int, dict],
    faults: Findings,
    notes: Findings,
) -> None:
    for identifier, annotation in annotations.items():
        image = images.get(annotation["image_id"])
        box = annotation["bbox"]
        example = f"id {identifier}: {box}"
        if image is None:
            faults.add("annotation of an unknown image", f"id {identifier}")
            continue
        if annotation["category_id"] not in categories:
            faults.add("annotation of an unknown category", f"id {identifier}")
        size = image["width"], image["height"]
        if fault := box_fault(box, size):
            faults.add(fault, example)
        elif overhang(box, size) > 1:
            notes.add(
                "bbox that sticks out of its image and will be clipped (if most do: COCO's are "
                "x, y, width, height)",
                f"{example} in {size[0]}x{size[1]}",
            )
        elif 0 in box[2:]:
            notes.add("bbox without area, which will be ignored", example)


def _check_files(image_root: str, images: list[dict], progress: Callable | None) -> Findings:
    faults = Findings()

    def fault(image: dict) -> str | None:
        path = os.path.join(image_root, image["file_name"])
        return image_fault(path, (image["width"], image["height"]))

    def check() -> Iterator[tuple[dict, str | None]]:
        # In batches: a queue of everything would hold the progress back.
        for start in range(0, len(images), BATCH):
            batch = images[start : start + BATCH]
            yield from zip(batch, pool.map(fault, batch), strict=True)

    with ThreadPoolExecutor(THREADS) as pool:
        for image, kind in progress(check(), total=len(images)) if progress else check():
            if kind:
                faults.add(kind, image["file_name"])
    return faults


def image_fault(path: str, size: tuple[int, int]) -> str | None:
    """What is wrong with an image that should have this width and height, if anything is."""
    try:
        with open(path, "rb") as file, Image.open(file) as image:
            found = image.size
            if image.getexif().get(ExifTags.Base.Orientation, 1) >= 5:  # detectron2 turns it
                found = found[::-1]
            if image.format != "JPEG" or not _has_end_of_jpeg(path):
                image.load()
    except FileNotFoundError:
        return "missing image"
    # Pillow reports a broken file in many ways, its decompression bombs among them.
    except Exception:
        return "unreadable image"
    return None if found == size else "image of another size than the JSON says"


def _has_end_of_jpeg(path: str) -> bool:
    with open(path, "rb") as file:
        file.seek(-2, os.SEEK_END)
        return file.read() == b"\xff\xd9"
