"""Faults of data in COCO's format, counted and named."""

from __future__ import annotations

from collections import Counter, defaultdict
from math import isfinite
from typing import cast

EXAMPLES = 3
# Boxes may stick out of their image by this many pixels: it is rounding, of float32 or of decimals.
ROUNDING = 0.01


class Findings:
    """How often each kind of fault was found, and the first few examples of it."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.examples: defaultdict[str, list] = defaultdict(list)

    def add(self, kind: str, example: object) -> None:
        self.counts[kind] += 1
        if len(self.examples[kind]) < EXAMPLES:
            self.examples[kind].append(example)

    def describe(self, kind: str) -> str:
        more = ", ..." if self.counts[kind] > EXAMPLES else ""
        examples = ", ".join(str(example) for example in self.examples[kind])
        return f"{kind}: {self.counts[kind]:,} (such as {examples}{more})"

    def lines(self) -> list[str]:
        return [self.describe(kind) for kind in self.counts]


def is_number(value: object) -> bool:
    # Not of bool, which is an int as well.
    return type(value) in (int, float) and isfinite(cast(float, value))


def as_number(value: object) -> int | float | None:
    """The finite number that a value of JSON means, if it means one: "12" is 12, True is 1."""
    if is_number(value):
        return cast(float, value)
    if isinstance(value, bool):
        return int(value)
    if isinstance(value, str):
        try:
            number = float(value)
        except ValueError:
            return None
        if isfinite(number):
            return int(number) if number.is_integer() else number
    return None


def as_integer(value: object) -> int | None:
    """The same of integers; 12.0 is one."""
    number = as_number(value)
    return int(number) if number is not None and number == int(number) else None


def overhang(box: list[float], size: tuple[int, int]) -> float:
    """By how many pixels a box (xywh) sticks out of an image of this width and height."""
    x, y, width, height = box
    return max(-x, -y, x + width - size[0], y + height - size[1])


def has_area(box: object) -> bool:
    """Whether it is a box (xywh) that covers something."""
    return isinstance(box, list) and len(box) == 4 and all(map(is_number, box)) and min(box[2:]) > 0


def box_fault(box: object, size: tuple[int, int]) -> str | None:
    """Why a box (xywh, in pixels) has no meaning in an image of this width and height, if so."""
    if not isinstance(box, list) or len(box) != 4 or not all(map(is_number, box)):
        return "bbox is not four finite numbers"
    x, y, width, height = box
    if width < 0 or height < 0:
        return "bbox of negative size"
    # Of a box inside, however small, the corner is inside; a box of no size may lie on the border.
    if x > size[0] or y > size[1] or x + width < 0 or y + height < 0:
        return "bbox outside its image"
    return None
