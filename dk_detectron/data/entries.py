"""Images, categories and annotations of a file in COCO's format, judged and repaired one by one."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

from tqdm import tqdm

from .faults import (
    NUMBERS,
    Findings,
    are_numbers,
    as_integer,
    as_number,
    box_fault,
    has_area,
    is_number,
    is_text,
    overhang,
    place_fault,
)
from .masks import box_around, read_mask

# detectron2 scales the longer side to 1333 pixels: of a thinner image nothing is left.
THINNEST = 1333
MOST_PIXELS = 2**32  # of pycocotools' RLEs
# Corners that are read as sizes stick out of the image wherever an object lies right of its middle,
# or below: three in four do if objects lie anywhere. Careless boxes do so far more rarely.
CORNERS_HANG = 0.1
# COCO's own training set has a few objects twice: no reason to read other data than all do.
REPEATED = 0.001
MOST_FOUND = 100  # detections of an image and class, best first, that COCO's metrics take
REFERENCES = "image_id", "category_id"  # of an annotation


class Entries:
    """The sound entries by identifier, and what was found on the way.

    Attributes:
        faults: what has no meaning.
        repairs: what was given one.
        notes: what is odd, and left as it is.
    """

    def __init__(self) -> None:
        self.faults, self.repairs, self.notes = Findings(), Findings(), Findings()
        self.images: dict[int, dict] = {}
        self.categories: dict[int, dict] = {}
        self.refused: set[tuple[str, int]] = set()  # "image" or "category", and the id
        self.crowds = 0
        self.boxes = self.corners = self.units = self.fractions = self.hanging = 0

    def read(self, content: dict) -> None:
        """Judges a file's content, and repairs it in place."""
        self.images = self._by_id(content["images"], "image", ("width", "height"), "file_name")
        self.categories = self._by_id(content["categories"], "category", (), "name")
        self._judge_images()
        self._judge_names()
        if "annotations" in content:
            content["annotations"] = self._read_annotations(content["annotations"])
            self._number(content["annotations"])
            self._judge_all(content["annotations"])

    def _by_id(self, entries: list, what: str, numbers: tuple, text: str) -> dict[int, dict]:
        sound: dict[int, dict] = {}
        for entry in entries:
            if not isinstance(entry, dict):
                self.faults.add(f"{what} without a proper id, {text}", entry)
                continue
            lacking = [key for key in ("id", *numbers) if not self._to_integer(entry, key, what)]
            if not is_text(entry.get(text)):
                lacking.append(text)
            if lacking:
                self.faults.add(f"{what} without a proper {', '.join(lacking)}", entry)
                if "id" not in lacking:
                    self.refused.add((what, entry["id"]))
            elif entry["id"] in sound:
                self.faults.add(f"{what} whose id is taken", entry["id"])
            else:
                sound[entry["id"]] = entry
        return sound

    def _to_integer(self, entry: dict, key: str, what: str) -> bool:
        """Whether the entry has, or means, an integer under the key; it has it afterwards."""
        value = entry.get(key)
        if type(value) is int:
            return is_number(value)
        number = as_integer(value)
        if number is None:
            return False
        entry[key] = number
        self.repairs.add(f"{what} whose {key} was not written as an integer", repr(value))
        return True

    def _judge_images(self) -> None:
        names: set[str] = set()
        for image in self.images.values():
            short, long = sorted((image["width"], image["height"]))
            if short < 1 or long > THINNEST * short:
                self.faults.add(
                    f"image whose sides are less than 1, or beyond {THINNEST} : 1",
                    f"{image['file_name']}: {image['width']}x{image['height']}",
                )
            elif short * long >= MOST_PIXELS:
                self.faults.add("image of more pixels than a mask can count", image["file_name"])
            if image["file_name"] in names:
                self.notes.add("file that is listed for several images", image["file_name"])
            names.add(image["file_name"])

    def _judge_names(self) -> None:
        names: dict[str, str] = {}
        for category in self.categories.values():
            other = names.setdefault(category["name"].strip().casefold(), category["name"])
            if other is not category["name"]:
                self.notes.add("categories of one name", f"{other!r} and {category['name']!r}")

    def _read_annotations(self, annotations: list) -> list:
        """Repairs all annotations, and returns those that are not left out."""
        progress = tqdm(annotations, "Annotations", unit_scale=True, delay=1, disable=None)
        kept = [a for position, a in enumerate(progress) if self._read_annotation(a, position)]
        if self.faults.counts:
            return kept
        if not kept:
            for annotation in annotations:
                self.faults.add("annotations none of which can be used", _label(annotation))
        return self._without_repeats(kept)

    def _without_repeats(self, annotations: list[dict]) -> list[dict]:
        """Leaves out what is there twice but for its id, as after merging a list with itself.

        Every repeat is an object that an evaluation misses, however well it is found.
        """
        places = [
            hash((a["image_id"], a["category_id"], a["iscrowd"], *a["bbox"])) for a in annotations
        ]
        counts = Counter(places)
        if len(counts) == len(places):
            return annotations
        seen: set[int | str] = set()
        repeats: dict[int, dict] = {}
        for position, (place, annotation) in enumerate(zip(places, annotations, strict=True)):
            if counts[place] > 1:
                content = json.dumps({**annotation, "id": None}, sort_keys=True)
                if content in seen:
                    repeats[position] = annotation
                elif place in seen:
                    kind = "annotation of the same image, category and box as another one"
                    self.notes.add(kind, _label(annotation))
                seen |= {place, content}
        few = len(repeats) <= REPEATED * len(annotations)
        kind = "annotation that repeats another one" + ("" if few else ", left out")
        for annotation in repeats.values():
            (self.notes if few else self.repairs).add(kind, _label(annotation))
        if few:
            return annotations
        self.crowds -= sum(annotation["iscrowd"] for annotation in repeats.values())
        return [a for position, a in enumerate(annotations) if position not in repeats]

    def _read_annotation(self, annotation: object, position: int) -> bool:
        """Repairs an annotation; False if it is left out."""
        if not isinstance(annotation, dict):
            self.faults.add("annotation without a proper id, image_id, category_id", annotation)
            return True
        label = f"id {annotation['id']}" if "id" in annotation else f"number {position + 1}"
        if not type(annotation.get("image_id")) is type(annotation.get("category_id")) is int:
            lacking = [k for k in REFERENCES if not self._to_integer(annotation, k, "annotation")]
            if lacking:
                self.faults.add(f"annotation without a proper {', '.join(lacking)}", label)
                return True
        image = self.images.get(annotation["image_id"])
        if image is None:
            if ("image", annotation["image_id"]) not in self.refused:
                self.repairs.add("annotation of an unknown image, left out", label)
            return False
        category = self.categories.get(annotation["category_id"])
        if category is None and ("category", annotation["category_id"]) not in self.refused:
            self.faults.add("annotation of an unknown category", label)
        size = image["width"], image["height"]
        covers = has_area(annotation.get("bbox")) or self._read_strings(annotation, label)
        if annotation.get("segmentation"):
            covers = self._read_mask(annotation, size, label, covers)
        if self._read_box(annotation, size, label, covers):
            if not covers:
                self.repairs.add("bbox without area, left out", f"{label}: {annotation['bbox']}")
                return False
            self._read_area(annotation, label)
        self._read_flags(annotation, label)
        if annotation.get("keypoints"):
            self._read_keypoints(annotation, (category or {}).get("keypoints"), label)
        return True

    def _read_strings(self, annotation: dict, label: str) -> bool:
        """Makes numbers of a box in strings; whether it covers something then."""
        box = annotation.get("bbox")
        if isinstance(box, list) and any(isinstance(value, str) for value in box):
            annotation["bbox"] = [as_number(value) for value in box]
            self.repairs.add("bbox whose numbers were written as strings", label)
        return has_area(annotation.get("bbox"))

    def _read_mask(self, annotation: dict, size: tuple[int, int], label: str, covers: bool) -> bool:
        """Understands the mask; a box that does not cover anything is drawn around it.

        Returns whether the box covers something then.
        """
        mask = read_mask(annotation["segmentation"], size)
        if mask.fault:
            self.faults.add(mask.fault, label)
        elif mask.repair:
            self.repairs.add(mask.repair, label)
        annotation["segmentation"] = mask.segmentation or []
        if covers or not mask.segmentation:
            return covers
        box = box_around(mask.segmentation, size)
        if has_area(box):
            annotation["bbox"] = box
            self.repairs.add("bbox that is missing or empty, drawn around its mask", label)
        return has_area(box)

    def _read_flags(self, annotation: dict, label: str) -> None:
        crowd = annotation.get("iscrowd")
        if not isinstance(crowd, int) or isinstance(crowd, bool):
            annotation["iscrowd"] = crowd = as_integer(crowd) or 0
            self.repairs.add("annotation whose iscrowd was no number, or missing", label)
        # Neither detectron2 nor pycocotools understands the flag, but both know crowds, which are
        # not learnt and cost nothing.
        if "ignore" in annotation and as_number(annotation.pop("ignore")):
            annotation["iscrowd"] = crowd = 1
            self.repairs.add("annotation with `ignore`, treated as a crowd", label)
        if crowd not in (0, 1):
            self.faults.add("annotation whose iscrowd is neither 0 nor 1", label)
        self.crowds += crowd == 1

    def _read_keypoints(self, annotation: dict, names: Any, label: str) -> None:
        keypoints: Any = annotation["keypoints"]
        if not _are_keypoints(keypoints):
            self.faults.add("keypoints that are no list of x, y, visibility, ...", label)
        elif names and isinstance(names, list) and len(keypoints) != 3 * len(names):
            kind = f"keypoints that are not the {len(names)} that the category names"
            self.faults.add(kind, f"{label}: {len(keypoints) // 3}")
        elif type(annotation.get("num_keypoints")) is not int:  # pycocotools needs it
            annotation["num_keypoints"] = sum(visibility > 0 for visibility in keypoints[2::3])
            self.repairs.add("keypoints without num_keypoints: those that are labelled", label)

    def _read_box(self, annotation: dict, size: tuple[int, int], label: str, covers: bool) -> bool:
        """Judges the box; False if it has no meaning."""
        box: Any = annotation.get("bbox")
        if fault := place_fault(box, size) if covers else box_fault(box, size):
            self.faults.add(fault, f"{label}: {box}")
            return False
        x, y, width, height = box
        self.boxes += 1
        self.corners += x < width <= size[0] + 1 and y < height <= size[1] + 1
        if width <= 1 and max(box) <= 1:  # in pixels, it would lie in the corner of its image
            self.units += 1
            self.fractions += not all(value == int(value) for value in box)
        if overhang(box, size) > 1:
            self.hanging += 1
            self.notes.add(
                "bbox that sticks out of its image and will be clipped",
                f"{label}: {box} in {size[0]}x{size[1]}",
            )
        return True

    def _read_area(self, annotation: dict, label: str) -> None:
        """A mask cannot cover more than its box; half a pixel on each side is rounding."""
        _, _, width, height = annotation["bbox"]
        area: Any = annotation.get("area")
        if type(area) in NUMBERS and 0 < area <= (width + 1) * (height + 1):
            return
        if area != width * height:
            annotation["area"] = width * height
            kind = "annotation whose area was missing, impossible or no number: width * height"
            self.repairs.add(kind, label)

    def _number(self, annotations: list) -> None:
        """New ids for all, unless every one is a positive integer of its own.

        pycocotools takes an object of id 0 for one that was not found.
        """
        identifiers = [a.get("id") if isinstance(a, dict) else None for a in annotations]
        if not all(type(identifier) is int and identifier > 0 for identifier in identifiers):
            why = "ids that are missing, no integers or not above 0"
        elif len(set(identifiers)) < len(identifiers):
            why = "ids that are taken"
        else:
            return
        for position, annotation in enumerate(annotations):
            if isinstance(annotation, dict):
                annotation["id"] = position + 1
        self.repairs.add(f"annotations with {why}, all numbered anew from 1", identifiers[0])

    def _judge_all(self, annotations: list) -> None:
        """What only all annotations together can say."""
        kind = ""
        if annotations and self.crowds == len(annotations):
            kind = (
                "annotations that are all crowds (iscrowd 1), of which nothing is learnt or "
                "evaluated; many exports write 1 for every mask as an RLE, where 0 is meant"
            )
        elif self.corners >= 0.99 * self.boxes and self.hanging > CORNERS_HANG * self.boxes:
            kind = "bboxes that are corners (x1, y1, x2, y2); COCO's are x, y, width, height"
        elif self.fractions and self.units >= 0.99 * self.boxes:  # one of a whole image is whole
            kind = "bboxes in fractions of the image; COCO's are in pixels"
        for annotation in annotations if kind else ():
            if isinstance(annotation, dict):
                self.faults.add(kind, f"id {annotation['id']}")
        dicts = (a for a in annotations if isinstance(a, dict))
        used = {id for a in dicts if type(id := a.get("category_id")) is int}
        if annotations and (unused := [c for i, c in self.categories.items() if i not in used]):
            for category in unused:
                self.notes.add("category without boxes", repr(category["name"]))
        if not self.faults.counts:
            self._note_crowded(annotations)

    def _note_crowded(self, annotations: list[dict]) -> None:
        kind = f"image with more objects of a class than the {MOST_FOUND} that COCO's AP looks for"
        objects = Counter(
            (a["image_id"], a["category_id"]) for a in annotations if not a["iscrowd"]
        )
        for (image, _), count in objects.items():
            if count > MOST_FOUND:
                self.notes.add(kind, f"{self.images[image]['file_name']}: {count}")


def _label(annotation: dict) -> str:
    return f"id {annotation.get('id')}"


def _are_keypoints(value: object) -> bool:
    """Whether detectron2 can read them."""
    return isinstance(value, list) and len(value) % 3 == 0 and are_numbers(value)
