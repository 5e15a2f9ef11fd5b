"""Masks in COCO's format: what is one, what can be read as one, and what cannot."""

from __future__ import annotations

from itertools import chain
from math import hypot, isfinite
from typing import NamedTuple

from pycocotools import mask as mask_util

from .faults import FAR


class Mask(NamedTuple):
    """A mask as it was understood.

    Attributes:
        segmentation: in COCO's format; None if there is no mask.
        repair: what was done to it, if anything was.
        fault: why it cannot be used, if so.
    """

    segmentation: list | dict | None = None
    repair: str | None = None
    fault: str | None = None


LONGEST_RUN = 32  # bits: pycocotools counts no further
PLACEHOLDER = "placeholder where a mask would stand, used as a box alone"


def read_mask(segmentation: object, size: tuple[int, int]) -> Mask:
    """Understands the mask of an object in an image of this width and height."""
    if segmentation is None or segmentation == [] or segmentation == {}:
        return Mask()
    if isinstance(segmentation, dict):
        return _read_rle(segmentation, size)
    if not isinstance(segmentation, list):
        return Mask(fault="segmentation is neither polygons nor an RLE")
    polygons, repair = segmentation, None
    if not isinstance(polygons[0], list):
        polygons, repair = [polygons], "polygon that is not in a list, put into one"
    elif len(polygons) > 2 and all(isinstance(p, list) and len(p) == 2 for p in polygons):
        polygons, repair = [list(chain(*polygons))], "polygon of pairs, read as one of numbers"
    try:
        reach = max([hypot(*polygon) for polygon in polygons])  # no coordinate is larger
    except (OverflowError, TypeError):
        return Mask(fault="polygon of something else than numbers")
    if not isfinite(reach):
        return Mask(fault="polygon with a coordinate that is not finite")
    sound = [polygon for polygon in polygons if len(polygon) >= 6 and len(polygon) % 2 == 0]
    if not sound:
        return Mask(repair=PLACEHOLDER)
    far = FAR * max(size)
    if reach > far and max(max(map(max, sound)), -min(map(min, sound))) > far:
        return Mask(fault=f"polygon that reaches beyond {FAR} times its image")
    if len(sound) < len(polygons):
        return Mask(sound, "part of a mask that is no polygon of three points, left out")
    return Mask(polygons, repair)


def box_around(segmentation: list | dict, size: tuple[int, int]) -> list[float]:
    """The box (xywh) of a sound mask in an image of this width and height."""
    if isinstance(segmentation, list):
        xs = [x for polygon in segmentation for x in polygon[0::2]]
        ys = [y for polygon in segmentation for y in polygon[1::2]]
        x, y = min(xs), min(ys)
        return [x, y, max(xs) - x, max(ys) - y]
    if isinstance(segmentation["counts"], list):
        segmentation = mask_util.frPyObjects(segmentation, size[1], size[0])
    return mask_util.toBbox(segmentation).tolist()


def _read_rle(rle: dict, size: tuple[int, int]) -> Mask:
    width, height = size
    total = _pixels(rle.get("counts"))
    if total is None:
        return Mask(fault="RLE whose counts are neither a list of numbers nor a compressed string")
    if total != width * height:
        return Mask(fault="RLE that has more or fewer pixels than its image")
    if "size" not in rle:
        return Mask({**rle, "size": [height, width]}, "RLE without its size, taken from its image")
    if rle["size"] != [height, width]:
        return Mask(fault="RLE whose size is not [height, width] of its image")
    return Mask(rle)


def _pixels(counts: object) -> int | None:
    """The number of pixels that the runs fill, if they are runs."""
    if isinstance(counts, list):
        sound = all(type(count) is int and count >= 0 for count in counts)
        return sum(counts) if sound else None
    if isinstance(counts, str) and counts.isascii():
        return _compressed_pixels(counts.encode())
    return None


def _compressed_pixels(text: bytes) -> int | None:
    """The same of pycocotools' strings: five bits a character, differences from the third run on.

    pycocotools decodes whatever it is given, in C and without asking.
    """
    runs, value, shift = [], 0, 0
    for character in text:
        bits = character - 48
        if not 0 <= bits < 64 or shift > LONGEST_RUN:
            return None
        value |= (bits & 31) << shift
        shift += 5
        if not bits & 32:
            if bits & 16:
                value -= 1 << shift
            runs.append(value + runs[-2] if len(runs) > 2 else value)
            if runs[-1] < 0:
                return None
            value = shift = 0
    return sum(runs) if shift == 0 else None
