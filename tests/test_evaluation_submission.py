"""tools/make_testdev_submission.py: the server's format, out of whatever a results file holds."""

import io
import json
import re
import runpy
import sys
import zipfile
from contextlib import redirect_stdout
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import running
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances
from detectron2.evaluation import COCOEvaluator
from detectron2.structures import Boxes, BoxMode, Instances
from pycocotools import mask as mask_util
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from dk_detectron.data import shapes
from dk_detectron.evaluation.submission import collect, file_name, read_image_info

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


@pytest.mark.parametrize(
    ("changes", "violation"),
    [
        ({"image_id": 8}, "unknown image_id"),
        ({"image_id": "seven"}, "unknown image_id"),
        ({"image_id": [7]}, "unknown image_id"),
        ({"category_id": 2}, "unknown category_id"),
        ({"category_id": True}, "unknown category_id"),
        ({"bbox": [1, 2, 3]}, "bbox is not four finite numbers"),
        ({"bbox": [1, 2, 3, float("inf")]}, "bbox is not four finite numbers"),
        ({"bbox": [1, 2, 3, None]}, "bbox is not four finite numbers"),
        ({"bbox": {"x": 1}}, "bbox is not four finite numbers"),
        ({"bbox": [1, 2, 3, 10**400]}, "bbox is not four finite numbers"),
        ({"bbox": [1, 2, 3000, 4]}, "bbox that reaches beyond 10 times its image"),
        ({"bbox": [1, 2, 3, -4]}, "bbox of negative size"),
        ({"bbox": [101, 2, 3, 4]}, "bbox outside its image"),
        ({"score": float("nan")}, "score is not a finite number"),
        ({"score": None}, "score is not a finite number"),
        ({"score": 10**400}, "score is not a finite number"),
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
    ("changes", "violation"),
    [
        (
            {"image_id": "7"},
            "image_id of another type than a number's (read as one): 1 (such as 7)",
        ),
        ({"image_id": 7.0}, "image_id of another type"),
        ({"category_id": "90"}, "category_id of another type"),
        ({"score": "0.5"}, "score of another type"),
        ({"bbox": ["1", "2.0", 30, "4e1"]}, "bbox whose numbers were written as strings"),
    ],
)
def test_numbers_are_read_as_they_are_meant(changes, violation):
    found = collect([result(**changes)], IMAGES, CATEGORIES)
    assert texts(found) == [result()]
    (line,) = found.violations.lines()
    assert line.startswith(violation)


def test_long_identifiers_keep_every_digit():
    identifier = 2**62 + 1  # which no float holds
    found = collect([result(image_id=str(identifier))], {identifier: (100, 80)}, CATEGORIES)
    assert texts(found) == [result(image_id=identifier)]


@pytest.mark.parametrize("score", [1.5, 99, -0.1, -3])
def test_another_scale_of_scores_is_an_error(score):
    """What is dropped would be the best."""
    message = f"r.json: score: expected probabilities, .* got {score} in result 2: .* sigmoid"
    with pytest.raises(ValueError, match=message):
        collect([result(), result(score=score)], IMAGES, CATEGORIES, source="r.json")
    rounding = collect([result(score=1 + 1e-7), result(score=-1e-7, image_id=9)], IMAGES, {90})
    assert [r["score"] for r in texts(rounding)] == [1, 0]
    assert rounding.violations.lines() == []


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([0, 1, 2], "got 0 in result 1; all of them may be positions from 0: write sorted"),
        ([2, 1, 3], "got 2 in result 1; all of them may be positions from 1: write sorted"),
        ([89, 0, 3], "got 89 in result 1; all of them may be one less than the ids: add 1"),
        ([5, 91, 2], "got 5 in result 1; all of them may be one more than the ids: subtract 1"),
        ([1, 90, 7], None),
    ],
)
def test_category_ids_that_are_counted_otherwise(ids, message):
    results = [result(category_id=identifier, score=0.1 * k) for k, identifier in enumerate(ids)]
    if message is None:
        found = collect(results, IMAGES, {1, 4, 90})
        assert found.kept == 2 and "unknown category_id (dropped): 1" in found.violations.lines()[0]
        return
    with pytest.raises(ValueError, match=f"r.json: category_id: expected .*{message}"):
        collect(results, IMAGES, {1, 4, 90}, source="r.json")


def test_results_that_are_there_twice():
    # As of a file that was concatenated with itself; the second half meets full images.
    results = [result(score=round(0.9 - i / 200, 5), bbox=[0, 0, i, 1]) for i in range(1, 121)]
    found = collect([dict(r) for r in results + results], IMAGES, CATEGORIES)
    assert sorted(r["score"] for r in texts(found)) == sorted(r["score"] for r in results[:100])
    # The hundredth and those after it are not among the best the second time.
    assert found.violations.counts["result that is there twice (kept once)"] == 99


PIXELS = np.zeros((80, 100), dtype=np.uint8, order="F")
PIXELS[2:42, 1:31] = 1
RLE = mask_util.encode(PIXELS)
RLE["counts"] = RLE["counts"].decode()


@pytest.mark.parametrize(
    ("mask", "violation"),
    [
        (RLE, None),
        ({"counts": RLE["counts"]}, "RLE without its size"),
        ({"size": [80, 100], "counts": [82, 40] + [40, 40] * 29 + [5558]}, "RLE that is a list"),
        ([[1, 2, 31, 2, 31, 42, 1, 42]], "mask of polygons (turned into an RLE)"),
        ([1, 2, 31, 2, 31, 42, 1, 42], "polygon that is not in a list"),
    ],
)
def test_masks_are_submitted_as_the_server_reads_them(mask, violation):
    found = collect([result(segmentation=mask)], IMAGES, CATEGORIES)
    assert found.task == "segm"
    (written,) = texts(found)
    assert written.keys() == {"image_id", "category_id", "segmentation", "score"}
    assert (mask_util.decode(written["segmentation"]) == PIXELS).all()
    lines = found.violations.lines()
    assert lines[0].startswith(violation) if violation else lines == []
    assert found.notes.lines() == [
        "bbox, left out: --task bbox submits it: 1 (such as bbox of result 1)"
    ]


@pytest.mark.parametrize(
    ("mask", "violation"),
    [
        (None, "segmentation without a mask"),
        ([[1, 2, 3, 4]], "segmentation without a mask"),
        ({**RLE, "counts": "0000"}, "RLE that has more or fewer pixels than its image"),
        ({**RLE, "size": [100, 80]}, "RLE whose size is not [height, width] of its image"),
        (
            {**RLE, "counts": "o" * 100_000},
            "RLE whose counts are neither a list of numbers nor a compressed string",
        ),
        ("mask", "segmentation is neither polygons nor an RLE"),
    ],
)
def test_masks_that_are_none_are_dropped(mask, violation):
    found = collect([result(segmentation=RLE), result(segmentation=mask)], IMAGES, CATEGORIES)
    assert found.kept == 1
    (line,) = found.violations.lines()
    assert line.startswith(f"{violation} (dropped): 1") and len(line) < 1000


def test_what_a_submission_leaves_out_is_said():
    results = [result(segmentation=RLE, keypoints=[1, 2, 2]), result(score=0.4)]
    found = collect(results, IMAGES, CATEGORIES, "bbox")
    assert texts(found) == [result(score=0.4), result()] and found.violations.lines() == []
    assert found.notes.lines() == [
        "segmentation, left out: --task segm submits it: 1 (such as segmentation of result 1)",
        "other keys, left out: 1 (such as keypoints of result 1)",
    ]


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


@pytest.mark.parametrize(
    "text",
    ["", "[]", '{"images": []}', '{"images": [{}], "categories": []}', "[" * 10**5,
     '{"images": [{"id": 1}], "categories": [{"id": 1, "name": "a"}]}'],
)  # fmt: skip
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
    arguments = evaluated["test"], evaluated["test_info"], tmp_path
    result = running.run_tool("make_testdev_submission.py", *arguments)
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
        assert (
            f"kept {len(results) - 1} of {len(results)} results (bbox), in 12 of 12 images"
            in output
        )


@pytest.mark.parametrize("below", [".", "more/of/it"])
def test_a_folder_that_cannot_be_is_said_before_results_are_read(below, evaluated, tmp_path):
    occupied = tmp_path / "file"
    occupied.write_text("")
    error, output = run_tool("none.json", evaluated["test_info"], occupied / below)
    assert error.startswith("error: OUT_DIR: expected a folder that can be written to, got ")
    assert f"as {occupied} is none" in error and not output


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda text: text[:-10], "error: .*broken.json: expected JSON at character"),
        (
            lambda text: "[]",
            "error: .*broken.json: expected results to submit, found none among 0: eval",
        ),
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
