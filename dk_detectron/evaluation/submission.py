"""From detectron2's results to the file that COCO's test-dev server accepts."""

from __future__ import annotations

import heapq
import json
import os
import re
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

from ..data.faults import ROUNDING, Findings, box_fault, is_number, overhang

DETECTIONS_PER_IMAGE = 100
BOX_DECIMALS, SCORE_DECIMALS = 2, 5
CHUNK = 2**20  # characters that are read at once
SPACE = re.compile(r"[ \t\r\n]*")


class _JsonReader:
    """A JSON file in pieces: characters, and values of less than `CHUNK` characters."""

    def __init__(self, file: TextIO, progress: Callable[[int], object] | None) -> None:
        self.file = file
        self.progress = progress
        self.buffer = ""
        self.position = 0  # in the buffer
        self.dropped = 0  # characters that have left the buffer
        self.decoder = json.JSONDecoder()

    @property
    def place(self) -> int:
        """Characters before the next one, in the file."""
        return self.dropped + self.position

    def fill(self) -> bool:
        text = self.file.read(CHUNK)
        self.buffer = self.buffer[self.position :] + text
        self.dropped += self.position
        self.position = 0
        if self.progress:
            self.progress(len(text))
        return bool(text)

    def error(self, expected: str, got: str, place: int) -> ValueError:
        return ValueError(
            f"{self.file.name}: expected an array of results with {expected} at character "
            f"{place:,}, got {got}"
        )

    def peek(self) -> str:
        """The next character that is no space; empty at the end."""
        while True:
            if space := SPACE.match(self.buffer, self.position):
                self.position = space.end()
            if self.position < len(self.buffer) or not self.fill():
                return self.buffer[self.position : self.position + 1]

    def expect(self, *characters: str) -> str:
        found = self.peek()
        if found not in characters:
            got = repr(found) if found else "the end of the file, which is not whole"
            raise self.error(" or ".join(map(repr, characters)), got, self.place)
        self.position += 1
        return found

    def value(self) -> Any:
        while True:
            try:
                value, self.position = self.decoder.raw_decode(self.buffer, self.position)
                return value
            except json.JSONDecodeError as error:
                place = self.dropped + error.pos
                # It may continue after the end of the buffer.
                if len(self.buffer) - self.position > CHUNK or not self.fill():
                    raise self.error("JSON", error.msg, place) from error


def read_results(file: TextIO, progress: Callable[[int], object] | None = None) -> Iterator[dict]:
    """The objects of a JSON array, one after the other, however long the array is.

    Args:
        progress: called with the number of characters after each read.

    Raises:
        ValueError: this is no array of objects, or not a whole one.
    """
    reader = _JsonReader(file, progress)
    reader.expect("[")
    if reader.peek() == "]":
        reader.expect("]")
    else:
        separator = ","
        while separator == ",":
            reader.expect("{")
            reader.position -= 1
            yield reader.value()
            separator = reader.expect(",", "]")
    if found := reader.peek():
        raise reader.error("its end", repr(found), reader.place)


@dataclass
class Submission:
    """What goes to the server.

    Attributes:
        images: identifiers of all images of the test set.
        best: heaps of (score, -order of appearance, text), by image; at most 100 each.
        total: results read.
        violations: what the results did wrong.
    """

    images: dict[int, tuple[int, int]]
    best: dict[int, list[tuple[float, int, str]]] = field(default_factory=dict)
    total: int = 0
    violations: Findings = field(default_factory=Findings)

    @property
    def kept(self) -> int:
        return sum(map(len, self.best.values()))


def read_image_info(path: str | Path) -> tuple[dict[int, tuple[int, int]], set[int]]:
    """Width and height of each image, and the category ids, of a file such as
    ``image_info_test-dev2017.json``.

    Raises:
        ValueError: it is not such a file.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
        images = {image["id"]: (image["width"], image["height"]) for image in content["images"]}
        categories = {category["id"] for category in content["categories"]}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"IMAGE_INFO: expected images and categories as in image_info_test-dev2017.json, "
            f"got {path}: {type(error).__name__}: {error}"
        ) from error
    return images, categories


def collect(
    results: Iterator[dict], images: dict[int, tuple[int, int]], categories: set[int]
) -> Submission:
    """Validates results and keeps the best of each image, rounded.

    Boxes that stick out of their image are clipped. Other faulty results are dropped.

    Args:
        images: width and height by identifier.
        categories: the allowed identifiers.
    """
    submission = Submission(images)
    counts: dict[int, int] = {}
    for order, result in enumerate(results):
        submission.total += 1
        if fault := _fault(result, images, categories):
            submission.violations.add(f"{fault} (dropped)", result)
            continue
        image, size = result["image_id"], images[result["image_id"]]
        if overhang(result["bbox"], size) > ROUNDING:
            submission.violations.add("bbox that sticks out of its image (clipped)", result)
        counts[image] = counts.get(image, 0) + 1
        heap = submission.best.setdefault(image, [])
        score = result["score"]
        if len(heap) < DETECTIONS_PER_IMAGE:
            heapq.heappush(heap, (score, -order, _text(result, size)))
        elif score > heap[0][0]:  # of equal scores the earlier stay, as in pycocotools
            heapq.heapreplace(heap, (score, -order, _text(result, size)))
    for image, count in counts.items():
        if count > DETECTIONS_PER_IMAGE:
            submission.violations.add(
                f"image with more than {DETECTIONS_PER_IMAGE} results (the best are kept)",
                f"{count} in image {image}",
            )
    return submission


def _fault(result: dict, images: dict[int, tuple[int, int]], categories: set[int]) -> str | None:
    """Why a result cannot be submitted, if so."""
    for key in "image_id", "category_id", "bbox", "score":
        if key not in result:
            return f"no {key}"
    if type(result["image_id"]) is not int or result["image_id"] not in images:
        return "unknown image_id"
    if type(result["category_id"]) is not int or result["category_id"] not in categories:
        return "unknown category_id"
    if fault := box_fault(result["bbox"], images[result["image_id"]]):
        return fault
    if not is_number(result["score"]):
        return "score is not a finite number"
    if not 0 <= result["score"] <= 1:
        return "score outside [0, 1]"
    return None


def _text(result: dict, size: tuple[int, int]) -> str:
    """The JSON of a result, its box clipped, everything rounded."""
    x, y, width, height = result["bbox"]
    # Rounding corners, not sizes, keeps the box inside the image.
    x1, y1, x2, y2 = (
        round(min(max(value, 0), limit), BOX_DECIMALS)
        for value, limit in zip((x, y, x + width, y + height), (*size, *size), strict=True)
    )
    box = [x1, y1, round(x2 - x1, BOX_DECIMALS), round(y2 - y1, BOX_DECIMALS)]
    return json.dumps(
        {
            "image_id": result["image_id"],
            "category_id": result["category_id"],
            "bbox": box,
            "score": round(result["score"], SCORE_DECIMALS),
        },
        separators=(",", ":"),
    )


def file_name(algorithm: str) -> str:
    """The name that the server asks for.

    Raises:
        ValueError: the algorithm's name does not fit into it.
    """
    if not re.fullmatch(r"[A-Za-z0-9.+-]+(_[A-Za-z0-9.+-]+)*", algorithm):
        raise ValueError(f"--name: expected letters, digits, _ and -, got {algorithm!r}")
    return f"detections_test-dev2017_{algorithm}_results.json"


def write(submission: Submission, folder: Path, algorithm: str) -> Path:
    """Writes the JSON and its zip, whole or not at all; returns the zip's path.

    Raises:
        ValueError: there is nothing to write.
    """
    name = file_name(algorithm)
    if not submission.kept:
        raise ValueError(f"expected results to submit, found none among {submission.total:,}")
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
