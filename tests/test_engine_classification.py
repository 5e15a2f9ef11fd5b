"""Pretraining: the paper's recipe, its data, and resumption to the bit, for detectors as well."""

import json
import logging
import shutil
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.engine import HookBase
from detectron2.engine.hooks import EvalHook, PeriodicWriter
from detectron2.modeling import META_ARCH_REGISTRY, build_model
from PIL import Image
from running import run_tool
from torch import nn
from torchvision.datasets import ImageFolder
from torchvision.transforms._presets import ImageClassification

from dk_detectron.data import image_folder, shapes
from dk_detectron.data.stream import SampleStream, seeded
from dk_detectron.engine import AccuracyEvaluator, ClassificationTrainer, Trainer, main, setup
from dk_detectron.engine.average import WeightAverage
from dk_detectron.engine.trainer import write_evaluation
from dk_detectron.model_zoo import CONFIGS, load_config, paper_rows

ROOT = Path(__file__).parent.parent
CONFIG = CONFIGS / "demo" / "shapes_classes_MNV2_dk_l3.yaml"
CLASSIFIERS = [pytest.param(row, id=Path(row["config"]).stem) for row in paper_rows(1, 2)]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    """Drawn shapes: 24 pictures to train on, 12 to evaluate on, in six classes."""
    folder = tmp_path_factory.mktemp("pictures") / "shapes"
    for split, count in ("train", 24), ("val", 12):
        shapes.write_class_split(folder, split, count, seed=0, side=64)
    return folder


@pytest.fixture
def own_pictures(pictures, tmp_path) -> Path:
    """A copy to spoil."""
    return Path(shutil.copytree(pictures, tmp_path / "own"))


def options(folder: Path, output: Path) -> list[str]:
    return f"""
        DATASETS.TRAIN ('{folder / "train"}',) DATASETS.TEST ('{folder / "val"}',)
        OUTPUT_DIR {output} MODEL.DEVICE cpu DATALOADER.NUM_WORKERS 0
        INPUT.CROP_SIZE 32 INPUT.MIN_SIZE_TEST 32
        SOLVER.IMS_PER_BATCH 4 SOLVER.EPOCHS 0 SOLVER.MAX_ITER 6 SOLVER.WARMUP_ITERS 2
    """.split()


def config(folder: Path, output: Path, *more, file: Path = CONFIG) -> CfgNode:
    output.mkdir(exist_ok=True)
    return load_config(file, [*options(folder, output), *more])


class Killed(Exception):
    pass


class Recorder(HookBase):
    """Collects every loss and learning rate; stops training like a power cut, if told where."""

    def __init__(self, stop_after: int | None = None):
        self.seen = {}
        self.stop_after = stop_after

    def after_step(self):
        storage = self.trainer.storage
        self.seen[self.trainer.iter] = {
            "lr": [group["lr"] for group in self.trainer.optimizer.param_groups],
            **{
                name: storage.history(name).latest()
                for name in storage.histories()
                if "loss" in name
            },
        }
        if self.trainer.iter == self.stop_after:
            raise Killed


def train(trainer_class, cfg: CfgNode, *, resume: bool = False, stop_after: int | None = None):
    """
    Returns:
        The trainer, and by iteration what its recorder has seen.
    """
    # A resumed trainer has to take everything from its checkpoint.
    torch.manual_seed(int(resume))
    trainer = trainer_class(cfg)
    trainer._hooks = [h for h in trainer._hooks if not isinstance(h, PeriodicWriter)]
    if stop_after is not None:
        trainer._hooks = [h for h in trainer._hooks if not isinstance(h, EvalHook)]
    recorder = Recorder(stop_after)
    trainer.register_hooks([recorder])
    trainer.resume_or_load(resume=resume)
    try:
        trainer.train()
    except Killed:
        assert stop_after is not None
    return trainer, recorder.seen


def model_of(path: Path) -> dict[str, torch.Tensor]:
    return torch.load(path, weights_only=True)["model"]


def assert_same(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(actual[name], tensor), name


# The recipe


@pytest.mark.parametrize("row", CLASSIFIERS)
def test_every_classifier_of_the_paper_takes_a_step(row):
    cfg = load_config(CONFIGS / row["config"])
    model = META_ARCH_REGISTRY.get(cfg.MODEL.META_ARCHITECTURE)(cfg).train()
    optimizer = ClassificationTrainer.build_optimizer(cfg, model)
    batch = {
        "image": torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8),
        "label": torch.tensor([3, 900]),
    }
    loss = model(batch)["loss_cls"]
    # Weights of the last layer are small: the first guess is nearly uniform over 1000 classes.
    assert loss.item() == pytest.approx(np.log(1000), rel=0.25)
    loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
    before = model.linear.weight.detach().clone()
    optimizer.step()
    assert not torch.equal(before, model.linear.weight)


def test_schedule_is_appendix_d():
    """On ImageNet's 1,281,167 training images, at 8 processes and at other numbers of them."""
    cfg = load_config(CONFIGS / "ImageNet" / "R_50_DW_dk_l3.yaml", ["DATASETS.TRAIN", "('fake',)"])
    samples = [("x.jpg", 0)] * 1_281_167
    DatasetCatalog.register("fake", lambda: image_folder.Pictures(["x"], samples))
    MetadataCatalog.get("fake").set(evaluator_type="classification")
    try:
        scaled = {n: ClassificationTrainer.auto_scale_workers(cfg, n) for n in (1, 8, 16)}
    finally:
        DatasetCatalog.remove("fake")
        MetadataCatalog.remove("fake")
    for processes, iterations, warmup in (8, 450_410, 25_023), (16, 225_205, 12_511):
        solver = scaled[processes].SOLVER
        assert (solver.MAX_ITER, solver.WARMUP_ITERS) == (iterations, warmup)
        assert solver.IMS_PER_BATCH == 32 * processes
        assert solver.BASE_LR == pytest.approx(0.1 * processes / 8)
    assert scaled[8].SOLVER.CHECKPOINT_PERIOD == scaled[8].TEST.EVAL_PERIOD == 5005
    assert scaled[1].SOLVER.BASE_LR == pytest.approx(0.1 / 8)
    assert scaled[1].SOLVER.MAX_ITER == pytest.approx(8 * 450_410, abs=8)

    cfg = scaled[8]
    assert (cfg.SOLVER.OPTIMIZER, cfg.SOLVER.MOMENTUM, cfg.SOLVER.NESTEROV) == ("SGD", 0.9, False)
    model = build_model(cfg)
    optimizer = ClassificationTrainer.build_optimizer(cfg, model)
    # On everything but the biases that hold where taps rest.
    assert {group["weight_decay"] for group in optimizer.param_groups} == {4e-5, 0}
    assert {group["momentum"] for group in optimizer.param_groups} == {0.9}
    scheduler = ClassificationTrainer.build_lr_scheduler(cfg, optimizer)

    def lr(iteration: int, part: str) -> float:
        scheduler.last_epoch = iteration
        parameter = dict(model.named_parameters())[part]
        (index,) = (
            i
            for i, group in enumerate(optimizer.param_groups)
            if any(p is parameter for p in group["params"])
        )
        return scheduler.get_lr()[index]

    for iteration, expected in {
        0: 0.0,
        12_511: 0.05,
        25_022: 0.1 * 25_022 / 25_022.8,
        25_023: 0.1,
        # Half of the 85 epochs of the cosine.
        25_023 + 212_693: 0.05,
        450_409: 0.0,
    }.items():
        assert lr(iteration, "linear.weight") == pytest.approx(expected, rel=1e-4, abs=1e-9)
        generator = next(n for n, _ in model.named_parameters() if "offset_generator" in n)
        assert lr(iteration, generator) == pytest.approx(0.01 * expected, rel=1e-4, abs=1e-9)


@pytest.mark.parametrize(("batch", "epoch"), [(4, 6), (7, 3), (96, 1)])
def test_periods_are_an_epoch_at_most(batch, epoch, pictures, tmp_path):
    """Of the 24 pictures; the configuration's are of ImageNet."""
    opts = "SOLVER.EPOCHS", 4, "SOLVER.IMS_PER_BATCH", batch
    cfg = config(pictures, tmp_path, *opts)
    scaled = ClassificationTrainer.auto_scale_workers(cfg, 1)
    assert scaled.SOLVER.CHECKPOINT_PERIOD == scaled.TEST.EVAL_PERIOD == epoch
    cfg = config(pictures, tmp_path, *opts, "SOLVER.CHECKPOINT_PERIOD", 1, "TEST.EVAL_PERIOD", 0)
    scaled = ClassificationTrainer.auto_scale_workers(cfg, 1)
    assert (scaled.SOLVER.CHECKPOINT_PERIOD, scaled.TEST.EVAL_PERIOD) == (1, 0)


def test_pixels_are_torchvisions(pictures):
    """Resized, cut out and normalised to what the preset of torchvision's weights gives."""
    rng = np.random.default_rng(0)
    cfg = load_config(CONFIGS / "ImageNet" / "MNV2.yaml")
    transform = image_folder.evaluation_transform(cfg)
    model = build_model(cfg)
    for size in (300, 400, 3), (500, 280, 3):
        picture = Image.fromarray(rng.integers(0, 256, size, dtype=np.uint8)).resize((310, 270))
        expected = ImageClassification(crop_size=224)(picture)
        pixels = transform(picture)
        assert pixels.dtype == torch.uint8 and pixels.shape == (3, 224, 224)
        actual = model.normalize(pixels[None])[0]
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)


def test_batches_and_tensors_give_the_same_logits():
    cfg = load_config(CONFIGS / "ImageNet" / "MNV2_dk_l3.yaml")
    model = build_model(cfg).eval()
    batch = {
        "image": torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8),
        "label": torch.tensor([1, 2]),
    }
    with torch.no_grad():
        logits = model(batch)
        assert logits.shape == (2, 1000)
        assert torch.equal(logits, model(model.normalize(batch["image"])))
        loss = model.train()(batch)["loss_cls"]
        logits = model(model.normalize(batch["image"]))
        assert loss.item() == pytest.approx(F.cross_entropy(logits, batch["label"]).item())


@pytest.mark.parametrize("order", ["RGB", "BGR"])
def test_training_pictures_vary_in_everything_and_repeat_by_seed(order, pictures, tmp_path):
    cfg = config(pictures, tmp_path / "out", "INPUT.FORMAT", order, "INPUT.CROP_SIZE", 48)
    dataset = ClassificationTrainer.build_train_loader(cfg).dataset
    first, again, other = dataset[(5, 0)], dataset[(5, 0)], dataset[(6, 0)]
    assert first["image"].shape == (3, 48, 48) and first["image"].dtype == torch.uint8
    assert torch.equal(first["image"], again["image"])
    assert not torch.equal(first["image"], other["image"])
    means = torch.stack([dataset[(p, 0)]["image"].float().mean((1, 2)) for p in range(16)])
    assert (means.amax(0) - means.amin(0)).min() > 10


# Accuracy


def test_accuracy_is_counted_over_uneven_batches():
    logits = torch.tensor(
        [
            [9.0, 8, 7, 6, 5, 4, 3],  # 0 > 1 > 2 > 3 > 4 > 5 > 6
            [3.0, 4, 5, 6, 7, 8, 9],  # 6 > 5 > 4 > 3 > 2 > 1 > 0
            [0.0, 9, 0.5, 8, 7, 6, 5],  # 1 > 3 > 4 > 5 > 6 > 2 > 0
            [1.0, 2, 3, 9, 4, 5, 6],  # 3 > 6 > 5 > 4 > 2 > 1 > 0
            [1.0, 2, 3, 9, 4, 5, 6],
        ]
    )
    # First; fifth; sixth; first; seventh.
    labels = torch.tensor([0, 2, 2, 3, 0])
    evaluator = AccuracyEvaluator()
    for cuts in (4, 1), (2, 2, 1), (5,):
        evaluator.reset()
        for part in zip(logits.split(cuts), labels.split(cuts), strict=True):
            evaluator.process({"label": part[1]}, part[0])
        assert evaluator.evaluate() == {"classification": {"top1": 40.0, "top5": 60.0, "images": 5}}
    evaluator.reset()
    evaluator.process({"label": torch.tensor([0, 1])}, torch.tensor([[1.0, 0, 0], [1.0, 0, 0]]))
    metrics = evaluator.evaluate()["classification"]
    assert (metrics["top1"], metrics["top5"]) == (50.0, 100.0)
    evaluator.reset()
    with pytest.raises(ValueError, match="got none that can be read"):
        evaluator.evaluate()


# Training


@pytest.fixture(scope="module")
def uninterrupted(pictures, tmp_path_factory):
    """Six steps with a moving average; its output folder, and what was seen."""
    output = tmp_path_factory.mktemp("uninterrupted")
    cfg = config(pictures, output, "SOLVER.EMA_DECAY", 0.5)
    return output, train(ClassificationTrainer, cfg)[1]


@pytest.mark.parametrize("workers", [0, 2])
def test_classifier_resumes_to_the_bit(workers, uninterrupted, pictures, tmp_path):
    """Losses, learning rates, weights, statistics and moving average."""
    output, expected = uninterrupted
    more = "SOLVER.EMA_DECAY", 0.5, "SOLVER.CHECKPOINT_PERIOD", 3
    cfg = config(pictures, tmp_path, *more, "DATALOADER.NUM_WORKERS", workers)
    _, before = train(ClassificationTrainer, cfg, stop_after=3)
    assert list(before) == [0, 1, 2, 3]
    _, after = train(ClassificationTrainer, cfg, resume=True)
    # The fourth step, lost with the process, is done again.
    assert list(after) == [3, 4, 5]
    assert before | after == expected
    assert before[3] == after[3]
    for name in "model_final.pth", "model_final_ema.pth":
        assert_same(model_of(tmp_path / name), model_of(output / name))
    evaluations = [json.loads((p / "evaluation.json").read_text()) for p in (tmp_path, output)]
    assert evaluations[0] == evaluations[1]


def test_moving_average_is_one(pictures, tmp_path):
    """Against its definition, kept by hand; weights and statistics alike."""
    cfg = config(pictures, tmp_path, "SOLVER.EMA_DECAY", 0.75, "SOLVER.MAX_ITER", 4)
    expected = {}

    class ByHand(HookBase):
        def after_step(self):
            for name, tensor in self.trainer.model.state_dict().items():
                tensor = tensor.double().clone()
                if self.trainer.iter > 0:
                    tensor = 0.75 * expected[name] + 0.25 * tensor
                expected[name] = tensor

    trainer = ClassificationTrainer(cfg)
    trainer.register_hooks([ByHand()])
    trainer.train()
    averaged = model_of(tmp_path / "model_final_ema.pth")
    raw = model_of(tmp_path / "model_final.pth")
    assert averaged.keys() == raw.keys()
    for name, tensor in averaged.items():
        if tensor.is_floating_point():
            torch.testing.assert_close(tensor.double(), expected[name], rtol=1e-4, atol=1e-5)
    assert not torch.equal(averaged["linear.weight"], raw["linear.weight"])
    metrics = json.loads((tmp_path / "evaluation.json").read_text())
    assert set(metrics) == {"classification", "classification_ema"}


@pytest.mark.parametrize("steps", [1, 2], ids=["finished", "in the middle"])
def test_an_average_that_a_run_is_resumed_with_starts_at_its_weights(steps, pictures, tmp_path):
    """And not at the initialisation, also if there is no step left."""
    opts = "DATASETS.TEST", "()", "SOLVER.WARMUP_ITERS", 0, "SOLVER.MAX_ITER"
    train(ClassificationTrainer, config(pictures, tmp_path, *opts, 1))
    cfg = config(pictures, tmp_path, *opts, steps, "SOLVER.EMA_DECAY", 0.5)
    train(ClassificationTrainer, cfg, resume=True)
    assert_same(model_of(tmp_path / "model_final_ema.pth"), model_of(tmp_path / "model_final.pth"))


def test_a_loader_that_is_no_stream_is_taken_as_it_is(pictures, tmp_path, said):
    """Such as detectron2's own; a resumed run says that its data begin anew."""

    class OwnLoader(ClassificationTrainer):
        @classmethod
        def build_train_loader(cls, cfg: CfgNode) -> list[dict]:
            loader = super().build_train_loader(cfg)
            return [batch for batch, _ in zip(loader, range(4), strict=False)]

    opts = "DATASETS.TEST", "()", "SOLVER.WARMUP_ITERS", 0, "SOLVER.MAX_ITER"
    train(OwnLoader, config(pictures, tmp_path, *opts, 1))
    assert "build_train_loader" not in said.text
    _, seen = train(OwnLoader, config(pictures, tmp_path, *opts, 2), resume=True)
    assert list(seen) == [1]
    assert "cannot be entered at iteration 1, so the data begin anew" in said.text


def test_metrics_of_other_kinds_of_number_are_written(pictures, tmp_path):
    values = {
        "float": 0.5, "numpy": np.float32(0.25), "torch": torch.tensor(3), "array": np.ones(2),
        "nan": np.nan, "infinity": np.float64(np.inf), "tuple": (1, float("-inf")), "name": "a",
    }  # fmt: skip
    write_evaluation(config(pictures, tmp_path), {"task": values})
    assert json.loads((tmp_path / "evaluation.json").read_text())["task"] == {
        "float": 0.5, "numpy": 0.25, "torch": 3, "array": [1, 1],
        "nan": None, "infinity": None, "tuple": [1, None], "name": "a",
    }  # fmt: skip


def test_a_run_is_not_scaled_anew_in_the_middle(pictures, tmp_path, monkeypatch):
    """To half of its steps it would have been finished."""
    cfg = config(pictures, tmp_path, "SOLVER.REFERENCE_WORLD_SIZE", 1)
    state = ClassificationTrainer(cfg).state_dict()
    assert (state["processes"], state["reference"]) == (1, 1)
    state["processes"] = 2  # and now one
    with pytest.raises(ValueError, match="--num-gpus: expected 2 proc.* got 1, .* resume with 2"):
        ClassificationTrainer(cfg).load_state_dict(state)


def test_a_random_seed_is_kept(pictures, tmp_path):
    """SEED -1: another run is another, a resumed one the same."""
    more = "SEED", -1, "SOLVER.CHECKPOINT_PERIOD", 3
    cfg = config(pictures, tmp_path, *more, "DATASETS.TEST", "()")
    first, before = train(ClassificationTrainer, cfg, stop_after=4)
    second, after = train(ClassificationTrainer, cfg, resume=True)
    assert list(after) == [3, 4, 5]
    assert second.cfg.SEED == first.cfg.SEED >= 0
    assert [after[i] for i in (3, 4)] == [before[i] for i in (3, 4)]
    other, _ = train(ClassificationTrainer, cfg, stop_after=0)
    assert other.cfg.SEED != first.cfg.SEED


def test_pretraining_learns(pictures, tmp_path):
    """The loss falls below that of a blind guess."""
    opts = """
        SOLVER.MAX_ITER 50 SOLVER.IMS_PER_BATCH 12 SOLVER.BASE_LR 0.001 DATASETS.TEST ()
        INPUT.CROP_SIZE 48 INPUT.COLOR_JITTER 0.0
    """
    _, seen = train(ClassificationTrainer, config(pictures, tmp_path, *opts.split()))
    losses = [seen[i]["total_loss"] for i in range(50)]
    assert np.mean(losses[:5]) == pytest.approx(np.log(6), rel=0.15)
    assert np.mean(losses[-10:]) < 0.9 * np.log(6)


def test_checkpoint_has_what_a_detector_needs(uninterrupted):
    output, _ = uninterrupted
    parts = {name.split(".")[0] for name in model_of(output / "model_final.pth")}
    assert parts == {"backbone", "linear"}


# Detectors


@pytest.fixture(scope="module")
def detection_set(tmp_path_factory) -> str:
    """The shapes in COCO format, under a name of its own."""
    from detectron2.data.datasets import register_coco_instances

    folder = tmp_path_factory.mktemp("detection")
    shapes.write_split(folder, "train", 9, seed=0, side=64)
    name = "tiny_shapes"
    json_file = folder / "annotations" / "instances_train.json"
    register_coco_instances(name, {}, str(json_file), str(folder / "train"))
    yield name
    DatasetCatalog.remove(name)
    MetadataCatalog.remove(name)


@pytest.mark.parametrize("workers", [0, 2])
def test_detector_resumes_to_the_bit(workers, detection_set, tmp_path):
    """Losses, though proposals are sampled at random and pictures grouped by their shape."""
    opts = f"""
        DATASETS.TRAIN ('{detection_set}',) DATASETS.TEST () SOLVER.IMS_PER_BATCH 2
        INPUT.MIN_SIZE_TRAIN (48,64) MODEL.FPN.OUT_CHANNELS 16 MODEL.ROI_BOX_HEAD.FC_DIM 16
        MODEL.RPN.BATCH_SIZE_PER_IMAGE 16 MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE 8
        SOLVER.MAX_ITER 6 SOLVER.WARMUP_ITERS 2 INPUT.COLOR_JITTER 0.3
    """.split()
    seen = {}
    for run, count in ("whole", 0), ("cut", workers):
        cfg = load_config(
            CONFIGS / "demo" / "shapes_MNV2_FPN_dk_l3.yaml",
            [*opts, "OUTPUT_DIR", str(tmp_path / run), "DATALOADER.NUM_WORKERS", count]
            + ["SOLVER.CHECKPOINT_PERIOD", 3],
        )
        (tmp_path / run).mkdir()
        assert cfg.DATALOADER.ASPECT_RATIO_GROUPING
        if run == "whole":
            seen[run] = train(Trainer, cfg)[1]
        else:
            _, before = train(Trainer, cfg, stop_after=4)
            _, after = train(Trainer, cfg, resume=True)
            assert list(after) == [3, 4, 5]
            seen[run] = before | after
            assert [before[i] for i in (3, 4)] == [after[i] for i in (3, 4)]
    assert seen["cut"] == seen["whole"]
    assert {"loss_cls", "loss_rpn_cls", "total_loss"} <= set(seen["whole"][0])
    assert_same(
        model_of(tmp_path / "cut" / "model_final.pth"),
        model_of(tmp_path / "whole" / "model_final.pth"),
    )


def test_stream_can_be_entered_anywhere():
    """From any batch on it is the same, also when batches hold one group only."""
    from itertools import islice

    from detectron2.data.samplers import TrainingSampler

    for groups in None, [index % 3 == 0 for index in range(10)]:

        def stream(start, groups=groups):
            stream = SampleStream(TrainingSampler(10, seed=7), 4, groups)
            stream.start = start
            return list(islice(stream, 8))

        whole = stream(0)
        for start in 1, 5:
            assert stream(start)[: 8 - start] == whole[start:]
        if groups:
            assert all(len({groups[index] for _, index in batch}) == 1 for batch in whole)
        else:
            # Positions count up, and every ten of them show everything once.
            samples = [sample for batch in whole for sample in batch]
            assert [position for position, _ in samples] == list(range(32))
            for epoch in range(3):
                assert sorted(i for _, i in samples[10 * epoch : 10 * epoch + 10]) == [*range(10)]


def test_seeding_leaves_no_trace():
    import random

    def draw():
        return random.random(), np.random.rand(), torch.rand(1).item()

    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    expected = draw(), draw()
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    first = draw()
    with seeded(3, 4):
        inside = draw()
    assert (first, draw()) == expected
    with seeded(3, 4):
        assert draw() == inside
    with seeded(3, 5):
        assert not set(draw()) & set(inside)


# What goes wrong


def arguments(folder: Path, output: Path, *more, **changes) -> Namespace:
    defaults = {
        "config_file": str(CONFIG),
        "opts": [*options(folder, output), *more],
        "eval_only": False,
        "resume": False,
    }
    return Namespace(**(defaults | changes))


def spoil(folder: Path, what: str) -> None:
    if what == "val class":
        shutil.rmtree(folder / "val" / "heart")
    elif what == "empty class":
        for path in (folder / "train" / "ring").iterdir():
            path.unlink()
    elif what == "split":
        shutil.rmtree(folder / "val")
    elif what == "flat":
        for path in (folder / "val").glob("*/*.jpg"):
            path.rename(folder / "val" / path.name)
        for path in (folder / "val").iterdir():
            if path.is_dir():
                path.rmdir()


@pytest.mark.parametrize(
    ("what", "more", "error", "message"),
    [
        ("val class", [], ValueError, r"same class folders in .*\(6\) and .*\(5\).*: heart"),
        ("empty class", [], FileNotFoundError, "one folder of pictures for each class: .*ring"),
        ("split", [], ValueError, "DATASETS: expected a registered set .* got '.*val'"),
        ("flat", [], FileNotFoundError, "val: expected one folder of pictures for each class"),
        ("", ["MODEL.CLASSIFIER.NUM_CLASSES", 7], ValueError, "NUM_CLASSES: expected 6.*got 7"),
        ("", ["DATASETS.TRAIN", "('birds',)"], ValueError, "got 'birds'"),
        ("", ["DATASETS.TRAIN", "('shapes_train',)"], ValueError, "set of labelled pictures"),
        ("", ["DATASETS.TRAIN", "()"], ValueError, "DATASETS.TRAIN: expected a data set"),
        ("", ["MODEL.META_ARCHITECTURE", "RetinaNet"], ValueError, "expected ImageClassifier"),
        ("", ["SOLVER.EMA_DECAY", 1.0], ValueError, "EMA_DECAY: expected 0 <= decay < 1, got 1"),
        ("", ["MODEL.WEIGHTS", "none.pth"], FileNotFoundError, "MODEL.WEIGHTS: .* 'none.pth'"),
        ("", ["SOLVER.BASE_LR_END", 0.1], ValueError, "BASE_LR_END: .* at most SOLVER.BASE_LR 0.0"),
        ("", ["SOLVER.WARMUP_METHOD", "lin"], ValueError, "expected one of linear, constant, got"),
        ("", ["INPUT.FORMAT", "bgr"], ValueError, "INPUT.FORMAT: expected RGB or BGR, got 'bgr'"),
        (
            "",
            ["INPUT.RANDOM_FLIP", "horizonal"],
            ValueError,
            "one of none, horizontal, vertical",
        ),
        ("", ["INPUT.COLOR_JITTER", -0.2], ValueError, "COLOR_JITTER: expected a share, .* got -0"),
        ("", ["INPUT.CROP_SIZE", 0], ValueError, "CROP_SIZE: expected a number of pixels, got 0"),
        ("", ["INPUT.CROP_SIZE", 48], ValueError, "TEST: .* at least INPUT.CROP_SIZE 48, .* 32"),
    ],
)
def test_what_cannot_work_is_refused_before_any_work(
    what, more, error, message, own_pictures, tmp_path
):
    spoil(own_pictures, what)
    with pytest.raises(error, match=message):
        setup(arguments(own_pictures, tmp_path / "out", *more), ClassificationTrainer)
    assert not (tmp_path / "out").exists()


def test_the_number_of_classes_comes_from_the_data(own_pictures, tmp_path):
    args = arguments(own_pictures, tmp_path / "out", "SOLVER.REFERENCE_WORLD_SIZE", 0)
    args.config_file = str(CONFIGS / "ImageNet" / "MNV2_dk_l3.yaml")
    assert setup(args, ClassificationTrainer).MODEL.CLASSIFIER.NUM_CLASSES == 6


def test_a_shorter_run_leaves_steps_out(pictures, tmp_path, said):
    """Also one that comes with the last iteration, for which there is no step."""
    more = "SOLVER.STEPS", (3, 6, 9), "SOLVER.RESCALE_INTERVAL", False
    cfg = config(pictures, tmp_path, *more)
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    ClassificationTrainer.build_lr_scheduler(cfg, optimizer)
    assert "SOLVER.STEPS" not in said.text  # of which a cosine makes no use
    cfg.SOLVER.LR_SCHEDULER_NAME = "WarmupMultiStepLR"
    scheduler = ClassificationTrainer.build_lr_scheduler(cfg, optimizer)
    scheduler.last_epoch = 5
    assert scheduler.get_lr() == [pytest.approx(0.1)]
    assert "SOLVER.STEPS: (3,), without those that 6 iterations end before" in said.text
    assert cfg.SOLVER.STEPS == (3, 6, 9)


def test_a_run_is_not_made_shorter_than_it_is(pictures, tmp_path):
    state = {"iteration": 6}
    with pytest.raises(ValueError, match="SOLVER.MAX_ITER: expected at least 7 .*, got 6: raise"):
        ClassificationTrainer(config(pictures, tmp_path)).load_state_dict(state)


def test_warm_up_that_never_ends_is_refused(pictures, tmp_path):
    cfg = config(pictures, tmp_path, "SOLVER.EPOCHS", 1, "SOLVER.WARMUP_EPOCHS", 5)
    with pytest.raises(ValueError, match="fewer iterations of warm-up than the 6 .* got 30; set"):
        ClassificationTrainer(cfg)


@pytest.mark.parametrize(
    ("name", "warmup", "outcome"),
    [
        ("WarmupStepWithFixedGammaLR", 100, "refused"),
        ("WarmupCosineLR", 100, "said"),  # from a thousandth of the rate down to none
        ("WarmupCosineLR", 80, "said"),
        ("WarmupCosineLR", 10, "right"),
        ("WarmupMultiStepLR", 70, "said"),
        ("WarmupMultiStepLR", 50, "right"),
    ],
)
def test_warm_up_ends_before_the_schedule_comes_down(name, warmup, outcome, said):
    schedule = "SOLVER.LR_SCHEDULER_NAME", name, "SOLVER.STEPS", (60,), "SOLVER.EPOCHS", 0
    more = "SOLVER.RESCALE_INTERVAL", False, "SOLVER.WARMUP_ITERS", warmup, "SOLVER.MAX_ITER", 100
    cfg = load_config(CONFIG, [*schedule, *more])
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    if outcome == "refused":
        with pytest.raises(ValueError, match="fewer iterations of warm-up than the 100 .* got 100"):
            ClassificationTrainer.build_lr_scheduler(cfg, optimizer)
        return
    scheduler = ClassificationTrainer.build_lr_scheduler(cfg, optimizer)
    rates = []
    for scheduler.last_epoch in range(100):
        rates += scheduler.get_lr()
    assert (max(rates) > 0.5) == (outcome == "right")
    assert ("so far that no learning rate is above" in said.text) == (outcome == "said")


def test_missing_data_come_with_a_cure(tmp_path):
    image_folder.register_image_folder("gone_train", tmp_path / "gone", "buy it")
    try:
        with pytest.raises(FileNotFoundError, match="gone_train' expects .*gone; buy it"):
            more = "DATASETS.TRAIN", "('gone_train',)"
            setup(arguments(tmp_path, tmp_path / "out", *more), ClassificationTrainer)
    finally:
        DatasetCatalog.remove("gone_train")
        MetadataCatalog.remove("gone_train")
    root = MetadataCatalog.get("imagenet_val").image_root
    assert root.endswith("imagenet/val")


def truncate(path: Path) -> Path:
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    return path


@pytest.mark.parametrize("kind", ["truncated", "not a picture"])
@pytest.mark.parametrize("workers", [0, 1])
def test_corrupt_picture_is_named(kind, workers, own_pictures, tmp_path):
    path = own_pictures / "train" / "star" / "000006.jpg"
    truncate(path) if kind == "truncated" else path.write_text("not a picture")
    cfg = config(own_pictures, tmp_path, "DATALOADER.NUM_WORKERS", workers)
    with pytest.raises(ValueError, match="star/000006.jpg: expected a picture.*SKIP_CORRUPT True"):
        train(ClassificationTrainer, cfg)
    assert not list(tmp_path.glob("*.pth"))


@pytest.fixture
def said(caplog):
    """What detectron2's loggers say, whether they pass it on or not."""
    logger = logging.getLogger("detectron2")
    logger.addHandler(caplog.handler)
    with caplog.at_level("WARNING"):
        yield caplog
    logger.removeHandler(caplog.handler)


def test_corrupt_pictures_can_be_left_out(own_pictures, tmp_path, said):
    """Named, counted; in training the next picture takes the place, in evaluation nothing does."""
    spoilt = [
        truncate(own_pictures / "train" / "star" / "000006.jpg"),
        truncate(own_pictures / "train" / "star" / "000012.jpg"),
        truncate(own_pictures / "val" / "heart" / "000004.jpg"),
    ]
    more = "DATALOADER.SKIP_CORRUPT", True, "SOLVER.IMS_PER_BATCH", 8, "SOLVER.MAX_ITER", 3
    cfg = config(own_pictures, tmp_path, *more)
    dataset = ClassificationTrainer.build_train_loader(cfg).dataset
    paths = [path for path, _ in image_folder.load_pictures(cfg.DATASETS.TRAIN[0]).samples]
    index = paths.index(str(spoilt[0]))
    substitute = dataset[(0, index)]
    assert [message.split(":")[0] for message in substitute["skipped"]] == [
        str(spoilt[0]),
        str(spoilt[1]),
    ]
    assert torch.equal(substitute["image"], dataset[(0, index + 2)]["image"])
    trainer, _ = train(ClassificationTrainer, cfg)
    # Three steps of eight show each of the 24 pictures once.
    assert trainer.data_loader.skipped == 3
    assert trainer.storage.history("skipped_pictures").latest() == 3
    for path in spoilt:
        assert str(path) in said.text
    metrics = json.loads((tmp_path / "evaluation.json").read_text())["classification"]
    assert metrics["images"] == 11


def test_truncated_checkpoint_is_refused_and_nothing_overwritten(uninterrupted, pictures, tmp_path):
    shutil.copytree(uninterrupted[0], tmp_path / "run")
    truncate(tmp_path / "run" / "model_final.pth")
    before = {p.name: p.read_bytes() for p in (tmp_path / "run").iterdir()}
    trainer = ClassificationTrainer(config(pictures, tmp_path / "run", "SOLVER.EMA_DECAY", 0.5))
    with pytest.raises(Exception, match="(?i)zip|truncated|corrupt|cannot be read"):
        trainer.resume_or_load(resume=True)
    after = {p.name: p.read_bytes() for p in (tmp_path / "run").iterdir()}
    new = set(after) - set(before)
    assert all("tfevents" in name or name == "metrics.json" for name in new)
    assert {name: after[name] for name in before} == before


# The command line


def test_two_processes_train_and_evaluate(pictures, tmp_path):
    """Each evaluates its half of the pictures, with the same network."""
    more = "--config-file", CONFIG, "--num-gpus", 2
    steps = "SOLVER.MAX_ITER", 3, "SOLVER.EMA_DECAY", 0.5
    result = run_tool("train_imagenet.py", *more, *options(pictures, tmp_path), *steps)
    assert result.returncode == 0, result.stderr[-3000:]
    assert "World size: 2" in result.stdout
    metrics = json.loads((tmp_path / "evaluation.json").read_text())
    assert metrics["classification"]["images"] == 12

    # One process, and the network out of the file, come to the same.
    cfg = config(pictures, tmp_path / "one")
    model = build_model(cfg)
    model.load_state_dict(model_of(tmp_path / "model_final.pth"))
    assert ClassificationTrainer.test(cfg, model)["classification"] == metrics["classification"]


def test_shapes_tool_writes_class_folders(tmp_path):
    args = "--classes", "--train", "7", "--val", "6", "--side", "64"
    result = run_tool("prepare_shapes.py", *args, DETECTRON2_DATASETS=str(tmp_path))
    assert result.returncode == 0, result.stderr
    folder = tmp_path / "shapes_classes"
    found = image_folder.read_image_folder(str(folder / "train"))
    assert found.classes == sorted(shapes.OUTLINES)
    assert len(found.samples) == 7
    assert len(list((folder / "val").glob("*/*.jpg"))) == 6
    assert not (folder / "test").exists()


def test_what_systems_leave_among_pictures_is_left_out(tmp_path, said):
    """Folders that are no classes, files that are no pictures, at any depth; said once."""
    for name in "a/1.png", "b/2.png", "b/deep/3.JPEG":
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(path, format="PNG")
    hidden = [
        ".ipynb_checkpoints/1.png", "__MACOSX/a/._1.png", "@eaDir/1.png", "a/._1.png",
        "a/.ipynb_checkpoints/1-checkpoint.png", "b/deep/@eaDir/3.jpg",
    ]  # fmt: skip
    for name in hidden:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"no picture")
    (tmp_path / ".empty").mkdir()
    found = image_folder.read_image_folder(str(tmp_path))
    assert found.classes == ["a", "b"]
    names = [(str(Path(path).relative_to(tmp_path)), label) for path, label in found.samples]
    assert names == [("a/1.png", 0), ("b/2.png", 1), ("b/deep/3.JPEG", 1)]
    (message,) = {record.getMessage() for record in said.records}
    assert message.startswith(f"{tmp_path}: 7 hidden files and folders, left out: .empty, .ipynb_")


def test_evaluation_only(uninterrupted, pictures, tmp_path):
    """Through the command line's function, of a checkpoint."""
    output, _ = uninterrupted
    opts = "MODEL.WEIGHTS", str(output / "model_final.pth")
    main(arguments(pictures, tmp_path, *opts, eval_only=True), ClassificationTrainer)
    expected = json.loads((output / "evaluation.json").read_text())["classification"]
    found = json.loads((tmp_path / "evaluation.json").read_text())
    assert found == {"classification": expected}


def test_pretrained_backbone_arrives_in_a_detector_that_trains_and_resumes(
    uninterrupted, detection_set, tmp_path
):
    """Pretrain, load, train, resume: no tensor of the backbone is lost on the way."""
    pretrained = model_of(uninterrupted[0] / "model_final.pth")
    opts = f"""
        DATASETS.TRAIN ('{detection_set}',) DATASETS.TEST () SOLVER.IMS_PER_BATCH 2
        INPUT.MIN_SIZE_TRAIN (48,64) MODEL.FPN.OUT_CHANNELS 16 MODEL.ROI_BOX_HEAD.FC_DIM 16
        SOLVER.MAX_ITER 4 SOLVER.WARMUP_ITERS 2 SOLVER.CHECKPOINT_PERIOD 2
        DATALOADER.NUM_WORKERS 0 MODEL.MOBILENETV2.RES5_CHANNELS 1280 OUTPUT_DIR {tmp_path}
        MODEL.WEIGHTS {uninterrupted[0] / "model_final.pth"}
    """.split()
    cfg = load_config(CONFIGS / "demo" / "shapes_MNV2_FPN_dk_l3.yaml", opts)
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=False)
    detector = trainer.model.state_dict()
    backbone = {name for name in pretrained if name.startswith("backbone.")}
    arrived = {name for name in detector if name.startswith("backbone.bottom_up.")}
    assert {name.replace("bottom_up.", "") for name in arrived} == backbone
    for name in backbone:
        there = detector[name.replace("backbone.", "backbone.bottom_up.")]
        assert torch.equal(there, pretrained[name]), name

    _, before = train(Trainer, cfg, stop_after=2)
    _, after = train(Trainer, cfg, resume=True)
    assert list(after) == [2, 3] and after[2] == before[2]


def test_torchvisions_own_checkpoint_is_evaluated(pictures, tmp_path):
    """By --eval-only, its classifier included; every picture gets torchvision's own logits."""
    torch.manual_seed(0)
    network = torchvision.models.mobilenet_v2(num_classes=6)
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):  # else all pictures look alike
            module.running_mean.normal_(std=0.1)
            module.running_var.uniform_(0.1, 0.3)
    torch.save(network.state_dict(), tmp_path / "mobilenet_v2.pth")
    more = "MODEL.MOBILENETV2.RES5_CHANNELS", "1280", "MODEL.WEIGHTS", tmp_path / "mobilenet_v2.pth"
    args = arguments(pictures, tmp_path / "output", *map(str, more), eval_only=True)
    accuracy = main(args, ClassificationTrainer)["classification"]

    preset = ImageClassification(crop_size=32, resize_size=32)
    hits = {1: 0, 5: 0}
    data = ImageFolder(pictures / "val")
    for picture, label in data:
        order = network.eval()(preset(picture)[None])[0].argsort(descending=True).tolist()
        for k in hits:
            hits[k] += label in order[:k]
    assert accuracy == {"top1": 100 * hits[1] / 12, "top5": 100 * hits[5] / 12, "images": 12}
    assert 0 < hits[1] < 12


def test_a_run_that_was_stopped_leaves_no_final_average(tmp_path):
    hook = WeightAverage(nn.Linear(2, 2), 0.9, str(tmp_path))
    for iteration in 3, 6:
        hook.trainer = Namespace(iter=iteration, max_iter=6, checkpointer=Namespace(classes=[]))
        hook.after_train()
        assert (tmp_path / "model_final_ema.pth").exists() == (iteration == 6)


@pytest.mark.parametrize("build", ["build_train_loader", "build_test_loader"])
def test_the_order_of_channels_is_the_configured_one(build, tmp_path):
    (tmp_path / "red").mkdir()
    Image.new("RGB", (64, 64), (250, 100, 5)).save(tmp_path / "red" / "1.png")
    seen = {}
    for order in "RGB", "BGR":
        opts = ["INPUT.FORMAT", order, "DATASETS.TRAIN", f"('{tmp_path}',)", "INPUT.CROP_SIZE", 48]
        opts += ["DATALOADER.NUM_WORKERS", 0, "SOLVER.IMS_PER_BATCH", 1, "MODEL.DEVICE", "cpu"]
        cfg = load_config(CONFIGS / "ImageNet" / "MNV2.yaml", [*opts, "INPUT.COLOR_JITTER", 0.0])
        name = [] if build == "build_train_loader" else [str(tmp_path)]
        loader = getattr(ClassificationTrainer, build)(cfg, *name)
        seen[order] = loader.dataset[(0, 0) if not name else 0]["image"].float().mean((1, 2))
    assert seen["RGB"].tolist() == [250, 100, 5] and seen["BGR"].tolist() == [5, 100, 250]
