"""Deformed shapes: a detection data set drawn from a seed.

Six kinds of object, each turned, stretched and bent at random over a ninefold range of sizes, lie on
textured backgrounds among unlabelled distractors. Kinds differ in what those deformations keep:
corners, arms and holes.

Image `i` of a split depends on `(seed, split, i)` and the image size only, so a set can be drawn in
any order, by any number of processes, and a larger set begins with the smaller one.

Arrays of this file: points are `(N, 2)`, x before y, in pixels with (0, 0) the corner of the first
pixel; `alpha` is the `(H, W)` share of each pixel that an object covers; `canvas` is `(H, W, 3)`,
BGR, float32, 0 to 1.
"""

import os
import signal
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import contourpy
import cv2
import numpy as np
from tqdm import tqdm

VERSION = 1  # raise it when the same arguments give other images
SPLITS = ("train", "val", "test")

MIN_SIZE = 192  # smaller images would hold objects too small to tell apart
SIDES = (7 / 8, 5 / 4)  # image sides, in units of the size argument
OBJECT_SIZES = (1 / 16, 9 / 16)  # geometric mean of box width and height, in the same unit
MAX_ASPECT = 2.2  # of the stretch
MAX_BEND = 0.65  # curvature times half thickness: at 1 the inner side would fold
MIN_VISIBLE = 0.6  # of an object's pixels, once all others are drawn
JPEG_QUALITY = 92


def _dense(corners):
    """Closed polygon with 24 points an edge, so that edges can bend."""
    ends = np.vstack([corners, corners[:1]])
    at = np.arange(24 * len(corners)) / 24
    return np.stack([np.interp(at, np.arange(len(ends)), column) for column in ends.T], axis=1)


def _polar(radius, angle):
    return np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1)


def _circle(radius):
    return _polar(radius, np.linspace(0, 2 * np.pi, 96, endpoint=False))


def _star():
    return [_dense(_polar(np.tile([1, 0.42], 5), np.arange(10) * np.pi / 5))]


def _cross():
    a, b = 1, 0.3
    quarter = np.array([[a, -b], [a, b], [b, b]])
    turns = [quarter @ np.array([[c, s], [-s, c]]) for c, s in [(1, 0), (0, 1), (-1, 0), (0, -1)]]
    return [_dense(np.vstack(turns))]


def _arrow():
    half = np.array([[1, 0], [0.15, 0.72], [0.15, 0.24], [-1, 0.24]])
    return [_dense(np.vstack([half, half[:0:-1] * [1, -1]]))]


def _crescent():
    tip = np.deg2rad(40)  # where the two arcs meet, seen from the centre of the outer one
    outer = _polar(1, np.linspace(tip, 2 * np.pi - tip, 96))
    shift, height = 0.5, np.sin(tip)
    inner_tip = np.arctan2(height, np.cos(tip) - shift)
    radius = np.hypot(height, np.cos(tip) - shift)
    inner = _polar(radius, np.linspace(2 * np.pi - inner_tip, inner_tip, 96)) + [shift, 0]
    return [np.vstack([outer, inner[1:-1]])]


def _heart():
    t = np.linspace(0, 2 * np.pi, 160, endpoint=False)
    x = np.sin(t) ** 3
    y = (13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)) / 16
    return [np.stack([x, y], axis=1)]


def _ring():
    return [_circle(1), _circle(0.58)]


def _polygon(corners):
    return [_dense(_polar(1, np.arange(corners) * 2 * np.pi / corners))]


# Outlines before deformation: the first contour is the border, further ones are holes.
OUTLINES = {
    "star": _star(),
    "cross": _cross(),
    "arrow": _arrow(),
    "crescent": _crescent(),
    "heart": _heart(),
    "ring": _ring(),
}
# Unlabelled, and of the same sizes, colours and deformations: an edge alone is not an object.
DISTRACTORS = {"triangle": _polygon(3), "square": _polygon(4), "disc": [_circle(1)]}
CLASSES = tuple(OUTLINES)


def _rotate(points, angle):
    c, s = np.cos(angle), np.sin(angle)
    return points @ np.array([[c, s], [-s, c]])


def _bend(points, strength):
    """Winds the x axis onto an arc; `strength` is curvature times half thickness, below 1."""
    x, y = points.T
    curvature = strength / np.abs(y).max()
    if abs(curvature) < 1e-3:
        return points
    radius = 1 / curvature - y
    return np.stack([radius * np.sin(curvature * x), radius * np.cos(curvature * x)], axis=1)


def deform(outline, rng):
    """Stretches, bends and turns an outline, each along a direction of its own.

    Args:
        outline (list[ndarray]): contours, as in `OUTLINES`.
        rng (np.random.Generator): source of the deformation.

    Returns:
        list[ndarray]: the contours, in a box centred at 0 whose width times height is 1.
    """
    points = np.vstack(outline)
    stretch = MAX_ASPECT ** rng.uniform(0, 0.5)
    points = _rotate(points, rng.uniform(0, 2 * np.pi)) * [stretch, 1 / stretch]
    points = _bend(_rotate(points, rng.uniform(0, 2 * np.pi)), rng.uniform(-MAX_BEND, MAX_BEND))
    points = _rotate(points, rng.uniform(0, 2 * np.pi))
    low, high = points.min(axis=0), points.max(axis=0)
    points = (points - (low + high) / 2) / np.sqrt(np.prod(high - low))
    return np.split(points, np.cumsum([len(contour) for contour in outline])[:-1])


def rasterize(contours, height, width):
    """Anti-aliased `alpha` of the area inside an odd number of the contours, in pixels."""
    alpha = np.zeros((height, width), np.float32)
    points = np.vstack(contours)
    x0, y0 = np.maximum(np.floor(points.min(axis=0)), 0).astype(int)
    x1, y1 = np.minimum(np.ceil(points.max(axis=0)), (width, height)).astype(int)
    fine, bits = 4, 8  # samples a pixel and side; fractional bits of OpenCV's fixed point
    # OpenCV puts integers at pixel centres, hence the half.
    fixed = [
        np.round(((contour - (x0, y0)) * fine - 0.5) * 2**bits).astype(np.int32)
        for contour in contours
    ]
    mask = np.zeros(((y1 - y0) * fine, (x1 - x0) * fine), np.uint8)
    cv2.fillPoly(mask, fixed, 255, shift=bits)
    shrunk = cv2.resize(mask, (x1 - x0, y1 - y0), interpolation=cv2.INTER_AREA)
    alpha[y0:y1, x0:x1] = shrunk.astype(np.float32) / 255
    return alpha


def place(outline, size, height, width, rng):
    """Deforms an outline and puts it somewhere in the image.

    Args:
        outline (list[ndarray]): contours, as in `OUTLINES`.
        size (float): geometric mean of box width and height, in pixels; less where it cannot fit.
        height, width (int): of the image.
        rng (np.random.Generator): source of deformation and position.

    Returns:
        ndarray: `alpha`. At most a tenth of the box's sides lies outside the image.
    """
    contours = deform(outline, rng)
    extent = np.ptp(np.vstack(contours), axis=0)
    scale = min(size, *(0.9 * np.array([width, height]) / extent))
    margin = 0.4 * scale * extent
    centre = rng.uniform(margin, np.array([width, height]) - margin)
    return rasterize([contour * scale + centre for contour in contours], height, width)


def _noise(rng, height, width, cells):
    """Smooth noise of four octaves, 0 to 1, about `cells` blobs across."""
    total = np.zeros((height, width), np.float32)
    for octave in range(4):
        count = int(cells * 2**octave) + 2
        grid = rng.random((count, count), np.float32) * 0.55**octave
        total += cv2.resize(grid, (width, height), interpolation=cv2.INTER_CUBIC)
    return cv2.normalize(total, None, 0, 1, cv2.NORM_MINMAX)


def _pattern(rng, height, width, cycles):
    """A scalar texture, 0 to 1: clouds, patches, stripes or a slope.

    Args:
        rng (np.random.Generator): source of the texture.
        height, width (int): of the area.
        cycles (float): about how often the texture repeats across it.
    """
    noise = _noise(rng, height, width, cycles)
    kind = rng.choice(["clouds", "patches", "stripes", "slope"])
    if kind == "clouds":
        return noise
    if kind == "patches":
        return 0.5 + 0.5 * np.tanh(rng.uniform(6, 24) * (noise - 0.5))
    y, x = np.mgrid[0:height, 0:width].astype(np.float32) / max(height, width)
    angle = rng.uniform(0, 2 * np.pi)
    along = np.cos(angle) * x + np.sin(angle) * y
    if kind == "stripes":
        wave = np.sin(2 * np.pi * cycles * along + rng.uniform(0, 6) * noise)
        return 0.5 + 0.5 * np.tanh(rng.uniform(0.5, 4) * wave)
    slope = cv2.normalize(along, None, 0, 1, cv2.NORM_MINMAX)
    return 0.75 * slope + 0.25 * noise


def _colours(rng, count, saturation, value):
    """`(count, 3)` BGR colours of any hue, with saturation and value in the given ranges."""
    hsv = rng.uniform((0, saturation[0], value[0]), (360, saturation[1], value[1]), (1, count, 3))
    return cv2.cvtColor(hsv.astype(np.float32), cv2.COLOR_HSV2BGR)[0]


def _lab(colours):
    return cv2.cvtColor(np.ascontiguousarray(colours)[None], cv2.COLOR_BGR2Lab)[0]


def _contrasting_colour(rng, surroundings):
    """A colour that most of the `(N, 3)` surroundings differ from, by an amount that varies."""
    candidates = _colours(rng, 24, (0.2, 1), (0.15, 1))
    sample = _lab(surroundings[rng.integers(len(surroundings), size=64)])
    distances = np.linalg.norm(_lab(candidates)[:, None] - sample, axis=2)
    contrast = np.quantile(distances, 0.15, axis=1)
    good = np.flatnonzero(contrast > rng.uniform(28, 70))
    return candidates[good[0] if len(good) else contrast.argmax()]


def background(height, width, rng):
    """A textured `canvas` with nothing on it."""
    first, second = _colours(rng, 2, (0.05, 0.6), (0.2, 0.95))
    # Half of the way only: room is left for objects that contrast with both colours.
    second = first + rng.uniform(0.25, 0.75) * (second - first)
    pattern = _pattern(rng, height, width, rng.uniform(2, 14))[..., None]
    light = rng.uniform(0, 0.3) * (_noise(rng, height, width, 2)[..., None] - 0.5)
    return np.clip(first + pattern * (second - first) + light, 0, 1).astype(np.float32)


def paint(canvas, alpha, rng):
    """Paints one object onto the canvas, in place, with a texture that stands out from it.

    Args:
        canvas (ndarray): the image so far.
        alpha (ndarray): where the object lies, from `place`.
        rng (np.random.Generator): source of colours, texture and shadow.
    """
    colour = _contrasting_colour(rng, canvas[alpha > 0.5])
    x, y, width, height = cv2.boundingRect((alpha > 0).astype(np.uint8))
    pattern = _pattern(rng, height, width, rng.uniform(1, 4))[..., None]
    fill = colour * (1 + rng.uniform(0.1, 0.5) * (0.5 - pattern) * 2)

    reach = 0.06 * np.sqrt(width * height)
    shift = np.float32([[1, 0, rng.uniform(-reach, reach)], [0, 1, rng.uniform(0, reach)]])
    shadow = cv2.warpAffine(alpha, shift, alpha.shape[::-1])
    shadow = cv2.GaussianBlur(shadow, (0, 0), 0.5 + reach / 2)
    canvas *= 1 - rng.uniform(0, 0.6) * shadow[..., None]

    part, cover = canvas[y : y + height, x : x + width], alpha[y : y + height, x : x + width, None]
    part += cover * (np.clip(fill, 0, 1) - part)


def photograph(canvas, rng):
    """The canvas as a camera would see it: slightly blurred, noisy, 8 bits."""
    canvas = cv2.GaussianBlur(canvas, (0, 0), rng.uniform(0.2, 0.7))
    noise = rng.standard_normal(canvas.shape, np.float32) * rng.uniform(0, 0.03)
    return np.round(np.clip(canvas + noise, 0, 1) * 255).astype(np.uint8)


def _log_uniform(rng, low, high):
    return low * (high / low) ** rng.uniform()


def _draw_kinds(rng):
    """Names of what an image holds, in drawing order."""
    kinds = [*rng.choice(CLASSES, rng.integers(1, 8)), *rng.choice([*DISTRACTORS], rng.integers(3))]
    return rng.permutation(kinds).tolist()


def draw_image(size, rng):
    """Draws one image.

    Args:
        size (int): nominal side; real ones are `SIDES` times this.
        rng (np.random.Generator): source of everything.

    Returns:
        tuple[ndarray, list[tuple[str, ndarray]]]: the `(H, W, 3)` BGR uint8 image, and of each
        object its class and the `alpha` of what others leave visible of it.
    """
    height, width = rng.integers(*np.round(np.multiply(SIDES, size)).astype(int) + (0, 1), size=2)
    canvas = background(height, width, rng)
    drawn = []  # (class, alpha, visible alpha)
    for kind in _draw_kinds(rng):
        outline = (OUTLINES | DISTRACTORS)[kind]
        object_size = size * _log_uniform(rng, *OBJECT_SIZES)
        for _ in range(8):  # then the image is full: leave the object out
            alpha = place(outline, object_size, height, width, rng)
            left = [visible * (1 - alpha) for _, _, visible in drawn]
            if all(v.sum() >= MIN_VISIBLE * a.sum() for v, (_, a, _) in zip(left, drawn)):
                paint(canvas, alpha, rng)
                drawn = [(k, a, v) for v, (k, a, _) in zip(left, drawn)] + [(kind, alpha, alpha)]
                break
    return photograph(canvas, rng), [(k, v) for k, _, v in drawn if k in OUTLINES]


def _cut_open(rings):
    """Joins a border and its holes by cuts of no width: COCO's polygons have no holes."""
    joined = rings[0]
    for hole in rings[1:]:
        gaps = np.linalg.norm(joined[:, None] - hole, axis=2)
        i, j = np.unravel_index(gaps.argmin(), gaps.shape)
        hole = np.vstack([hole[j:], hole[: j + 1]])
        joined = np.vstack([joined[: i + 1], hole, joined[i:]])
    return joined


def outline_polygons(alpha):
    """Polygons around where `alpha` exceeds a half, at sub-pixel precision.

    Returns:
        list[ndarray]: points of each part of 2 square pixels or more; holes are cut open.
    """
    # contourpy is matplotlib's contour finder; the frame of zeros closes contours at the border.
    finder = contourpy.contour_generator(
        z=np.pad(alpha, 1), fill_type=contourpy.FillType.OuterOffset
    )
    polygons = []
    for points, offsets in zip(*finder.filled(0.5, np.inf)):
        rings = np.split(points.astype(np.float32) - 0.5, offsets[1:-1])
        rings = [cv2.approxPolyDP(ring[:-1], 0.2, closed=True)[:, 0] for ring in rings]
        polygons.append(_cut_open([ring for ring in rings if len(ring) > 2]))
    return [polygon.round(2) for polygon in polygons if cv2.contourArea(polygon) >= 2]


def _annotation(kind, visible):
    """COCO annotation, without the identifiers, of an object's visible part."""
    polygons = outline_polygons(visible)
    points = np.vstack(polygons)
    (x, y), (width, height) = points.min(axis=0), np.ptp(points, axis=0)
    return {
        "category_id": CLASSES.index(kind) + 1,
        "bbox": np.round([x, y, width, height], 2).tolist(),
        "area": round(sum(cv2.contourArea(polygon) for polygon in polygons), 2),
        "segmentation": [polygon.ravel().tolist() for polygon in polygons],
        "iscrowd": 0,
    }
