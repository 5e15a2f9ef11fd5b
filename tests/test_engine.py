"""Training by tools/train_net.py, end to end on real files."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from argparse import Namespace
from collections import defaultdict
from collections.abc import Sequence
from copy import deepcopy
from functools import partial, partialmethod
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
import torchvision
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.engine import default_argument_parser
from detectron2.engine import launch as launch_functions
from detectron2.modeling import build_model
from detectron2.utils import comm
from detectron2.utils.events import EventStorage
from running import Tool, finish

from dk_detectron.engine import Trainer, command_line, setup
from dk_detectron.engine.amp import build_loop
from dk_detectron.engine.command_line import main, parse_flags_anywhere
from dk_detectron.engine.launch import launch
from dk_detectron.engine.schedule import check_processes
from dk_detectron.layers import LocalDeformKernel2d
from dk_detectron.model_zoo import CONFIGS, load_config

ROOT = Path(__file__).parent.parent
# The demo's network, smaller still, on a data set in the place of "shapes".
OPTIONS = """
    MODEL.ROI_HEADS.NUM_CLASSES 1 MODEL.FPN.OUT_CHANNELS 32 MODEL.ROI_BOX_HEAD.FC_DIM 32
    MODEL.DEVICE cpu DATALOADER.NUM_WORKERS 0 INPUT.MIN_SIZE_TRAIN (64,) INPUT.MIN_SIZE_TEST 64
    SOLVER.IMS_PER_BATCH 2 SOLVER.STEPS () SOLVER.WARMUP_ITERS 2 SOLVER.BASE_LR 0.01
""".split()
CONFIG = ROOT / "configs" / "demo" / "shapes_MNV2_FPN_dk_l3.yaml"


@pytest.fixture(scope="module")
def datasets_root(tmp_path_factory) -> Path:
    """Bright squares on dark noise, in COCO format, under the name of the shapes."""
    root = tmp_path_factory.mktemp("datasets")
    rng = np.random.default_rng(0)
    for split in "train", "val":
        folder = root / "shapes" / split
        folder.mkdir(parents=True)
        images, annotations = [], []
        for i in range(1, 7):
            picture = rng.integers(0, 80, (64, 96, 3), dtype=np.uint8)
            (x, y), side = rng.integers(2, 30, 2).tolist(), int(rng.integers(16, 32))
            picture[y : y + side, x : x + side] = 220
            cv2.imwrite(str(folder / f"{i}.png"), picture)
            images.append({"id": i, "file_name": f"{i}.png", "height": 64, "width": 96})
            annotations.append(
                {"id": i, "image_id": i, "category_id": 1, "bbox": [x, y, side, side],
                 "area": side * side, "iscrowd": 0, "segmentation": []}
            )  # fmt: skip
        content = {
            "info": {}, "licenses": [], "images": images, "annotations": annotations,
            "categories": [{"id": 1, "name": "square"}],
        }  # fmt: skip
        path = root / "shapes" / "annotations" / f"instances_{split}.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(content))
    return root


def start_tool(
    tool: str, datasets: Path, *args, python: Sequence[str] = ()
) -> Tool | subprocess.Popen:
    env = {
        **os.environ,
        "DETECTRON2_DATASETS": str(datasets),
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
    }
    if not python:
        return Tool(ROOT / "tools" / tool, [*map(str, args)], env)
    command = [sys.executable, *python, str(ROOT / "tools" / tool), *map(str, args)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    # A shell has what it starts in the background ignore SIGINT, and so would this.
    listen = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    return subprocess.Popen(command, env=env, preexec_fn=listen, **pipes)


def start_training(
    datasets: Path, output: Path, *args, python: Sequence[str] = ()
) -> Tool | subprocess.Popen:
    arguments = "--config-file", CONFIG, *args, "OUTPUT_DIR", output, *OPTIONS
    return start_tool("train_net.py", datasets, *arguments, python=python)


def run_tool(tool: str, datasets: Path, *args) -> subprocess.CompletedProcess:
    return finish(start_tool(tool, datasets, *args))


def train(datasets: Path, output: Path, *args) -> subprocess.CompletedProcess:
    return finish(start_training(datasets, output, *args))


def losses(output: Path) -> dict[int, float]:
    lines = [json.loads(line) for line in (output / "metrics.json").read_text().splitlines()]
    return {line["iteration"]: line["total_loss"] for line in lines if "total_loss" in line}


@pytest.fixture(scope="module")
def run(datasets_root, tmp_path_factory) -> Path:
    """Four steps and an evaluation."""
    output = tmp_path_factory.mktemp("run")
    result = train(datasets_root, output, "SOLVER.MAX_ITER", 4, "SOLVER.CHECKPOINT_PERIOD", 2)
    assert result.returncode == 0, result.stderr[-3000:]
    return output


def test_training_leaves_everything_behind(run):
    assert {
        "model_final.pth",
        "config.yaml",
        "metrics.json",
        "evaluation.json",
        "last_checkpoint",
    } <= {p.name for p in run.iterdir()}
    assert list(run.glob("events.out.tfevents.*"))
    assert (run / "inference" / "shapes_val" / "coco_instances_results.json").is_file()
    metrics = json.loads((run / "evaluation.json").read_text())["bbox"]
    assert {"AP", "AP50", "AP75", "APs", "APm", "APl"} <= set(metrics)
    # No large objects in this set: COCO says NaN, JSON cannot.
    assert metrics["APl"] is None and metrics["AP"] is not None


def test_runs_repeat_exactly(run, datasets_root, tmp_path):
    result = train(datasets_root, tmp_path, "SOLVER.MAX_ITER", 4, "SOLVER.CHECKPOINT_PERIOD", 2)
    assert result.returncode == 0, result.stderr[-3000:]
    assert losses(tmp_path) == losses(run) and losses(run)
    first = torch.load(run / "model_final.pth", weights_only=True)["model"]
    second = torch.load(tmp_path / "model_final.pth", weights_only=True)["model"]
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name


def test_resume_goes_on_where_it_stopped(run, datasets_root, tmp_path):
    result = train(datasets_root, tmp_path, "SOLVER.MAX_ITER", 2)
    assert result.returncode == 0, result.stderr[-3000:]
    result = train(datasets_root, tmp_path, "--resume", "SOLVER.MAX_ITER", 4)
    assert result.returncode == 0, result.stderr[-3000:]
    assert "Starting training from iteration 2" in result.stdout


def test_pretrained_weights_start_a_run_that_survives_a_truncated_checkpoint(
    datasets_root, tmp_path
):
    """torchvision's MobileNet-V2 straight into a frozen deformable backbone."""
    torch.manual_seed(0)
    weights = torchvision.models.mobilenet_v2().state_dict()
    torch.save(weights, tmp_path / "mobilenet_v2.pth")
    options = "MODEL.WEIGHTS", tmp_path / "mobilenet_v2.pth", "MODEL.MOBILENETV2.NORM", "FrozenBN"
    result = train(
        datasets_root, tmp_path, *options, "SOLVER.MAX_ITER", 2, "SOLVER.CHECKPOINT_PERIOD", 1
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert "| resampled                    |        17 | backbone.bottom_up 17" in result.stdout
    trained = torch.load(tmp_path / "model_final.pth", weights_only=True)["model"]
    name = "backbone.bottom_up.res5.3.conv1.norm.running_var"
    assert torch.equal(trained[name], weights["features.17.conv.0.1.running_var"])

    last = tmp_path / "model_final.pth"
    last.write_bytes(last.read_bytes()[:10000])
    result = train(datasets_root, tmp_path, "--resume", *options, "SOLVER.MAX_ITER", 3)
    assert result.returncode == 0, result.stderr[-3000:]
    assert "Trying the checkpoint before, since: " in result.stdout
    assert "Starting training from iteration 2" in result.stdout


def test_eval_only_gives_the_same_metrics(run, datasets_root, tmp_path):
    args = "--eval-only", "MODEL.WEIGHTS", run / "model_final.pth"
    result = train(datasets_root, tmp_path, *args)
    assert result.returncode == 0, result.stderr[-3000:]
    assert (tmp_path / "evaluation.json").read_text() == (run / "evaluation.json").read_text()


# Distributed training. Every proposal and every anchor is a sample, the same number in each image,
# so that no chance enters that another division among processes would change; norms are frozen.
ALL_SAMPLES = """
    MODEL.MOBILENETV2.NORM FrozenBN MODEL.FPN.NORM FrozenBN SOLVER.OPTIMIZER SGD
    MODEL.RPN.BATCH_SIZE_PER_IMAGE 100000 MODEL.RPN.POSITIVE_FRACTION 1.0
    MODEL.RPN.POST_NMS_TOPK_TRAIN 50 MODEL.RPN.NMS_THRESH 1.0
    MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE 50 MODEL.ROI_HEADS.POSITIVE_FRACTION 1.0
    MODEL.ROI_HEADS.PROPOSAL_APPEND_GT False SOLVER.MAX_ITER 3 DATASETS.TEST ()
""".split()


def weights_of(output: Path) -> dict[str, torch.Tensor]:
    return torch.load(output / "model_final.pth", weights_only=True)["model"]


@pytest.fixture(scope="module")
def two_processes(run, datasets_root, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("two_processes")
    options = "--num-gpus", 2, "MODEL.WEIGHTS", run / "model_final.pth", *ALL_SAMPLES
    result = train(datasets_root, output, *options)
    assert result.returncode == 0, result.stderr[-3000:]
    assert "World size: 2" in result.stdout
    return output


def test_two_processes_learn_what_one_does(run, two_processes, datasets_root, tmp_path):
    options = "MODEL.WEIGHTS", run / "model_final.pth", *ALL_SAMPLES
    result = train(datasets_root, tmp_path, *options)
    assert result.returncode == 0, result.stderr[-3000:]
    # The sums over images are taken in another order; three steps add the errors up.
    assert losses(two_processes) == pytest.approx(losses(tmp_path), rel=1e-5)
    start, one, two = weights_of(run), weights_of(tmp_path), weights_of(two_processes)
    moved = [name for name in one if not torch.equal(one[name], start[name])]
    assert len(moved) > 100
    for name in moved:
        step = (one[name] - start[name]).abs().max().item()
        torch.testing.assert_close(two[name], one[name], rtol=1e-5, atol=1e-3 * step, msg=name)


def train_compiled(output: Path, weights: Path) -> None:
    """In each of the processes of a job; the graphs are run as they are, not made code of."""
    torch.set_num_threads(1)
    torch.nn.Module.compile = partialmethod(torch.nn.Module.compile, backend="eager")
    opts = ["OUTPUT_DIR", output, "MODEL.WEIGHTS", weights, "MODEL.BACKBONE.COMPILE", True]
    opts = [*map(str, opts), *OPTIONS, *ALL_SAMPLES]
    main(Namespace(config_file=str(CONFIG), opts=opts, resume=False, eval_only=False), Trainer)
    graphs = torch._dynamo.utils.counters
    assert graphs["stats"]["unique_graphs"] >= 1 and not graphs["graph_break"]


def test_a_compiled_backbone_learns_the_same_in_two_processes(
    run, two_processes, datasets_root, tmp_path, monkeypatch
):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(datasets_root))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    launch_functions(train_compiled, 2, dist_url="auto", args=(tmp_path, run / "model_final.pth"))
    start, expected, found = weights_of(run), weights_of(two_processes), weights_of(tmp_path)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        step = (tensor - start[name]).abs().max().item()
        # As with one process and two: sums in another order, in three steps.
        torch.testing.assert_close(found[name], tensor, rtol=1e-5, atol=1e-3 * step, msg=name)


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@pytest.mark.parametrize("launcher", ["detectron2", "torchrun"])
def test_two_machines_train_as_one_with_two_processes(
    launcher, run, two_processes, datasets_root, tmp_path
):
    options = "MODEL.WEIGHTS", run / "model_final.pth", *ALL_SAMPLES
    port, jobs = free_port(), []
    for rank in range(2):
        if launcher == "torchrun":
            python = (
                "-m torch.distributed.run --nnodes 2 --nproc-per-node 1 --master-addr 127.0.0.1 "
                f"--master-port {port} --node-rank {rank}"
            ).split()
            machines = []
        else:
            python = []
            machines = f"--num-machines 2 --machine-rank {rank} --dist-url tcp://127.0.0.1:{port}"
            machines = machines.split()
        args = *machines, *options
        jobs.append(start_training(datasets_root, tmp_path / str(rank), *args, python=python))
    for result in map(finish, jobs):
        assert result.returncode == 0, result.stderr[-3000:]
    assert losses(tmp_path / "0") == losses(two_processes)
    assert not (tmp_path / "1" / "model_final.pth").exists()


def test_torchrun_and_num_gpus_exclude_each_other(datasets_root, tmp_path):
    python = "-m torch.distributed.run --standalone --nproc-per-node 1".split()
    job = start_training(datasets_root, tmp_path, "--num-gpus", 2, python=python)
    errors = finish(job).stderr
    assert job.returncode != 0
    assert "--num-gpus, --num-machines: expected none under torchrun" in errors


def test_jobs_on_one_machine_have_ports_of_their_own(monkeypatch):
    """detectron2's default is one port for every job of a user."""
    taken = []
    monkeypatch.setattr("sys.argv", ["train_net.py"])
    # The package's attribute of that name is the function.
    module = sys.modules["dk_detectron.engine.command_line"]
    monkeypatch.setattr(module, "launch", lambda _, args: taken.append(args))
    command_line(Trainer, "")
    assert taken[0].dist_url == "auto"
    taken[0].num_machines = 2
    with pytest.raises(ValueError, match="--dist-url: expected the address of the first of 2"):
        launch(print, taken[0])


def test_a_killed_process_stops_the_job_and_resume_goes_on_exactly(datasets_root, tmp_path):
    options = (
        "--num-gpus", 2, "SOLVER.MAX_ITER", 10, "SOLVER.CHECKPOINT_PERIOD", 2, "DATASETS.TEST", "()"
    )  # fmt: skip
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    result = train(datasets_root, whole, *options)
    assert result.returncode == 0, result.stderr[-3000:]

    job = start_training(datasets_root, killed, *options)
    while not (killed / "last_checkpoint").exists():
        assert job.poll() is None, finish(job).stderr[-3000:]
        time.sleep(0.05)
    children = Path(f"/proc/{job.pid}/task/{job.pid}/children").read_text().split()
    workers = [p for p in children if "spawn_main" in Path(f"/proc/{p}/cmdline").read_text()]
    os.kill(int(workers[1]), signal.SIGKILL)
    errors = finish(job).stderr
    assert job.returncode != 0
    assert "process 1 terminated with signal SIGKILL" in errors
    assert "the same command with --resume goes on from the last checkpoint" in errors

    result = train(datasets_root, killed, "--resume", *options)
    assert result.returncode == 0, result.stderr[-3000:]
    assert "Starting training from iteration" in result.stdout
    resumed = weights_of(killed)
    for name, tensor in weights_of(whole).items():
        assert torch.equal(tensor, resumed[name]), name


def test_keys_of_detectron2_work(datasets_root, tmp_path):
    """Those that the other tests leave off."""
    result = train(
        datasets_root, tmp_path, "SOLVER.MAX_ITER", 3,
        "CUDNN_BENCHMARK", True, "VIS_PERIOD", 2, "TEST.PRECISE_BN.ENABLED", True,
        "TEST.PRECISE_BN.NUM_ITER", 2, "TEST.EVAL_PERIOD", 2, "MODEL.MOBILENETV2.NORM", "BN",
        "MODEL.BACKBONE.FREEZE_AT", 0,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-3000:]
    assert "Running precise-BN for 2 iterations" in result.stdout + result.stderr
    (events,) = tmp_path.glob("events.out.tfevents.*")
    for tag in b"Left: GT bounding boxes", b"loss_cls":  # pictures of proposals, and scalars
        assert tag in events.read_bytes()
    assert {line for line in losses(tmp_path)} == {2}


def test_results_become_pictures(run, datasets_root):
    args = "--config-file", run / "config.yaml", "--count", 3, "--threshold", 0.0
    result = run_tool("visualize_results.py", datasets_root, *args)
    assert result.returncode == 0, result.stderr[-3000:]
    pictures = sorted((run / "pictures").glob("*.png"))
    assert len(pictures) == 3
    # Ground truth and detections side by side, 480 pixels high, and neither blank.
    picture = cv2.imread(str(pictures[0]))
    assert picture.shape[0] == 480 and picture.shape[1] == 2 * 720 + 8
    assert picture[:, :720].std() > 10 and picture[:, 728:].std() > 10
    assert "| AP50" in result.stdout.split("bbox, from")[1]


def test_offset_generators_learn_slowly_and_all_but_resting_taps_decays():
    cfg = load_config(ROOT / "configs/COCO-Detection/faster_rcnn_MNV2_FPN_dcn_dk_l3_1x.yaml")
    for bias_factor in 1.0, 2.0:
        cfg.SOLVER.BIAS_LR_FACTOR = bias_factor
        model = build_model(cfg)
        optimizer = Trainer.build_optimizer(cfg, model)
        rates = {id(p): g["lr"] for g in optimizer.param_groups for p in g["params"]}
        decays = {id(p): g["weight_decay"] for g in optimizer.param_groups for p in g["params"]}
        generators = 0
        for name, parameter in model.named_parameters():
            if not parameter.requires_grad:
                continue
            factor = bias_factor if name.endswith(".bias") else 1.0
            if "offset_generator" in name:
                factor *= 0.1
                generators += 1
            assert rates[id(parameter)] == pytest.approx(0.02 * factor), name
            resting = name.endswith("offset_generator.bias")
            assert decays[id(parameter)] == (0 if resting else 4e-5), name
        # res2 is frozen: 14 deformable kernels with data offsets, two tensors a generator.
        assert generators == 14 * 2 * 2


@pytest.mark.parametrize("name", ["SGD", "AdamW"])
def test_optimizer_takes_its_settings(name):
    cfg = load_config(CONFIG)
    cfg.SOLVER.OPTIMIZER = name
    cfg.SOLVER.BASE_LR = 0.003
    optimizer = Trainer.build_optimizer(cfg, build_model(cfg))
    assert name in type(optimizer).__name__
    assert {g["lr"] for g in optimizer.param_groups} == {0.003, 0.003 * cfg.SOLVER.OFFSET_LR_FACTOR}
    assert {g["weight_decay"] for g in optimizer.param_groups} == {4e-5, 0}
    assert optimizer.defaults.get("momentum") == (0.9 if name == "SGD" else None)


@pytest.mark.parametrize("processes", [1, 4, 16])
def test_batch_rate_and_schedule_scale_with_the_processes(processes):
    """Goyal et al.'s linear rule, from the 8 GPUs that the paper's schedule is for."""
    cfg = load_config(CONFIGS / "COCO-Detection" / "faster_rcnn_MNV2_FPN_dk_l3_1x.yaml")
    cfg.freeze()
    solver, share = Trainer.auto_scale_workers(cfg, processes).SOLVER, processes / 8
    assert solver.IMS_PER_BATCH == 16 * share
    assert solver.BASE_LR == pytest.approx(0.02 * share)
    assert solver.MAX_ITER == 90000 / share
    assert solver.STEPS == (60000 / share, 80000 / share)
    assert solver.WARMUP_ITERS == 1000 / share
    assert Trainer.auto_scale_workers(cfg, 8).SOLVER == cfg.SOLVER


def test_no_length_is_scaled_to_none():
    periods = ["SOLVER.MAX_ITER", 2, "SOLVER.CHECKPOINT_PERIOD", 1, "TEST.EVAL_PERIOD", 3]
    cfg = load_config(CONFIG, [*periods, "SOLVER.REFERENCE_WORLD_SIZE", 1])
    scaled = Trainer.auto_scale_workers(cfg, 8)
    assert scaled.SOLVER.MAX_ITER == scaled.SOLVER.CHECKPOINT_PERIOD == scaled.TEST.EVAL_PERIOD == 1
    cfg.TEST.EVAL_PERIOD = 0  # only after the last step
    assert Trainer.auto_scale_workers(cfg, 8).TEST.EVAL_PERIOD == 0


@pytest.mark.parametrize(
    ("before", "now", "cure"),
    [
        ((1, 1), (2, 1), ", or set SOLVER.REFERENCE_WORLD_SIZE 2$"),
        ((4, 8), (8, 8), ", or set SOLVER.REFERENCE_WORLD_SIZE 16$"),
        ((8, 8), (4, 8), ", or set SOLVER.REFERENCE_WORLD_SIZE 4$"),
        ((3, 8), (2, 8), r"resume with 3 process\(es\)$"),
        ((1, 1), (2, 2), None),
        ((4, 8), (2, 4), None),
        ((4, 8), (4, 2), None),  # a change that its command states
        ((4, None), (2, 8), None),  # of a checkpoint that does not say it
    ],
)
def test_processes_that_would_scale_a_run_anew_are_refused(before, now, cure, monkeypatch, caplog):
    """Numbers of processes, and SOLVER.REFERENCE_WORLD_SIZE, of a run and of its resumption."""
    monkeypatch.setattr(comm, "get_world_size", lambda: now[0])
    state = dict(zip(("processes", "reference"), before, strict=True))
    if before[1] is None:
        del state["reference"]
    if cure:
        with pytest.raises(ValueError, match=f"--num-gpus: expected {before[0]} proc.*{cure}"):
            check_processes(state, now[1])
    else:
        check_processes(state, now[1])
        assert ("with other samples" in caplog.text) is (before[0] != now[0])


@pytest.mark.parametrize("jitter", [0.0, 0.5])
def test_colours_vary_if_asked(jitter, datasets_root):
    from dk_detectron.data import datasets

    cfg = load_config(CONFIG)
    cfg.DATALOADER.NUM_WORKERS = 0
    cfg.INPUT.COLOR_JITTER = jitter
    replace_registered(datasets, datasets_root)
    try:
        loader = iter(Trainer.build_train_loader(cfg))
    finally:
        replace_registered(datasets, datasets.datasets_root())
    means = defaultdict(list)
    for _ in range(8):
        for record in next(loader):
            means[record["file_name"]].append(record["image"].float().mean().item())
    spread = max(max(values) - min(values) for values in means.values())
    assert spread > 5 if jitter else spread < 1e-3


class Probe(torch.nn.Module):
    """A detector's contract, a loss by name, around one layer; it notes the type of its output."""

    def __init__(self):
        super().__init__()
        self.layer = LocalDeformKernel2d(8, 8, 3, padding=1, groups=8)
        self.dtypes = []

    def forward(self, x):
        y = self.layer(x)
        self.dtypes.append(y.dtype)
        return {"loss": y.float().square().mean()}


def amp_config(enabled=True, precision="float16"):
    cfg = load_config(CONFIG)
    cfg.SOLVER.AMP.ENABLED, cfg.SOLVER.AMP.PRECISION = enabled, precision
    return cfg


def run_loop(cfg, batches):
    """Steps of SGD: the model, its loop and the losses."""
    torch.manual_seed(0)
    model = Probe()
    loop = build_loop(cfg, model, batches, torch.optim.SGD(model.parameters(), lr=0.1))
    with EventStorage() as storage:
        for loop.iter in range(len(batches)):
            loop.run_step()
            storage.step()
        losses = [value for value, _ in storage.history("total_loss").values()]
    return model, loop, losses


@pytest.mark.parametrize("precision", ["float16", "bfloat16"])
def test_mixed_precision_trains_as_float32_does(precision):
    batches = [torch.randn(2, 8, 9, 10) for _ in range(3)]
    model, loop, losses = run_loop(amp_config(precision=precision), batches)
    expected, _, expected_losses = run_loop(amp_config(enabled=False), batches)
    dtype = getattr(torch, precision)
    assert model.dtypes == [dtype] * 3 and expected.dtypes == [torch.float32] * 3
    # Inputs, weights and outputs are each rounded by at most half of eps; the loss has the square.
    tolerance = 2 * 1.5 * torch.finfo(dtype).eps
    assert losses == pytest.approx(expected_losses, rel=tolerance)
    assert losses != expected_losses
    # Only activations are of low precision.
    for (name, actual), target in zip(model.named_parameters(), expected.parameters(), strict=True):
        assert actual.dtype == torch.float32
        scale = target.abs().max().item()
        torch.testing.assert_close(actual, target, rtol=0, atol=tolerance * scale + 1e-3, msg=name)
    assert loop.grad_scaler.is_enabled() == (precision == "float16")


def test_float16_skips_a_step_that_overflows_and_scales_less():
    batches = [torch.randn(2, 8, 9, 10), torch.full((2, 8, 9, 10), 6e4), torch.randn(2, 8, 9, 10)]
    model, loop, _ = run_loop(amp_config(), batches[:1])
    before, scale = deepcopy(model.state_dict()), loop.grad_scaler.get_scale()
    loop._data_loader_iter_obj = iter(batches[1:])
    loop._write_metrics = lambda *args: None  # which stops at an infinite loss
    loop.run_step()
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert loop.grad_scaler.get_scale() == scale / 2
    loop.run_step()
    assert not all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_float16_goes_on_from_bfloat16():
    """Which leaves the state of a scaler that is empty, where one of float32 leaves none."""
    batches = [torch.randn(2, 8, 9, 10)]
    _, before, _ = run_loop(amp_config(precision="bfloat16"), batches)
    _, loop, _ = run_loop(amp_config(), batches)
    scale = loop.grad_scaler.get_scale()
    assert before.state_dict()["grad_scaler"] == {}
    loop.load_state_dict(before.state_dict())
    assert loop.grad_scaler.get_scale() == scale > 1


def test_a_detector_trains_and_resumes_in_bfloat16_on_a_cpu(datasets_root, tmp_path):
    options = "SOLVER.AMP.ENABLED", True, "SOLVER.AMP.PRECISION", "bfloat16"
    result = train(datasets_root, tmp_path, *options, "SOLVER.MAX_ITER", 1)
    assert result.returncode == 0, result.stderr[-3000:]
    result = train(datasets_root, tmp_path, "--resume", *options, "SOLVER.MAX_ITER", 2)
    assert result.returncode == 0, result.stderr[-3000:]
    weights = torch.load(tmp_path / "model_final.pth", weights_only=True)["model"]
    assert all(t.dtype == torch.float32 for t in weights.values() if t.is_floating_point())


SHAPES = ["DATASETS.TRAIN", "('shapes_train',)", "DATASETS.TEST", "('shapes_val',)"]
SCRATCH = ["MODEL.MOBILENETV2.NORM", "BN", "MODEL.BACKBONE.FREEZE_AT", 0]


def arguments(**changes) -> Namespace:
    defaults = {"config_file": str(CONFIG), "opts": [], "eval_only": False, "resume": False}
    return Namespace(**(defaults | changes))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (
            {"config_file": "none.yaml"},
            FileNotFoundError,
            "--config-file: expected a YAML file, .* got 'none",
        ),
        ({"opts": ["MODEL.DEFORM_KERNEL.SCOPE", 4]}, ValueError, "Non-existent key: .*SCOPE"),
        (
            {"opts": ["MODEL.WEIGHTS", "none.pth"]},
            FileNotFoundError,
            "MODEL.WEIGHTS: .* 'none.pth'",
        ),
        ({"opts": ["MODEL.WEIGHTS", "detectron2://a.pkl"]}, ValueError, "got a pickle file"),
        ({"opts": ["SOLVER.OPTIMIZER", "Adam"]}, ValueError, "one of SGD, AdamW, got 'Adam'"),
        (
            {"opts": ["SOLVER.AMP.PRECISION", "fp16"]},
            ValueError,
            "SOLVER.AMP.PRECISION: expected one of float16, bfloat16, got 'fp16'",
        ),
        ({"opts": ["DATASETS.TRAIN", "('cats',)"]}, ValueError, "registered data set.* got 'cats'"),
        ({"opts": ["DATASETS.TEST", "('trees_val',)"]}, FileNotFoundError, "prepare_trees.py"),
        ({"eval_only": True}, ValueError, "MODEL.WEIGHTS: expected a checkpoint to evaluate"),
        (
            {"opts": ["MODEL.MOBILENETV2.NORM", "BNN"]},
            ValueError,
            "MODEL.MOBILENETV2.NORM: expected one of .*'FrozenBN'.* got 'BNN'",
        ),
        ({"opts": ["MODEL.FPN.NORM", "bn"]}, ValueError, "MODEL.FPN.NORM: expected one of .* 'bn'"),
        (
            {"opts": ["SOLVER.REFERENCE_WORLD_SIZE", 8, "SOLVER.IMS_PER_BATCH", 12]},
            ValueError,
            "SOLVER.IMS_PER_BATCH: .* got 12: take 8 or 16, or set SOLVER.REFERENCE_WORLD_SIZE 0",
        ),
        (
            {"opts": ["MODEL.MOBILENETV2.NORM", "FrozenBN"]},
            ValueError,
            "learns nothing from scratch",
        ),
        ({}, ValueError, r"ROI_HEADS.NUM_CLASSES: expected 1, .* in the data \(square\), got 6: "),
        (
            {"config_file": "COCO-Detection/faster_rcnn_MNV2_FPN_dk_l3_1x.yaml",
             "opts": [*SHAPES, *SCRATCH, "MODEL.ROI_HEADS.NUM_CLASSES", 80]},
            ValueError,
            "NUM_CLASSES: expected 1, .* got 80: correct it, or leave it out",
        ),
    ],
)  # fmt: skip
def test_what_cannot_work_is_refused_before_any_work(
    changes, error, message, datasets_root, tmp_path, monkeypatch
):
    from dk_detectron.data import datasets

    monkeypatch.chdir(tmp_path)
    replace_registered(datasets, datasets_root)
    try:
        with pytest.raises(error, match=message):
            setup(arguments(**changes))
    finally:
        replace_registered(datasets, datasets.datasets_root())
    assert list(tmp_path.iterdir()) == []


def replace_registered(datasets, root: Path) -> None:
    from detectron2.data import DatasetCatalog, MetadataCatalog

    for name in datasets.SPLITS:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)
    datasets.register_all(root)


@pytest.mark.parametrize(
    ("config", "key"),
    [("faster_rcnn_MNV2_FPN_dk_l3_1x", "ROI_HEADS"), ("retinanet_MNV2_FPN_dk_l3_1x", "RETINANET")],
)
def test_the_number_of_classes_comes_from_the_data(config, key, datasets_root, tmp_path):
    """A configuration that does not say it, on data by a name that says where they are."""
    shapes = datasets_root / "shapes"
    data = [
        f"('coco:{shapes}/annotations/instances_{split}.json:{shapes}/{split}',)"
        for split in ("train", "val")
    ]
    args = arguments(
        config_file=f"COCO-Detection/{config}.yaml",
        opts=["DATASETS.TRAIN", data[0], "DATASETS.TEST", data[1], *SCRATCH,
              "OUTPUT_DIR", str(tmp_path)],
    )  # fmt: skip
    cfg = setup(args)
    assert cfg.MODEL[key].NUM_CLASSES == 1
    assert f"{key}.NUM_CLASSES: 1, as in the data (square)" in (tmp_path / "log.txt").read_text()
    evaluator = Trainer.build_evaluator(cfg, cfg.DATASETS.TEST[0])
    assert Path(evaluator._output_dir).parent == tmp_path / "inference"


@pytest.fixture
def set_of_dicts(datasets_root):
    """Registered as detectron2's tutorial does it, without what its evaluation needs."""
    DatasetCatalog.register("dicts", lambda: [])
    MetadataCatalog.get("dicts").set(thing_classes=["square"])
    yield "dicts"
    DatasetCatalog.remove("dicts")
    MetadataCatalog.remove("dicts")


class OwnEvaluator(Trainer):
    """With the signature that detectron2's examples have."""

    @classmethod
    def build_evaluator(cls, cfg, dataset_name, output_folder=None):
        return output_folder


@pytest.mark.parametrize("kind", [None, "pascal_voc"])
def test_what_cannot_be_evaluated_is_refused_before_training(kind, set_of_dicts):
    if kind:
        MetadataCatalog.get(set_of_dicts).set(evaluator_type=kind)
    cfg = load_config(CONFIG, ["DATASETS.TEST", (set_of_dicts,)])
    message = f"DATASETS.TEST: expected data sets in COCO .* 'dicts' .* {kind!r}: register it by"
    for trainer in Trainer, type("Another", (Trainer,), {}):
        with pytest.raises(ValueError, match=message):
            trainer.check_datasets(cfg, cfg.DATASETS.TEST)
    assert OwnEvaluator.check_datasets(cfg, cfg.DATASETS.TEST) == []
    cfg.DATASETS.TEST = ()
    assert Trainer.check_datasets(cfg, (set_of_dicts,)) == []


def test_own_evaluators_of_augmented_images_write_into_the_run(tmp_path, monkeypatch):
    cfg = load_config(CONFIG, ["OUTPUT_DIR", str(tmp_path), "DATASETS.TEST", ("coco:a/b:c",)])
    monkeypatch.setattr(OwnEvaluator, "measure", lambda cfg, model, evaluators: evaluators)
    found = OwnEvaluator.measure_with_TTA(cfg, build_model(cfg))
    assert found == [str(tmp_path / "inference_TTA" / "coco_a_b_c")]


@pytest.mark.parametrize("annotations", [[], None])
def test_data_to_evaluate_on_have_objects_or_no_annotations(annotations, datasets_root, tmp_path):
    shapes = datasets_root / "shapes"
    content = json.loads((shapes / "annotations" / "instances_val.json").read_text())
    del content["annotations"]
    if annotations is not None:
        content["annotations"] = annotations
    (tmp_path / "val.json").write_text(json.dumps(content))
    name = f"coco:{tmp_path}/val.json:{shapes}/val"
    cfg = load_config(CONFIG, ["DATASETS.TEST", (name,)])
    if annotations is None:
        assert Trainer.check_datasets(cfg, [name])
    else:
        with pytest.raises(ValueError, match="TEST: expected objects to find in coco:.* among 0 "):
            Trainer.check_datasets(cfg, [name])


@pytest.mark.parametrize("is_there", [False, True])
@pytest.mark.parametrize("mask", [[[9, 9, 20, 9, 20, 20]], {"size": [64, 96], "counts": [0, 6144]}])
def test_polygons_are_cropped_by_a_package(mask, is_there, datasets_root, tmp_path, monkeypatch):
    from dk_detectron.engine import detection

    monkeypatch.setattr(detection, "find_spec", lambda name: is_there)
    shapes = datasets_root / "shapes"
    content = json.loads((shapes / "annotations" / "instances_train.json").read_text())
    for annotation in content["annotations"]:
        annotation["segmentation"] = mask
    (tmp_path / "train.json").write_text(json.dumps(content))
    name = f"coco:{tmp_path}/train.json:{shapes}/train"
    cfg = load_config(CONFIG, ["DATASETS.TRAIN", (name,), "MODEL.MASK_ON", True])
    assert Trainer.check_datasets(cfg, [name])
    cfg.INPUT.CROP.ENABLED = True
    if isinstance(mask, list) and not is_there:
        with pytest.raises(ValueError, match="CROP.ENABLED: expected the package shapely, by whic"):
            Trainer.check_datasets(cfg, [name])
    else:
        assert Trainer.check_datasets(cfg, [name])


def test_keypoints_are_those_of_the_network(datasets_root, tmp_path):
    """detectron2 pairs those of the data with others, or fails after all training."""
    shapes = datasets_root / "shapes"
    content = json.loads((shapes / "annotations" / "instances_val.json").read_text())

    def check(numbers, split="TRAIN", **metadata):
        for annotation, number in zip(content["annotations"], numbers, strict=True):
            annotation["keypoints"] = [9, 9, 2] * number
        file = tmp_path / f"{len(list(tmp_path.iterdir()))}.json"
        file.write_text(json.dumps(content))
        name = f"coco:{file}:{shapes}/val"
        opts = "MODEL.KEYPOINT_ON", True, "MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS", 2
        cfg = load_config(CONFIG, [*opts, "DATASETS.TRAIN", (), "DATASETS.TEST", ()])
        cfg.DATASETS[split] = (name,)
        MetadataCatalog.get(name).set(**metadata)
        assert Trainer.check_datasets(cfg, [name])

    with pytest.raises(ValueError, match="keypoints for every object, coco:.* has 1 annotations w"):
        check([2, 2, 2, 0, 2, 2], split="TEST")
    for numbers, got in ([3] * 6, "3"), ([2, 3, 2, 2, 2, 2], "2 or 3"):
        with pytest.raises(ValueError, match=f"NUM_KEYPOINTS: .* each object has .*, {got}, got 2"):
            check(numbers)
    check([2] * 6, split="TEST")
    names = {"keypoint_names": ["left", "right"]}
    for metadata in {}, names, {"keypoint_names": ["left"], "keypoint_flip_map": []}:
        with pytest.raises(ValueError, match="expected the names of 2 keypoints, and which chang"):
            check([2] * 6, **metadata)
    check([2] * 6, **names, keypoint_flip_map=[("left", "right")])


def test_resume_tells_what_has_changed(run, datasets_root, tmp_path):
    """Another rate and length take over; a finished run stays as it is; the optimizer must fit."""
    output = tmp_path / "run"
    shutil.copytree(run, output)
    finished = train(datasets_root, output, "--resume", "SOLVER.MAX_ITER", 4)
    assert finished.returncode == 0, finished.stderr[-2000:]
    log = finished.stdout + finished.stderr
    assert "has finished, after 4 of 4 iterations: raise SOLVER.MAX_ITER" in log
    assert losses(output) == losses(run)
    before = {p.name: p.read_bytes() for p in output.glob("*.pth")}
    assert before == {p.name: p.read_bytes() for p in run.glob("*.pth")}

    other = train(datasets_root, output, "--resume", "SOLVER.OPTIMIZER", "SGD")
    assert "SOLVER.OPTIMIZER: expected 'AdamW', that of the run to resume" in other.stderr

    more = "SOLVER.MAX_ITER", 5, "SOLVER.WEIGHT_DECAY", 0.001, "SOLVER.AMP.ENABLED", True
    result = train(datasets_root, output, "--resume", *more)
    assert result.returncode == 0, result.stderr[-2000:]
    log = result.stdout + result.stderr
    assert "SOLVER.MAX_ITER: 4 -> 5" in log and "-> 0.001" in log
    assert "The run to resume did not scale gradients" in log
    assert (output / "model_0000004.pth").exists() or 4 in losses(output)


def test_eval_only_wants_trained_heads(datasets_root, tmp_path):
    torch.save(torchvision.models.mobilenet_v2().state_dict(), tmp_path / "backbone.pth")
    result = train(
        datasets_root, tmp_path / "run", "--eval-only", "MODEL.WEIGHTS", tmp_path / "backbone.pth"
    )
    assert result.returncode and "expected trained weights of the whole network" in result.stderr
    assert not (tmp_path / "run" / "evaluation.json").exists()


@pytest.mark.parametrize(
    "words",
    [
        "--resume --num-gpus 2 --config-file c SEED 3 OUTPUT_DIR -1",
        "--config-file c SEED 3 --resume OUTPUT_DIR -1 --num-gpus 2",
        "SEED 3 OUTPUT_DIR -1 --config-file c --num-gpus 2 --resume",
    ],
)
def test_flags_and_pairs_in_any_order(words):
    args = parse_flags_anywhere(default_argument_parser(), words.split())
    assert (args.resume, args.num_gpus, args.config_file, args.eval_only) == (True, 2, "c", False)
    assert args.opts == ["SEED", "3", "OUTPUT_DIR", "-1"]


def test_an_unknown_flag_behind_the_pairs_is_an_error(capsys):
    with pytest.raises(SystemExit):
        parse_flags_anywhere(default_argument_parser(), ["SEED", "3", "--resum", "--nothing"])
    assert "--nothing" in capsys.readouterr().err


def test_the_help_is_of_this_trainer(monkeypatch, capsys):
    """detectron2's own speaks of a LazyConfig's path.key=value, which is refused here."""
    monkeypatch.setattr(sys, "argv", ["dk-train", "--help"])
    with pytest.raises(SystemExit):
        command_line(Trainer, "")
    told = " ".join(capsys.readouterr().out.split())
    assert "LazyConfig" not in told and "opts KEY VALUE pairs" in told
    assert "--config-file FILE a YAML file, or the name" in told
    assert "--resume go on from the last checkpoint in OUTPUT_DIR" in told
