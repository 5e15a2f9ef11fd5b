"""tools/make_testdev_submission.py: the server's format, out of whatever a results file holds."""

import io
import json
import os
import re
import runpy
import subprocess
import sys
import zipfile
from contextlib import redirect_stdout
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances
from detectron2.evaluation import COCOEvaluator
from detectron2.structures import Boxes, BoxMode, Instances
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from dk_detectron.data import shapes
from dk_detectron.evaluation import submission
from dk_detectron.evaluation.submission import collect, file_name, read_image_info, read_results

ROOT = Path(__file__).parent.parent
IMAGES = {7: (100, 80), 9: (64, 64)}
CATEGORIES = {1, 90}  # with holes, as COCO's


def result(**changes) -> dict:
    return {
        "image_id": 7,
        "category_id": 90,
        "bbox": [1.0, 2.0, 30.0, 40.0],
        "score": 0.5,
    } | changes


def parse(text: str) -> list:
    file = io.StringIO(text)
    file.name = "results.json"
    return list(read_results(file))


@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize(
    ("chunk", "results"),
    [(1, [{}, {}, {}]), (200, [result(score=i / 7, note='"},{[') for i in range(9)])],
)
def test_reading_in_pieces_is_reading_at_once(chunk, results, indent, monkeypatch):
    monkeypatch.setattr(submission, "CHUNK", chunk)
    assert parse(json.dumps(results, indent=indent)) == results
    assert parse(" [ ] \n") == []


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "expected an array of results with '\\[' at character 0, got the end of the file"),
        ('{"a": 1}', "'\\[' at character 0, got '{'"),
        ("[1, 2]", "'{' at character 1, got '1'"),
        ('[{"a": 1}, {"a": ', "JSON at character 17, got Expecting value"),
        ('[{"a": 1}', "',' or '\\]' at character 9, got the end of the file, which is not whole"),
        ('[{"a": 1},]', "'{' at character 10, got '\\]'"),
        ('[{"a": 1}] x', "its end at character 11, got 'x'"),
        ('[{"a": cat}, ' + '{"a": 1},' * 300_000, "JSON at character 7, got Expecting value"),
    ],
)
def test_what_is_no_results_file(text, message):
    with pytest.raises(ValueError, match=f"results.json: .*{message}"):
        parse(text)


@pytest.mark.parametrize(
    ("changes", "violation"),
    [
        ({"image_id": 8}, "unknown image_id"),
        ({"image_id": "7"}, "unknown image_id"),
        ({"image_id": [7]}, "unknown image_id"),
        ({"category_id": 2}, "unknown category_id"),
        ({"category_id": True}, "unknown category_id"),
        ({"bbox": [1, 2, 3]}, "bbox is not four finite numbers"),
        ({"bbox": [1, 2, 3, float("inf")]}, "bbox is not four finite numbers"),
        ({"bbox": [1, 2, 3, "4"]}, "bbox is not four finite numbers"),
        ({"bbox": [1, 2, 3, -4]}, "bbox of negative size"),
        ({"bbox": [101, 2, 3, 4]}, "bbox outside its image"),
        ({"score": float("nan")}, "score is not a finite number"),
        ({"score": None}, "score is not a finite number"),
        ({"score": 1.5}, "score outside \\[0, 1\\]"),
        ({"score": -0.1}, "score outside \\[0, 1\\]"),
    ],
)
def test_faulty_results_are_dropped_and_counted(changes, violation):
    found = collect(iter([result(), result(**changes), result(**changes)]), IMAGES, CATEGORIES)
    assert (found.total, found.kept) == (3, 1)
    (line,) = found.violations.lines()
    assert line.startswith(violation.replace("\\", "") + " (dropped): 2 (such as {")
    for key in result():
        without = {k: v for k, v in result().items() if k != key}
        assert list(collect(iter([without]), IMAGES, CATEGORIES).violations.counts) == [
            f"no {key} (dropped)"
        ]


def texts(found) -> list[dict]:
    return [json.loads(text) for heap in found.best.values() for _, _, text in heap]


@pytest.mark.parametrize(
    ("box", "expected", "clipped"),
    [
        ([1.23456, 2.0, 30.0, 40.0], [1.23, 2.0, 30.0, 40.0], False),
        # Sizes rounded by themselves would reach 100.01.
        ([0.106, 0, 99.894, 80], [0.11, 0, 99.89, 80], False),
        # What float32 makes of a box on the border.
        ([-1e-5, 0, 100.00002, 80.00001], [0, 0, 100, 80], False),
        ([-3, -2, 200, 10], [0, 0, 100, 8], True),
        ([100, 80, 0, 0], [100, 80, 0, 0], False),
    ],
)
def test_boxes_are_rounded_inside_their_image(box, expected, clipped):
    found = collect(iter([result(bbox=box)]), IMAGES, CATEGORIES)
    assert texts(found) == [result(bbox=expected)]
    kinds = ["bbox that sticks out of its image (clipped)"] if clipped else []
    assert list(found.violations.counts) == kinds


def test_the_best_hundred_of_an_image():
    generator = torch.Generator().manual_seed(0)
    # Of 200 scores many are equal: the earlier ones stay.
    scores = (torch.randint(0, 20, (200,), generator=generator) / 20).tolist()
    results = [result(score=score, bbox=[0, 0, i / 4, 1]) for i, score in enumerate(scores)]
    results.insert(50, result(image_id=9))
    found = collect(iter(results), IMAGES, CATEGORIES)
    best = sorted(range(200), key=lambda i: -scores[i])[:100]
    assert sorted(r["bbox"][2] for r in texts(found) if r["image_id"] == 7) == sorted(
        i / 4 for i in best
    )
    assert found.kept == 101
    assert found.violations.lines() == [
        "image with more than 100 results (the best are kept): 1 (such as 200 in image 7)"
    ]


def test_scores_have_five_decimals():
    found = collect(iter([result(score=0.123456789), result(score=1)]), IMAGES, CATEGORIES)
    assert [r["score"] for r in texts(found)] == [0.12346, 1]


@pytest.mark.parametrize("name", ["", "a/b", "../a", "a b", "_a"])
def test_names_that_no_file_can_have(name):
    with pytest.raises(ValueError, match="--name: expected letters"):
        file_name(name)


@pytest.mark.parametrize("text", ["", "[]", '{"images": []}', '{"images": [{}], "categories": []}'])
def test_what_is_no_image_info(text, tmp_path):
    path = tmp_path / "info.json"
    path.write_text(text)
    with pytest.raises(ValueError, match="IMAGE_INFO: expected images and categories .*info.json"):
        read_image_info(path)


def run_tool(*args) -> tuple[str, str]:
    """The error, empty if there is none, and the output."""
    tool = runpy.run_path(str(ROOT / "tools/make_testdev_submission.py"))
    output = io.StringIO()
    with patch.object(sys, "argv", ["tool", *map(str, args)]), redirect_stdout(output):
        try:
            tool["main"]()
        except SystemExit as error:
            return error.code, output.getvalue()
    return "", output.getvalue()


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory) -> dict[str, Path]:
    """Results that detectron2's evaluator writes, of the shapes' val and test splits."""
    root = tmp_path_factory.mktemp("shapes")
    generator = torch.Generator().manual_seed(0)
    paths = {"root": root}
    for split, file in ("val", "instances_val.json"), ("test", "image_info_test.json"):
        shapes.write_split(root, split, 12, seed=0, side=96)
        name = f"submission_{split}"
        json_file = root / "annotations" / file
        register_coco_instances(name, {}, str(json_file), str(root / split))
        try:
            records = DatasetCatalog.get(name)
            output = root / f"inference_{split}"
            evaluator = COCOEvaluator(name, ("bbox",), False, str(output), use_fast_impl=False)
            evaluator.reset()
            for record in records:
                evaluator.process([record], [{"instances": detections(record, generator)}])
            paths[f"{split}_ap"] = evaluator.evaluate().get("bbox")
        finally:
            DatasetCatalog.remove(name)
            MetadataCatalog.remove(name)
        paths[split] = output / "coco_instances_results.json"
        paths[f"{split}_info"] = json_file
    return paths


def detections(record: dict, generator: torch.Generator) -> Instances:
    """The objects, each displaced a little, and noise, as a network would find them."""
    size = record["height"], record["width"]
    boxes = torch.tensor([a["bbox"] for a in record["annotations"]]).reshape(-1, 4)
    classes = torch.tensor([a["category_id"] for a in record["annotations"]], dtype=torch.int64)
    boxes = boxes * (1 + 0.1 * torch.randn(boxes.shape, generator=generator))
    boxes = BoxMode.convert(boxes, BoxMode.XYWH_ABS, BoxMode.XYXY_ABS)
    corners = torch.rand(30, 2, generator=generator) * torch.tensor(size[::-1]) * 0.7
    noise = torch.cat([corners, corners + 5 + 30 * torch.rand(30, 2, generator=generator)], dim=1)
    instances = Instances(size)
    instances.pred_boxes = Boxes(torch.cat([boxes, noise]))
    instances.pred_boxes.clip(size)
    instances.pred_classes = torch.cat([classes, torch.arange(30) % 6])
    instances.scores = torch.rand(len(instances), generator=generator)
    instances.scores[: len(classes)] += 1
    instances.scores /= 2
    return instances


def stats(ground_truth: Path, results: Path) -> list[float]:
    with redirect_stdout(io.StringIO()):
        truth = COCO(str(ground_truth))
        evaluation = COCOeval(truth, truth.loadRes(str(results)), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation.stats.tolist()


def test_the_submission_scores_as_the_results_do(evaluated, tmp_path):
    arguments = evaluated["val"], evaluated["val_info"], tmp_path, "--name", "dk_l3", "--strict"
    error, output = run_tool(*arguments)
    assert not error, error + output
    path = tmp_path / "detections_test-dev2017_dk_l3_results.json"
    assert {p.name for p in tmp_path.iterdir()} == {path.name, path.with_suffix(".zip").name}
    before = stats(evaluated["val_info"], evaluated["val"])
    assert 100 * before[0] == pytest.approx(evaluated["val_ap"]["AP"]) and before[0] > 0.2
    assert stats(evaluated["val_info"], path) == pytest.approx(before, abs=5e-4)
    # Fewer digits, and nothing else lost.
    assert len(json.loads(path.read_text())) == len(json.loads(evaluated["val"].read_text()))
    assert path.stat().st_size < 0.75 * evaluated["val"].stat().st_size


def test_the_test_split(evaluated, tmp_path):
    """As a command of its own."""
    script = ROOT / "tools" / "make_testdev_submission.py"
    result = subprocess.run(
        [sys.executable, script, evaluated["test"], evaluated["test_info"], tmp_path],
        env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr + result.stdout
    assert "12 images, 6 categories" in result.stdout and "violation" not in result.stdout
    archive = tmp_path / "detections_test-dev2017_dk_results.zip"
    assert result.stdout.splitlines()[-1] == str(archive)
    with zipfile.ZipFile(archive) as opened:
        assert opened.namelist() == ["detections_test-dev2017_dk_results.json"]
        text = opened.read(opened.namelist()[0]).decode()
    written = archive.with_suffix(".json")
    assert text == written.read_text()
    content = json.loads(text)
    assert all(set(r) == {"image_id", "category_id", "bbox", "score"} for r in content)
    with redirect_stdout(io.StringIO()):
        assert len(COCO(str(evaluated["test_info"])).loadRes(content).anns) == len(content)
    # What was written is itself without a fault, and does not change any more.
    error, output = run_tool(written, evaluated["test_info"], tmp_path / "again", "--strict")
    assert not error, output
    assert (tmp_path / "again" / written.name).read_text() == text


def test_strict_writes_nothing(evaluated, tmp_path):
    results = json.loads(evaluated["test"].read_text())
    results[0]["image_id"] = 999
    results[1]["bbox"] = [-5.0, 0.0, 20.0, 10.0]
    faulty, folder = tmp_path / "faulty.json", tmp_path / "output"
    faulty.write_text(json.dumps(results))
    error, strict = run_tool(faulty, evaluated["test_info"], folder, "--strict")
    assert error == "error: --strict allows no violation; nothing was written"
    assert not folder.exists()
    error, lenient = run_tool(faulty, evaluated["test_info"], folder)
    assert not error and len(list(folder.iterdir())) == 2
    for output in strict, lenient:
        assert "violation: unknown image_id (dropped): 1 (such as {'image_id': 999" in output
        assert "violation: bbox that sticks out of its image (clipped): 1 (such as" in output
        assert f"kept {len(results) - 1} of {len(results)} results, in 12 of 12 images" in output


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda text: text[:-10], "error: .*broken.json: expected an array of results"),
        (lambda text: "[]", "error: expected results to submit, found none among 0"),
        (lambda text: text.replace("image_id", "image"), "found none among"),
    ],
)
def test_a_broken_file_leaves_what_was_there(damage, message, evaluated, tmp_path):
    folder = tmp_path / "output"
    assert not run_tool(evaluated["test"], evaluated["test_info"], folder)[0]
    before = {p: p.read_bytes() for p in folder.iterdir()}
    broken = tmp_path / "broken.json"
    broken.write_text(damage(evaluated["test"].read_text()))
    error, _ = run_tool(broken, evaluated["test_info"], folder)
    assert re.search(message, error)
    assert {p: p.read_bytes() for p in folder.iterdir()} == before
    assert "No such file" in run_tool("none.json", evaluated["test_info"], folder)[0]
