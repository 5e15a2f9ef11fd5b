"""Prediction by a run's directory: the three lines, and the command over files."""

import csv
import json
import logging
import shutil
import signal
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from detectron2.config import get_cfg
from detectron2.data.detection_utils import read_image
from detectron2.engine import DefaultPredictor
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances
from PIL import Image
from pycocotools.coco import COCO
from test_data_inputs import noise, write_video
from test_engine import CONFIG, OPTIONS, run_tool

import dk_detectron
from dk_detectron import add_dk_config
from dk_detectron.commands import predict, visualize_results
from dk_detectron.data.inputs import Video, find_inputs
from dk_detectron.engine import Predictor, outputs
from dk_detectron.model_zoo import load_config
from dk_detectron.weights import CheckpointError

# As COCO's, the identifiers have gaps and begin where they like; and a name that is no folder's.
CATEGORIES = [{"id": 7, "name": "and/or"}, {"id": 3, "name": "disc"}]


@pytest.fixture(scope="module")
def datasets_root(tmp_path_factory) -> Path:
    """Bright squares on dark noise, the same names in two folders."""
    root = tmp_path_factory.mktemp("datasets")
    rng = np.random.default_rng(0)
    for split in "train", "val":
        images, annotations = [], []
        for i in range(4):
            name = f"{'ab'[i % 2]}/{i // 2}.png"
            picture = rng.integers(0, 80, (64, 96, 3), dtype=np.uint8)
            picture[10:40, 20:50] = 220
            path = root / "shapes" / split / name
            path.parent.mkdir(parents=True, exist_ok=True)
            cv2.imwrite(str(path), picture)
            images.append({"id": i + 1, "file_name": name, "height": 64, "width": 96})
            annotations.append(
                {"id": i + 1, "image_id": i + 1, "category_id": CATEGORIES[i % 2]["id"],
                 "bbox": [20, 10, 30, 30], "area": 900, "iscrowd": 0, "segmentation": []}
            )  # fmt: skip
        content = {"images": images, "annotations": annotations, "categories": CATEGORIES}
        path = root / "shapes" / "annotations" / f"instances_{split}.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(content))
    return root


@pytest.fixture(scope="module")
def run(datasets_root, tmp_path_factory) -> Path:
    """Two steps, an average of weights, and an evaluation that finds something anywhere."""
    output = tmp_path_factory.mktemp("runs") / "run"
    result = run_tool(
        "train_net.py", datasets_root, "--config-file", CONFIG, *OPTIONS, "OUTPUT_DIR", output,
        "MODEL.ROI_HEADS.NUM_CLASSES", 2, "MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.0,
        "TEST.DETECTIONS_PER_IMAGE", 5, "SOLVER.MAX_ITER", 2, "SOLVER.EMA_DECAY", 0.5,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-3000:]
    return output


@pytest.fixture(scope="module")
def predictor(run) -> Predictor:
    return Predictor(run)


@pytest.fixture(scope="module")
def pictures(datasets_root) -> list[str]:
    return sorted(map(str, (datasets_root / "shapes" / "val").rglob("*.png")))


def assert_same(actual, expected, **tolerance) -> None:
    """To the bit, unless there is a tolerance."""
    assert actual.get_fields().keys() == expected.get_fields().keys()
    assert actual.image_size == expected.image_size and len(actual) == len(expected) > 0
    tolerance = tolerance or {"rtol": 0, "atol": 0}
    for name, field in actual.get_fields().items():
        other = expected.get(name)
        field, other = (getattr(value, "tensor", value) for value in (field, other))
        torch.testing.assert_close(field, other, **tolerance)


def test_a_strangers_detectron2_finds_the_same(run, predictor, pictures):
    cfg = get_cfg()
    add_dk_config(cfg)
    cfg.merge_from_file(str(run / "config.yaml"))
    stranger = DefaultPredictor(cfg)
    trained = torch.load(run / "model_final.pth", weights_only=True)
    assert all(torch.equal(trained["model"][k], v) for k, v in stranger.model.state_dict().items())
    for path in pictures:
        expected = stranger(cv2.imread(path))["instances"]
        assert_same(predictor(path), expected)
        assert_same(predictor(cv2.imread(path)), expected)
    # In the order of the network's outputs, which is that of the identifiers.
    expected = sorted(CATEGORIES, key=lambda category: category["id"])
    assert json.loads((run / "classes.json").read_text()) == expected
    for name in "model_final.pth", "model_final_ema.pth":
        assert torch.load(run / name, weights_only=True)["classes"] == expected
    assert predictor.classes == expected
    assert predictor.metadata.thing_classes == ["disc", "and/or"]


def test_evaluation_leaves_the_results_of_these_weights(run, datasets_root):
    """And not of their average, which is evaluated too; in the layout of the training."""
    predictor = Predictor(run, opts=["MODEL.CHANNELS_LAST", True])
    folder = run / "inference" / "shapes_val"
    results = json.loads((folder / "coco_instances_results.json").read_text())
    truth = COCO(str(datasets_root / "shapes" / "annotations" / "instances_val.json"))
    for image in truth.loadImgs(truth.getImgIds()):
        found = predictor(datasets_root / "shapes" / "val" / image["file_name"])
        scores = [r["score"] for r in results if r["image_id"] == image["id"]]
        assert scores == found.scores.tolist()
    assert {"bbox", "bbox_ema"} == json.loads((run / "evaluation.json").read_text()).keys()


def test_lists_go_through_the_network_in_batches(run, predictor, pictures):
    batched = Predictor(run, batch_size=3)
    sizes = []
    batched.model.register_forward_pre_hook(lambda model, inputs: sizes.append(len(inputs[0])))
    found = batched([*pictures, cv2.imread(pictures[0])])
    assert sizes == [3, 2]
    for instances, path in zip(found, [*pictures, pictures[0]], strict=True):
        # Sums over a batch are taken in another order.
        assert_same(instances, predictor(path), rtol=1e-4, atol=1e-3)
    assert batched([]) == []


def test_other_weights_thresholds_and_settings(run, predictor, pictures):
    averaged = Predictor(run, weights="model_final_ema.pth")
    assert averaged.weights == str(run / "model_final_ema.pth")
    by_key = Predictor(run, opts=["MODEL.WEIGHTS", averaged.weights])
    assert by_key.weights == averaged.weights
    assert averaged(pictures[0]).scores.tolist() != predictor(pictures[0]).scores.tolist()
    scores = predictor(pictures[0]).scores
    threshold = (scores[1] + scores[2]).item() / 2
    assert_same(Predictor(run, threshold=threshold)(pictures[0]), predictor(pictures[0])[:2])
    one = Predictor(run, device="cpu", opts=["TEST.DETECTIONS_PER_IMAGE", 1])
    assert_same(one(pictures[0]), predictor(pictures[0])[:1])


def test_the_models_order_of_channels_is_its_own_affair(run, predictor, pictures):
    """An array is blue first, whatever INPUT.FORMAT says."""
    picture = cv2.imread(pictures[0])
    assert predictor.cfg.INPUT.FORMAT == "RGB"
    swapped = Predictor(run, opts=["INPUT.FORMAT", "BGR"])
    assert_same(swapped(picture[:, :, ::-1]), predictor(picture))


def test_a_run_can_be_moved(run, tmp_path, pictures, predictor):
    shutil.copytree(run, tmp_path / "moved")
    moved = Predictor(str(tmp_path / "moved"))
    assert moved.weights == str(tmp_path / "moved" / "model_final.pth")
    assert_same(moved(pictures[0]), predictor(pictures[0]))


def test_checkpoints_without_names_give_numbers(run, tmp_path):
    state = torch.load(run / "model_final.pth", weights_only=True)["model"]
    torch.save({"model": state}, tmp_path / "bare.pth")
    of_run = Predictor(run, weights=tmp_path / "bare.pth")
    assert [c["name"] for c in of_run.classes] == ["disc", "and/or"]
    shutil.copy(run / "config.yaml", tmp_path)
    bare = Predictor(tmp_path, weights="bare.pth")
    assert bare.classes == [{"id": 0, "name": "0"}, {"id": 1, "name": "1"}]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size: expected 1 or more, got 0"),
        ({"threshold": 50}, "threshold: expected a score from 0 to 1, got 50"),
        ({"device": "gpu"}, "device: expected one that this torch has, .* got 'gpu'"),
        ({"weights": "other.pth"}, "MODEL.WEIGHTS: expected a checkpoint, got .*other.pth'"),
        (
            {"opts": ["MODEL.META_ARCHITECTURE", "ImageClassifier"]},
            "RUN_DIR: expected the run of a detector",
        ),
        ({"opts": ["INPUT.FORMAT", "rgb"]}, "INPUT.FORMAT: expected RGB or BGR, got 'rgb'"),
        ({"opts": ["MODEL.WEIGHT", "x"]}, "Non-existent key: MODEL.WEIGHT; did you mean MODEL.WEI"),
        (
            {"opts": ["MODEL.ROI_HEADS.NUM_CLASSES", 3]},
            "model_final.pth: expected a checkpoint of the configured network",
        ),
    ],
)
def test_arguments_that_cannot_be_are_refused(options, message, run):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        Predictor(run, **options)


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="RUN_DIR: .* which has no config.yaml"):
        Predictor(tmp_path)


@pytest.mark.parametrize(
    ("picture", "message"),
    [
        (np.zeros((8, 8, 3), np.float32), r"as uint8 \[H, W, 3\], blue first, got float32"),
        (np.zeros((8, 8), np.uint8), r"got uint8 \[8, 8\]"),
        (np.zeros((3, 8, 8), np.uint8), r"got uint8 \[3, 8, 8\]"),
        (np.zeros((0, 8, 3), np.uint8), "sides of at least 1, .* got 8 x 0"),
        (np.zeros((1, 2000, 3), np.uint8), "at most 1333 : 1, got 2000 x 1"),
        ("none.png", "none.png: missing image"),
    ],
)
def test_what_is_no_picture_is_refused(picture, message, predictor):
    for argument in picture, [picture]:
        with pytest.raises(ValueError, match=message):
            predictor(argument)


@pytest.fixture
def inputs(tmp_path, pictures, monkeypatch) -> Path:
    """A folder of pictures with all that a folder may have, and a video beside it."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "inputs"
    for name in "a", "b", ".cache":
        (folder / name).mkdir(parents=True)
        shutil.copy(pictures[0], folder / name / "x.png")
    exif = Image.Exif()
    exif[274] = 6
    Image.fromarray(noise(48, 80)).save(folder / "turned.jpg", exif=exif)
    (folder / "page.jpg").write_text("<html>")
    (folder / "notes.gif").write_text("what is not looked into")
    (folder / "._x.png").write_bytes(b"\0\5\x16\7")
    Image.fromarray(noise()[:, :, 0].astype(np.uint16) * 257).save(folder / "sixteen.png")
    cv2.imwrite(str(folder / "thin.png"), noise(1, 1400))
    write_video("clip.avi", [cv2.imread(path)[:40, :60] for path in pictures])
    return folder


def command(monkeypatch, *arguments) -> object:
    """The exit status of dk-predict; what a string is, is a message and 1."""
    monkeypatch.setattr(sys, "argv", ["dk-predict", *map(str, arguments)])
    # As in a process of its own: detectron2's set-up of logs, which others call, stops them here.
    monkeypatch.setattr(logging.getLogger("detectron2"), "propagate", True)
    try:
        predict.main()
    except SystemExit as error:
        return error.code
    return 0


def rows_of(folder: Path) -> list[dict]:
    with open(folder / "predictions.csv", newline="") as file:
        return list(csv.DictReader(file))


def test_files_become_pictures_results_a_table_and_crops(
    run, predictor, inputs, monkeypatch, capfd, tmp_path
):
    arguments = run, "inputs", "clip.avi", "--threshold", 0, "--crops", "--output", "out"
    assert command(monkeypatch, *arguments) == "error: 3 inputs could not be read"
    said = capfd.readouterr()
    for fault in "page.jpg: unreadable", "sixteen.png: image of 16 bits", "thin.png: expected":
        assert f"inputs/{fault}" in said.err
    assert f"Weights: {run / 'model_final.pth'}, on cpu" in said.out
    assert "1 other files in the folders, left out, such as inputs/notes.gif: name " in said.out
    assert "out: 35 objects in 7 images" in said.out

    out = tmp_path / "out"
    names = "inputs_a_x.png inputs_b_x.png turned.jpg clip.mp4 crops"
    files = "coco_instances_results.json image_info.json predictions.csv"
    assert {p.name for p in out.iterdir()} == set(f"{names} {files}".split())
    # Drawn in their own size, seen the right way up, and not as they were.
    for path, name, size in [
        ("a/x.png", "inputs_a_x.png", (64, 96)),
        ("turned.jpg", "turned.jpg", (80, 48)),
    ]:
        original = read_image(str(inputs / path), "BGR")
        drawn = cv2.imread(str(out / name))
        assert drawn.shape[:2] == original.shape[:2] == size
        assert (drawn != original).mean() > 0.01

    info = COCO(str(out / "image_info.json"))
    results = info.loadRes(str(out / "coco_instances_results.json"))
    by_file = {image["file_name"]: image for image in info.loadImgs(info.getImgIds())}
    frames = [f"clip.avi#{k}" for k in range(4)]
    assert [*by_file] == ["inputs/turned.jpg", "inputs/a/x.png", "inputs/b/x.png", *frames]
    assert by_file["inputs/turned.jpg"]["width"] == 48
    expected = predictor([*list(by_file)[:3], *Video("clip.avi")])
    rows = rows_of(out)
    assert len(rows) == len(results.anns) == 35
    for image, instances in zip(by_file.values(), expected, strict=True):
        found = results.imgToAnns[image["id"]]
        corners = instances.pred_boxes.tensor
        boxes = torch.cat([corners[:, :2], corners[:, 2:] - corners[:, :2]], 1)
        assert [a["bbox"] for a in found] == [pytest.approx(b) for b in boxes.tolist()]
        assert [a["score"] for a in found] == instances.scores.tolist()
        classes = [predictor.classes[k] for k in instances.pred_classes]
        assert [a["category_id"] for a in found] == [c["id"] for c in classes]
        path, _, frame = image["file_name"].partition("#")
        in_table = [row for row in rows if (row["file"], row["frame"]) == (path, frame)]
        assert [row["class"] for row in in_table] == [c["name"] for c in classes]
        for row, corner, score in zip(in_table, corners, instances.scores, strict=True):
            table = [float(row[name]) for name in ("x1", "y1", "x2", "y2")]
            assert table == pytest.approx(corner.tolist(), abs=0.0051)  # two decimals
            assert float(row["score"]) == pytest.approx(score.item(), abs=5.1e-7)

    # Every box is a crop, in a folder of its class: what lies in it, to whole pixels.
    crops = list((out / "crops").rglob("*.png"))
    assert len(crops) == 35 and {p.name for p in (out / "crops").iterdir()} <= {"disc", "and_or"}
    instances = expected[1]
    for k, (left, top, right, bottom) in enumerate(instances.pred_boxes.tensor.tolist()):
        name = predictor.classes[instances.pred_classes[k]]["name"].replace("/", "_")
        crop = cv2.imread(str(out / "crops" / name / f"inputs_a_x_{k}.png"))
        whole = cv2.imread(str(inputs / "a" / "x.png"))
        part = whole[int(top) : int(np.ceil(bottom)), int(left) : int(np.ceil(right))]
        assert (crop == part).all()

    drawn = Video(str(out / "clip.mp4"))
    assert drawn.frames_per_second == 10
    assert [frame.shape for frame in drawn] == [(40, 60, 3)] * 4

    # What is there is never mixed with what another prediction finds.
    before = {p: p.stat().st_mtime_ns for p in out.rglob("*")}
    assert "--output: expected a folder that is new or empty" in command(monkeypatch, *arguments)
    assert before == {p: p.stat().st_mtime_ns for p in out.rglob("*")}


def test_the_folder_of_the_output_is_no_input(run, inputs, monkeypatch):
    shutil.rmtree(inputs / ".cache")
    for name in "page.jpg", "sixteen.png", "thin.png", "notes.gif":
        (inputs / name).unlink()
    arguments = run, inputs, "--threshold", 1, "--output"
    assert command(monkeypatch, *arguments, inputs / "out") == 0
    assert len(list((inputs / "out").glob("*.*g"))) == 3
    (inputs / "out" / "image_info.json").unlink()
    assert find_inputs([str(inputs)], leave_out=inputs / "out").others == []
    # Nothing found: lists that are empty, not files that are not there.
    assert (inputs / "out" / "coco_instances_results.json").read_text() == "[]\n"
    assert rows_of(inputs / "out") == []


def test_mistakes_are_told_before_anything_is_written(run, inputs, monkeypatch, tmp_path):
    (tmp_path / "empty").mkdir()
    for arguments, message in [
        ((run, "empty"), "error: INPUT: expected pictures"),
        (("empty", "inputs"), "error: RUN_DIR: expected the OUTPUT_DIR of a training"),
        ((run, "inputs", "--weights", "no.pth"), "error: MODEL.WEIGHTS: expected a checkpoint"),
        ((run, "inputs", "--threshold", 2), "error: threshold: expected"),
        ((run, "inputs", "--opts", "MODEL.WEIGHT", 2), "error: options KEY VALUE ...: expected"),
    ]:
        assert command(monkeypatch, *arguments).startswith(message)
    assert not (tmp_path / "predictions").exists()


@pytest.mark.parametrize(
    ("options", "least"),
    [
        ([], 0.5),
        (["--opts", "INPUT.MIN_SIZE_TEST", "64"], 0.5),
        (["--threshold", "0.2", "--opts", "MODEL.ROI_HEADS.SCORE_THRESH_TEST", "0.01"], 0.2),
        (["--opts", "MODEL.ROI_HEADS.SCORE_THRESH_TEST", "0.01"], 0.01),
    ],
)
def test_the_least_score_is_the_one_that_is_given(options, least, run, inputs, monkeypatch):
    class Seen(Exception):
        pass

    def look(output, predictor, *arguments, **more):
        raise Seen(predictor.cfg.MODEL.ROI_HEADS.SCORE_THRESH_TEST)

    monkeypatch.setattr(predict, "predict_into", look)
    with pytest.raises(Seen) as seen:
        command(monkeypatch, run, "inputs", *options)
    assert seen.value.args == (least,)


def test_an_error_leaves_no_half_of_a_result(run, predictor, inputs, monkeypatch, tmp_path):
    def fail(self, *arguments):
        raise OSError("No space left on device")

    monkeypatch.setattr(outputs.Outputs, "_crop", fail)
    found = find_inputs(["clip.avi", str(inputs / "a")], leave_out=tmp_path)
    with pytest.raises(OSError, match="No space left"):
        outputs.predict_into(tmp_path / "out", predictor, found, crops=True)
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["x.png"]


def test_masks_are_drawn_and_among_the_results(predictor, tmp_path, monkeypatch):
    names = [{"id": 3, "name": "disc"}, {"id": 7, "name": "$1^$"}]  # no formula of matplotlib's
    monkeypatch.setattr(predictor, "classes", names)
    mask = torch.zeros(1, 40, 60, dtype=torch.bool)
    mask[0, 10:20, 5:25] = True
    instances = Instances((40, 60), pred_boxes=Boxes(torch.tensor([[5.0, 10.0, 25.0, 20.0]])))
    instances.scores, instances.pred_classes = torch.tensor([0.75]), torch.tensor([1])
    instances.pred_masks = mask
    grey = np.full((40, 60, 3), 128, np.uint8)
    with outputs.Outputs(tmp_path, predictor) as folder:
        folder.add_picture("x.tif", "x", grey, instances)
    results = COCO(str(tmp_path / "image_info.json")).loadRes(
        str(tmp_path / "coco_instances_results.json")
    )
    assert (results.annToMask(results.anns[1]) == mask[0].numpy()).all()
    # The object shines through, in a colour.
    inside = cv2.imread(str(tmp_path / "x.png"))[12:18, 8:22].reshape(-1, 3)
    assert (inside != 128).any(1).mean() > 0.9 and inside.std(0).max() < 64


def test_retinanet_predicts_too(tmp_path, pictures):
    opts = "MODEL.FPN.OUT_CHANNELS 32 MODEL.RETINANET.NUM_CLASSES 2 MODEL.MOBILENETV2.NORM BN"
    opts = f"{opts} INPUT.MIN_SIZE_TEST 64 MODEL.WEIGHTS {tmp_path}/x.pth".split()
    cfg = load_config("COCO-Detection/retinanet_MNV2_FPN_dk_l3_1x.yaml", opts)
    torch.save({"model": build_model(cfg).state_dict()}, tmp_path / "x.pth")
    (tmp_path / "config.yaml").write_text(cfg.dump())
    found = Predictor(tmp_path, threshold=0.0)(pictures[0])
    assert len(found) == 100 and {*found.pred_classes.tolist()} <= {0, 1}
    assert 0 < found.scores.max() < 0.05  # of a new head; that of the configuration is 0.05
    assert len(Predictor(tmp_path)(pictures[0])) == 0


def test_a_webcam_ends_by_an_interrupt(predictor, inputs, monkeypatch, tmp_path):
    """Between two frames, with all that was found before; here a video is in its place."""

    class Webcam(Video):
        def __init__(self, source):
            super().__init__("clip.avi")
            self.is_live, self.announced = True, 0

    class Progress:
        def __init__(self, frames, **_):
            self.frames = frames

        def __iter__(self):
            for frame in self.frames:
                yield frame
                if self.frames.count == 2:
                    signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(outputs, "Video", Webcam)
    found = find_inputs(["3"], leave_out=tmp_path)
    handler = signal.getsignal(signal.SIGINT)
    summary = outputs.predict_into(tmp_path / "out", predictor, found, progress=Progress)
    assert (summary.images, summary.objects, summary.faults) == (2, 10, [])
    assert signal.getsignal(signal.SIGINT) is handler
    info = COCO(str(tmp_path / "out" / "image_info.json"))
    assert [image["file_name"] for image in info.loadImgs([1, 2])] == ["3#0", "3#1"]
    assert len(list(Video(str(tmp_path / "out" / "webcam_3.mp4")))) == 2


def test_a_webcam_that_is_not_there_is_named(predictor, tmp_path):
    found = find_inputs(["99"], leave_out=tmp_path)
    summary = outputs.predict_into(tmp_path / "out", predictor, found)
    assert summary.faults == ["99: webcam that cannot be opened"] and summary.images == 0


def test_the_tool_of_a_clone(run, pictures, datasets_root, tmp_path):
    arguments = run, pictures[0], "--output", tmp_path / "out", "--batch", 2, "--device", "cpu"
    result = run_tool("predict.py", datasets_root, *arguments)
    assert result.returncode == 0, result.stderr[-3000:]
    assert (tmp_path / "out" / Path(pictures[0]).name).is_file()


def test_three_lines_are_found_where_they_are_looked_for():
    assert dk_detectron.Predictor is Predictor and "Predictor" in dir(dk_detectron)


def test_detections_are_drawn_under_the_names_that_they_were_learnt_by(
    run, datasets_root, tmp_path
):
    """On another data set, of whose classes the order is another one."""
    shapes = datasets_root / "shapes"
    content = json.loads((shapes / "annotations" / "instances_val.json").read_text())
    for category, other in zip(content["categories"], CATEGORIES[::-1], strict=True):
        category["name"] = other["name"]
    (tmp_path / "val.json").write_text(json.dumps(content))
    name = f"coco:{tmp_path}/val.json:{shapes}/val"
    cfg = load_config(run / "config.yaml", ["DATASETS.TEST", (name,)])
    with pytest.raises(CheckpointError, match="class 0 is 'and/or', got .* with 'disc' in its pla"):
        visualize_results.draw(cfg, 1, 0.5)


def test_results_of_equal_stems_are_drawn_apart(run, datasets_root, tmp_path):
    """And of a run without an evaluation, with its last checkpoint: the same pictures."""
    arguments = "--config-file", run / "config.yaml", "--threshold", 0
    drawn = []
    for is_evaluated in True, False:
        if not is_evaluated:
            (run / "inference").rename(tmp_path / "inference")
        result = run_tool("visualize_results.py", datasets_root, *arguments)
        assert result.returncode == 0, result.stderr[-3000:]
        assert ("no evaluation yet; predicting" in result.stdout) is not is_evaluated
        drawn.append({p.name: cv2.imread(str(p)) for p in (run / "pictures").iterdir()})
        assert drawn[-1].keys() == {"a_0.png", "a_1.png", "b_0.png", "b_1.png"}
    (tmp_path / "inference").rename(run / "inference")
    for name, picture in drawn[0].items():
        # The colours of boxes are jittered, their places are not.
        assert ((picture == drawn[1][name]).all(2)).mean() > 0.9

    # Drawn anew: none is left of what is not asked for.
    result = run_tool("visualize_results.py", datasets_root, *arguments, "--count", 1)
    assert result.returncode == 0, result.stderr[-3000:]
    assert [p.name for p in (run / "pictures").iterdir()] == ["0.png"]
