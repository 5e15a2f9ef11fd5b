"""tools/gpu_check.sh without a GPU: programs that only say what they were asked stand in."""

import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
# Fails with $STATUS where $BROKEN is a part of its command.
STAND_IN = """#!/bin/sh
echo "$(basename $0) $*"
case "$0 $*" in *"$BROKEN"*) exit $STATUS;; esac
"""


@pytest.fixture
def check(tmp_path):
    programs = tmp_path / ".venv" / "bin"  # where the script finds its Python
    programs.mkdir(parents=True)
    (tmp_path / "tools").mkdir()
    script = shutil.copy(ROOT / "tools" / "gpu_check.sh", tmp_path / "tools")

    def run(broken="nothing", status=3, sanitizer=True, out="out", **variables):
        for name in ["python", "nvcc", "nvidia-smi"] + ["compute-sanitizer"] * sanitizer:
            (programs / name).write_text(STAND_IN)
            (programs / name).chmod(0o755)
        environment = {
            "PATH": f"{programs}:/usr/bin:/bin",
            "BROKEN": broken,
            "STATUS": str(status),
            "HOME": os.environ["HOME"],
            **variables,
        }
        result = subprocess.run(
            ["bash", script, out],
            env=environment, cwd=tmp_path, capture_output=True, text=True,
        )  # fmt: skip
        file = tmp_path / out / "summary.md"
        summary = file.read_text() if file.exists() else ""
        assert (f"; please send {file}" in result.stdout) == bool(summary)
        rows = [line for line in summary.splitlines() if line.startswith("| ")][1:]
        return result, summary, rows

    return run


def test_all_passes(check):
    result, summary, rows = check()
    assert result.returncode == 0, result.stdout
    assert len(rows) == 16 and all("| passed |" in row for row in rows)
    assert "python tools/benchmark_ops.py --device cuda" in summary  # what it printed
    assert "nvidia-smi --query-gpu=name" in summary
    ours = "--kernel-name kernel_substring=dk4cuda "
    for name, only, what in (
        ("memcheck", "", "short"), ("initcheck", "", "unwritten"),
        ("racecheck", ours, "unwritten"), ("racecheck_dense", ours, "short"),
        ("synccheck", ours, "short"),
    ):  # fmt: skip
        log = (Path(result.stdout.split("please send ")[1]).parent / f"{name}.log").read_text()
        assert f"--tool {name.removesuffix('_dense')} --error-exitcode 9 {only}/" in log
        assert log.rstrip().endswith(f"tools/gpu_check.py {what}")


def test_a_stage_that_fails_does_not_stop_the_others(check):
    result, summary, rows = check(broken="--tool racecheck")
    assert result.returncode == 1 and "failed after" in result.stdout
    # All of a row but its seconds.
    failed = [row.rpartition(" | ")[0] for row in rows if "| passed |" not in row]
    assert failed == [
        f"| no race in shared memory, {kind} (compute-sanitizer) | **failed** (3): {name}.log"
        for kind, name in (("depthwise", "racecheck"), ("dense", "racecheck_dense"))
    ]
    assert len(rows) == 16
    end = "The end of racecheck_dense.log:\n\n```\ncompute-sanitizer --tool racecheck "
    assert summary.count("The end of ") == 2 and end in summary


def test_nothing_runs_without_a_build(check):
    check()  # its logs are no answer to what comes now
    result, summary, rows = check(broken="build_ext")
    assert result.returncode == 1 and "failed after" in result.stdout
    assert "| **failed** (3): build.log |" in rows[0]
    assert len(rows) == 16 and all("| not run: no build | 0 |" in row for row in rows[1:])
    assert "\npython setup.py build_ext --inplace\n" in summary and "benchmark_ops" not in summary


def test_nothing_runs_without_a_gpu(check):
    result, _, _ = check(PYTHON=sys.executable, CUDA_VISIBLE_DEVICES="")
    assert result.returncode == 1 and not result.stdout
    assert result.stderr.startswith(
        f"gpu_check: expected a Python whose torch finds a GPU, {sys.executable} says "
        f'"AssertionError: torch {torch.__version__} finds no GPU": run make setup'
    )


def test_what_is_left_out_is_said(check):
    result, _, rows = check(sanitizer=False)
    assert result.returncode == 0
    assert sum("| not installed |" in row for row in rows) == 5
    result, _, rows = check(broken="gpu_check.py large", status=77)
    assert result.returncode == 0 and sum("| passed |" in row for row in rows) == 15
    (row,) = [row for row in rows if "| passed |" not in row]
    assert "| left out: python tools/gpu_check.py large |" in row


def test_a_small_gpu_leaves_out_large_tensors(monkeypatch, capsys):
    gpu = SimpleNamespace(total_memory=24 * 2**30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: gpu)
    monkeypatch.setattr(sys, "argv", ["gpu_check.py", "large"])
    with pytest.raises(SystemExit, match="77"):
        runpy.run_path(str(ROOT / "tools" / "gpu_check.py"), run_name="__main__")
    assert capsys.readouterr().out == "needs a GPU with 60 GB\n"


def test_a_folder_that_cannot_be_made_is_an_error(check, tmp_path):
    (tmp_path / "file").touch()
    result, _, _ = check(out="file/out")
    assert result.returncode == 1 and "mkdir: " in result.stderr
    assert not result.stdout
