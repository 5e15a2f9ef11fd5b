"""The data sets: deterministic, COCO to the letter, and there whole or not at all."""

import io
import json
import logging
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from PIL import Image
from pycocotools.coco import COCO
from running import run_tool

from dk_detectron.commands import prepare_trees
from dk_detectron.data import datasets, image_folder, outlines, shapes, trees
from dk_detectron.data.writing import make_folder

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def shapes_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shapes")
    for split, count in ("train", 60), ("val", 6), ("test", 4):
        shapes.write_split(folder, split, count, seed=0, side=128)
    return folder


def files(folder: Path) -> dict[str, bytes]:
    return {
        str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()
    }


def test_shapes_are_a_function_of_the_seed(shapes_folder, tmp_path):
    """The same bytes again, also when fewer are made; other bytes from another seed."""
    shapes.write_split(tmp_path / "again", "val", 3, seed=0, side=128)
    shapes.write_split(tmp_path / "other", "val", 3, seed=1, side=128)
    for name in (f"val/{i:06d}.jpg" for i in range(3)):
        original = (shapes_folder / name).read_bytes()
        assert (tmp_path / "again" / name).read_bytes() == original
        assert (tmp_path / "other" / name).read_bytes() != original


def test_splits_differ(shapes_folder):
    assert (shapes_folder / "train/000000.jpg").read_bytes() != (
        shapes_folder / "val/000000.jpg"
    ).read_bytes()


def test_shapes_annotations_are_coco(shapes_folder, capsys):
    coco = COCO(str(shapes_folder / "annotations" / "instances_train.json"))
    assert len(coco.imgs) == 60 and len(coco.anns) > 100
    for image in coco.imgs.values():
        with Image.open(shapes_folder / "train" / image["file_name"]) as picture:
            assert picture.size == (image["width"], image["height"])
    for annotation in coco.anns.values():
        image = coco.imgs[annotation["image_id"]]
        x, y, w, h = annotation["bbox"]
        assert x >= 0 and y >= 0 and x + w <= image["width"] and y + h <= image["height"]
        rows, columns = np.nonzero(coco.annToMask(annotation))
        # Boxes and polygons are finer than pixels, masks round them and lose the thinnest tips.
        assert -1 <= columns.min() - x <= 2 and -2 <= columns.max() + 1 - (x + w) <= 1
        assert -1 <= rows.min() - y <= 2 and -2 <= rows.max() + 1 - (y + h) <= 1
        assert 0 < annotation["area"] <= w * h


def test_shapes_vary_as_promised(shapes_folder):
    annotations = json.loads((shapes_folder / "annotations/instances_train.json").read_text())
    sizes = [a["area"] ** 0.5 for a in annotations["annotations"]]
    assert max(sizes) / min(sizes) > 8
    counts = np.bincount([a["category_id"] for a in annotations["annotations"]])[1:]
    assert len(counts) == len(outlines.OUTLINES) and counts.min() > counts.mean() / 3


@pytest.mark.parametrize("name", outlines.OUTLINES)
def test_deformations_do_what_they_say(name):
    outline = outlines.OUTLINES[name]()
    rest = outlines.Deformation(bend=0, stretch=1, stretch_angle=0, rotation=0, size=50)
    plain = outlines.deform(outline, rest)
    extent = np.ptp(plain, axis=0)
    assert np.prod(extent) ** 0.5 == pytest.approx(50)
    np.testing.assert_allclose(plain.max(0), -plain.min(0))
    turned = outlines.deform(outline, rest._replace(rotation=np.pi / 2))
    np.testing.assert_allclose(np.ptp(turned, axis=0), extent[::-1])
    double = outlines.deform(outline, rest._replace(size=100))
    np.testing.assert_allclose(double, 2 * plain)
    stretched = np.ptp(outlines.deform(outline, rest._replace(stretch=2)), axis=0)
    assert stretched[0] / stretched[1] == pytest.approx(2 * extent[0] / extent[1])
    bent = outlines.deform(outline, rest._replace(bend=0.8))
    assert np.abs(bent - plain).max() > 2


def test_test_split_has_no_annotations(shapes_folder):
    content = json.loads((shapes_folder / "annotations/image_info_test.json").read_text())
    assert set(content) == {"info", "licenses", "images", "categories"}
    assert len(content["images"]) == 4


def prepare_shapes(root: Path, *args: str) -> subprocess.CompletedProcess:
    return run_tool("prepare_shapes.py", *args, DETECTRON2_DATASETS=str(root))


def test_prepare_shapes_is_idempotent_and_keeps_other_sets(tmp_path):
    args = ("--train", "3", "--val", "2", "--test", "2", "--side", "96")
    assert "made" in prepare_shapes(tmp_path, *args).stdout
    before = files(tmp_path)
    assert len(before) == 3 + 2 + 2 + 3 + 1
    assert "already there" in prepare_shapes(tmp_path, *args).stdout
    refused = prepare_shapes(tmp_path, *args, "--seed", "5")
    assert refused.returncode == 1 and "--force" in refused.stderr
    assert refused.stderr.startswith(f"error: {tmp_path / 'shapes'}: expected")
    assert files(tmp_path) == before
    forced = prepare_shapes(tmp_path, *args, "--seed", "5", "--force")
    assert forced.returncode == 0 and files(tmp_path) != before


def test_nothing_is_left_of_an_interrupted_build(tmp_path):
    def build(folder):
        (folder / "half").write_text("")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make_folder(tmp_path / "set", {}, build)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_of_somebody_else_is_kept(tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "mine.jpg").write_text("")
    with pytest.raises(FileExistsError, match="found a folder without made_with.json"):
        make_folder(tmp_path / "photos", {"seed": 0}, lambda folder: None, force=True)
    assert (tmp_path / "photos" / "mine.jpg").is_file()


def test_a_missing_set_names_its_cure():
    path, name = "nowhere/instances_val.json", "trees_val"
    with pytest.raises(FileNotFoundError, match=f"{path}; make it with .*prepare_trees.py"):
        datasets.load(path, "nowhere", name)


def test_a_path_in_a_name_is_its_own_cure(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    name = "coco:~/gone.json:~"
    datasets.resolve(name)
    try:
        metadata = MetadataCatalog.get(name)
        assert (metadata.json_file, metadata.image_root) == (f"{tmp_path}/gone.json", str(tmp_path))
        cure = "gone.json; correct the path, which is relative to the current folder"
        with pytest.raises(FileNotFoundError, match=cure):
            datasets.check_on_disk(name)
        with pytest.raises(FileNotFoundError, match=cure):
            DatasetCatalog.get(name)
    finally:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


def test_pictures_of_other_names_in_class_folders_are_said_to_be_left_out(
    tmp_path, caplog, monkeypatch
):
    for name in "a/1.png", "b/1.png", "b/2.jfif", "b/3.jfif", "b/._4.jfif":
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    # As in a process of its own: detectron2's set-up of logs, which others call, stops them here.
    monkeypatch.setattr(logging.getLogger("detectron2"), "propagate", True)
    assert len(image_folder.read_image_folder(str(tmp_path)).samples) == 2
    (message,) = set(caplog.messages)  # twice, where pytest listens to that logger as well
    assert re.match(f"{tmp_path}: 2 files that are not named as .*, left out: b/[23].jfif", message)


def test_registered_under_their_names(shapes_folder, tmp_path):
    """As detectron2 loads them, from the folder that DETECTRON2_DATASETS names."""
    (tmp_path / "shapes").symlink_to(shapes_folder)
    try:
        for name in datasets.SPLITS:
            DatasetCatalog.remove(name)
            MetadataCatalog.remove(name)
        datasets.register_all(tmp_path)
        assert len(DatasetCatalog.get("shapes_train")) == 60
        assert MetadataCatalog.get("shapes_train").thing_classes == list(outlines.OUTLINES)
        unlabelled = DatasetCatalog.get("shapes_test")
        assert len(unlabelled) == 4 and not any(r.get("annotations") for r in unlabelled)
    finally:
        for name in datasets.SPLITS:
            DatasetCatalog.remove(name)
            MetadataCatalog.remove(name)
        datasets.register_all(datasets.datasets_root())


def make_wheel(path: Path, boxes: list[tuple[int, int, int, int]]) -> Path:
    """A wheel with two photographs of 500x450 and the same boxes in both."""
    objects = "".join(
        f"<object><name>Tree</name><bndbox><xmin>{a}</xmin><ymin>{b}</ymin><xmax>{c}</xmax>"
        f"<ymax>{d}</ymax></bndbox></object>"
        for a, b, c, d in boxes
    )
    pixels = np.random.default_rng(0).integers(0, 255, (450, 500, 3), dtype=np.uint8)
    png = io.BytesIO()
    Image.fromarray(pixels).save(png, "png")
    with zipfile.ZipFile(path, "w") as archive:
        for name in trees.PHOTOGRAPHS.values():
            archive.writestr(f"deepforest/data/{name}.png", png.getvalue())
            archive.writestr(f"deepforest/data/{name}.xml", f"<annotation>{objects}</annotation>")
    return path


def test_trees_are_cut_into_tiles(tmp_path):
    # VOC's corners count from 1, inclusive: (11, 21, 50, 70) is 40 x 50 pixels at (10, 20).
    boxes = [(11, 21, 50, 70), (241, 101, 290, 140), (221, 201, 260, 240)]
    trees.write_dataset(tmp_path, make_wheel(tmp_path / "a.whl", boxes))
    val = json.loads((tmp_path / "annotations/instances_val.json").read_text())
    # 500 x 450 in the fewest equal tiles of at most 400.
    sizes = [(i["width"], i["height"]) for i in val["images"]]
    assert sizes == [(250, 225)] * 4
    found = [(a["image_id"], a["bbox"], a["iscrowd"]) for a in val["annotations"]]
    assert found == [
        (1, [10, 20, 40, 50], 0),
        (1, [240, 100, 10, 40], 1),  # a fifth of the second: to be ignored
        (1, [220, 200, 30, 25], 1),  # 47 % of the third
        (2, [0, 100, 40, 40], 0),
        (2, [0, 200, 10, 25], 1),
        (3, [220, 0, 30, 15], 1),
        (4, [0, 0, 10, 15], 1),
    ]
    train = json.loads((tmp_path / "annotations/instances_train.json").read_text())
    assert {(i["width"], i["height"]) for i in train["images"]} == {(400, 400)}
    assert [i["file_name"] for i in train["images"]] == [
        "00000_00000.png", "00000_00100.png", "00050_00000.png", "00050_00100.png",
    ]  # fmt: skip
    whole = [a["image_id"] for a in train["annotations"] if a["bbox"][2:] == [40, 40]]
    assert whole == [1, 2, 3, 4]
    with zipfile.ZipFile(tmp_path / "a.whl") as archive:
        original = archive.read(f"deepforest/data/{trees.PHOTOGRAPHS['train']}.png")
    tile = np.asarray(Image.open(tmp_path / "train" / "00050_00100.png"))
    np.testing.assert_array_equal(tile, np.asarray(Image.open(io.BytesIO(original)))[50:, 100:])


@pytest.mark.parametrize("size", [100, 400, 401, 1035, 2472])
@pytest.mark.parametrize("overlap", [0.0, 0.5])
def test_tiles_cover_and_overlap(size, overlap):
    edges = trees.tile_edges(size, overlap)
    assert edges[0][0] == 0 and edges[-1][1] == size
    assert all(end - start <= trees.TILE for start, end in edges)
    for (_, end), (start, _) in zip(edges, edges[1:], strict=False):
        assert end - start >= overlap * trees.TILE and (overlap or end == start)


def test_trees_check_the_file(tmp_path):
    with pytest.raises(ValueError, match="expected deepforest==1.5.2 with sha256"):
        trees.check_wheel(make_wheel(tmp_path / "a.whl", []))


def test_trees_refuse_another_file(tmp_path):
    other = tmp_path / "other.whl"
    with zipfile.ZipFile(other, "w") as archive:
        archive.writestr("other/__init__.py", "")
    with pytest.raises(ValueError, match="expected the wheel of deepforest==1.5.2"):
        trees.write_dataset(tmp_path / "a", other)
    other.write_text("not a zip")
    with pytest.raises(ValueError, match="expected the wheel of deepforest==1.5.2"):
        trees.write_dataset(tmp_path / "b", other)


def test_trees_say_how_to_go_without_a_network(tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_INDEX_URL", "http://localhost:1/simple")
    monkeypatch.setenv("PIP_RETRIES", "0")
    monkeypatch.setenv("PIP_NO_CACHE_DIR", "1")
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    for name in "PIP_FIND_LINKS", "PIP_EXTRA_INDEX_URL":
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(RuntimeError, match="give the file with --wheel"):
        trees.download_wheel(tmp_path)


def fail_to_download(folder):
    raise RuntimeError("pip could not download it")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["--wheel", "gone.whl"], "No such file.*gone.whl"), ([], "pip could not download it")],
)
def test_trees_end_with_one_line(arguments, message, tmp_path, monkeypatch):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    monkeypatch.setattr(trees, "download_wheel", fail_to_download)
    monkeypatch.setattr(sys, "argv", ["dk-prepare-trees", *arguments])
    with pytest.raises(SystemExit, match=f"error: .*{message}"):
        prepare_trees.main()
