"""The commands that look at trained networks, end to end on run directories."""

import csv
import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch
from detectron2.modeling import build_model
from torch import nn

from dk_detectron.analysis import effective_receptive_field, measure
from dk_detectron.analysis.field_figures import heat
from dk_detectron.analysis.records import Records
from dk_detectron.commands import visualize_dynamics, visualize_erf, visualize_kernels
from dk_detectron.commands._networks import Network, distinct_names
from dk_detectron.commands._subjects import subjects
from dk_detectron.model_zoo import load_config

# The demo's network, smaller still.
OPTIONS = """
    MODEL.ROI_HEADS.NUM_CLASSES 2 MODEL.FPN.OUT_CHANNELS 8 MODEL.ROI_BOX_HEAD.FC_DIM 8
    INPUT.MIN_SIZE_TEST 64
""".split()
KERNELS = {
    "rigid": ["MODEL.DEFORM_KERNEL.CONV_3X3", "rigid"],
    "dk": [],
    "dcn_dk": ["MODEL.DEFORM_KERNEL.DATA_OFFSET_ON_PER_STAGE", [False, True, True, True]],
    "scc": ["MODEL.DEFORM_KERNEL.CONV_3X3", "conditional"],
}


def make_dataset(root: Path, count: int) -> str:
    """Pictures of 64x96, every other with two objects: one of 8 pixels, one of 32."""
    rng = np.random.default_rng(0)
    images, annotations = [], []
    for i in range(1, count + 1):
        cv2.imwrite(str(root / f"{i}.png"), rng.integers(0, 256, (64, 96, 3), dtype=np.uint8))
        images.append({"id": i, "file_name": f"{i}.png", "height": 64, "width": 96})
        for j, side in enumerate((8, 32) if i % 2 else ()):
            x, y = 10 + 5 * (i % 8), 5 * (i % 6)
            annotations.append(
                {"id": 2 * i + j, "image_id": i, "category_id": j + 1, "iscrowd": 0,
                 "bbox": [x, y, side, side], "area": side**2 + i,
                 "segmentation": [[x, y, x + side, y, x + side, y + side]]}
            )  # fmt: skip
    categories = [{"id": 1, "name": "dot"}, {"id": 2, "name": "square"}]
    content = {"images": images, "categories": categories, "annotations": annotations}
    (root / "annotations.json").write_text(json.dumps(content))
    return f"coco:{root / 'annotations.json'}:{root}"


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> str:
    """Six pictures, three with objects."""
    return make_dataset(tmp_path_factory.mktemp("coco"), 6)


@pytest.fixture(scope="module")
def dataset_of_many(tmp_path_factory) -> str:
    """Twelve pictures, six with objects."""
    return make_dataset(tmp_path_factory.mktemp("coco"), 12)


@pytest.fixture(scope="module")
def runs(tmp_path_factory, dataset) -> dict[str, Path]:
    """Run directories of untrained networks whose offsets move."""
    root = tmp_path_factory.mktemp("runs")
    for name, options in KERNELS.items():
        cfg = load_config("demo/shapes_MNV2_FPN_dk_l3.yaml", OPTIONS + options)
        cfg.DATASETS.TEST = (dataset,)
        torch.manual_seed(0)
        model = build_model(cfg)
        for parameter_name, parameter in model.named_parameters():
            if "generator.weight" in parameter_name and "proposal" not in parameter_name:
                nn.init.normal_(parameter, std=0.05)
        folder = root / name / "seed_0"
        folder.mkdir(parents=True)
        (folder / "config.yaml").write_text(cfg.dump())
        torch.save({"model": model.state_dict()}, folder / "model_final.pth")
    return {name: root / name / "seed_0" for name in KERNELS}


def run(command, monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", [command.__name__, *map(str, arguments)])
    command.main()


def size(path: Path) -> tuple[int, int]:
    return cv2.imread(str(path)).shape[:2]


def rows(path: Path) -> list[dict[str, str]]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_names_are_what_differs():
    assert distinct_names([Path("/a/rigid/seed_0"), Path("/a/dk/seed_0")]) == ["rigid", "dk"]
    assert distinct_names([Path("/a/rigid/seed_0"), Path("/a/dk/seed_1")]) == [
        "rigid/seed_0",
        "dk/seed_1",
    ]
    assert distinct_names([Path("/a/b")]) == ["b"]
    assert distinct_names([Path("/a/b"), Path("/a/b")]) == ["b", "b"]
    assert distinct_names([Path("/a"), Path("/a/b")]) == ["a", "a/b"]


def test_names_whose_files_would_be_the_same(tmp_path, monkeypatch):
    folders = tmp_path / "dk" / "seed_0", tmp_path / "dk_seed_0"
    message = "^error: RUN: expected folders whose names differ by more .* dk/seed_0, dk_seed_0, wh"
    for command in visualize_dynamics, visualize_erf, visualize_kernels:
        with pytest.raises(SystemExit, match=message):
            run(command, monkeypatch, *folders)


def test_a_heat_map_glows_where_the_field_is():
    pixels = np.full((40, 60, 3), 128, np.uint8)
    field = np.zeros((40, 60))
    field[10, 40] = 1e-20
    glow = heat(pixels, field)
    assert glow.shape == (40, 60, 3) and 0 <= glow.min() <= glow.max() <= 1
    red = glow[:, :, 0] - glow[:, :, 2]
    assert np.unravel_index(red.argmax(), red.shape) == (10, 40) and red.max() > 0.3
    assert abs(red[30, 10]) < 0.01
    assert np.ptp(heat(pixels, 0 * field)) == 0


def test_fields_of_networks_side_by_side(runs, tmp_path, monkeypatch, capsys):
    chosen = [runs[name] for name in ("rigid", "dcn_dk")]
    run(visualize_erf, monkeypatch, *chosen, "--count", 4, "--output-dir", tmp_path)
    assert capsys.readouterr().out.split() == [f"{tmp_path}/erf_1.png", f"{tmp_path}/erf_2.png"]
    three, one = (size(tmp_path / f"erf_{page}.png") for page in (1, 2))
    assert three[1] == one[1] and 2 < three[0] / one[0] < 3.2
    numbers = rows(tmp_path / "erf.csv")
    assert [r["network"] for r in numbers] == ["rigid", "dcn_dk"] * 4
    areas = [float(r["area"]) for r in numbers]
    assert areas == sorted(areas, reverse=True) and areas[0] > 1024 > areas[-1]
    # The first object again, by hand.
    cfg = load_config(chosen[1] / "config.yaml")
    model = build_model(cfg)
    model.load_state_dict(torch.load(chosen[1] / "model_final.pth", weights_only=True)["model"])
    row = numbers[1]
    name = row["picture"].partition(":")[0]
    picture = cv2.imread(str(Path(cfg.DATASETS.TEST[0].rpartition(":")[2]) / name))
    image = torch.tensor(picture.transpose(2, 0, 1)).float().flip(0)  # RGB
    point = float(row["x"]), float(row["y"])
    (field,) = effective_receptive_field(model, image, [point], "backbone.bottom_up.res5")
    half = 16
    box = point[0] - half, point[1] - half, point[0] + half, point[1] + half
    expected = measure(field, point, box)
    for key in "in_box", "radius_50", "area_30", "aspect":
        assert float(row[key]) == pytest.approx(expected[key], rel=1e-4), key
    assert 0 < float(row["in_mask"]) < float(row["in_box"])


def test_fields_under_deformation(runs, tmp_path, monkeypatch, capsys):
    options = "--deform", "--count", 1, "--feature", "backbone.fpn_output3", "--fixed-offsets"
    run(visualize_erf, monkeypatch, runs["dk"], *options, "--output-dir", tmp_path)
    numbers = rows(tmp_path / "erf.csv")
    assert [r["deformation"] for r in numbers] == ["original", "rotated by -90°", "scaled by 1.5"]
    assert numbers[0]["overlap"] == ""
    assert all(0.1 < float(r["overlap"]) < 1 for r in numbers[1:])
    assert float(numbers[2]["x"]) == 1.5 * float(numbers[0]["x"])
    assert float(numbers[1]["x"]) == pytest.approx(64 - float(numbers[0]["y"]))
    assert (tmp_path / "erf_1.png").is_file() and not (tmp_path / "erf_2.png").exists()


def test_fields_at_points_of_any_picture(runs, tmp_path, monkeypatch, capsys):
    grey = tmp_path / "grey.png"
    cv2.imwrite(str(grey), np.random.default_rng(0).integers(0, 256, (32, 40), dtype=np.uint8))
    options = "--images", grey, "--output-dir", tmp_path
    run(visualize_erf, monkeypatch, runs["dk"], *options, "--points", "10,8", "39.5,31")
    numbers = rows(tmp_path / "erf.csv")
    assert [(r["x"], r["y"]) for r in numbers] == [("20.0", "16.0"), ("79.0", "62.0")]
    assert all(r["in_box"] == r["in_mask"] == r["box_aspect"] == "nan" for r in numbers)
    run(visualize_erf, monkeypatch, runs["dk"], *options)
    assert [(r["x"], r["y"]) for r in rows(tmp_path / "erf.csv")] == [("40.0", "32.0")]
    message = r"^error: --points: expected points on the picture, of about 40x32 pixels, got grey"
    with pytest.raises(SystemExit, match=rf"{message}.png at 41,8$"):
        run(visualize_erf, monkeypatch, runs["dk"], *options, "--points", "41,8")


def test_points_follow_the_rounding_of_both_sides(tmp_path):
    """131x99 becomes 85x64: the lower right corner is on the picture still."""
    path = str(tmp_path / "odd.png")
    cv2.imwrite(path, np.zeros((99, 131, 3), np.uint8))
    cfg = load_config("demo/shapes_MNV2_FPN_dk_l3.yaml", OPTIONS)
    args = SimpleNamespace(images=[path], points=[(131.0, 99.0), (65.5, 49.5)])
    seen = [picture for _, (picture,) in subjects(args, [cfg])]
    assert seen[0].pixels.shape == (64, 85, 3)
    assert seen[0].objects[0].centre == pytest.approx((85, 64))
    assert seen[1].objects[0].centre == pytest.approx((42.5, 32))


def test_a_configuration_without_weights_is_looked_at_and_said_to_be(
    tmp_path, monkeypatch, capsys, dataset
):
    run(
        visualize_erf, monkeypatch, "--config-file", "demo/shapes_MNV2_FPN_dk_l3.yaml", *OPTIONS,
        "--dataset", dataset, "--count", 1, "--output-dir", tmp_path,
    )  # fmt: skip
    assert "weights are not trained, but drawn at random" in capsys.readouterr().err
    assert rows(tmp_path / "erf.csv")[0]["network"] == "shapes_MNV2_FPN_dk_l3"


def test_all_objects_as_tables(runs, tmp_path, monkeypatch, capsys):
    arguments = [runs["rigid"], runs["dk"], "--table", "--output-dir", tmp_path]
    run(visualize_erf, monkeypatch, *arguments, "--feature", "backbone.bottom_up.res3")
    text = capsys.readouterr().out
    assert (tmp_path / "fields.md").read_text() == text
    assert [line.split("|")[1:4] for line in text.splitlines()[2:6]] == [
        [" rigid     ", f" {bucket:9} ", f" {number:8} "]
        for bucket, number in {"small": 3, "medium": 3, "large": 0, "all": 6}.items()
    ]
    assert "object_size ~ radius_50" in text
    found = {name: rows(tmp_path / f"fields_{name}.csv") for name in ("rigid", "dk")}
    assert [r["annotation_id"] for r in found["dk"]] == ["2", "3", "6", "7", "10", "11"]
    assert found["dk"][0]["radius_50"] != found["rigid"][0]["radius_50"]
    assert found["dk"][0]["theoretical_width"] == found["rigid"][0]["theoretical_width"]
    run(visualize_erf, monkeypatch, *arguments, "--feature", "backbone.bottom_up.res3")
    assert capsys.readouterr().out == text
    with pytest.raises(SystemExit, match="expected rows of the same network and settings"):
        run(visualize_erf, monkeypatch, *arguments)


def test_kernels_of_networks(runs, tmp_path, monkeypatch, capsys):
    arguments = runs["dk"], runs["dcn_dk"], "--count", 2, "--output-dir", tmp_path
    run(visualize_kernels, monkeypatch, *arguments)
    expected = {
        *(f"{n}_kernels_{i}.png" for n in ("dk", "dcn_dk") for i in (1, 2)),
        *(f"dcn_dk_samples_{i}.png" for i in (1, 2)),
        *(f"{n}_kernel_offsets.png" for n in ("dk", "dcn_dk")), "dcn_dk_data_offsets.png",
        *(f"{n}_offsets.csv" for n in ("dk", "dcn_dk")),
    }  # fmt: skip
    assert {path.name for path in tmp_path.iterdir()} == expected
    assert all(min(size(path)) > 100 for path in tmp_path.glob("*.png"))
    table = rows(tmp_path / "dcn_dk_offsets.csv")
    assert [r["kind"] for r in table] == ["kernel_offset"] * 17 + ["data_offset"] * 14
    assert all(0 < float(r["mean"]) < float(r["largest"]) for r in table)
    assert all(0 <= float(r["clipped"]) < 1 for r in table)
    assert any(float(r["clipped"]) > 0 for r in table if r["kind"] == "kernel_offset")
    # Five sizes of feature maps by default, a row of 2.25 inches each; or what one asks for.
    every = size(tmp_path / "dk_kernels_1.png")
    layers = "--layers", "backbone.bottom_up.res4.0.conv2", "--levels", 1
    run(visualize_kernels, monkeypatch, *arguments, *layers)
    one = size(tmp_path / "dk_kernels_1.png")
    assert every[1] == one[1] and every[0] - one[0] == pytest.approx(4 * 2.25 * 110, abs=3)


def test_a_picture_of_two_objects_has_its_offsets_once(runs, dataset, tmp_path, monkeypatch):
    one, other = (f"{dataset.split(':')[2]}/{i}.png" for i in (1, 2))
    tables = []
    for images in [one, other], [one, other, one]:
        arguments = "--images", *images, "--layers", "backbone.bottom_up.res4.0.conv2"
        run(visualize_kernels, monkeypatch, runs["dk"], *arguments, "--output-dir", tmp_path)
        tables.append((tmp_path / "seed_0_offsets.csv").read_text())
    assert tables[0] == tables[1]


def test_kernels_need_offsets(runs, tmp_path, monkeypatch, capsys):
    for arguments, message in {
        (runs["rigid"],): "seed_0: model: expected layers of dk_detectron.layers",
        (runs["scc"],): "seed_0: expected layers with offsets, got gates alone",
        (runs["dk"], "--layers", "res9"): "--layers: expected some of backbone.bottom_up.stem",
    }.items():
        with pytest.raises(SystemExit, match=f"^error: .*{message}"):
            run(visualize_kernels, monkeypatch, *arguments, "--output-dir", tmp_path)
    assert not list(tmp_path.iterdir())
    with pytest.raises(SystemExit):
        run(visualize_kernels, monkeypatch, runs["dk"], "--levels", 0)
    assert "--levels: expected" in capsys.readouterr().err


def test_dynamics_of_networks(runs, dataset_of_many, tmp_path, monkeypatch, capsys):
    layer = "backbone.bottom_up.res3.0.conv2"
    options = "--dataset", dataset_of_many, "--layer", layer, "--output-dir", tmp_path
    arguments = runs["scc"], runs["dk"], *options
    run(visualize_dynamics, monkeypatch, *arguments)
    *table, path = capsys.readouterr().out.splitlines()
    assert path == f"{tmp_path}/dynamics.png" and min(size(tmp_path / "dynamics.png")) > 500
    assert (tmp_path / "dynamics.md").read_text().splitlines() == table
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table[2:]]
    assert [row[:5] for row in cells] == [
        ["scc", layer, "gate", "8", "12"],
        ["dk", layer, "kernel_offset", "18", "12"],
    ]
    assert all("±" in row[6] and "±" in row[8] for row in cells)
    assert len(rows(tmp_path / "dynamics_scc.csv")) == 12
    run(visualize_dynamics, monkeypatch, *arguments)
    assert capsys.readouterr().out.splitlines()[:-1] == table
    with pytest.raises(SystemExit, match="^error: scc: --kind: expected one of gate of"):
        run(visualize_dynamics, monkeypatch, *arguments, "--kind", "data_offset")
    with pytest.raises(SystemExit, match="^error: seed_0: expected at least 7 objects to"):
        run(
            visualize_dynamics,
            monkeypatch,
            runs["dk"],
            "--limit",
            1,
            "--output-dir",
            tmp_path / "o",
        )
    with pytest.raises(SystemExit):
        run(visualize_dynamics, monkeypatch, runs["dk"], "--classes", 0)
    assert "--classes, --limit: expected" in capsys.readouterr().err


def test_what_cannot_be_looked_at(runs, tmp_path, monkeypatch, capsys):
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "config.yaml").write_text((runs["dk"] / "config.yaml").read_text())
    text = tmp_path / "text.png"
    text.write_text("no picture")
    run_dk = runs["dk"]
    for arguments, message in {
        (): "RUN: expected folders of finished runs",
        (tmp_path / "none",): "none: expected a finished run, .* got none with config.yaml",
        (bare,): "bare: expected a finished run, .* got none with model_final.pth",
        (
            "MODEL.WEIGHT",
            "x",
            "--config-file",
            run_dk / "config.yaml",
        ): "did you mean MODEL.WEIGHTS",
        (run_dk, "--dataset", "nothing"): "expected a registered data set",
        (run_dk, "--images", text): "text.png: expected a picture",
        (run_dk, "--images", tmp_path / "no.png"): "no.png: no such file",
        (run_dk, "--feature", "backbone.res9"): "output: expected",
        (run_dk, "--feature", "proposal_generator.rpn_head.nothing"): "output: expected",
    }.items():
        with pytest.raises(SystemExit, match=f"^error: .*{message}"):
            run(visualize_erf, monkeypatch, *arguments, "--output-dir", tmp_path / "out")
    assert not list((tmp_path / "out").glob("*"))
    for arguments, message in {
        (run_dk, "--points", "1,2"): "expected --images",
        (run_dk, "--images", text, "--points", "1"): "invalid parse_point value: '1'",
        (run_dk, "--images", text, "--table"): "expected a data set",
        (run_dk, "--count", 0): "at least 1",
    }.items():
        with pytest.raises(SystemExit):
            run(visualize_erf, monkeypatch, *arguments)
        assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "key"),
    [
        (["INPUT.FORMAT", "BGR"], "format"),
        (["MODEL.PIXEL_MEAN", [0.0, 0.0, 0.0]], "network"),
        (["MODEL.WEIGHTS", ""], "weights, state"),
    ],
    ids=["format", "network", "random"],
)
def test_rows_of_a_table_are_of_one_network(options, key, dataset, tmp_path):
    cfg = load_config("demo/shapes_MNV2_FPN_dk_l3.yaml", [*OPTIONS, "MODEL.WEIGHTS", "a.pth"])
    other = cfg.clone()
    other.merge_from_list(options)
    settings, changed = (Network("n", c, nn.Identity()).settings for c in (cfg, other))
    assert settings == Network("n", cfg.clone(), nn.Identity()).settings
    Records(tmp_path / "rows.csv", ["image_id"], settings)
    with pytest.raises(FileExistsError, match=rf"got others \({key}\)"):
        Records(tmp_path / "rows.csv", ["image_id"], changed)
    if key == "weights, state":  # drawn at random, they are others each time
        assert changed != Network("n", other, nn.Identity()).settings


def test_tables_are_of_the_weights_that_are_there(runs, tmp_path, monkeypatch):
    """A run that was trained anew, into the same folder, has none of the rows of before."""
    arguments = runs["dk"], "--table", "--limit", 1, "--output-dir", tmp_path
    run(visualize_erf, monkeypatch, *arguments)
    weights = runs["dk"] / "model_final.pth"
    os.utime(weights, ns=(0, weights.stat().st_mtime_ns + 1))
    with pytest.raises(SystemExit, match=r"same network and settings .* got others \(state\)"):
        run(visualize_erf, monkeypatch, *arguments)
