"""tools/reproduce_tables.py: plans for every row, real runs of two, and the tables."""

import csv
import io
import json
import re
import runpy
import subprocess
import sys
from contextlib import redirect_stdout
from pathlib import Path
from unittest.mock import patch

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from detectron2.data import MetadataCatalog
from detectron2.modeling import build_model
from scipy.stats import rankdata
from test_engine import OPTIONS, datasets_root, replace_registered  # noqa: F401  (a fixture)

from dk_detectron.data import datasets
from dk_detectron.evaluation import reproduction
from dk_detectron.evaluation.reproduction import (
    FIELD,
    Settings,
    execute,
    family,
    plan,
    row_name,
    select_rows,
)
from dk_detectron.evaluation.reproduction_tables import collect, render
from dk_detectron.model_zoo import CONFIGS, load_config, paper_rows
from dk_detectron.weights import Checkpointer

ROOT = Path(__file__).parent.parent
ROWS = "MNV2", "MNV2_dk_l3"
TINY = [*OPTIONS, "SOLVER.MAX_ITER", "6", "SOLVER.CHECKPOINT_PERIOD", "2"]


def run_tool(*args) -> tuple[str, str]:
    """The error, empty if there is none, and the output."""
    tool = runpy.run_path(str(ROOT / "tools" / "reproduce_tables.py"))
    output = io.StringIO()
    with patch.object(sys, "argv", ["tool", *map(str, args)]), redirect_stdout(output):
        try:
            tool["main"]()
        except SystemExit as error:
            return str(error.code), output.getvalue()
    return "", output.getvalue()


@pytest.fixture(scope="module")
def environment(datasets_root):  # noqa: F811
    """The small data set in place of the shapes, here and in the runs; val serves as test too."""
    annotations = datasets_root / "shapes" / "annotations"
    content = json.loads((annotations / "instances_val.json").read_text())
    del content["annotations"]
    (annotations / "image_info_test.json").write_text(json.dumps(content))
    (datasets_root / "shapes" / "test").symlink_to("val")
    replace_registered(datasets, datasets_root)
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("DETECTRON2_DATASETS", str(datasets_root))
        patched.setenv("PYTHONPATH", str(ROOT))
        patched.setenv("OMP_NUM_THREADS", "1")
        yield
    replace_registered(datasets, datasets.datasets_root())


@pytest.fixture(scope="module")
def finished(environment, tmp_path_factory):
    """The tool's arguments, and where its two runs are."""
    output = tmp_path_factory.mktemp("tables")
    arguments = ["--scale", "shapes", "--rows", *ROWS, "--seeds", 0, "--output", output]
    error, printed = run_tool(*arguments, "--opts", *TINY)
    assert not error, error + printed
    return arguments, output, printed


def test_two_rows_are_trained_and_tabulated(finished):
    _, output, printed = finished
    assert "[1/2] MNV2, seed 0" in printed and "[2/2] MNV2_dk_l3, seed 0" in printed
    for name in ROWS:
        result = json.loads((output / name / "seed_0" / "result.json").read_text())
        metrics = json.loads((output / name / "seed_0" / "evaluation.json").read_text())["bbox"]
        assert (result["row"], result["seed"], result["dataset"]) == (name, 0, "shapes_val")
        assert result["AP"] == metrics["AP"] and result["APl"] is None
        with open(output / name / "seed_0" / "fields_seed_0.csv", newline="") as file:
            fields = [*csv.DictReader(file)]
        ranks = [rankdata([float(row[key]) for row in fields]) for key in FIELD.split(" ~ ")]
        assert result["field_correlation"] == pytest.approx(100 * np.corrcoef(ranks)[0, 1])
        assert result["train_seconds"] > 0 and result["inference_seconds"] > 0
        weights = torch.load(output / name / "seed_0" / "model_final.pth", weights_only=True)
        fixed = re.compile("running_|num_batches_tracked|pixel_|cell_anchors")
        learnt = {k: v for k, v in weights["model"].items() if not fixed.search(k)}
        assert result["parameters"] == sum(v.numel() for v in learnt.values())
        assert ("offset_generator" in " ".join(learnt)) == (name == "MNV2_dk_l3")
    assert printed.endswith((output / "tables.md").read_text() + "\n")
    assert plt.imread(output / "gains.png").std() > 0.05  # something is drawn
    lines = list(csv.DictReader(io.StringIO((output / "tables.csv").read_text())))
    assert [(line["row"], line["runs"]) for line in lines] == [(name, "1") for name in ROWS]
    assert lines[1]["AP_paper"] == "32.9" and lines[1]["APl"] == ""


def test_what_is_finished_is_not_repeated(finished):
    arguments, output, printed = finished
    with patch.object(subprocess, "run", side_effect=AssertionError("a command ran")):
        error, again = run_tool(*arguments, "--opts", *TINY)
        assert not error and again == printed
        error, tables = run_tool(*arguments, "--collect-only")
        assert not error and tables == (output / "tables.md").read_text() + "\n"
        assert run_tool(*arguments, "--dry-run", "--opts", *TINY) == ("", "")


def test_other_settings_do_not_mix(finished):
    arguments, output, _ = finished
    error, _ = run_tool(*arguments, "--opts", *TINY, "SOLVER.MAX_ITER", 7)
    assert error.startswith(f"error: {output}: expected runs with") and "another --output" in error


def test_tables_are_of_the_scale_of_their_runs(tmp_path):
    """AP on shapes stands beside no AP of the paper's."""
    settings = {"scale": "shapes", "num_gpus": 1, "weights": "", "opts": []}
    (tmp_path / "settings.json").write_text(json.dumps(settings))
    arguments = "--collect-only", "--output", tmp_path
    error, printed = run_tool(*arguments)
    assert error == f"error: --scale: expected shapes, as of the runs in {tmp_path}, got coco"
    assert not printed and not (tmp_path / "tables.md").exists()
    assert "over rigid" in run_tool(*arguments, "--scale", "shapes")[1]


def test_an_interrupted_run_goes_on_to_the_submission(finished, monkeypatch):
    _, output, _ = finished
    monkeypatch.setattr(reproduction, "TEST_DEV", "shapes_test")
    (run,) = plan(
        select_rows([3], ["MNV2"]), Settings("shapes", opts=TINY), output, [0], test_dev=True
    )
    # As a run leaves it that is killed after its fourth step.
    left = "result.json", "evaluation.json", "model_final.pth", "model_0000005.pth"
    for name in *left, "fields_seed_0.csv":
        (run.folder / name).unlink()
    (run.folder / "last_checkpoint").write_text("model_0000003.pth")
    assert len(run.commands) == 4
    execute(run)
    assert "Starting training from iteration 4" in (run.folder / "reproduce.log").read_text()
    assert (run.folder / "result.json").exists() and run.archive.exists()
    assert run.archive.name == "detections_test-dev2017_MNV2_seed0_results.zip"
    assert run.commands == []


def test_failures_are_told_and_the_others_still_run(environment, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(
        reproduction, "_command", lambda _: [sys.executable, "-c", "exit('no memory')"]
    )
    output = tmp_path / "tables"
    error, printed = run_tool(
        "--scale", "shapes", "--rows", *ROWS, "--seeds", 3, "--output", output
    )
    assert error == "error: 2 of 2 runs failed; the same command tries them again"
    told = capsys.readouterr().err
    assert f"error: MNV2, seed 3: exit status 1; the end of {output}/MNV2/seed_3/rep" in told
    assert told.count("no memory") == 2
    assert "| MNV2_dk_l3 | 0 " in printed


def test_every_row_has_a_plan_on_coco():
    rows = select_rows([3, 4])
    assert len(rows) == 18 and list(select_rows([4])) == [*rows][10:]
    runs = plan(rows, Settings("coco", 8, "imagenet/{row}.pth"), Path("out"), [42], test_dev=True)
    for run, row in zip(runs, paper_rows(3, 4), strict=True):
        assert (CONFIGS / "ImageNet" / f"{run.row}.yaml").is_file()
        assert run.config.MODEL.WEIGHTS == f"imagenet/{run.row}.pth"
        assert run.config.DATASETS.TRAIN == ("coco_2017_train",) and run.config.SEED == 42
        train, evaluate, submit = run.commands
        assert train[4] == str(CONFIGS / row["config"]) and train[5:8] == [
            "--num-gpus", "8", "--resume",
        ]  # fmt: skip
        results = f"out/{run.row}/seed_42/test-dev/inference/coco_2017_test-dev"
        assert "--eval-only" in evaluate and "('coco_2017_test-dev',)" in evaluate
        assert evaluate[-1] == f"out/{run.row}/seed_42/test-dev"
        assert submit[3] == f"{results}/coco_instances_results.json"
        assert submit[4] == MetadataCatalog.get("coco_2017_test-dev").json_file


def test_the_pretrained_scale_fine_tunes_the_rows_of_mobilenet():
    rows = select_rows([3, 4], ["MNV2", "MNV2_dcn_dk_l3", "R_50_DW"])
    mobilenets = {name: row for name, row in rows.items() if name != "R_50_DW"}
    settings = Settings("pretrained", weights="mobilenet.pth")
    runs = plan(mobilenets, settings, Path("out"), [0])
    for run in runs:
        assert run.config.MODEL.WEIGHTS == "mobilenet.pth"
        assert run.config.MODEL.MOBILENETV2.NORM == "FrozenBN"
        assert run.config.DATASETS.TRAIN == ("trees_train",)
        assert run.config.SOLVER.CLIP_OFFSET_GRADIENTS > 0
    kernels = [run.config.MODEL.DEFORM_KERNEL for run in runs]
    assert [k.CONV_3X3 for k in kernels] == ["rigid", "local"]
    assert [any(k.DATA_OFFSET_ON_PER_STAGE) for k in kernels] == [False, True]
    with pytest.raises(ValueError, match="expected rows of MobileNet-V2 .* got R_50_DW"):
        plan(rows, settings, Path("out"), [0])


def test_every_row_has_a_plan_on_shapes():
    rows = select_rows([3, 4])
    runs = plan(rows, Settings("shapes"), Path("out"), [0, 1])
    assert len({run.folder for run in runs}) == 36
    for run in runs[:18]:
        row = load_config(CONFIGS / rows[run.row]["config"])
        assert run.config.MODEL.DEFORM_KERNEL == row.MODEL.DEFORM_KERNEL
        assert run.config.MODEL.BACKBONE.NAME == row.MODEL.BACKBONE.NAME
        assert run.config.SOLVER.OFFSET_LR_FACTOR == row.SOLVER.OFFSET_LR_FACTOR
        assert (run.config.MODEL.MOBILENETV2.NORM, run.config.MODEL.ROI_HEADS.NUM_CLASSES) == (
            "BN", 6,
        )  # fmt: skip
        assert family(run.row) != "R_50_DW" or run.config.MODEL.RESNETS.NORM == "BN"


def test_networks_of_a_seed_start_as_one_function(tmp_path):
    """Also with pictures of another size than any in training, and unlike those of other seeds."""
    rows = select_rows([3, 4], ["MNV2", "MNV2_dk_g3", "MNV2_dk_l3", "MNV2_dcn_dk_l3"])
    runs = plan(rows, Settings("shapes"), tmp_path, [0, 1])
    image = torch.randn(1, 3, 64, 96, generator=torch.Generator().manual_seed(0))
    outputs = {}
    for run in runs:
        reproduction.write_start(run)
        model = build_model(run.config).eval()
        Checkpointer(model).load(run.config.MODEL.WEIGHTS)
        with torch.no_grad():
            outputs[run.row, run.seed] = model.backbone(image)["p2"]
    assert len([*tmp_path.glob("starts/*")]) == 2
    for (_, seed), output in outputs.items():
        torch.testing.assert_close(output, outputs["MNV2", seed], rtol=1e-4, atol=1e-6)
    assert (outputs["MNV2", 0] - outputs["MNV2", 1]).abs().max() > 0.01


def test_weights_that_the_options_name_are_not_made_up(tmp_path, monkeypatch):
    path = tmp_path / "typo.pth"
    settings = Settings("shapes", opts=["MODEL.WEIGHTS", str(path)])
    (run,) = plan(select_rows([3, 4], ["MNV2"]), settings, tmp_path, [0])
    assert run.config.MODEL.WEIGHTS == str(path)
    monkeypatch.setattr(reproduction.Trainer, "check_datasets", lambda *_: None)
    with pytest.raises(FileNotFoundError, match="typo.pth"):
        reproduction.check([run])
    reproduction.write_start(run)
    assert not path.exists()


def test_a_torn_line_of_metrics_costs_itself_alone(tmp_path):
    whole = '{"iteration": 19, "time": 0.1}', '{"iteration": 59, "time": 0.3}'
    (tmp_path / "metrics.json").write_text('\n{"iteration": 39, "ti\n'.join(whole))
    assert reproduction._train_seconds(tmp_path) == pytest.approx(0.2)


def write_result(output: Path, row: str, seed: int, ap: float, **changes) -> None:
    folder = output / row / f"seed_{seed}"
    folder.mkdir(parents=True)
    result = {
        "row": row, "seed": seed, "AP": ap, "AP50": ap + 20, "APs": ap - 10, "APm": ap, "APl": None,
        "field_correlation": ap / 2,
        "parameters": 5_250_000, "train_seconds": 0.25, "inference_seconds": None,
    }  # fmt: skip
    (folder / "result.json").write_text(json.dumps(result | changes))


def test_tables_by_hand(tmp_path):
    for seed, (rigid, ours) in enumerate([(30, 34), (31, 33), (32, 38)]):
        write_result(tmp_path, "MNV2", seed, rigid)
        write_result(tmp_path, "MNV2_dk_l3", seed, ours)
    write_result(tmp_path, "MNV2_dcn", 0, 36)
    old = tmp_path / "MNV2_dcn" / "seed_0" / "result.json"  # of version 0.1
    old.write_text(
        json.dumps({k: v for k, v in json.loads(old.read_text()).items() if k != "AP50"})
    )
    rows = select_rows([3, 4], ["MNV2_dk_l3", "MNV2_dcn", "R_50_DW"])
    r50, dk, dcn = collect(rows, tmp_path)
    assert dk["runs"] == 3 and dk["AP"] == 35 and dk["AP_std"] == pytest.approx(7**0.5)
    assert dk["AP_paper"] == 32.9 and dk["AP_difference"] == pytest.approx(2.1)
    # Of the differences 4, 2 and 6: their standard error times Student's t of two degrees.
    assert dk["AP_gain"] == 4 and dk["AP_gain_paper"] == pytest.approx(32.9 - 31.3)
    assert dk["AP_gain_high"] == pytest.approx(4 + 4.302653 * 2 / 3**0.5)
    assert dcn["AP_std"] is None and dcn["AP_gain"] == 6 and dcn["AP_gain_low"] is None
    assert (r50["runs"], r50["AP"], r50["AP_gain"], r50["AP_paper"]) == (0, None, None, 36.6)

    def cells(text, row):
        line = next(x for x in text.splitlines() if x.startswith(f"| {row} "))
        return [cell.strip() for cell in line.strip("|").split("|")]

    coco = render([r50, dk, dcn], "coco")
    assert coco.index("Table 3") < coco.index("| MNV2_dk_l3") < coco.index("Table 4")
    assert cells(coco, "MNV2_dk_l3") == [
        "MNV2_dk_l3", "3", "35.0 ± 2.6", "32.9", "+2.1", "55.0 ± 2.6", "25.0 ± 2.6", "19.5", "+5.5",
        "35.0 ± 2.6", "36.0", "-1.0", "–", "42.5", "–", "5.2", "0.250", "–",
    ]  # fmt: skip
    shapes = render([r50, dk, dcn], "shapes")
    assert cells(shapes, "MNV2_dcn")[:6] == ["MNV2_dcn", "1", "36.0", "+6.0", "+3.1", "–"]
    fields = shapes[shapes.index("Receptive fields") :]
    assert cells(fields, "MNV2_dk_l3") == ["MNV2_dk_l3", "3", "17.5 ± 1.3", "+2.0 (-0.5 to +4.5)"]
    assert cells(shapes, "MNV2_dk_l3")[2:5] == ["35.0 ± 2.6", "+4.0 (-1.0 to +9.0)", "+1.6"]
    assert cells(shapes, "R_50_DW")[:5] == ["R_50_DW", "0", "–", "–", "+0.0"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rows", "cats"], "--rows: expected some of R_50_DW, .*, got cats"),
        (["--table", "3", "--rows", "MNV2_dcn"], "--rows: expected some of .*, got MNV2_dcn"),
        (["--weights", "no/{row}.pth"], "(json_file|image_root) at|no/R_50_DW.pth"),
        (["--scale", "shapes", "--opts", "SOLVER.STEP", "3"], "Non-existent key: SOLVER.STEP"),
        (
            ["--scale", "shapes", "--opts", "DATASETS.TEST", "('shapes_val', 'trees_val')"],
            "expected one data set, got .*trees_val",
        ),
    ],
)
def test_what_cannot_work_is_refused_before_any_work(arguments, message, environment, tmp_path):
    output = tmp_path / "tables"
    error, _ = run_tool("--output", output, *arguments)
    assert error.startswith("error: ") and re.search(message, error)
    assert not output.exists()


def test_names_are_those_of_the_classifiers():
    assert [row_name(row) for row in paper_rows(3)][:3] == [
        "R_50_DW", "R_50_DW_dk_g3", "R_50_DW_dk_g1_g3",
    ]  # fmt: skip


def test_the_time_of_an_image_is_that_of_the_last_evaluation(tmp_path):
    line = "Total inference pure compute time: 0:00:01 ({} s / iter per device, on 1 devices)\n"
    log = tmp_path / "log.txt"
    log.write_text(line.format(0.9) + line.format(0.25))
    assert reproduction._inference_seconds(log) == 0.25


def test_gains_are_over_the_rigid_network_of_the_same_family(tmp_path):
    for name, ap in {"MNV2": 30, "R_50_DW": 36, "R_50_DW_dk_g3": 37}.items():
        write_result(tmp_path, name, 0, ap)
    (line,) = collect(select_rows([3], ["R_50_DW_dk_g3"]), tmp_path)
    assert line["AP_gain"] == 1
