"""Receptive fields over a data set: pictures, objects, rows that survive, numbers of the claim."""

import csv
import json
import math
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from detectron2.config import get_cfg
from torch import nn

from dk_detectron.analysis import effective_receptive_field
from dk_detectron.analysis.field_survey import (
    COLUMNS,
    correlations,
    means_by_size,
    survey_fields,
)
from dk_detectron.analysis.measures import overlap
from dk_detectron.analysis.objects import (
    DEFORMATIONS,
    CocoPictures,
    Object,
    Picture,
    read_picture,
)
from dk_detectron.analysis.records import Records
from dk_detectron.data.image_folder import register_image_folder


@pytest.fixture
def cfg():
    cfg = get_cfg()
    cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST = 32, 64
    return cfg


def annotation(identifier, image_id, box, **more):
    x, y, w, h = box
    polygon = [x, y, x + w, y, x + w, y + h, x, y + h]
    return {
        "id": identifier, "image_id": image_id, "category_id": 1, "iscrowd": 0, "bbox": list(box),
        "area": w * h, "segmentation": [polygon], **more,
    }  # fmt: skip


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """Three pictures of 64x96; the last has no object of use."""
    root = tmp_path_factory.mktemp("coco")
    rng = np.random.default_rng(0)
    for i in 1, 2, 3:
        cv2.imwrite(str(root / f"{i}.png"), rng.integers(0, 256, (64, 96, 3), dtype=np.uint8))
    content = {
        "images": [
            {"id": i, "file_name": f"{i}.png", "height": 64, "width": 96} for i in (1, 2, 3)
        ],
        "categories": [{"id": 1, "name": "square"}],
        "annotations": [
            annotation(1, 1, (10, 20, 8, 8)),
            annotation(2, 1, (40, 4, 48, 48)),
            annotation(3, 2, (2, 2, 20, 40), segmentation=[]),
            annotation(4, 2, (60, 30, 50, 50), area=36 * 34),  # over the border
            annotation(5, 3, (0, 0, 90, 60), iscrowd=1),
        ],
    }
    (root / "annotations.json").write_text(json.dumps(content))
    return f"coco:{root / 'annotations.json'}:{root}"


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1), nn.ReLU(), nn.Conv2d(4, 2, 5, 2, 2))


def test_objects_are_those_of_the_picture_as_the_network_sees_it(dataset, cfg):
    pictures = CocoPictures(dataset)
    assert pictures.categories == ["square"]
    assert [a["id"] for i in pictures.images for a in pictures.annotations(i)] == [1, 2, 3, 4]
    picture = pictures.read(1, cfg)
    assert picture.pixels.shape == (32, 48, 3) and picture.scale == 0.5
    small, large = picture.objects
    assert small.box == (5, 10, 9, 14) and small.centre == (7, 12)
    assert (small.area, small.bucket, large.bucket) == (64, "small", "medium")
    rows, columns = small.mask.nonzero()
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (10, 13, 5, 8)
    clipped = pictures.read(2, cfg, only=[4]).objects
    assert [thing.box for thing in clipped] == [(30, 15, 48, 32)]
    assert pictures.read(2, cfg).objects[0].mask is None
    bgr = picture.image
    assert bgr.shape == (3, 32, 48) and bgr.dtype == torch.float32
    assert torch.equal(bgr[0], torch.tensor(picture.pixels[:, :, 2].copy()).float())
    cfg.INPUT.FORMAT = "RGB"
    assert torch.equal(pictures.read(1, cfg).image, bgr.flip(0))
    assert pictures.spread(2) == [(2, 4), (1, 1)]
    assert [annotation for _, annotation in pictures.spread(99)] == [2, 4, 3, 1]


def test_deformed_pictures_take_their_objects_along():
    pixels = np.zeros((20, 30, 3), np.uint8)
    pixels[4:8, 10:25] = 255
    box = 10, 4, 25, 8
    picture = Picture("x", pixels, 2.0, True, (Object(1, "a", 60, box, pixels[:, :, 0] > 0),))
    for deformed in picture.rotated(), picture.scaled(1.5):
        (thing,) = deformed.objects
        x0, y0, x1, y1 = map(round, thing.box)
        assert (deformed.pixels[y0 + 1 : y1 - 1, x0 + 1 : x1 - 1] == 255).all()
        assert deformed.pixels.sum() == pytest.approx(255 * 3 * (x1 - x0) * (y1 - y0), rel=0.05)
        assert thing.mask.shape == deformed.pixels.shape[:2]
        assert thing.mask.sum() == (x1 - x0) * (y1 - y0)
    assert picture.rotated().pixels.shape == (30, 20, 3)
    assert picture.rotated().objects[0].box == (12, 10, 16, 25)  # clockwise: the top is right
    assert picture.scaled(1.5).scale == 3 and picture.scaled(1.5).objects[0].box == (
        15,
        6,
        37.5,
        12,
    )
    assert picture.scaled(0.001).pixels.shape == (1, 1, 3)


def test_odd_pictures(tmp_path, cfg):
    grey = np.arange(64, dtype=np.uint8).reshape(8, 8)
    cv2.imwrite(str(tmp_path / "grey.png"), grey)
    assert read_picture(tmp_path / "grey.png", cfg).pixels.shape == (32, 32, 3)
    cv2.imwrite(str(tmp_path / "tiny.png"), grey[:1, :1])
    assert read_picture(tmp_path / "tiny.png", cfg).image.shape == (3, 32, 32)
    cv2.imwrite(str(tmp_path / "huge.png"), np.zeros((3000, 4000), np.uint8))
    assert read_picture(tmp_path / "huge.png", cfg).pixels.shape == (32, 43, 3)
    cv2.imwrite(str(tmp_path / "deep.png"), grey.astype(np.uint16) * 300)
    cv2.imwrite(str(tmp_path / "thin.png"), np.zeros((1, 4000), np.uint8))
    (tmp_path / "empty.png").touch()
    (tmp_path / "text.jpg").write_text("no picture")
    (tmp_path / "torn.png").write_bytes((tmp_path / "grey.png").read_bytes()[:60])
    for name, message in {
        "deep.png": "8 bits, got mode I;16",
        "thin.png": "got 4000x1, of which nothing is left",
        "empty.png": "got what cannot be read",
        "text.jpg": "got what cannot be read",
        "torn.png": "got what cannot be read",
    }.items():
        with pytest.raises(ValueError, match=f"{name}: expected .*{message}"):
            read_picture(tmp_path / name, cfg)
    with pytest.raises(FileNotFoundError, match="none.png: no such file"):
        read_picture(tmp_path / "none.png", cfg)
    cfg.INPUT.FORMAT = "YUV-BT.601"
    with pytest.raises(ValueError, match="INPUT.FORMAT: expected RGB or BGR"):
        read_picture(tmp_path / "grey.png", cfg)


def test_data_sets_of_no_use(tmp_path, dataset, cfg):
    with pytest.raises(ValueError, match="expected a registered data set"):
        CocoPictures("nothing")
    (tmp_path / "a_class").mkdir()
    register_image_folder("pictures_of_classes", tmp_path)
    with pytest.raises(ValueError, match="expected a data set in COCO's format, got 'pictures_of"):
        CocoPictures("pictures_of_classes")
    content = json.loads(Path(dataset.split(":")[1]).read_text())
    content["annotations"] = []
    empty = tmp_path / "empty.json"
    empty.write_text(json.dumps(content))
    pictures = CocoPictures(f"coco:{empty}:{tmp_path}")
    with pytest.raises(ValueError, match="expected objects, got none that is not a crowd"):
        pictures.spread(3)
    with pytest.raises(ValueError, match="expected objects, got none that is not a crowd"):
        survey_fields(network(), cfg, pictures, tmp_path / "x.csv", "2")
    assert not (tmp_path / "x.csv").exists()
    other = CocoPictures(dataset)
    other.images = {1: other.images[1] | {"width": 200}}
    with pytest.raises(
        ValueError, match="1.png: expected 200x64, as the JSON says, got about 96x64"
    ):
        other.read(1, cfg)


def test_a_row_is_what_the_field_of_its_object_measures(dataset, cfg, tmp_path):
    net, pictures = network(), CocoPictures(dataset)
    rows = survey_fields(net, cfg, pictures, tmp_path / "fields.csv", "2")
    assert [row["annotation_id"] for row in rows] == [1, 2, 3, 4]
    assert all(tuple(row) == COLUMNS for row in rows)
    picture = pictures.read(1, cfg)
    for row, thing in zip(rows, picture.objects, strict=False):
        (field,) = effective_receptive_field(net, picture.image, [thing.centre])
        share = field / field.sum()
        x0, y0, x1, y1 = map(int, thing.box)
        assert row["in_box"] == pytest.approx(share[y0:y1, x0:x1].sum().item(), rel=1e-5)
        assert row["in_mask"] == pytest.approx(share[thing.mask].sum().item(), rel=1e-5)
        assert row["object_size"] == pytest.approx(0.5 * math.sqrt(thing.area), rel=1e-5)
        assert (row["x"], row["y"]) == pytest.approx(thing.centre)
        assert row["theoretical_width"] == row["theoretical_height"] == 3 + 4 * 2
    assert rows[0]["field_size"] == pytest.approx(
        math.sqrt(rows[0]["axis_major"] * rows[0]["axis_minor"]), rel=1e-4
    )
    assert math.isnan(rows[2]["in_mask"]) and rows[2]["box_aspect"] == 0.5


def test_a_survey_goes_on_where_it_was_stopped(dataset, cfg, tmp_path):
    net, pictures = network(), CocoPictures(dataset)
    whole = repr(survey_fields(net, cfg, pictures, tmp_path / "whole.csv", "2"))  # it has NaN
    path = tmp_path / "stopped.csv"

    class Stop(Exception):
        pass

    def stopping(images):
        yield images[0]
        raise Stop

    with pytest.raises(Stop):
        survey_fields(net, cfg, pictures, path, "2", progress=stopping)
    seen = []

    def noting(images):
        seen.extend(images)
        return images

    assert repr(survey_fields(net, cfg, pictures, path, "2", progress=noting)) == whole
    assert seen == [2]
    # Killed while writing: the last picture is done again.
    path.write_text(path.read_text()[:-9])
    assert repr(survey_fields(net, cfg, pictures, path, "2", progress=noting)) == whole
    assert seen == [2, 2]
    assert path.read_text() == (tmp_path / "whole.csv").read_text()
    for change in {"attached": False}, {"settings": {"weights": "others"}}, {"limit": 1}:
        with pytest.raises(FileExistsError, match="expected rows of the same network and settings"):
            survey_fields(net, cfg, pictures, path, "2", **change)
    assert path.read_text() == (tmp_path / "whole.csv").read_text()
    limited = survey_fields(net, cfg, pictures, tmp_path / "some.csv", "2", limit=1)
    assert {row["image_id"] for row in limited} == {1}


def test_records_of_somebody_else_are_left_alone(tmp_path):
    path = tmp_path / "mine.csv"
    path.write_text("image_id,a\n1,2\n")
    with pytest.raises(FileExistsError, match="move it away"):
        Records(path, ["image_id", "a"], {})
    assert path.read_text() == "image_id,a\n1,2\n"
    records = Records(tmp_path / "new.csv", ["image_id", "a", "b"], {"of": (1, 2)})
    records.add([{"image_id": 3, "a": 0.1234567890123, "b": "x, y"}])
    records.add([{"image_id": 4, "a": math.nan, "b": 7}])
    again = Records(tmp_path / "new.csv", ["image_id", "a", "b"], {"of": (1, 2)})
    assert again.done == {3, 4}
    assert again.rows()[0] == {"image_id": 3, "a": 0.123457, "b": "x, y"}
    assert math.isnan(again.rows()[1]["a"]) and again.rows()[1]["b"] == 7
    with open(tmp_path / "new.csv") as file:
        assert len(list(csv.reader(file))) == 3


@pytest.mark.parametrize("name", ["007", "1e3", "1_0", " 5", "Infinity", "+1"])
def test_names_of_classes_are_no_numbers(name, tmp_path):
    """Of traffic signs, for example, they are numbers with zeros before them."""
    records = Records(tmp_path / "new.csv", ["image_id", "category", "area"], {})
    records.add([{"image_id": 3, "category": name, "area": -2.5e-7}])
    assert records.rows() == [{"image_id": 3, "category": name, "area": -2.5e-7}]


def row(area, radius, **more):
    values = dict.fromkeys(COLUMNS, 1.0) | {"object_size": math.sqrt(area), "radius_50": radius}
    bucket = Object(1, "a", area, (0, 0, 1, 1)).bucket
    return values | {"area": area, "bucket": bucket} | more


def test_means_by_size_and_the_claim_as_a_number():
    rows = [
        row(10, 1.0, box_aspect=1.0, aspect=3.0),
        row(32**2 - 1, 3.0, box_aspect=2.0, aspect=2.0),
        row(32**2, 2.0, box_aspect=3.0, aspect=1.0),
        row(96**2, 8.0, box_aspect=4.0, aspect=0.5),
        row(500**2, math.nan, box_aspect=5.0, aspect=math.nan),
    ]
    means = {mean["objects"]: mean for mean in means_by_size(rows)}
    assert [mean["number"] for mean in means.values()] == [2, 1, 2, 5]
    assert [mean["dead"] for mean in means.values()] == [0, 0, 1, 1]
    assert [mean["radius_50"] for mean in means.values()] == [2.0, 2.0, 8.0, 3.5]
    # The dead one has no part in what is not the field's either.
    assert [mean["object_size"] for mean in means.values()][2] == 96
    assert [mean["box_aspect"] for mean in means.values()] == [1.5, 3.0, 4.0, 2.5]
    found = correlations(rows)
    # Ranks 1 2 3 4 against 1 3 2 4: 1 - 6 * 2 / (4 * 15).
    assert found["object_size ~ radius_50"] == pytest.approx(0.8)
    assert found["box_aspect ~ aspect"] == pytest.approx(-1)
    assert math.isnan(found["object_size ~ radius_90"])  # all the same
    assert all(math.isnan(value) for value in correlations(rows[:2]).values())
    assert math.isnan(means_by_size([])[0]["radius_50"]) and correlations([])


def test_buckets_are_cocos():
    sizes = [32**2 - 1, 32**2, 96**2 - 1, 96**2]
    things = [replace(Object(1, "a", 0, (0, 0, 1, 1)), area=size) for size in sizes]
    assert [thing.bucket for thing in things] == ["small", "medium", "medium", "large"]


@pytest.mark.parametrize("name", DEFORMATIONS)
def test_fields_of_deformed_pictures_are_turned_back(name):
    deform, undo = DEFORMATIONS[name]
    pixels = np.zeros((20, 30, 3), np.uint8)
    pixels[4:8, 10:25] = 255
    field = deform(Picture("x", pixels, 1.0, False)).pixels[:, :, 0].astype(float)
    assert overlap(undo(field, (20, 30)), pixels[:, :, 0]) > 0.9


def test_a_limit_takes_pictures_that_are_evenly_spread(dataset, cfg, tmp_path):
    _, json_file, root = dataset.split(":")
    content = json.loads(Path(json_file).read_text())
    content["images"] = [{**content["images"][0], "id": i} for i in range(1, 6)]
    content["annotations"] = [annotation(i, i, (10, 20, 8, 8)) for i in range(1, 6)]
    path = tmp_path / "five.json"
    path.write_text(json.dumps(content))
    pictures = CocoPictures(f"coco:{path}:{root}")
    rows = survey_fields(network(), cfg, pictures, tmp_path / "x.csv", "2", limit=2)
    assert [row["image_id"] for row in rows] == [1, 3]
