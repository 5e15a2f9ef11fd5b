"""Numbers that say what a receptive field looks like."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

RADII = 50, 90
# The thresholds of Ding et al. 2022 (RepLKNet), section 6.
AREAS = 20, 30, 50, 99
# Of `measure`, in order.
MEASURES = (
    "in_box", "in_mask", *(f"radius_{share}" for share in RADII),
    *(f"area_{share}" for share in AREAS), "centre_x", "centre_y", "axis_major", "axis_minor",
    "angle", "aspect", "box_aspect",
)  # fmt: skip


def measure(
    field: Any,
    point: Sequence[float],
    box: Sequence[float] | None = None,
    mask: Any = None,
) -> dict[str, float]:
    """What an effective receptive field looks like, in shares of its mass and in pixels.

    Args:
        field: [H, W], not negative; an array or a tensor.
        point: (x, y), in pixels, of which it is the field.
        box: (x0, y0, x1, y1) of the object.
        mask: [H, W], booleans: the object's pixels.

    Returns:
        By the names of ``MEASURES``; NaN what there is nothing for: no box or mask, or a field that
        is zero everywhere.

        in_box, in_mask: the share of the mass on the object.
        radius_50, radius_90: the least distance from the point within which this percentage of the
            mass lies, by the centres of pixels.
        area_20 ... area_99: the area of the smallest square around the point's pixel, as far as it
            lies in the picture, that holds this percentage; as a share of the picture's.
        centre_x, centre_y, axis_major, axis_minor, angle: the Gaussian of the same mean and
            covariance (the maximum likelihood one): its centre, its standard deviations, and the
            major axis' angle to the x axis, in degrees from -90 to 90, clockwise as one sees it.
        aspect: the Gaussian's standard deviation along x over that along y.
        box_aspect: the box's width over its height.

    Raises:
        ValueError: another shape, or a negative or infinite value.
    """
    field = np.asarray(getattr(field, "cpu", lambda: field)(), dtype=np.float64)
    if field.ndim != 2 or not np.isfinite(field).all() or (field < 0).any():
        raise ValueError(
            f"field: expected finite values [H, W], not below 0, got shape {list(field.shape)}"
        )
    if mask is not None and np.shape(mask) != field.shape:
        raise ValueError(f"mask: expected {list(field.shape)}, got {list(np.shape(mask))}")
    found = dict.fromkeys(MEASURES, math.nan)
    if box is not None:
        width, height = box[2] - box[0], box[3] - box[1]
        found["box_aspect"] = width / height if height > 0 else math.nan
    if not field.any():
        return found
    share = field / field.sum()
    if box is not None:
        rows = _covered(field.shape[0], box[1], box[3])
        columns = _covered(field.shape[1], box[0], box[2])
        found["in_box"] = float(rows @ share @ columns)
    if mask is not None:
        found["in_mask"] = float(share[np.asarray(mask, dtype=bool)].sum())
    return found | _radii(share, point) | _areas(share, point) | _gaussian(share)


def _covered(size: int, low: float, high: float) -> np.ndarray:
    """The share of each of an axis' pixels that an interval covers."""
    first = np.arange(size)
    return (np.minimum(first + 1, high) - np.maximum(first, low)).clip(0, 1)


def _reached(distance: np.ndarray, share: np.ndarray, parts: Sequence[int]) -> list[float]:
    """The least distance within which there are these percentages of the mass."""
    order = np.argsort(distance, axis=None, kind="stable")
    mass = share.ravel()[order].cumsum()
    # A share that only rounding keeps from being reached is.
    last = np.searchsorted(mass, np.array(parts) / 100 - 1e-12)
    return [float(d) for d in distance.ravel()[order][last.clip(max=len(mass) - 1)]]


def _radii(share: np.ndarray, point: Sequence[float]) -> dict[str, float]:
    y, x = np.mgrid[: share.shape[0], : share.shape[1]] + 0.5
    distance = np.hypot(x - point[0], y - point[1])
    return dict(zip((f"radius_{p}" for p in RADII), _reached(distance, share, RADII), strict=True))


def _areas(share: np.ndarray, point: Sequence[float]) -> dict[str, float]:
    pixel = [min(int(p), n - 1) for p, n in zip(point, share.shape[::-1], strict=True)]
    y, x = np.mgrid[: share.shape[0], : share.shape[1]]
    distance = np.maximum(abs(x - pixel[0]), abs(y - pixel[1]))
    reached = _reached(distance, share, AREAS)
    return {f"area_{p}": float((distance <= d).mean()) for p, d in zip(AREAS, reached, strict=True)}


def _gaussian(share: np.ndarray) -> dict[str, float]:
    rows, columns = share.sum(1), share.sum(0)
    y, x = (np.arange(n) + 0.5 for n in share.shape)
    cx, cy = columns @ x, rows @ y
    # The mass of a pixel is spread over it: a twelfth is the variance of that.
    xx, yy = columns @ (x - cx) ** 2 + 1 / 12, rows @ (y - cy) ** 2 + 1 / 12
    xy = (y - cy) @ share @ (x - cx)
    variances, axes = np.linalg.eigh([[xx, xy], [xy, yy]])
    minor, major = np.sqrt(variances)
    angle = math.degrees(math.atan2(axes[1, 1], axes[0, 1]))
    found = {
        "centre_x": cx, "centre_y": cy, "axis_major": major, "axis_minor": minor,
        "angle": angle - 180 * round(angle / 180), "aspect": math.sqrt(xx / yy),
    }  # fmt: skip
    return {name: float(value) for name, value in found.items()}


def overlap(one: Any, other: Any) -> float:
    """How alike two fields [H, W] are: the mass they share, 1 if equal, 0 if nowhere both."""
    shares = [np.asarray(field, dtype=np.float64) for field in (one, other)]
    if not all(share.any() for share in shares):
        return math.nan
    return float(np.minimum(*(share / share.sum() for share in shares)).sum())
