"""tools/gpu_check.sh without a GPU: programs that only say what they were asked stand in."""

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# Fails where $BROKEN is a part of its command.
STAND_IN = """#!/bin/sh
echo "$(basename $0) $*"
case "$0 $*" in *"$BROKEN"*) exit 3;; esac
"""


@pytest.fixture
def check(tmp_path):
    programs = tmp_path / "programs"
    programs.mkdir()

    def run(broken="nothing", sanitizer=True):
        for name in ["python", "nvcc", "nvidia-smi"] + ["compute-sanitizer"] * sanitizer:
            (programs / name).write_text(STAND_IN)
            (programs / name).chmod(0o755)
        environment = {
            "PATH": f"{programs}:/usr/bin:/bin",
            "PYTHON": str(programs / "python"),
            "BROKEN": broken,
            "HOME": os.environ["HOME"],
        }
        result = subprocess.run(
            ["bash", ROOT / "tools" / "gpu_check.sh", "out"],
            env=environment, cwd=tmp_path, capture_output=True, text=True,
        )  # fmt: skip
        summary = (tmp_path / "out" / "summary.md").read_text()
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
    result, _, rows = check(broken="--tool racecheck")
    assert result.returncode == 1 and "failed after" in result.stdout
    # All of a row but its seconds.
    failed = [row.rpartition(" | ")[0] for row in rows if "| passed |" not in row]
    assert failed == [
        f"| no race in shared memory, {kind} (compute-sanitizer) | **failed**: {name}.log"
        for kind, name in (("depthwise", "racecheck"), ("dense", "racecheck_dense"))
    ]
    assert len(rows) == 16


def test_what_is_left_out_is_said(check):
    result, _, rows = check(sanitizer=False)
    assert result.returncode == 0
    assert sum("| not installed |" in row for row in rows) == 5
