"""Where a detector's average precision goes: kinds of errors, confusions, pictures.

The kinds are those of TIDE (Bolya et al., ECCV 2020), at an intersection over union of 0.5:

============  =====================================================================================
class         well placed on an object, of another class
localization  of the object's class, but overlaps it by 0.1 to 0.5
both          neither placed well nor of the right class
duplicate     well placed on an object that a higher score has found already
background    overlaps nothing by more than 0.1
missed        an object that no detection finds, not even of the first two kinds
============  =====================================================================================
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from pycocotools import mask as boxes_and_masks
from pycocotools.coco import COCO

FOREGROUND, BACKGROUND = 0.5, 0.1
KINDS = "class", "localization", "both", "duplicate", "background", "missed"
# As COCO counts: so many of the highest scores of a class in a picture.
MOST_DETECTIONS = 100
RECALLS = np.linspace(0, 1, 101)


@dataclass(frozen=True)
class Detection:
    """A detection at the threshold of 0.5.

    Attributes:
        category: its class' identifier.
        target: of the object that it found, or would have found without its error: the place among
            all objects; -1 if there is none.
        kind: of its error; "" if it is right.
    """

    score: float
    category: int
    target: int
    kind: str


@dataclass
class Errors:
    """The errors of a detector on a data set.

    Attributes:
        objects: the class of each object that counts.
        detections: all that count.
        missed: places among the objects.
    """

    objects: list[int] = field(default_factory=list)
    detections: list[Detection] = field(default_factory=list)
    missed: list[int] = field(default_factory=list)

    def counts(self) -> dict[str, int]:
        """How often each kind occurs, whatever the score."""
        counts = {kind: 0 for kind in KINDS} | {"missed": len(self.missed)}
        for detection in self.detections:
            if detection.kind:
                counts[detection.kind] += 1
        return counts

    def ap50(self) -> float:
        """Mean over the classes of the average precision at 0.5, as COCO's; NaN of no objects."""
        return self._ap(self.detections, self.objects)

    def gains(self) -> dict[str, float]:
        """By how much AP50 would rise if all errors of one kind were mended, and of no other.

        An error of class or place becomes right, unless its object has been found; another is
        removed, and a missed object is not asked for.
        """
        now = self.ap50()
        gains = {kind: self._ap(self._mended(kind), self.objects) - now for kind in KINDS[:-1]}
        missed = set(self.missed)
        kept = [kind for place, kind in enumerate(self.objects) if place not in missed]
        return gains | {"missed": self._ap(self.detections, kept) - now}

    def _mended(self, kind: str) -> list[Detection]:
        found = {d.target for d in self.detections if not d.kind}
        mended = []
        for d in self.detections:  # from the highest score
            if d.kind != kind:
                mended.append(d)
            elif kind in ("class", "localization") and d.target not in found:
                found.add(d.target)
                mended.append(Detection(d.score, self.objects[d.target], d.target, ""))
        return mended

    @staticmethod
    def _ap(detections: Iterable[Detection], objects: Sequence[int]) -> float:
        right = defaultdict(list)
        for detection in detections:
            right[detection.category].append(not detection.kind)
        classes, numbers = np.unique(np.asarray(objects, dtype=int), return_counts=True)
        found = [
            _average_precision(right[kind], number)
            for kind, number in zip(classes.tolist(), numbers.tolist(), strict=True)
        ]
        return float(np.mean(found)) if found else float("nan")


def _average_precision(right: Sequence[bool], objects: int) -> float:
    """COCO's, of detections from the highest score to the lowest."""
    hits = np.cumsum(np.asarray(right, dtype=float))
    precision = hits / np.arange(1, len(hits) + 1)
    precision = np.maximum.accumulate(precision[::-1])[::-1]
    places = np.searchsorted(hits / objects, RECALLS, side="left")
    return float(np.append(precision, 0)[np.minimum(places, len(hits))].mean())


class Scene:
    """The objects and detections of one picture, and how they overlap.

    Attributes:
        objects, detections: entries of COCO; detections by falling scores.
        overlap: [detections, objects], intersections over unions.
    """

    def __init__(self, truth: COCO, image_id: int, results: Iterable[dict]):
        annotations = truth.imgToAnns.get(image_id, [])
        self.objects = [a for a in annotations if not a.get("iscrowd")]
        crowds = [a for a in annotations if a.get("iscrowd")]
        self.detections = _highest(results)
        self.overlap = _overlap(self.detections, self.objects, 0)
        in_crowd = _overlap(self.detections, crowds, 1) >= FOREGROUND
        ignored = (in_crowd & _same_class(self.detections, crowds)).any(1)
        # What finds a crowd of its class, and no object, does not count.
        counts = ~ignored | (np.array(self.matches(self.same_class()), dtype=int) >= 0)
        self.detections = [d for d, kept in zip(self.detections, counts, strict=True) if kept]
        self.overlap = self.overlap[counts]

    def matches(self, allowed: np.ndarray) -> list[int]:
        """For each detection, from the highest score, its object: that of the greatest overlap of
        those allowed, [detections, objects], and not taken yet; -1 if there is none."""
        free = np.ones(len(self.objects), dtype=bool)
        found = []
        for overlap, some in zip(self.overlap, allowed, strict=True):
            candidates = np.where(some & free & (overlap >= FOREGROUND), overlap, -1)
            # Of equal ones, COCO takes the last.
            best = len(candidates) - 1 - int(candidates[::-1].argmax()) if len(candidates) else -1
            found.append(best if best >= 0 and candidates[best] >= 0 else -1)
            if found[-1] >= 0:
                free[best] = False
        return found

    def same_class(self) -> np.ndarray:
        """[detections, objects]"""
        return _same_class(self.detections, self.objects)


def _highest(results: Iterable[dict]) -> list[dict]:
    """By falling scores; of each class so many as COCO counts."""
    counts: Counter[int] = Counter()
    found = []
    for result in sorted(results, key=lambda r: -r["score"]):
        counts[result["category_id"]] += 1
        if counts[result["category_id"]] <= MOST_DETECTIONS:
            found.append(result)
    return found


def _overlap(detections: list[dict], objects: list[dict], crowd: int) -> np.ndarray:
    """[detections, objects]; with crowds, over the detection's area."""
    if not detections or not objects:
        return np.zeros((len(detections), len(objects)))
    boxes = [np.array([e["bbox"] for e in some], float) for some in (detections, objects)]
    return np.asarray(boxes_and_masks.iou(*boxes, [crowd] * len(objects)))


def _same_class(some: list[dict], others: list[dict]) -> np.ndarray:
    first, second = (np.array([e["category_id"] for e in entries]) for entries in (some, others))
    return first.reshape(-1, 1) == second.reshape(1, -1)


def by_image(results: Iterable[dict]) -> Mapping[int, list[dict]]:
    """Detections by the identifiers of their pictures."""
    found = defaultdict(list)
    for result in results:
        found[result["image_id"]].append(result)
    return found


def scenes(
    truth: COCO,
    results: Iterable[dict],
    *,
    threshold: float = 0.0,
    progress: Callable[[list], Iterable] = iter,
) -> Iterable[tuple[int, Scene]]:
    """The pictures of a data set, with what is found there by scores of a threshold and more."""
    found = by_image(r for r in results if r["score"] >= threshold)
    for image_id in progress(sorted(truth.imgs)):
        yield image_id, Scene(truth, image_id, found.get(image_id, ()))


def find_errors(seen: Iterable[tuple[int, Scene]]) -> Errors:
    """Sorts all detections and objects into right and the kinds of wrong."""
    errors = Errors()
    for _, scene in seen:
        first = len(errors.objects)
        errors.objects += [a["category_id"] for a in scene.objects]
        errors.missed += [first + place for place in _judge(scene, first, errors.detections)]
    errors.detections.sort(key=lambda detection: -detection.score)
    return errors


def _judge(scene: Scene, first: int, detections: list[Detection]) -> list[int]:
    """Adds the detections of a picture; returns the places of its missed objects."""
    same = scene.same_class()
    matches = scene.matches(same)
    nearly = set(matches)
    for i, (entry, target) in enumerate(zip(scene.detections, matches, strict=True)):
        kind = ""
        if target < 0:
            kind, target = _kind(scene.overlap[i], same[i])
            nearly |= {target} if kind in ("class", "localization") else set()
        place = first + target if target >= 0 else -1
        detections.append(Detection(entry["score"], entry["category_id"], place, kind))
    return [place for place in range(len(scene.objects)) if place not in nearly]


def _kind(overlap: np.ndarray, same: np.ndarray) -> tuple[str, int]:
    """Of a wrong detection: its kind, and its object or -1."""
    if not len(overlap):
        return "background", -1
    own, other = np.where(same, overlap, -1), np.where(same, -1, overlap)
    if BACKGROUND <= own.max() < FOREGROUND:
        return "localization", int(own.argmax())
    if other.max() >= FOREGROUND:
        return "class", int(other.argmax())
    if own.max() >= FOREGROUND:
        return "duplicate", int(own.argmax())
    return ("background" if overlap.max() <= BACKGROUND else "both"), -1


def confusion(seen: Iterable[tuple[int, Scene]], categories: Sequence[int]) -> np.ndarray:
    """[classes + 1, classes + 1]: how often an object of a class (row) is found as a class.

    Objects are matched whatever the class. The last column counts objects that are not found, the
    last row detections of nothing.
    """
    place = {identifier: i for i, identifier in enumerate(categories)}
    matrix = np.zeros((len(place) + 1,) * 2, dtype=int)
    for _, scene in seen:
        matches = scene.matches(np.ones_like(scene.overlap, dtype=bool))
        for entry, target in zip(scene.detections, matches, strict=True):
            row = place[scene.objects[target]["category_id"]] if target >= 0 else -1
            matrix[row, place[entry["category_id"]]] += 1
        for missed in set(range(len(scene.objects))) - set(matches):
            matrix[place[scene.objects[missed]["category_id"]], -1] += 1
    return matrix


@dataclass(frozen=True)
class PictureScore:
    """How well a picture has come out: numbers of objects found and missed, and of false finds."""

    image_id: int
    found: int
    missed: int
    false: int

    @property
    def f1(self) -> float:
        """1 if all is right, 0 if nothing is."""
        return 2 * self.found / (2 * self.found + self.missed + self.false)


def score_pictures(seen: Iterable[tuple[int, Scene]]) -> list[PictureScore]:
    """Of all pictures where there is anything, from the best to the worst.

    Of those alike, the one with more right comes first at the best end, and the one with more wrong
    at the worst.
    """
    scores = []
    for image_id, scene in seen:
        found = sum(target >= 0 for target in scene.matches(scene.same_class()))
        missed, false = len(scene.objects) - found, len(scene.detections) - found
        if found + missed + false:
            scores.append(PictureScore(image_id, found, missed, false))
    return sorted(scores, key=lambda s: (-s.f1, s.missed + s.false - s.found, s.image_id))
