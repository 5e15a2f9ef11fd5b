"""Small pictures of one deformed object each, to classify: digits and shapes.

A task is drawn from a seed: other pictures for every seed, the same for all networks that compare.
Each has tests at the deformations of its training pictures ("matching") and beyond them.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .outlines import OUTLINES, Deformation, deform
from .shapes import place

MATCHING, VALIDATION = "matching", "validation"


class Sample(NamedTuple):
    """Pictures [N, C, H, W] of about -1 to 1, their classes [N], and the sizes of objects [N]."""

    images: Tensor
    labels: Tensor
    sizes: Tensor


class Task(NamedTuple):
    """What to learn from, what to choose settings by, and tests by name, MATCHING among them."""

    classes: int
    train: Sample
    validation: Sample
    tests: dict[str, Sample]


class DigitDeformation(NamedTuple):
    """Each [N]: size of the original's, angle in radians, ratio of lengths; and shift [N, 2]."""

    scale: Tensor
    angle: Tensor
    aspect: Tensor
    shift: Tensor


def warp(images: Tensor, deformation: DigitDeformation, size: int, fine: int = 1) -> Tensor:
    """[N, C, H, W] -> [N, C, size, size]: shrunk, stretched, turned, moved; zero around them.

    Args:
        images: square pictures.
        deformation: shifts are in halves of the side.
        fine: samples a pixel and side; at a scale s, 1/s of the original's pixels need as many.
    """
    n = len(images)
    scale, angle, aspect, shift = deformation
    affine = torch.zeros(n, 2, 3)
    affine[:, 0, 0], affine[:, 0, 1] = angle.cos() / scale * aspect, angle.sin() / scale
    affine[:, 1, 0], affine[:, 1, 1] = -angle.sin() / scale * aspect, angle.cos() / scale
    affine[:, :, 2] = -(affine[:, :, :2] @ shift[:, :, None])[:, :, 0]
    grid = F.affine_grid(affine, [n, 1, size * fine, size * fine], align_corners=False)
    warped = F.grid_sample(images, grid, align_corners=False)
    return F.avg_pool2d(warped, fine) if fine > 1 else warped


# ---- MNIST, scaled and turned

DIGITS_SIDE = 28
# Scales of the literature on scale equivariance. There digits stay upright, or have any angle, with
# which networks as narrow as these are far from converged in minutes.
DIGIT_ANGLE = torch.pi / 4
DIGIT_SCALES = {MATCHING: (0.3, 1.0), "smaller": (0.2, 0.3), "larger": (1.0, 1.35)}
TRAIN_DIGITS, VALIDATION_DIGITS = 10000, 1000
TEST_DIGITS = {MATCHING: 2000, "smaller": 500, "larger": 500}


def load_mnist(root: Path) -> tuple[Sample, Sample]:
    """MNIST's 60,000 training and 10,000 test digits, downloaded into ``root`` if not there.

    Raises:
        FileNotFoundError: it is not there, and cannot be downloaded.
    """
    from torchvision.datasets import MNIST

    samples = []
    for train in True, False:
        try:
            data = MNIST(str(root), train=train, download=True)
        except (OSError, RuntimeError) as error:
            raise FileNotFoundError(
                f"{root}: expected MNIST, found none and could not download it ({error}): put "
                f"train-images-idx3-ubyte and its three sisters into {root / 'MNIST' / 'raw'}"
            ) from error
        images = data.data[:, None] / 127.5 - 1
        samples.append(Sample(images, data.targets, torch.ones(len(images))))
    return samples[0], samples[1]


def deform_digits(
    digits: Sample, scales: tuple[float, float], generator: torch.Generator
) -> Sample:
    """Each scaled, uniformly within ``scales``, and turned about its centre."""
    n = len(digits.images)
    scale = torch.empty(n).uniform_(*scales, generator=generator)
    angle = torch.empty(n).uniform_(-DIGIT_ANGLE, DIGIT_ANGLE, generator=generator)
    deformation = DigitDeformation(scale, angle, torch.ones(n), torch.zeros(n, 2))
    # What is outside of a picture is black, which warping takes for zero.
    chunks = zip(digits.images.split(500), *(part.split(500) for part in deformation), strict=True)
    images = [
        warp(picture + 1, DigitDeformation(*parts), DIGITS_SIDE, fine=3) - 1
        for picture, *parts in chunks
    ]
    return Sample(torch.cat(images), digits.labels, scale)


def draw_digit_task(seed: int, root: Path) -> Task:
    """10,000 digits of MNIST to learn from, as in the literature; tests from its test digits."""
    generator = torch.Generator().manual_seed(seed)
    train, test = load_mnist(root)

    def draw(digits: Sample, order: Tensor, scales: tuple[float, float]) -> Sample:
        return deform_digits(Sample(*(part[order] for part in digits)), scales, generator)

    order = torch.randperm(len(train.labels), generator=generator)
    learn, choose = order[:TRAIN_DIGITS], order[TRAIN_DIGITS : TRAIN_DIGITS + VALIDATION_DIGITS]
    order = torch.randperm(len(test.labels), generator=generator)
    return Task(
        10,
        draw(train, learn, DIGIT_SCALES[MATCHING]),
        draw(train, choose, DIGIT_SCALES[MATCHING]),
        {
            name: draw(test, order[: TEST_DIGITS[name]], scales)
            for name, scales in DIGIT_SCALES.items()
        },
    )


# ---- the outlines of the shapes, one a picture, white on black

SHAPES_SIDE = 28
TRAIN_SHAPES, VALIDATION_SHAPES = 6000, 1000
TEST_SHAPES = {MATCHING: 2000, "smaller": 500, "larger": 500, "stretched": 500}


class ShapeRange(NamedTuple):
    """Sizes as parts of the side, and ratios of lengths along and across, both log-uniform."""

    sizes: tuple[float, float] = (0.35, 0.6)
    stretches: tuple[float, float] = (1.0, 1.5)


SHAPE_RANGES = {
    MATCHING: ShapeRange(),
    "smaller": ShapeRange(sizes=(0.22, 0.35)),
    "larger": ShapeRange(sizes=(0.6, 0.8)),
    "stretched": ShapeRange(stretches=(1.5, 2.5)),
}


def _log_uniform(rng: np.random.Generator, low: float, high: float) -> float:
    return low * (high / low) ** rng.uniform()


def draw_shape(
    name: str, shapes: ShapeRange, side: int, rng: np.random.Generator
) -> tuple[np.ndarray, float]:
    """One outline of `data.outlines`, stretched, turned by any angle, put anywhere; not bent.

    Returns:
        `alpha` of `data.shapes`, [side, side], and the object's size as a part of the side.
    """
    size = _log_uniform(rng, *shapes.sizes)
    stretch, turns = _log_uniform(rng, *shapes.stretches), rng.uniform(0, np.pi, 2)
    deformation = Deformation(0, stretch, turns[0], 2 * turns[1], side * size)
    return place(deform(OUTLINES[name](), deformation), side, side, rng), size


def draw_shape_sample(count: int, shapes: ShapeRange, seed: tuple[int, ...]) -> Sample:
    """The six classes in turn; picture `i` depends on ``(*seed, i)`` alone."""
    names = [*OUTLINES]
    drawn = [
        draw_shape(names[i % len(names)], shapes, SHAPES_SIDE, np.random.default_rng([*seed, i]))
        for i in range(count)
    ]
    images = torch.tensor(np.stack([image for image, _ in drawn]))[:, None]
    sizes = torch.tensor([size for _, size in drawn])
    return Sample(2 * images - 1, torch.arange(count) % len(names), sizes)


def draw_shape_task(seed: int, root: Path | None = None) -> Task:
    """6,000 shapes to learn from; tests beyond their sizes and stretches as well."""
    matching = SHAPE_RANGES[MATCHING]
    return Task(
        len(OUTLINES),
        draw_shape_sample(TRAIN_SHAPES, matching, (seed, 0)),
        draw_shape_sample(VALIDATION_SHAPES, matching, (seed, 1)),
        {
            name: draw_shape_sample(TEST_SHAPES[name], shapes, (seed, 2 + i))
            for i, (name, shapes) in enumerate(SHAPE_RANGES.items())
        },
    )


TASKS: dict[str, Callable[[int, Path], Task]] = {
    "digits": draw_digit_task,
    "shapes": draw_shape_task,
}
