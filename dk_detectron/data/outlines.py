"""The outlines of the shapes data set, and how they are deformed."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

OBJECT_SIZES = (3 / 32, 25 / 32)  # geometric mean of box width and height, in the same unit
CLASS_OBJECT_SIZES = (10 / 32, 25 / 32)  # where the object is what the picture shows
MAX_STRETCH = 1.8  # ratio of lengths along and across
MAX_BEND = 0.5  # see Deformation: at 1 the inner side would fold


def _rotate(points, angle):
    c, s = np.cos(angle), np.sin(angle)
    return points @ np.array([[c, s], [-s, c]])


def _dense(corners):
    """Closed polygon with 24 points an edge, so that edges can bend."""
    ends = np.vstack([corners, corners[:1]])
    at = np.arange(24 * len(corners)) / 24
    return np.stack([np.interp(at, np.arange(len(ends)), column) for column in ends.T], axis=1)


def _polar(radius, angle):
    return np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1)


def _circle(radius):
    return _polar(radius, np.linspace(0, 2 * np.pi, 96, endpoint=False))


def cut_open(rings):
    """Joins a border and its holes by cuts of no width: COCO's polygons have no holes."""
    joined = rings[0]
    for hole in rings[1:]:
        gaps = np.linalg.norm(joined[:, None] - hole, axis=2)
        i, j = np.unravel_index(gaps.argmin(), gaps.shape)
        hole = np.vstack([hole[j:], hole[: j + 1]])
        joined = np.vstack([joined[: i + 1], hole, joined[i:]])
    return joined


def _star():
    return _dense(_polar(np.tile([1, 0.42], 5), np.arange(10) * np.pi / 5))


def _cross():
    quarter = np.array([[1, -0.3], [1, 0.3], [0.3, 0.3]])
    return _dense(np.vstack([_rotate(quarter, turn * np.pi / 2) for turn in range(4)]))


def _arrow():
    half = np.array([[1, 0], [0.15, 0.72], [0.15, 0.24], [-1, 0.24]])
    return _dense(np.vstack([half, half[:0:-1] * [1, -1]]))


def _crescent():
    tip = np.deg2rad(40)  # where the two arcs meet, seen from the centre of the outer one
    shift = np.array([0.5, 0])
    x, y = [np.cos(tip), np.sin(tip)] - shift
    inner_tip, inner_radius = np.arctan2(y, x), np.hypot(x, y)
    outer = _polar(1, np.linspace(tip, 2 * np.pi - tip, 96))
    inner = _polar(inner_radius, np.linspace(2 * np.pi - inner_tip, inner_tip, 96)) + shift
    return np.vstack([outer, inner[1:-1]])


def _heart():
    t = np.linspace(0, 2 * np.pi, 160, endpoint=False)
    y = (13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)) / 16
    return np.stack([np.sin(t) ** 3, y], axis=1)


def _ring():
    return cut_open([_disc(), 0.58 * _disc()[::-1]])


def _disc():
    return _polar(1, np.linspace(0, 2 * np.pi, 96, endpoint=False))


def _triangle():
    return _dense(_polar(1, np.arange(3) * 2 * np.pi / 3))


def _square():
    return _dense(_polar(1, np.arange(4) * 2 * np.pi / 4))


# What draws the outlines, before deformation.
OUTLINES = {
    "star": _star,
    "cross": _cross,
    "arrow": _arrow,
    "crescent": _crescent,
    "heart": _heart,
    "ring": _ring,
}
# Unlabelled, with the same sizes, colours and deformations: an edge alone is not an object.
DISTRACTORS = {"triangle": _triangle, "square": _square, "disc": _disc}
CATEGORIES = [
    {"id": i, "name": name, "supercategory": "shape"} for i, name in enumerate(OUTLINES, start=1)
]


class Deformation(NamedTuple):
    """What is done to an outline, in this order.

    Attributes:
        bend: curvature times half thickness of the arc onto which the x axis is wound, -1 to 1.
        stretch: ratio of lengths along and across the direction of the stretch.
        stretch_angle: that direction, in radians from the x axis.
        rotation: in radians.
        size: geometric mean of the width and height of the box, in pixels.
    """

    bend: float
    stretch: float
    stretch_angle: float
    rotation: float
    size: float


def random_deformation(
    side: int, rng: np.random.Generator, sizes: tuple[float, float] = OBJECT_SIZES
) -> Deformation:
    """A deformation for an image of that nominal side; sizes are log-uniform."""
    smallest, largest = sizes
    return Deformation(
        bend=rng.uniform(-MAX_BEND, MAX_BEND),
        stretch=MAX_STRETCH ** rng.uniform(),
        stretch_angle=rng.uniform(0, np.pi),
        rotation=rng.uniform(0, 2 * np.pi),
        size=side * smallest * (largest / smallest) ** rng.uniform(),
    )


def _bend(points, strength):
    """Winds the x axis onto an arc; `strength` is curvature times half thickness, below 1."""
    x, y = points.T
    curvature = strength / np.abs(y).max()
    if abs(curvature) < 1e-3:
        return points
    radius = 1 / curvature - y
    return np.stack([radius * np.sin(curvature * x), radius * np.cos(curvature * x)], axis=1)


def deform(outline: np.ndarray, deformation: Deformation) -> np.ndarray:
    """Applies a deformation to an outline; the box of the result is centred at 0."""
    bend, stretch, stretch_angle, rotation, size = deformation
    points = _rotate(_bend(outline, bend), -stretch_angle) * [stretch, 1]
    points = _rotate(points, stretch_angle + rotation)
    low, high = points.min(axis=0), points.max(axis=0)
    return (points - (low + high) / 2) * size / np.sqrt(np.prod(high - low))
