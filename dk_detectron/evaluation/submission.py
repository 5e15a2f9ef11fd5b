"""From detectron2's results to the file that COCO's test-dev server accepts."""

from __future__ import annotations

import heapq
import json
import os
import re
import tempfile
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path

from pycocotools import mask as mask_util

from ..data.coco import parse
from ..data.entries import Entries
from ..data.faults import (
    ROUNDING,
    Findings,
    as_integer,
    as_number,
    box_fault,
    is_number,
    overhang,
    shortened,
)
from ..data.masks import read_mask

DETECTIONS_PER_IMAGE = 100
BOX_DECIMALS, SCORE_DECIMALS = 2, 5
# What can be submitted, and the key under which a result has it.
TASKS = {"bbox": "bbox", "segm": "segmentation"}
KEYS = "image_id", "category_id", "score"


@dataclass
class Submission:
    """What goes to the server.

    Attributes:
        images: width and height of all images of the test set, by identifier.
        task: of `TASKS`.
        source: what to call the results in messages.
        best: heaps of (score, -order of appearance, text), by image; at most 100 each.
        total: results read.
        violations: what the results did wrong.
        notes: what they have beside it, which is left out.
    """

    images: dict[int, tuple[int, int]]
    task: str
    source: str
    best: dict[int, list[tuple[float, int, str]]] = field(default_factory=dict)
    total: int = 0
    violations: Findings = field(default_factory=Findings)
    notes: Findings = field(default_factory=Findings)

    @property
    def key(self) -> str:
        return TASKS[self.task]

    @property
    def kept(self) -> int:
        return sum(map(len, self.best.values()))


def read_image_info(path: str | Path) -> tuple[dict[int, tuple[int, int]], set[int]]:
    """Width and height of each image, and the category ids, of a file such as
    ``image_info_test-dev2017.json``.

    Raises:
        OSError: it cannot be read.
        ValueError: it is not such a file.
    """
    entries = Entries()
    try:
        content = parse(str(path), Path(path).read_bytes(), entries.repairs)
        content.pop("annotations", None)
        entries.read(content)
        if entries.faults.counts:
            raise ValueError(f"{path}: {'; '.join(entries.faults.lines())}")
    except ValueError as error:
        raise ValueError(
            "IMAGE_INFO: expected images and categories as in image_info_test-dev2017.json, got "
            f"{error}"
        ) from error
    images = {id: (image["width"], image["height"]) for id, image in entries.images.items()}
    return images, set(entries.categories)


def collect(
    results: Iterable[dict],
    images: dict[int, tuple[int, int]],
    categories: set[int],
    task: str | None = None,
    source: str = "results",
) -> Submission:
    """Judges results, repairs what has one meaning, and keeps the best of each image, rounded.

    Boxes that stick out of their image are clipped. Other faulty results are dropped.

    Args:
        images: width and height by identifier.
        categories: the allowed identifiers.
        task: "bbox" or "segm"; by default masks if the first result has one, else boxes.
        source: what to call the results in messages, such as their path.

    Raises:
        ValueError: all of the results are wrong in one way: scores on another scale than [0, 1],
            category ids that are counted otherwise.
    """
    results = iter(results)
    head = list(islice(results, 1))
    if task is None:
        task = "segm" if head and head[0].get("segmentation") else "bbox"
    submission = Submission(images, task, source)
    seen: dict[float, int] = {}  # category ids, and the results where they first appear
    counts: dict[int, int] = {}
    texts: dict[int, set[str]] = {}
    for number, result in enumerate(chain(head, results), start=1):
        submission.total += 1
        _note_extras(submission, result, number)
        _mend_numbers(submission, result)
        if is_number(category := result.get("category_id")):
            seen.setdefault(category, number)
        if fault := _fault(submission, result, categories):
            submission.violations.add(f"{fault} (dropped)", result)
            continue
        score, image = result["score"], result["image_id"]
        if not 0 <= round(score, SCORE_DECIMALS) <= 1:
            raise ValueError(
                f"{source}: score: expected probabilities, from 0 to 1, got {score} in result "
                f"{number:,}: turn logits into them by a sigmoid, and divide percentages by 100"
            )
        heap, known = submission.best.setdefault(image, []), texts.setdefault(image, set())
        full = len(heap) == DETECTIONS_PER_IMAGE
        if not full or score > heap[0][0]:  # of equal scores the earlier stay, as in pycocotools
            text = _text(submission, result)
            if text in known:
                submission.violations.add("result that is there twice (kept once)", result)
                continue
            known.add(text)
            if full:
                known.discard(heapq.heapreplace(heap, (score, -number, text))[2])
            else:
                heapq.heappush(heap, (score, -number, text))
        counts[image] = counts.get(image, 0) + 1
    _check_categories(submission, seen, categories)
    for image, count in counts.items():
        if count > DETECTIONS_PER_IMAGE:
            submission.violations.add(
                f"image with more than {DETECTIONS_PER_IMAGE} results (the best are kept)",
                f"{count} in image {image}",
            )
    return submission


def _note_extras(submission: Submission, result: dict, number: int) -> None:
    for key in result:
        if key not in KEYS and key != submission.key:
            task = next((task for task, own in TASKS.items() if own == key), None)
            kind = f"{key}, left out: --task {task} submits it" if task else "other keys, left out"
            submission.notes.add(kind, f"{key} of result {number:,}")


def _mend_numbers(submission: Submission, result: dict) -> None:
    """Strings and floats become the numbers that they mean."""
    for key in KEYS:
        convert, strange = (as_number, str) if key == "score" else (as_integer, str | float)
        value = result.get(key)
        if isinstance(value, strange) and (number := convert(value)) is not None:
            result[key] = number
            submission.violations.add(f"{key} of another type than a number's (read as one)", value)
    box = result.get("bbox")
    if isinstance(box, list) and any(isinstance(value, str) for value in box):
        result["bbox"] = [as_number(value) for value in box]
        submission.violations.add("bbox whose numbers were written as strings (read as such)", box)


def _fault(submission: Submission, result: dict, categories: set[int]) -> str | None:
    """Why a result cannot be submitted, if so."""
    for key in *KEYS, submission.key:
        if key not in result:
            return f"no {key}"
    if type(result["image_id"]) is not int or result["image_id"] not in submission.images:
        return "unknown image_id"
    if type(result["category_id"]) is not int or result["category_id"] not in categories:
        return "unknown category_id"
    if not is_number(result["score"]):
        return "score is not a finite number"
    size = submission.images[result["image_id"]]
    if submission.task == "segm":
        return _encode_mask(submission, result, size)
    if fault := box_fault(result["bbox"], size):
        return fault
    if overhang(result["bbox"], size) > ROUNDING:
        submission.violations.add("bbox that sticks out of its image (clipped)", result)
    return None


def _encode_mask(submission: Submission, result: dict, size: tuple[int, int]) -> str | None:
    """Gives the result its mask as the server reads it, or says why there is none."""
    mask = read_mask(result["segmentation"], size)
    found = mask.segmentation
    if found is None:
        return mask.fault or "segmentation without a mask"
    if mask.repair:
        submission.violations.add(f"{mask.repair} (repaired)", result)
    if isinstance(found, list):
        submission.violations.add("mask of polygons (turned into an RLE)", result)
        found = mask_util.merge(mask_util.frPyObjects(found, *size[::-1]))
    elif isinstance(found["counts"], list):
        submission.violations.add("RLE that is a list of numbers (compressed)", result)
        found = mask_util.frPyObjects(found, *size[::-1])
    counts = found["counts"]
    result["segmentation"] = {
        "size": list(size[::-1]),
        "counts": counts.decode() if isinstance(counts, bytes) else counts,
    }
    return None


def _check_categories(submission: Submission, seen: dict[float, int], categories: set[int]) -> None:
    """Raises ``ValueError`` if category ids are not a few strangers, but counted otherwise."""
    unknown = seen.keys() - categories
    if not unknown:
        return
    ids = "sorted(ids of IMAGE_INFO)"
    schemes = {
        f"positions from 0: write {ids}[category_id]": range(len(categories)),
        f"positions from 1: write {ids}[category_id - 1]": range(1, len(categories) + 1),
        "one less than the ids: add 1": {identifier - 1 for identifier in categories},
        "one more than the ids: subtract 1": {identifier + 1 for identifier in categories},
    }
    for scheme, members in schemes.items():
        if seen.keys() <= set(members):
            first = min(unknown, key=lambda identifier: seen[identifier])
            raise ValueError(
                f"{submission.source}: category_id: expected one of the {len(categories)} ids of "
                f"IMAGE_INFO, {shortened(sorted(categories)[:5])}, got {first} in result "
                f"{seen[first]:,}; all of them may be {scheme}"
            )


def _text(submission: Submission, result: dict) -> str:
    """The JSON of a result, its box clipped, everything rounded."""
    shape = result[submission.key]
    if submission.task == "bbox":
        x, y, width, height = shape
        size = submission.images[result["image_id"]]
        # Rounding corners, not sizes, keeps the box inside the image.
        x1, y1, x2, y2 = (
            round(min(max(value, 0), limit), BOX_DECIMALS)
            for value, limit in zip((x, y, x + width, y + height), (*size, *size), strict=True)
        )
        shape = [x1, y1, round(x2 - x1, BOX_DECIMALS), round(y2 - y1, BOX_DECIMALS)]
    return json.dumps(
        {
            "image_id": result["image_id"],
            "category_id": result["category_id"],
            submission.key: shape,
            "score": round(min(max(result["score"], 0), 1), SCORE_DECIMALS),
        },
        separators=(",", ":"),
    )


def file_name(algorithm: str) -> str:
    """The name that the server asks for, the same for boxes and masks.

    Raises:
        ValueError: the algorithm's name does not fit into it.
    """
    if not re.fullmatch(r"[A-Za-z0-9.+-]+(_[A-Za-z0-9.+-]+)*", algorithm):
        raise ValueError(f"--name: expected letters, digits, _ and -, got {algorithm!r}")
    return f"detections_test-dev2017_{algorithm}_results.json"


def check_folder(folder: Path) -> None:
    """Raises ``OSError`` if a folder, which need not exist yet, can have no submission."""
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise OSError(
            f"OUT_DIR: expected a folder that can be written to, got {folder}, as {existing} is "
            "none: name another"
        )


def write(submission: Submission, folder: Path, algorithm: str) -> Path:
    """Writes the JSON and its zip, whole or not at all; returns the zip's path.

    Raises:
        ValueError: there is nothing to write.
    """
    name = file_name(algorithm)
    if not submission.kept:
        found = submission.violations.counts + submission.notes.counts
        why = "; ".join(f"{kind}: {count:,}" for kind, count in found.items())
        raise ValueError(
            f"{submission.source}: expected results to submit, found none among "
            f"{submission.total:,}: {why or 'evaluate again, with a lower threshold of scores'}"
        )
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".submission-", dir=folder) as temporary:
        made = Path(temporary, name)
        with open(made, "w", encoding="utf-8") as file:
            file.write("[")
            separator = ""
            for image in submission.images:
                for _, _, text in sorted(submission.best.get(image, ()), reverse=True):
                    file.write(f"{separator}{text}")
                    separator = ",\n"
            file.write("]\n")
        with zipfile.ZipFile(made.with_suffix(".zip"), "w", zipfile.ZIP_DEFLATED) as archive:
            archive.write(made, name)
        for suffix in ".json", ".zip":
            os.replace(made.with_suffix(suffix), (folder / name).with_suffix(suffix))
    return (folder / name).with_suffix(".zip")
