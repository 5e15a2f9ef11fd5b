"""AP of a detector that finds nothing."""

import json
import math

import pytest
import torch
from detectron2.config import LazyConfig, instantiate
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import Boxes, Instances
from pycocotools.coco import COCO
from test_engine import CONFIG, OPTIONS, datasets_root, train  # noqa: F401
from test_modeling_constructors import LAZY

from dk_detectron.data.datasets import register
from dk_detectron.engine import DetectionEvaluator, Trainer
from dk_detectron.engine.evaluator import LEFT_OUT_FILE
from dk_detectron.evaluation.errors import scenes
from dk_detectron.evaluation.scores import Scores, without_images
from dk_detectron.model_zoo import load_config

NAME = "evaluator_test"
CLASSES = "disc", "block", "absent"


@pytest.fixture
def truth(tmp_path):
    """Two images with a small and a medium object of the first two classes."""
    annotations = [
        {"id": k, "image_id": k, "category_id": k, "bbox": [1, 1, side, side], "iscrowd": 0,
         "area": side * side, "segmentation": [[1, 1, side, 1, side, side, 1, side]]}
        for k, side in ((1, 20), (2, 50))
    ]  # fmt: skip
    sizes = {"width": 80, "height": 70}
    content = {
        "images": [{"id": k, "file_name": f"{k}.png", **sizes} for k in (1, 2)],
        "categories": [{"id": k, "name": name} for k, name in enumerate(CLASSES, start=1)],
        "annotations": annotations,
    }
    path = tmp_path / "truth.json"
    path.write_text(json.dumps(content))
    register(NAME, str(path), str(tmp_path))
    DatasetCatalog.get(NAME)  # names of the classes
    yield path
    DatasetCatalog.remove(NAME)
    MetadataCatalog.remove(NAME)


def evaluate(evaluator, boxes, images=(1, 2)) -> dict:
    """Of the same detections in all images, all of the first class."""
    instances = Instances((70, 80))
    instances.pred_boxes = Boxes(torch.tensor(boxes).reshape(-1, 4).float())
    instances.scores = torch.full((len(boxes),), 0.9)
    instances.pred_classes = torch.zeros(len(boxes), dtype=torch.long)
    evaluator.reset()
    for k in images:
        evaluator.process([{"image_id": k}], [{"instances": instances}])
    return evaluator.evaluate()


def test_nothing_is_as_good_as_what_is_all_wrong(truth):
    """The oracle is COCO's own evaluation of a box that meets no object."""
    nothing = evaluate(DetectionEvaluator(NAME), [])
    wrong = evaluate(DetectionEvaluator(NAME), [[60, 60, 70, 65]])
    assert nothing.keys() == wrong.keys() == {"bbox"}
    assert nothing["bbox"] == pytest.approx(wrong["bbox"], nan_ok=True, abs=0)
    undefined = {name for name, value in nothing["bbox"].items() if math.isnan(value)}
    assert undefined == {"APl", "AP-absent"}
    assert {nothing["bbox"][name] for name in nothing["bbox"].keys() - undefined} == {0.0}


def test_what_is_found_is_measured_as_before(truth):
    found = evaluate(DetectionEvaluator(NAME), [[1, 1, 21, 21]])["bbox"]
    assert found["AP-disc"] == pytest.approx(100) and found["AP-block"] == 0


def test_without_ground_truth_there_is_no_ap(truth):
    """Neither of a file without objects, nor of a test set's, without annotations."""
    content = json.loads(truth.read_text())
    truth.write_text(json.dumps(content | {"annotations": []}))
    metrics = evaluate(DetectionEvaluator(NAME), [])["bbox"]
    assert all(map(math.isnan, metrics.values()))
    content.pop("annotations")
    truth.write_text(json.dumps(content))
    assert evaluate(DetectionEvaluator(NAME), []) == {}


def test_pictures_that_are_left_out_are_no_part_of_any_metric(truth, tmp_path):
    """And are named, for what is made of the results later."""
    folder = tmp_path / "inference"
    evaluator = DetectionEvaluator(NAME, output_dir=str(folder))
    evaluate(evaluator, [[1, 1, 21, 21]])
    assert json.loads((folder / LEFT_OUT_FILE).read_text()) == []
    metrics = evaluate(evaluator, [[1, 1, 21, 21]], images=[1])["bbox"]
    assert json.loads((folder / LEFT_OUT_FILE).read_text()) == [2]
    assert metrics["AP"] == pytest.approx(100) and math.isnan(metrics["AP-block"])
    kept = without_images(COCO(truth), {2})
    results = json.loads((folder / "coco_instances_results.json").read_text())
    assert 100 * Scores(kept, results).ap() == pytest.approx(metrics["AP"])
    assert [image_id for image_id, _ in scenes(kept, results)] == [1]


@pytest.mark.parametrize("masks", [False, True])
def test_a_trainer_reports_the_tasks_of_its_heads(masks, truth, tmp_path):
    cfg = load_config(CONFIG, ["MODEL.MASK_ON", masks, "OUTPUT_DIR", str(tmp_path)])
    metrics = evaluate(Trainer.build_evaluator(cfg, NAME), [])
    assert list(metrics) == (["bbox", "segm"] if masks else ["bbox"])
    assert all(of_task["AP"] == of_task["APs"] == 0 for of_task in metrics.values())


def test_the_lazy_configuration_evaluates_alike(truth):
    dataloader = LazyConfig.load(str(LAZY)).dataloader
    dataloader.test.dataset.names = NAME
    assert evaluate(instantiate(dataloader.evaluator), [])["bbox"]["AP"] == 0


def test_a_training_that_finds_nothing_ends_with_an_ap_of_zero(datasets_root, tmp_path):  # noqa: F811
    nothing = "SOLVER.MAX_ITER", 1, "MODEL.ROI_HEADS.SCORE_THRESH_TEST", 1.0
    result = train(datasets_root, tmp_path, *nothing)
    assert result.returncode == 0, result.stderr[-3000:]
    metrics = json.loads((tmp_path / "evaluation.json").read_text())["bbox"]
    assert metrics["AP"] == metrics["AP50"] == 0 and metrics["APl"] is None
