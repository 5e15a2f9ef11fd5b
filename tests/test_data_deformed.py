"""Small pictures of deformed digits and shapes: where they lie, and that a seed fixes them."""

import math

import numpy as np
import pytest
import torch
from torchvision.datasets import MNIST

from dk_detectron.data import deformed
from dk_detectron.data.deformed import (
    MATCHING,
    SHAPE_RANGES,
    DigitDeformation,
    Sample,
    deform_digits,
    draw_shape_sample,
    load_mnist,
    warp,
)


def blob(size: int = 29) -> torch.Tensor:
    """A bar from the centre to the right: turning and scaling show."""
    picture = torch.zeros(1, 1, size, size)
    picture[..., size // 2 - 1 : size // 2 + 2, size // 2 :] = 1
    return picture


def warped(scale=1.0, angle=0.0, aspect=1.0, shift=(0.0, 0.0), fine=1, size=29):
    values = [torch.tensor([value]) for value in (scale, angle, aspect)]
    return warp(blob(), DigitDeformation(*values, torch.tensor([shift])), size, fine)[0, 0]


def test_nothing_done_is_the_picture():
    torch.testing.assert_close(warped(), blob()[0, 0], rtol=0, atol=1e-6)


@pytest.mark.parametrize(("scale", "aspect"), [(0.5, 1.0), (0.7, 1.0), (0.5, 1.5)])
def test_areas_follow_the_scale(scale, aspect):
    found, whole = warped(scale, aspect=aspect, fine=4), float(blob().sum())
    assert float(found.sum()) == pytest.approx(whole * scale**2 / aspect, rel=0.08)


def test_finer_samples_see_what_others_miss():
    dots = torch.zeros(1, 1, 28, 28)
    dots[..., ::4, ::4] = 1
    values = [torch.tensor([value]) for value in (0.25, 0.0, 1.0)]
    deformation = DigitDeformation(*values, torch.zeros(1, 2))
    middle = [warp(dots, deformation, 28, fine)[..., 12:16, 12:16] for fine in (1, 4)]
    assert float(middle[0].std()) < 1e-5  # every sample lies alike between the dots
    assert float(middle[1].mean()) == pytest.approx(1 / 16, rel=0.1)


def test_a_quarter_turn_is_a_quarter_turn():
    found = warped(angle=math.pi / 2)
    assert any(
        torch.allclose(found, torch.rot90(blob()[0, 0], turns), atol=1e-4) for turns in (1, -1)
    )


def test_shifts_are_in_halves_of_the_side():
    found = warped(0.5, shift=(0.5, 0.0))
    columns = torch.arange(29.0)
    centre = float((found.sum(0) * columns).sum() / found.sum())
    unmoved = warped(0.5)
    before = float((unmoved.sum(0) * columns).sum() / unmoved.sum())
    assert centre - before == pytest.approx(0.5 * 29 / 2, abs=0.3)


def test_digits_are_repeatable_within_their_scales_on_black():
    digits = Sample(blob(28).repeat(40, 1, 1, 1) * 2 - 1, torch.arange(40) % 10, torch.ones(40))

    def draw(seed):
        return deform_digits(digits, (0.3, 0.6), torch.Generator().manual_seed(seed))

    first, again, other = draw(0), draw(0), draw(1)
    assert torch.equal(first.images, again.images) and not torch.equal(first.images, other.images)
    assert first.images.shape == (40, 1, 28, 28)
    assert 0.3 <= float(first.sizes.min()) < float(first.sizes.max()) <= 0.6
    assert (first.images[:, :, [0, -1]] == -1).all() and first.images.max() <= 1
    assert torch.equal(first.labels, digits.labels)


def test_mnist_that_is_not_there_and_cannot_come(monkeypatch, tmp_path):
    def refuse(self):
        raise RuntimeError("no way")

    monkeypatch.setattr(MNIST, "download", refuse)
    with pytest.raises(FileNotFoundError, match=r"could not download it \(no way\): put train-im"):
        load_mnist(tmp_path)


@pytest.fixture
def mnist(tmp_path):
    """A root with 70 digits of 28x28 in MNIST's files."""
    folder = tmp_path / "MNIST" / "raw"
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for split, count in ("train", 40), ("t10k", 30):
        for kind, magic, shape in ("images-idx3", 2051, (28, 28)), ("labels-idx1", 2049, ()):
            header = np.array([magic, count, *shape], ">i4").tobytes()
            high = 256 if shape else 10
            content = rng.integers(0, high, (count, *shape), np.uint8).tobytes()
            (folder / f"{split}-{kind}-ubyte").write_bytes(header + content)
    return tmp_path


def test_the_digit_task(mnist, monkeypatch):
    monkeypatch.setattr(deformed, "TRAIN_DIGITS", 20)
    monkeypatch.setattr(deformed, "VALIDATION_DIGITS", 10)
    monkeypatch.setattr(deformed, "TEST_DIGITS", {MATCHING: 20, "smaller": 10, "larger": 10})
    task = deformed.draw_digit_task(0, mnist)
    assert [len(s.labels) for s in (task.train, task.validation)] == [20, 10]
    assert {name: len(s.labels) for name, s in task.tests.items()} == deformed.TEST_DIGITS
    assert task.tests["larger"].sizes.min() >= 1 > task.tests[MATCHING].sizes.max()
    assert task.tests["smaller"].sizes.max() <= 0.3 <= task.tests[MATCHING].sizes.min()


@pytest.mark.parametrize("name", SHAPE_RANGES)
def test_shapes_are_repeatable_and_as_large_as_they_should_be(name):
    shapes = SHAPE_RANGES[name]
    sample = draw_shape_sample(12, shapes, (0, 2))
    longer = draw_shape_sample(13, shapes, (0, 2))
    assert torch.equal(longer.images[:12], sample.images)
    assert not torch.equal(draw_shape_sample(12, shapes, (1, 2)).images, sample.images)
    assert sample.images.shape == (12, 1, 28, 28) and sample.images.abs().max() <= 1
    assert sample.labels.tolist() == [*range(6)] * 2
    low, high = shapes.sizes
    assert low <= float(sample.sizes.min()) <= float(sample.sizes.max()) <= high
    # Boxes are as large as said, to a pixel, where a shape fits in the picture.
    for image, size in zip(sample.images[:, 0], sample.sizes, strict=True):
        height, width = ((image > 0).any(axis).sum() for axis in (1, 0))
        assert float(height * width) ** 0.5 <= 28 * float(size) + 2


def test_training_and_validation_digits_are_others(mnist, monkeypatch):
    monkeypatch.setattr(deformed, "TRAIN_DIGITS", 20)
    monkeypatch.setattr(deformed, "VALIDATION_DIGITS", 10)
    monkeypatch.setattr(deformed, "TEST_DIGITS", {MATCHING: 20, "smaller": 10, "larger": 10})
    monkeypatch.setattr(deformed, "deform_digits", lambda digits, *_: digits)
    task = deformed.draw_digit_task(0, mnist)
    samples = task.train, task.validation, task.tests[MATCHING]
    images = torch.cat([sample.images for sample in samples]).flatten(1)
    assert len(images.unique(dim=0)) == len(images) == 50


def test_no_picture_of_the_shape_task_is_in_two_samples(monkeypatch):
    monkeypatch.setattr(deformed, "TRAIN_SHAPES", 12)
    monkeypatch.setattr(deformed, "VALIDATION_SHAPES", 12)
    counts = dict.fromkeys(deformed.SHAPE_RANGES, 12)
    monkeypatch.setattr(deformed, "TEST_SHAPES", counts)
    task = deformed.draw_shape_task(3)
    assert {name: len(s.labels) for name, s in task.tests.items()} == counts
    samples = task.train, task.validation, *task.tests.values()
    images = torch.cat([sample.images for sample in samples]).flatten(1)
    assert len(images.unique(dim=0)) == len(images) == 6 * 12
