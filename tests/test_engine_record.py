"""OUTPUT_DIR: a record of the training, and what its results are used by."""

import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from detectron2.modeling import build_model
from detectron2.utils import comm
from running import finish
from test_engine import (  # noqa: F401
    CONFIG,
    OPTIONS,
    arguments,
    datasets_root,
    replace_registered,
    start_training,
    train,
)

from dk_detectron.commands import visualize_results
from dk_detectron.engine import ClassificationTrainer, Predictor, Trainer, main, setup
from dk_detectron.engine.record import (
    RunCheckpointer,
    compare_classes,
    get_own_config,
    last_checkpoint,
)
from dk_detectron.model_zoo import get_config, load_config
from dk_detectron.weights import CheckpointError

CLASSES = [{"id": 1, "name": "square"}]


@pytest.fixture
def start(datasets_root, tmp_path, monkeypatch):  # noqa: F811
    """Starts the command in tmp_path/run, as far as before the first step."""
    from dk_detectron.data import datasets

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Trainer, "train", lambda trainer: None)
    replace_registered(datasets, datasets_root)

    def run(*opts, config_file=CONFIG, **flags):
        opts = [*OPTIONS, "OUTPUT_DIR", "run", *map(str, opts)]
        args = arguments(config_file=str(config_file), opts=opts, **flags)
        main(args, Trainer) if args.resume else setup(args)
        return Path("run")

    yield run
    replace_registered(datasets, datasets.datasets_root())


@pytest.fixture
def caplog(caplog):
    """Also in the process's first test, within which detectron2's logger stops passing it on."""
    logger = logging.getLogger("detectron2")
    logger.addHandler(caplog.handler)
    yield caplog
    logger.removeHandler(caplog.handler)


@pytest.fixture(scope="module")
def model():
    return build_model(load_config(CONFIG, OPTIONS))


@pytest.fixture
def weights(model, tmp_path) -> Path:
    torch.save({"model": model.state_dict()}, tmp_path / "start.pth")
    return tmp_path / "start.pth"


def weights_in(path: Path) -> str:
    return yaml.safe_load(path.read_text())["MODEL"]["WEIGHTS"]


def test_config_follows_the_last_checkpoint(start, model, weights):
    run = start("MODEL.WEIGHTS", weights)
    assert weights_in(run / "training.yaml") == str(weights)
    # Nothing predicts with the weights that training started from.
    assert weights_in(run / "config.yaml") == str(run.absolute() / "model_final.pth")
    with pytest.raises(FileNotFoundError, match="expected a checkpoint in run, where training has"):
        Predictor(run)

    checkpointer = RunCheckpointer(model, str(run), CLASSES)
    for name in "model_0000001", "model_0000003":
        checkpointer.save(name)
        assert weights_in(run / "config.yaml") == str(run.absolute() / f"{name}.pth")
        assert torch.load(run / f"{name}.pth", weights_only=True)["classes"] == CLASSES
    assert json.loads((run / "classes.json").read_text()) == CLASSES
    assert Predictor(run).weights == "run/model_0000003.pth"

    # A training that has diverged goes back to a good checkpoint, or to none.
    checkpointer.rewind(lambda checkpoint: not checkpoint.get("bad"))
    checkpointer.save("model_0000005", bad=True)
    assert checkpointer.rewind(lambda checkpoint: not checkpoint.get("bad")) == "model_0000003.pth"
    assert weights_in(run / "config.yaml").endswith("model_0000003.pth")
    assert checkpointer.rewind(lambda checkpoint: False) is None
    assert weights_in(run / "config.yaml").endswith("model_final.pth")

    # All else in the two files is the same.
    before, now = (yaml.safe_load((run / f"{n}.yaml").read_text()) for n in ("training", "config"))
    now["MODEL"]["WEIGHTS"] = before["MODEL"]["WEIGHTS"]
    assert now == before
    assert get_config(run / "config.yaml").keys() == get_config(CONFIG).keys()


def test_a_resumed_run_remembers_its_start(start, model, weights, caplog):
    run = start("MODEL.WEIGHTS", weights)
    RunCheckpointer(model, str(run), CLASSES).save("model_0000001")
    # By the run's own config.yaml, as many do.
    start("SOLVER.WEIGHT_DECAY", 0.5, config_file="run/config.yaml", resume=True)
    assert weights_in(run / "training.yaml") == str(weights)
    assert weights_in(run / "config.yaml").endswith("run/model_0000001.pth")
    assert "SOLVER.WEIGHT_DECAY" in caplog.text and "MODEL.WEIGHTS:" not in caplog.text
    assert yaml.safe_load((run / "training.yaml").read_text())["SOLVER"]["WEIGHT_DECAY"] == 0.5


def test_a_resumed_run_keeps_its_seed(start, model, weights, caplog):
    run = start("MODEL.WEIGHTS", weights, "SEED", 3)
    RunCheckpointer(model, str(run), CLASSES).save("model_0000001")
    start("SEED", 7, resume=True)
    assert "SEED: the run in run keeps its own, 3, which its data follow; 7 is for" in caplog.text
    assert "Resuming with other settings" not in caplog.text
    assert yaml.safe_load((run / "training.yaml").read_text())["SEED"] == 3


def test_a_resumption_without_a_checkpoint_says_so(start, weights, caplog):
    start("MODEL.WEIGHTS", weights)
    assert "no checkpoint" not in caplog.text
    setup(
        arguments(opts=[*OPTIONS, "OUTPUT_DIR", "run", "MODEL.WEIGHTS", str(weights)], resume=True)
    )
    assert "--resume: no checkpoint in run to go on from: a run starts" in caplog.text


@pytest.mark.parametrize("flag", ["resume", "eval_only"])
def test_classes_in_another_order_are_refused(flag, start, tmp_path, datasets_root, caplog):  # noqa: F811
    """Their number is the same, so that no shape of a weight tells."""
    folder, own = tmp_path / "run", {}
    for order in ("cat", "dog"), ("dog", "cat"), ("cat", "hound"):
        file = tmp_path / f"{'_'.join(order)}.json"
        source = datasets_root / "shapes" / "annotations" / "instances_train.json"
        content = json.loads(source.read_text())
        content["categories"] = [{"id": i, "name": name} for i, name in enumerate(order, 1)]
        file.write_text(json.dumps(content))
        own[order] = f"('coco:{file}:{datasets_root / 'shapes' / 'train'}',)"

    def go_on(order):
        data = "DATASETS.TRAIN", own[order], "DATASETS.TEST", own[order]
        two = "MODEL.ROI_HEADS.NUM_CLASSES", 2, "OUTPUT_DIR", folder, *data
        args = arguments(opts=[*OPTIONS, *map(str, two)], **{flag: True})
        args.opts += ["MODEL.WEIGHTS", str(folder / "model_0000001.pth")]
        main(args, Trainer)

    cfg = load_config(CONFIG, [*OPTIONS, "MODEL.ROI_HEADS.NUM_CLASSES", 2])
    classes = [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}]
    folder.mkdir()
    RunCheckpointer(build_model(cfg), str(folder), classes).save("model_0000001")
    with pytest.raises(CheckpointError, match="in which class 0 is 'dog', got .* 'cat' in its pl"):
        go_on(("dog", "cat"))
    assert "other names in training" not in caplog.text
    go_on(("cat", "dog"))
    assert "other names in training" not in caplog.text
    go_on(("cat", "hound"))
    assert "1 of 2 classes had other names in training: class 1, which is 'hound'" in caplog.text
    compare_classes("of another project", ["dog", "cat"], ["cat", "dog"])


def test_a_run_that_cannot_be_resumed_keeps_its_record(start, model, weights):
    run = start("MODEL.WEIGHTS", weights)
    RunCheckpointer(model, str(run), CLASSES).save("model_0000001")
    before = {name: (run / name).read_text() for name in ("training.yaml", "config.yaml")}
    with pytest.raises(CheckpointError, match="the very same network to resume from"):
        start("MODEL.FPN.OUT_CHANNELS", 16, resume=True)
    assert before == {name: (run / name).read_text() for name in before}


@pytest.mark.parametrize(
    ("resume", "others", "message"),
    [
        (True, ["none"], "got model_0000003.pth on process 0 and none on process 2: share"),
        (False, ["model_0000001.pth"], "got none on process 0 and model_0000001.pth on process 2"),
        (True, ["model_0000003.pth", "model_0000003.pth of iteration 7"], "of iteration 3 on .* 7"),
    ],
)
def test_all_machines_resume_from_the_same(resume, others, message, model, tmp_path, monkeypatch):
    """The first two processes of three are of this machine, the last has a folder of its own."""
    checkpointer = RunCheckpointer(model, str(tmp_path), CLASSES)
    checkpointer.save("model_0000003", iteration=3)
    answers = iter(others)
    monkeypatch.setattr(comm, "all_gather", lambda own: [own, own, next(answers)])
    with pytest.raises(CheckpointError, match=f"same checkpoint on every machine.*{message}"):
        checkpointer.resume_or_load("", resume=resume)


def test_an_evaluation_leaves_the_run_as_it_is(start, model, weights, caplog):
    run = start("MODEL.WEIGHTS", weights)
    RunCheckpointer(model, str(run), CLASSES).save("model_0000001")
    before = {name: (run / name).read_text() for name in ("training.yaml", "config.yaml")}
    start("MODEL.WEIGHTS", weights, "INPUT.MIN_SIZE_TEST", 80, eval_only=True)
    assert before == {name: (run / name).read_text() for name in before}
    start("MODEL.WEIGHTS", weights, resume=True)
    assert "Resuming with other settings" not in caplog.text


def test_a_folder_of_evaluations_predicts_with_what_was_evaluated(start, weights):
    run = start("MODEL.WEIGHTS", weights, eval_only=True)
    assert weights_in(run / "config.yaml") == str(weights)
    assert not (run / "training.yaml").exists()
    assert Predictor(run).weights == str(weights)


def test_training_from_the_result_of_a_run_is_said(start, model, weights, caplog):
    run = start("MODEL.WEIGHTS", weights)
    RunCheckpointer(model, str(run), CLASSES).save("model_final")
    other = "OUTPUT_DIR", "other"
    start(*other, config_file="run/training.yaml")
    start(*other, "MODEL.WEIGHTS", weights, config_file="run/config.yaml")
    assert "the result of the run" not in caplog.text
    start(*other, config_file="run/config.yaml")
    assert "run/model_final.pth, the result of the run whose config.yaml this is" in caplog.text
    assert f"--config-file {run.resolve() / 'training.yaml'} starts as" in caplog.text


def test_a_copy_is_a_run_of_its_own(start, model, weights, monkeypatch, capsys):
    """And not another name of the one that it was copied from, which may have gone on since."""
    run = start("MODEL.WEIGHTS", weights)
    RunCheckpointer(model, str(run), CLASSES).save("model_0000001")
    assert get_own_config(run / "config.yaml").OUTPUT_DIR == "run"
    copy = shutil.copytree(run, "copy")
    cfg = get_own_config(f"{copy}/config.yaml")
    assert (cfg.OUTPUT_DIR, cfg.MODEL.WEIGHTS) == (copy, f"{copy}/model_0000001.pth")
    # As training was started it stays, also in another folder, unless to go on there.
    training = f"{copy}/training.yaml"
    assert get_own_config(training).OUTPUT_DIR == "run"
    assert get_own_config(training).MODEL.WEIGHTS == str(weights)
    resumed = get_own_config(training, resume=True)
    assert (resumed.OUTPUT_DIR, resumed.MODEL.WEIGHTS) == (copy, f"{copy}/model_0000001.pth")

    for folder in run, Path(copy):
        (folder / "evaluation.json").write_text(json.dumps({"bbox": {f"of {folder}": 1}}))
    monkeypatch.setattr(visualize_results, "draw", lambda cfg, *more: cfg.OUTPUT_DIR)
    for opts, folder in ([], "copy"), (["--opts", "OUTPUT_DIR", "run"], "run"):
        arguments = "dk-visualize-results", "--config-file", f"{copy}/config.yaml", *opts
        monkeypatch.setattr(sys, "argv", list(arguments))
        visualize_results.main()
        printed = capsys.readouterr().out
        assert f"Pictures: {folder}/" in printed and f"of {folder} " in printed


def test_an_evaluation_of_a_copy_is_in_it(start, model, weights):
    run = start("MODEL.WEIGHTS", weights)
    RunCheckpointer(model, str(run), CLASSES).save("model_0000001")
    shutil.copytree(run, "copy")
    opts = [*OPTIONS, "MODEL.ROI_HEADS.NUM_CLASSES", 1]
    cfg = setup(arguments(config_file="copy/config.yaml", opts=opts, eval_only=True))
    assert (cfg.OUTPUT_DIR, cfg.MODEL.WEIGHTS) == ("copy", "copy/model_0000001.pth")


def test_runs_of_before_are_compared_by_their_config(start, model, weights, caplog):
    run = start("MODEL.WEIGHTS", weights)
    RunCheckpointer(model, str(run), CLASSES).save("model_0000001")
    (run / "training.yaml").rename(run / "config.yaml")
    start("MODEL.WEIGHTS", weights, "SOLVER.WEIGHT_DECAY", 0.5, resume=True)
    assert "SOLVER.WEIGHT_DECAY" in caplog.text


def test_an_evaluation_keeps_the_record_of_a_run_of_before(start, model, weights):
    """Version 0.1 left config.yaml alone, as training was started."""
    run = start("MODEL.WEIGHTS", weights, "SOLVER.WEIGHT_DECAY", 0.5)
    RunCheckpointer(model, str(run), CLASSES).save("model_0000001")
    (run / "training.yaml").rename(run / "config.yaml")
    before = (run / "config.yaml").read_text()
    start("MODEL.WEIGHTS", weights, "INPUT.MIN_SIZE_TEST", 80, eval_only=True)
    assert (run / "training.yaml").read_text() == before
    assert weights_in(run / "config.yaml") == str(run.absolute() / "model_0000001.pth")


def test_an_empty_tag_names_no_checkpoint(start, model, weights):
    run = start("MODEL.WEIGHTS", weights)
    RunCheckpointer(model, str(run), CLASSES).save("model_0000001")
    (run / "last_checkpoint").write_text("\n")
    assert last_checkpoint(run) is None
    with pytest.raises(FileExistsError, match="write the name of one of them into run/last_check"):
        start(resume=True)


def test_one_job_trains_in_a_folder(start, weights, tmp_path):
    other = (
        "from dk_detectron.engine.run_directory import claim; claim('run'); print(1, flush=True); "
        "input()"
    )
    job = subprocess.Popen(
        [sys.executable, "-c", other], stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=tmp_path
    )
    try:
        assert job.stdout.readline() == b"1\n"
        with pytest.raises(FileExistsError, match="expected a folder that no other job is train"):
            start("MODEL.WEIGHTS", weights)
        assert os.listdir("run") == [".lock"]
        start("MODEL.WEIGHTS", weights, eval_only=True)
    finally:
        job.communicate(b"\n")
    # It has ended, and so may have been killed.
    start("MODEL.WEIGHTS", weights)
    start("MODEL.WEIGHTS", weights)  # in this very process again


def test_a_killed_run_can_be_used(datasets_root, tmp_path):  # noqa: F811
    options = "SOLVER.MAX_ITER", 1000, "SOLVER.CHECKPOINT_PERIOD", 1, "DATASETS.TEST", "()"
    job = start_training(datasets_root, tmp_path, *options)
    while not last_checkpoint(tmp_path):
        assert job.poll() is None, finish(job).stderr[-3000:]
        time.sleep(0.05)
    os.kill(job.pid, signal.SIGKILL)
    finish(job)
    # Killed between the two, config.yaml may be one behind what --resume takes.
    named = Path(weights_in(tmp_path / "config.yaml"))
    assert named.is_file() or named.name == "model_final.pth"
    predictor = Predictor(tmp_path)
    assert Path(predictor.weights) == last_checkpoint(tmp_path)
    assert predictor.classes == CLASSES
    picture = next((datasets_root / "shapes" / "val").glob("*.png"))
    assert predictor(picture).image_size == (64, 96)


def test_classifiers_leave_their_class_folders(tmp_path):
    for split in "train", "val":
        for name in "cat", "dog":
            folder = tmp_path / split / name
            folder.mkdir(parents=True)
            (folder / "1.png").touch()
    cfg = load_config("ImageNet/MNV2.yaml", ["DATASETS.TRAIN", (str(tmp_path / "train"),)])
    assert ClassificationTrainer.classes(cfg) == [
        {"id": 0, "name": "cat"},
        {"id": 1, "name": "dog"},
    ]
