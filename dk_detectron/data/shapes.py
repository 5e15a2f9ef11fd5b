"""Deformed shapes: a detection data set drawn from a seed.

Six kinds of object, each turned, stretched and bent at random over an eightfold range of sizes, lie
on textured backgrounds among unlabelled distractors. Kinds differ in what those deformations keep:
corners, arms and holes.

Image `i` of a split depends on `(seed, split, i)` and the nominal side only, so a set can be drawn
in any order, by any number of processes, and a larger set begins with the smaller one.

Arrays of this file: points are `(N, 2)`, x before y, in pixels with (0, 0) the corner of the first
pixel; `alpha` is the `(H, W)` share of each pixel that an object covers; `canvas` is `(H, W, 3)`,
BGR, float32, 0 to 1.
"""

from __future__ import annotations

import os
import signal
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import cv2
import numpy as np
from tqdm import tqdm

from .outlines import (
    CATEGORIES,
    CLASS_OBJECT_SIZES,
    DISTRACTORS,
    OBJECT_SIZES,
    OUTLINES,
    cut_open,
    deform,
    random_deformation,
)
from .writing import write_coco

SPLITS = ("train", "val", "test")
SIDES = (7 / 8, 5 / 4)  # image sides, in units of the side argument
MIN_VISIBLE = 0.75  # of an object's pixels, once all others are drawn
JPEG_QUALITY = 92
FEW = 64  # images, for which it is quicker to start no processes


def rasterize(points: np.ndarray, height: int, width: int) -> np.ndarray:
    """Anti-aliased `alpha` of a polygon's inside."""
    x0, y0 = np.maximum(np.floor(points.min(axis=0)), 0).astype(int)
    x1, y1 = np.minimum(np.ceil(points.max(axis=0)), (width, height)).astype(int)
    fine, bits = 4, 8  # samples a pixel and side; fractional bits of OpenCV's fixed point
    fixed = ((points - (x0, y0)) * fine - 0.5) * 2**bits  # OpenCV's integers are pixel centres
    mask = np.zeros(((y1 - y0) * fine, (x1 - x0) * fine), np.float32)
    cv2.fillPoly(mask, [np.round(fixed).astype(np.int32)], 1, shift=bits)
    alpha = np.zeros((height, width), np.float32)
    alpha[y0:y1, x0:x1] = cv2.resize(mask, (x1 - x0, y1 - y0), interpolation=cv2.INTER_AREA)
    return alpha


def place(points: np.ndarray, height: int, width: int, rng: np.random.Generator) -> np.ndarray:
    """Puts a deformed outline somewhere in the image, smaller if it would not fit.

    Returns:
        `alpha`. At most a tenth of the box's width and height lie outside the image.
    """
    frame = np.array([width, height])
    points = points * min(1, *(0.9 * frame / np.ptp(points, axis=0)))
    margin = 0.4 * np.ptp(points, axis=0)
    return rasterize(points + rng.uniform(margin, frame - margin), height, width)


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
    good = np.flatnonzero(contrast > rng.uniform(40, 80))
    return candidates[good[0] if len(good) else contrast.argmax()]


def background(height, width, rng):
    """A textured `canvas` with nothing on it."""
    first, second = _colours(rng, 2, (0.05, 0.6), (0.2, 0.95))
    # Half of the way only: room is left for objects that contrast with both colours.
    second = first + rng.uniform(0.15, 0.5) * (second - first)
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
    fill = colour * (1 + rng.uniform(0.05, 0.25) * (0.5 - pattern) * 2)

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


def _draw_names(rng):
    """Names of what an image holds, in drawing order."""
    names = rng.choice([*OUTLINES], rng.integers(2, 8))
    return rng.permutation([*names, *rng.choice([*DISTRACTORS], rng.integers(3))]).tolist()


def draw_image(
    side: int,
    rng: np.random.Generator,
    names: list[str] | None = None,
    sizes: tuple[float, float] = OBJECT_SIZES,
) -> tuple[np.ndarray, list]:
    """Draws one image of about `side` pixels squared; all chance comes from `rng`.

    Args:
        names: what it holds, in drawing order; by default a random choice.
        sizes: as OBJECT_SIZES.

    Returns:
        The image, `(H, W, 3)`, BGR, uint8; and of each object its name and the `alpha` of what
        others leave visible of it.
    """
    low, high = (round(factor * side) for factor in SIDES)
    height, width = rng.integers(low, high + 1, size=2).tolist()
    canvas = background(height, width, rng)
    drawn = []  # (name, alpha, visible alpha)
    for name in names or _draw_names(rng):
        points = deform((OUTLINES | DISTRACTORS)[name](), random_deformation(side, rng, sizes))
        for _ in range(8):  # without a place after that, the image is full
            alpha = place(points, height, width, rng)
            covered = [(n, a, visible * (1 - alpha)) for n, a, visible in drawn]
            if all(visible.sum() >= MIN_VISIBLE * a.sum() for _, a, visible in covered):
                paint(canvas, alpha, rng)
                drawn = [*covered, (name, alpha, alpha)]
                break
    return photograph(canvas, rng), [(n, visible) for n, _, visible in drawn if n in OUTLINES]


def outline_polygons(alpha: np.ndarray) -> list[np.ndarray]:
    """Polygons around where `alpha` exceeds a half, to a quarter of a pixel.

    Returns:
        The points of each part of 2 square pixels or more; holes are cut open.
    """
    x, y, width, height = cv2.boundingRect((alpha > 0).astype(np.uint8))
    fine = 4
    part = cv2.resize(alpha[y : y + height, x : x + width], None, fx=fine, fy=fine)
    contours, tree = cv2.findContours(
        (part > 0.5).astype(np.uint8), cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE
    )
    rings = [cv2.approxPolyDP(ring, 0.8, closed=True)[:, 0] for ring in contours]
    parents = [] if tree is None else tree[0, :, 3].tolist()
    polygons = []
    for border, parent in enumerate(parents):
        if parent < 0 and cv2.contourArea(contours[border]) >= 2 * fine**2:
            holes = [hole for hole, parent in zip(rings, parents, strict=True) if parent == border]
            polygons.append((cut_open([rings[border], *holes]) + 0.5) / fine + (x, y))
    return polygons


def annotate(name: str, visible: np.ndarray) -> dict | None:
    """COCO annotation, without identifiers, of an object's visible part; None if nothing is."""
    polygons = [polygon.round(2) for polygon in outline_polygons(visible)]
    if not polygons:
        return None
    points = np.vstack(polygons)
    area = sum(cv2.contourArea(polygon.astype(np.float32)) for polygon in polygons)
    return {
        "category_id": [*OUTLINES].index(name) + 1,
        "bbox": np.round([*points.min(axis=0), *np.ptp(points, axis=0)], 2).tolist(),
        "area": round(area, 2),
        "segmentation": [polygon.ravel().tolist() for polygon in polygons],
        "iscrowd": 0,
    }


def _generator(seed, split, index, *more):
    sequence = np.random.SeedSequence(seed, spawn_key=(SPLITS.index(split), index, *more))
    return np.random.default_rng(sequence)


def _write_jpeg(path, image):
    # Not imwrite, which keeps silent about a full disk.
    path.write_bytes(cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY])[1])


def _write_image(index, folder, seed, side):
    """Draws and writes image `index` of the split that `folder` is named after."""
    image, objects = draw_image(side, _generator(seed, folder.name, index))
    path = folder / f"{index:06d}.jpg"
    _write_jpeg(path, image)
    height, width = image.shape[:2]
    record = {"id": index + 1, "file_name": path.name, "width": width, "height": height}
    annotations = [annotate(name, visible) for name, visible in objects]
    return record, [annotation for annotation in annotations if annotation]


def _write_class_image(index, folder, seed, side):
    """The same for an image of one object, in the folder of its class."""
    rng = _generator(seed, folder.name, index, 1)
    name = [*OUTLINES][index % len(OUTLINES)]
    image, _ = draw_image(side, rng, [name], CLASS_OBJECT_SIZES)
    _write_jpeg(folder / name / f"{index:06d}.jpg", image)


def _start_worker():
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    cv2.setNumThreads(1)


def _draw_all(write_image, split, count):
    """The results of `write_image` for the indices of a split, in order, drawn in parallel."""
    show = partial(tqdm, total=count, desc=split, unit="image")
    if count < FEW:
        return list(show(map(write_image, range(count))))
    # Not a fork of this process, in which the threads of OpenCV may hold what a child waits for.
    context = get_context("forkserver")
    with ProcessPoolExecutor(os.cpu_count(), context, _start_worker) as pool:
        return list(show(pool.map(write_image, range(count), chunksize=8)))


def write_class_split(folder: Path, split: str, count: int, *, seed: int, side: int) -> None:
    """Writes images of one object each, the classes in turn, as torchvision's ImageFolder."""
    for name in OUTLINES:
        (folder / split / name).mkdir(parents=True)
    write_image = partial(_write_class_image, folder=folder / split, seed=seed, side=side)
    _draw_all(write_image, split, count)


def write_split(folder: Path, split: str, count: int, *, seed: int, side: int) -> None:
    """Writes the images and the annotation file of one split; "test" comes without annotations."""
    (folder / split).mkdir(parents=True)
    write_image = partial(_write_image, folder=folder / split, seed=seed, side=side)
    records = _draw_all(write_image, split, count)
    images = [image for image, _ in records]
    if split == "test":
        write_coco(folder / "annotations/image_info_test.json", images, CATEGORIES, None)
        return
    found = [{"image_id": image["id"], **a} for image, objects in records for a in objects]
    annotations = [{"id": i, **annotation} for i, annotation in enumerate(found, start=1)]
    write_coco(folder / f"annotations/instances_{split}.json", images, CATEGORIES, annotations)
