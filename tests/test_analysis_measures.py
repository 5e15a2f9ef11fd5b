"""The numbers of a receptive field, against hand-made fields and brute force."""

import math

import numpy as np
import pytest
import torch

from dk_detectron.analysis import measure
from dk_detectron.analysis.measures import AREAS, MEASURES, overlap


def test_a_single_pixel():
    field = np.zeros((10, 20))
    field[3, 7] = 5.0
    found = measure(field, (7.5, 3.5), box=(7.25, 0, 11, 3.5), mask=field > 0)
    assert found.keys() == set(MEASURES)
    assert found["in_box"] == 0.75 * 0.5  # a pixel counts as far as the box covers it
    assert found["in_mask"] == 1
    assert found["radius_50"] == found["radius_90"] == 0
    assert all(found[f"area_{p}"] == 1 / 200 for p in AREAS)
    assert (found["centre_x"], found["centre_y"]) == (7.5, 3.5)
    assert found["axis_major"] == found["axis_minor"] == pytest.approx(math.sqrt(1 / 12))
    assert found["aspect"] == 1 and found["box_aspect"] == 3.75 / 3.5


@pytest.mark.parametrize("angle", [-75, -30, 0, 20, 60])
def test_a_gaussian_is_fitted(angle):
    y, x = np.mgrid[:160, :200] + 0.5
    radians = math.radians(angle)
    along = (x - 90) * math.cos(radians) + (y - 80) * math.sin(radians)
    across = (y - 80) * math.cos(radians) - (x - 90) * math.sin(radians)
    field = torch.tensor(np.exp(-((along / 14) ** 2) / 2 - (across / 6) ** 2 / 2))
    found = measure(field, (90, 80))
    # Sampled at the centres of pixels, a twelfth more in variance is what a pixel's extent adds.
    assert found["axis_major"] == pytest.approx(math.sqrt(14**2 + 1 / 12), rel=1e-6)
    assert found["axis_minor"] == pytest.approx(math.sqrt(6**2 + 1 / 12), rel=1e-6)
    assert (found["centre_x"], found["centre_y"]) == pytest.approx((90, 80))
    assert found["angle"] == pytest.approx(angle)
    xx = (14 * math.cos(radians)) ** 2 + (6 * math.sin(radians)) ** 2 + 1 / 12
    yy = (14 * math.sin(radians)) ** 2 + (6 * math.cos(radians)) ** 2 + 1 / 12
    assert found["aspect"] == pytest.approx(math.sqrt(xx / yy))


def test_the_radius_of_a_disc():
    y, x = np.mgrid[:101, :121] + 0.5
    field = (np.hypot(x - 60.5, y - 50.5) <= 40).astype(float)
    found = measure(field, (60.5, 50.5))
    # Of a disc, sqrt(p) of the radius; a pixel's width is the grid's error.
    assert found["radius_50"] == pytest.approx(40 * math.sqrt(0.5), abs=0.5)
    assert found["radius_90"] == pytest.approx(40 * math.sqrt(0.9), abs=0.5)
    assert found["in_mask"] != found["in_mask"] and found["box_aspect"] != found["box_aspect"]


def test_areas_are_those_of_the_least_squares():
    rng = np.random.default_rng(0)
    field = rng.random((13, 17)) ** 4
    point = 3.2, 9.9
    found = measure(field, point)
    for percent in AREAS:
        for reach in range(17):
            rows, columns = (
                slice(max(9 - reach, 0), 10 + reach),
                slice(max(3 - reach, 0), 4 + reach),
            )
            square = field[rows, columns]
            if square.sum() >= percent / 100 * field.sum() - 1e-12:
                break
        assert found[f"area_{percent}"] == pytest.approx(square.size / field.size)
    distances = [
        (math.hypot(x + 0.5 - point[0], y + 0.5 - point[1]), field[y, x])
        for y in range(13)
        for x in range(17)
    ]
    for percent in 50, 90:
        reached = found[f"radius_{percent}"]
        inside = sum(mass for distance, mass in distances if distance <= reached)
        before = sum(mass for distance, mass in distances if distance < reached)
        assert before < percent / 100 * field.sum() <= inside


def test_all_of_a_uniform_field_is_reached_at_the_corner():
    found = measure(np.ones((3, 3)), (0, 0), box=(-5, -5, 99, 99))
    assert found["in_box"] == pytest.approx(1)
    assert found["area_99"] == 1
    assert found["radius_90"] == pytest.approx(math.hypot(2.5, 2.5))
    # At the lower right corner, the point's pixel is the last one.
    assert measure(np.ones((3, 3)), (3, 3))["area_20"] == 4 / 9


def test_a_dead_field_has_no_numbers():
    found = measure(torch.zeros(4, 5), (1, 1), box=(0, 0, 2, 1), mask=np.ones((4, 5)))
    assert found.pop("box_aspect") == 2
    assert all(math.isnan(value) for value in found.values())


def test_what_is_no_field_is_refused():
    for field in np.full((2, 2), np.inf), np.full((2, 2), -1.0), np.ones(3), np.array(np.nan):
        with pytest.raises(ValueError, match=r"field: expected finite values \[H, W\]"):
            measure(field, (0, 0))
    with pytest.raises(ValueError, match=r"mask: expected \[2, 2\], got \[2, 3\]"):
        measure(np.ones((2, 2)), (0, 0), mask=np.ones((2, 3)))


def test_overlap_is_the_mass_in_common():
    one, other = np.zeros((2, 3)), np.zeros((2, 3))
    one[0] = 1, 1, 2
    other[0] = 0, 3, 1
    assert overlap(one, 9 * one) == 1
    assert overlap(one, other) == pytest.approx(0.25 + 0.25)
    assert math.isnan(overlap(one, 0 * one))


def test_squares_of_a_wide_picture_are_around_their_point():
    field = np.zeros((10, 20))
    field[3, 15] = 1
    found = measure(field, (15.5, 3.5))
    assert found["area_20"] == found["area_99"] == 1 / 200
