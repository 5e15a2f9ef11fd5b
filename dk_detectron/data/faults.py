"""Faults of data in COCO's format, counted and named."""

from __future__ import annotations

from collections import Counter, defaultdict
from math import isfinite
from typing import TypeGuard

EXAMPLES = 3
FLOAT = {float}
NUMBERS = {int, float}  # types; bool, an int as well, is none
LONGEST = 300  # characters of an example
# What torch and numpy hold of an integer.
LARGEST = 2**63 - 1
# Boxes may stick out of their image by this many pixels: it is rounding, of float32 or of decimals.
ROUNDING = 0.01
# Nobody means a place beyond so many times the size of an image, and the memory that pycocotools
# takes for a polygon grows with it.
FAR = 10


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
        examples = ", ".join(map(shortened, self.examples[kind]))
        return f"{kind}: {self.counts[kind]:,} (such as {examples}{more})"

    def lines(self) -> list[str]:
        return [self.describe(kind) for kind in self.counts]


def shortened(example: object) -> str:
    """What can be printed of an example, which may hold a whole mask, or half a character."""
    try:
        text = str(example)
    except RecursionError:
        return f"a {type(example).__name__} of too many levels"
    text = text if len(text) <= LONGEST else f"{text[:LONGEST]}..."
    return text.encode(errors="backslashreplace").decode()


def is_text(value: object) -> bool:
    """Whether a value is a string of whole characters, which can be printed or name a file."""
    if not isinstance(value, str) or "\0" in value:
        return False
    return value.encode(errors="ignore").decode() == value


def is_number(value: object) -> TypeGuard[float]:
    # Not of bool, which is an int as well.
    if type(value) is int:
        return -LARGEST <= value <= LARGEST
    return type(value) is float and isfinite(value)


def are_numbers(values: list) -> bool:
    """:func:`is_number` of all; of floats alone, as most boxes are, in a quarter of the time."""
    return {*map(type, values)} == FLOAT and isfinite(sum(values)) or all(map(is_number, values))


def as_number(value: object) -> int | float | None:
    """The finite number that a value of JSON means, if it means one: "12" is 12, True is 1."""
    if is_number(value):
        return value
    if isinstance(value, bool):
        return int(value)
    if isinstance(value, str):
        for kind in int, float:  # a float does not hold every digit of a long identifier
            try:
                number = kind(value)
            except ValueError:
                continue
            return number if is_number(number) else None
    return None


def as_integer(value: object) -> int | None:
    """The same of integers; 12.0 is one."""
    number = as_number(value)
    if number is None or number != int(number):
        return None
    return int(number) if abs(number) <= LARGEST else None


def overhang(box: list[float], size: tuple[int, int]) -> float:
    """By how many pixels a box (xywh) sticks out of an image of this width and height."""
    x, y, width, height = box
    return max(-x, -y, x + width - size[0], y + height - size[1])


def is_box(box: object) -> TypeGuard[list[float]]:
    return isinstance(box, list) and len(box) == 4 and are_numbers(box)


def has_area(box: object) -> TypeGuard[list[float]]:
    """Whether it is a box (xywh) that covers something."""
    return is_box(box) and box[2] > 0 < box[3]


def box_fault(box: object, size: tuple[int, int]) -> str | None:
    """Why a box (xywh, in pixels) has no meaning in an image of this width and height, if so."""
    if not is_box(box):
        return "bbox is not four finite numbers"
    if box[2] < 0 or box[3] < 0:
        return "bbox of negative size"
    return place_fault(box, size)


def place_fault(box: list[float], size: tuple[int, int]) -> str | None:
    """Why a box of four numbers, none of its sides negative, cannot be in such an image, if so."""
    x, y, width, height = box
    if 0 <= x <= size[0] >= width and 0 <= y <= size[1] >= height:
        return None  # as of most, without looking closer
    if max(abs(x), width) > FAR * size[0] or max(abs(y), height) > FAR * size[1]:
        return f"bbox that reaches beyond {FAR} times its image"
    # Of a box inside, however small, the corner is inside; a box of no size may lie on the border.
    if x > size[0] or y > size[1] or x + width < 0 or y + height < 0:
        return "bbox outside its image"
    return None
