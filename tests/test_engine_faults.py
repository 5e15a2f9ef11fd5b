"""What ends a run before its time: signals, disks, memory, workers, pictures; and a used folder.

The last checkpoint stands, and the message says how to go on.
"""

import errno
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from running import finish
from test_engine import (  # noqa: F401
    CONFIG,
    OPTIONS,
    arguments,
    datasets_root,
    losses,
    replace_registered,
    run,
    start_tool,
    start_training,
    train,
)

from dk_detectron.engine import setup
from dk_detectron.engine.resources import DiskError, OutOfMemoryError, WorkerError, explained
from dk_detectron.engine.run_directory import check_unused, claim, set_aside
from dk_detectron.engine.signals import StopRequest, leave_off
from dk_detectron.model_zoo import load_config
from dk_detectron.weights import replacing, write_checkpoint, write_text

ENDLESS = "SOLVER.MAX_ITER", 100_000, "SOLVER.CHECKPOINT_PERIOD", 100_000
ENDLESS += "DATASETS.TEST", "()"
PATIENCE = 120  # seconds, of which a few are needed


def when(found, job: subprocess.Popen):
    """Waits until something is there."""
    for _ in range(10 * PATIENCE):
        if result := found():
            return result
        assert job.poll() is None, finish(job).stderr[-3000:]
        time.sleep(0.1)
    raise AssertionError("nothing has happened")


def trains(output: Path):
    """Whether metrics have been written, which takes 20 steps."""
    return (output / "metrics.json").exists() and losses(output)


def children(pid: int) -> list[int]:
    found = Path(f"/proc/{pid}/task/{pid}/children")
    return [int(child) for child in found.read_text().split()] if found.exists() else []


def workers_of(pid: int) -> list[int]:
    return [child for child in children(pid) if is_alive(child)]


def is_alive(pid: int) -> bool:
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except FileNotFoundError:
        return False


# ---- signals -------------------------------------------------------------------------------------


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_first_and_resume_goes_on(signum, datasets_root, tmp_path):  # noqa: F811
    job = start_training(datasets_root, tmp_path, *ENDLESS)
    when(lambda: trains(tmp_path), job)
    job.send_signal(signum)
    log = finish(job)
    assert job.returncode == 128 + signum
    assert f"{signum.name}: stopping after this step, with a checkpoint" in log.stderr
    (checkpoint,) = tmp_path.glob("model_*.pth")
    assert (tmp_path / "last_checkpoint").read_text() == checkpoint.name
    assert f"the same command with --resume goes on from {checkpoint.name}" in log.stdout
    last = torch.load(checkpoint, weights_only=True)["iteration"]
    more = "SOLVER.MAX_ITER", last + 2, "DATASETS.TEST", "()"
    result = train(datasets_root, tmp_path, "--resume", *more)
    assert result.returncode == 0, result.stderr[-3000:]
    assert f"Starting training from iteration {last + 1}" in result.stdout


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_the_first_process_stops_all(signum, datasets_root, tmp_path):  # noqa: F811
    job = start_training(datasets_root, tmp_path, "--num-gpus", 2, *ENDLESS)
    when(lambda: trains(tmp_path), job)
    family = [*children(job.pid)]
    assert len(family) >= 2
    job.send_signal(signum)
    finish(job)
    assert job.returncode == 128 + signum
    # Python's tracker of resources ends when it notices that the others have.
    deadline = time.monotonic() + PATIENCE
    while any(map(is_alive, family)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(map(is_alive, family))
    assert len(list(tmp_path.glob("model_*.pth"))) == 1


@pytest.fixture
def interruptible():
    """Also where the tests run in the background, and so ignore SIGINT."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_a_second_interrupt_stops_at_once(interruptible):
    request = StopRequest()
    with request.listening(), pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)
        assert request.agreed() and request.signum == signal.SIGINT
        signal.raise_signal(signal.SIGTERM)  # which comes again and again
        assert request.agreed() and request.signum == signal.SIGINT
        signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


# ---- disks ---------------------------------------------------------------------------------------


def test_a_full_disk_leaves_the_checkpoint_before(tmp_path):
    path = tmp_path / "model.pth"
    write_checkpoint({"model": {"a": torch.zeros(10)}}, path)
    before, limits = path.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, limits[1]))  # what a quota does
    try:
        with pytest.raises(OSError, match=f"{path} could not be written: .*GiB are free") as error:
            write_checkpoint({"model": {"a": torch.zeros(10**5)}}, path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert error.value.errno == errno.EFBIG
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_two_writers_of_a_file_do_not_meet(tmp_path):
    path = tmp_path / "page"
    with replacing(path) as first, replacing(path) as second:
        Path(first).write_text("first")
        Path(second).write_text("second")
        assert Path(first).parent == Path(second).parent == tmp_path
    assert path.read_text() == "first" and list(tmp_path.iterdir()) == [path]
    with pytest.raises(KeyError), replacing(path) as third:
        Path(third).write_text("half")
        raise KeyError
    assert path.read_text() == "first" and list(tmp_path.iterdir()) == [path]


def test_a_text_is_written_whole_and_the_same_everywhere(tmp_path):
    path = tmp_path / "new" / "table.md"
    program = (
        "import sys; from pathlib import Path; from dk_detectron.weights import write_text; "
        "write_text(Path(sys.argv[1]), '\\u00b1 \\u2265')"
    )
    latin = os.environ | {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
    subprocess.run([sys.executable, "-c", program, path], check=True, env=latin)
    assert path.read_bytes() == "± ≥".encode() and list(path.parent.iterdir()) == [path]
    with pytest.raises(UnicodeEncodeError):
        write_text(path, "half \udc80")
    assert path.read_bytes() == "± ≥".encode() and list(path.parent.iterdir()) == [path]


@pytest.fixture
def small_disk(run, tmp_path):  # noqa: F811
    """A file system with room for one checkpoint of the network, not for two."""
    folder = tmp_path / "small"
    folder.mkdir()
    size = int(1.7 * (run / "model_final.pth").stat().st_size)
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    if os.geteuid() or not shutil.which("mount") or subprocess.run(mount, check=False).returncode:
        pytest.skip("needs the right to mount a file system")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_run_on_a_full_disk_says_so_and_keeps_its_last_checkpoint(
    small_disk,
    datasets_root,  # noqa: F811
):
    options = "SOLVER.MAX_ITER", 30, "SOLVER.CHECKPOINT_PERIOD", 1, "DATASETS.TEST", "()"
    result = train(datasets_root, small_disk, *options)
    assert result.returncode == 1
    assert "No space left on device" in result.stderr and "make room" in result.stderr
    last = (small_disk / "last_checkpoint").read_text()
    assert f"--resume goes on from {last}" in result.stderr
    torch.load(small_disk / last, weights_only=True)
    assert not list(small_disk.glob("*.tmp"))


# ---- memory and workers --------------------------------------------------------------------------


def test_a_killed_worker_is_explained(datasets_root, tmp_path):  # noqa: F811
    options = [*OPTIONS]
    options[options.index("DATALOADER.NUM_WORKERS") + 1] = "1"
    job = start_tool(
        "train_net.py", datasets_root, "--config-file", CONFIG, *ENDLESS, *options,
        "OUTPUT_DIR", tmp_path,
    )  # fmt: skip
    when(lambda: trains(tmp_path), job)
    (worker,) = workers_of(job.pid)
    os.kill(worker, signal.SIGKILL)
    errors = finish(job).stderr
    assert job.returncode == 1
    # torch learns of it by a signal, or when it waits for the worker.
    assert "killed by signal: Killed" in errors or "exited unexpectedly" in errors
    assert "lower DATALOADER.NUM_WORKERS" in errors
    assert "there is no checkpoint yet: start again" in errors


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: 123 bytes"),
        RuntimeError("deform_kernel_conv2d: CUDA error: out of memory"),
        MemoryError("Unable to allocate 3 GiB"),
    ],
)
def test_out_of_memory_names_the_keys_to_turn(error, tmp_path):
    cfg = load_config(CONFIG, [*OPTIONS, "OUTPUT_DIR", str(tmp_path)])
    with pytest.raises(OutOfMemoryError) as training, explained(cfg, training=True):
        raise error
    text = str(training.value)
    assert str(error) in text and "there is no checkpoint yet" in text
    for key in (
        "lower SOLVER.IMS_PER_BATCH (now 2 images in each process)",
        "INPUT.MIN_SIZE_TRAIN (now (64,))",
        "SOLVER.AMP.ENABLED True",
        "MODEL.BACKBONE.GRADIENT_CHECKPOINTING True",
    ):
        assert key in text
    with pytest.raises(OutOfMemoryError, match="INPUT.MIN_SIZE_TEST") as evaluation:
        with explained(cfg, training=False):
            raise error
    assert "start again" not in str(evaluation.value)


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (MemoryError("no"), OutOfMemoryError),
        (RuntimeError("DataLoader worker (pid 7) is killed by signal: Bus error."), WorkerError),
        (OSError(errno.ENOSPC, "No space left on device"), DiskError),
    ],
)
def test_an_evaluation_in_a_training_can_be_gone_on_with(error, kind, tmp_path):
    cfg = load_config(CONFIG, [*OPTIONS, "OUTPUT_DIR", str(tmp_path)])
    (tmp_path / "last_checkpoint").write_text("model_0000003.pth")
    with pytest.raises(kind) as found, explained(cfg, training=True):
        with explained(cfg, training=False):
            raise error
    assert str(found.value).count("--resume goes on from model_0000003.pth") == 1
    assert found.value.__cause__ is error


def test_other_errors_stay_as_they_are(tmp_path):
    cfg = load_config(CONFIG, [*OPTIONS, "OUTPUT_DIR", str(tmp_path)])
    for error in RuntimeError("sizes must match"), OSError(errno.EACCES, "no"), KeyError("a"):
        with pytest.raises(type(error)) as found, explained(cfg, training=True):
            raise error
        assert found.value is error
    with pytest.raises(DiskError, match="GiB free"), explained(cfg, training=True):
        raise OSError(errno.ENOSPC, "No space left on device")
    with pytest.raises(WorkerError, match="--shm-size"), explained(cfg, training=True):
        raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Bus error.")


# ---- a folder for each run -----------------------------------------------------------------------


def test_a_folder_with_a_run_is_not_used_for_another(run, datasets_root, tmp_path):  # noqa: F811
    output = tmp_path / "run"
    shutil.copytree(run, output)
    before = {path: path.read_bytes() for path in output.rglob("*") if path.is_file()}
    result = train(datasets_root, output, "SOLVER.MAX_ITER", 2)
    assert result.returncode == 1
    assert "expected a folder without checkpoints to start a run in" in result.stderr
    assert "--resume goes on with it; else take another OUTPUT_DIR" in result.stderr
    assert {path: path.read_bytes() for path in output.rglob("*") if path.is_file()} == before

    (output / "last_checkpoint").unlink()
    with pytest.raises(FileExistsError, match="write the name of one of them into .*last_check"):
        check_unused(output, resume=True)


def test_what_a_kill_left_of_a_checkpoint_is_removed(tmp_path):
    left = "model_0000003.pth.0123abcd.tmp", "model_final.pth.0123abcd.tmp"
    others = "model_0000001.pth", "mine.pth.0123abcd.tmp", "model_0000003.pth.tmp", ".lock"
    for name in left + others:
        (tmp_path / name).touch()
    claim(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {*others}


def test_what_an_early_end_left_is_set_aside(tmp_path):
    assert set_aside(tmp_path) is None
    for name in "metrics.json", "events.out.tfevents.1", "log.txt", "last_checkpoint":
        (tmp_path / name).write_text("{}")
    (tmp_path / "pretrained.pth").touch()
    check_unused(tmp_path, resume=False)
    assert set_aside(tmp_path) == tmp_path / "unfinished_1"
    assert {path.name for path in tmp_path.iterdir()} == {
        "unfinished_1", "log.txt", "pretrained.pth"
    }  # fmt: skip
    (tmp_path / "metrics.json").write_text("{}")
    assert set_aside(tmp_path) == tmp_path / "unfinished_2"


def test_a_run_that_was_stopped_before_its_evaluation_does_it(run, datasets_root, tmp_path):  # noqa: F811
    output = tmp_path / "run"
    shutil.copytree(run, output)
    expected = (output / "evaluation.json").read_text()
    (output / "evaluation.json").unlink()
    result = train(datasets_root, output, "--resume", "SOLVER.MAX_ITER", 4)
    assert result.returncode == 0, result.stderr[-3000:]
    assert "stopped before it left evaluation.json: now it does" in result.stdout
    assert (output / "evaluation.json").read_text() == expected


# ---- pictures, and keys --------------------------------------------------------------------------


def test_detectors_leave_damaged_pictures_out_if_asked(datasets_root, tmp_path):  # noqa: F811
    root = tmp_path / "datasets"
    shutil.copytree(datasets_root, root)
    for name in "train/2.png", "val/3.png":
        picture = root / "shapes" / name
        picture.write_bytes(picture.read_bytes()[:-500])
    result = train(root, tmp_path / "run", "SOLVER.MAX_ITER", 4)
    assert result.returncode == 1 and "unreadable image: 1 (such as 2.png)" in result.stderr
    assert not (tmp_path / "run").exists()
    skip = "DATALOADER.SKIP_CORRUPT", True
    result = train(root, tmp_path / "run", "SOLVER.MAX_ITER", 4, *skip)
    assert result.returncode == 0, result.stderr[-3000:]
    assert (
        "unreadable image: 1 (such as 2.png); left out (DATALOADER.SKIP_CORRUPT)" in result.stdout
    )
    results = tmp_path / "run" / "inference" / "shapes_val" / "coco_instances_results.json"
    assert 3 not in {found["image_id"] for found in json.loads(results.read_text())}
    assert json.loads((results.parent / "left_out.json").read_text()) == [3]


def test_test_time_augmentation_is_done(run, datasets_root, tmp_path):  # noqa: F811
    result = train(
        datasets_root, tmp_path, "--eval-only", "MODEL.WEIGHTS", run / "model_final.pth",
        "TEST.AUG.ENABLED", True, "TEST.AUG.MIN_SIZES", "(64,)", "TEST.AUG.MAX_SIZE", 96,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-3000:]
    metrics = json.loads((tmp_path / "evaluation.json").read_text())
    assert metrics.keys() == {"bbox", "bbox_TTA"} and metrics["bbox_TTA"]["AP"] is not None


@pytest.mark.parametrize(
    ("opts", "message"),
    [
        (["TEST.EVAL_PERIOD", -1], "TEST.EVAL_PERIOD: expected a number of steps"),
        (["SOLVER.CHECKPOINT_PERIOD", 0], "SOLVER.CHECKPOINT_PERIOD: expected a number of steps"),
        (["TEST.AUG.ENABLED", True, "MODEL.KEYPOINT_ON", True], "TEST.AUG.ENABLED: expected False"),
        (["TEST.EXPECTED_RESULTS", [["segm", "AP", 30, 1]]], "with a task of bbox, got"),
        (["SOLVER.EPOCHS", 3], "SOLVER.EPOCHS: expected 0.*a detector makes no use of it, got 3"),
        (["MODEL.RESNETS.DEFORM_MODULATED", True], "set MODEL.DEFORM_KERNEL.DATA_OFFSET_ON_PER_ST"),
        (["OUTPUT_DIR", ""], "OUTPUT_DIR: expected a folder"),
        (["SOLVER.LR_SCHEDULER_NAME", "WarmupCosine"], "expected one of .*WarmupCosineLR, .*, got"),
        (
            ["SOLVER.LR_SCHEDULER_NAME", "WarmupMultiStepLR", "SOLVER.STEPS", (3, 2)],
            r"SOLVER.STEPS: .* increasing order, got \(3, 2\)",
        ),
        (
            [
                "SOLVER.CLIP_GRADIENTS.ENABLED",
                True,
                "SOLVER.CLIP_GRADIENTS.CLIP_TYPE",
                "full_model",
            ],
            "CLIP_TYPE: expected one of value, norm, got 'full_model'",
        ),
        (
            ["MODEL.META_ARCHITECTURE", "GeneralisedRCNN"],
            "such as GeneralizedRCNN, .*got 'Generalis",
        ),
        (
            ["MODEL.BACKBONE.NAME", "build_resnet_backbon"],
            "NAME: .* such as build_resnet_backbone,",
        ),
        (["MODEL.ROI_HEADS.NAME", "StandardROIHead"], "NAME: .* such as StandardROIHeads, "),
        (["INPUT.FORMAT", "YUV-BT.601"], "INPUT.FORMAT: expected RGB or BGR, got 'YUV-BT.601'"),
        (["INPUT.MIN_SIZE_TRAIN_SAMPLING", "rang"], "expected choice or range, got 'rang'"),
        (
            ["INPUT.MIN_SIZE_TRAIN", ()],
            r"MIN_SIZE_TRAIN: expected sizes to choose from, .* got \(\)",
        ),
        (["INPUT.MIN_SIZE_TRAIN_SAMPLING", "range"], "the least and the greatest size, .*64,"),
        (
            ["INPUT.MIN_SIZE_TRAIN_SAMPLING", "range", "INPUT.MIN_SIZE_TRAIN", (96, 64)],
            r"MIN_SIZE_TRAIN: expected the least and the greatest size, .* got \(96, 64\)",
        ),
        (
            ["MODEL.KEYPOINT_ON", True, "MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS", 5],
            "TEST.KEYPOINT_OKS_SIGMAS: expected 5 numbers, .* got 0",
        ),
    ],
)
def test_keys_without_effect_are_refused(opts, message, datasets_root, tmp_path, monkeypatch):  # noqa: F811
    from dk_detectron.data import datasets

    monkeypatch.chdir(tmp_path)
    replace_registered(datasets, datasets_root)
    try:
        with pytest.raises(ValueError, match=message):
            setup(arguments(opts=[*OPTIONS, "OUTPUT_DIR", "run", *opts]))
    finally:
        replace_registered(datasets, datasets.datasets_root())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("iteration", [8, 9, 10, 11])
def test_a_stopped_run_saves_unless_the_step_has_its_checkpoint(iteration):
    saved = []
    trainer = Namespace(
        iter=iteration, max_iter=100, stop_request=Namespace(signum=signal.SIGTERM),
        cfg=Namespace(SOLVER=Namespace(CHECKPOINT_PERIOD=5)),
        checkpointer=Namespace(save=lambda name, iteration: saved.append((name, iteration))),
    )  # fmt: skip
    leave_off(trainer)
    # detectron2's own hook saves after 5 and 10 steps, which are iterations 4 and 9.
    assert saved == ([] if iteration == 9 else [(f"model_{iteration:07d}", iteration)])
