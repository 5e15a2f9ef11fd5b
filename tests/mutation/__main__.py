"""python -m mutation [cuda] [cpu] [ops] [--files GLOB ...] [--count N] [--seed N] [--report FILE]

With PYTHONPATH=tests, from the root. Works in a copy of the project, build/mutation/tree; goes on
where it was stopped; prints what share of the faults the tests see, and each that they do not.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from fnmatch import fnmatch
from pathlib import Path

from tqdm import tqdm

from mutation.sites import Fault, draw, faults

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "build" / "mutation"
EQUIVALENT = Path(__file__).with_name("equivalent.json")
PYTEST = f"{sys.executable} -m pytest -x -q -p no:cacheprovider"
OPERATORS = " ".join(
    f"tests/test_ops{name}.py" for name in ("", "_derivatives", "_integration", "_fuzz", "_bounds")
)
# A third of their time, and nearly all that they see.
SLOW = "gradcheck or edges or second or jacobians or opcheck or test_compile or lower"
EMULATED = f"DK_EMULATED_ORDERS='forward reverse' {PYTEST} tests/test_csrc_emulated.py"
# Two thirds of its time.
MANY_THREADS = "tensor_cores or many_blocks or more_columns"


@dataclass(frozen=True)
class Target:
    """Sources, and the commands that judge them: the first that fails has seen the fault.

    Attributes:
        build: prints the path of the library last, which the tests find in $LIBRARY.
    """

    sources: tuple[str, ...]
    build: str
    tests: tuple[str, ...]


TARGETS = {
    "cuda": Target(
        ("csrc/*.h", "csrc/cuda/*.cuh", "csrc/cuda/*.h", "csrc/cuda/deform*.cpp"),
        f"{sys.executable} -m emulation.build",
        (
            f"{EMULATED} -k 'not ({MANY_THREADS})'",
            f"{EMULATED} -k '{MANY_THREADS}'",
            f"{PYTEST} tests/test_ops.py -k emulated",
            f"{PYTEST} tests/test_csrc_ptx.py",
            f"PYTHON={sys.executable} tests/sanitize.sh thread cuda",
        ),
    ),
    "cpu": Target(
        ("csrc/*.h", "csrc/deform_kernel.cpp", "csrc/cpu/*.h", "csrc/cpu/deform*.cpp"),
        # First with the fault in the instruction set that the tests run, as if it were alone there.
        f"{sys.executable} -m extension.build quick {ROOT}",
        (
            f"DK_TEST_EXTENSION=$LIBRARY {PYTEST} {OPERATORS}"
            f" -k 'not emulated and not composed and not ({SLOW})'",
            f"DK_TEST_EXTENSION=$({sys.executable} -m extension.build quick | tail -n 1)"
            f" {PYTEST} {OPERATORS} -k 'not emulated and not composed and ({SLOW} or instruction)'",
            f"PYTHON={sys.executable} tests/sanitize.sh address cpu",
        ),
    ),
    "ops": Target(
        ("dk_detectron/ops/*.py",),
        "true",
        (
            f"{PYTEST} tests/test_layers.py {OPERATORS} -k 'not emulated and not ({SLOW})'",
            f"{PYTEST} {OPERATORS} -k 'not emulated and ({SLOW})'",
            f"{PYTEST} tests/test_layers_compiled.py tests/test_layers_generators.py"
            " tests/test_export.py -k 'one_graph or inductor or smaller_scope or standard_onnx'",
        ),
    ),
}


def copy_project() -> Path:
    """A copy to plant faults in, with what compilers made in it before."""
    tree = FOLDER / "tree"
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, capture_output=True, check=True, text=True,
    )  # fmt: skip
    library = [str(path.relative_to(ROOT)) for path in ROOT.glob("dk_detectron/_C*.so")]
    for name in [*filter(None, listed.stdout.split("\0")), *library]:
        source, copy = ROOT / name, tree / name
        if source.is_file() and not (copy.exists() and copy.read_bytes() == source.read_bytes()):
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(source.read_bytes())
            copy.chmod(source.stat().st_mode)
    return tree


def run(command: str, tree: Path, limit: float | None, **extra: str) -> tuple[bool, str]:
    """Whether a command succeeded within a number of seconds, and what it said."""
    environment = {**os.environ, "PYTHONPATH": f"{tree}:{tree / 'tests'}", **extra}
    process = subprocess.Popen(
        ["bash", "-c", command], cwd=tree, env=environment, text=True, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    try:
        said, _ = process.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        return False, f"took more than {limit:.0f} s"
    return process.returncode == 0, said


class Judge:
    """Says of a fault whether the tests of a target see something wrong."""

    def __init__(self, target: Target, tree: Path):
        self.target, self.tree = target, tree
        self.limits: dict[str, float] = {}

    def __call__(self, fault: Fault) -> str:
        """ "survived", "does not compile", or which command failed, and its last lines."""
        for command in self.target.tests:
            if command not in self.limits:
                self.limits[command] = self.limit(command)
            with planted(fault, self.tree):
                verdict = self.verdict(command, self.limits[command])
            if verdict != "survived":
                return verdict
        return "survived"

    def limit(self, command: str) -> float:
        """Seconds for a command, which must succeed before any fault is planted."""
        begin = time.monotonic()
        verdict = self.verdict(command, None)
        if verdict != "survived":
            raise SystemExit(
                f"expected tests that pass before any fault is planted, got:\n{verdict}"
            )
        # A fault may make a loop endless.
        return 60 + 3 * (time.monotonic() - begin)

    def verdict(self, command: str, limit: float | None) -> str:
        works, said = run(self.target.build, self.tree, None)
        if not works:
            return "does not compile"
        library = (said.split() or [""])[-1]
        passed, said = run(command, self.tree, limit, LIBRARY=library)
        if passed:
            return "survived"
        last = "\n".join(said.splitlines()[-3:])
        return f"{command.replace(sys.executable, 'python')}\n{last}"


@contextmanager
def planted(fault: Fault, tree: Path):
    fault.plant(tree)
    try:
        yield
    finally:
        (tree / fault.path).write_text((ROOT / fault.path).read_text())


def reason_of_equivalence(fault: Fault) -> str | None:
    """Why a fault changes no result, if that is known."""
    for known in json.loads(EQUIVALENT.read_text()):
        if all(known[key] == getattr(fault, key) for key in ("path", "before", "after")):
            if known["text"] == fault.text.strip() and is_there(fault, known):
                return known["reason"]
    return None


def is_there(fault: Fault, known: dict) -> bool:
    """Whether, of equal lines, it has ``above`` in the ten lines before, and ``left`` beside it."""
    source = (ROOT / fault.path).read_text()[: fault.start]
    *above, left = source.split("\n")[-11:]
    return known.get("above", "") in "\n".join(above) and left.endswith(known.get("left", ""))


def paths_of(name: str, files: Sequence[str] = ("*",)) -> list[str]:
    """The sources of a target whose names match one of the patterns."""
    found = {path for glob in TARGETS[name].sources for path in ROOT.glob(glob)}
    chosen = [path for path in sorted(found) if any(fnmatch(path.name, glob) for glob in files)]
    return [str(path.relative_to(ROOT)) for path in chosen]


def judged(
    name: str, count: int, seed: int, report: Path, files: Sequence[str] = ("*",)
) -> list[dict]:
    """What became of ``count`` faults that compile; the report has each as soon as it is known."""
    target, tree, paths = TARGETS[name], copy_project(), paths_of(name, files)
    order = draw([fault for path in paths for fault in faults(ROOT, path)], 10 * count, seed)
    known = (
        [json.loads(line) for line in report.read_text().splitlines()] if report.exists() else []
    )
    verdicts = {key(entry): entry for entry in known}
    found: list[dict] = []
    judge = None
    with tqdm(total=count, desc=name, unit="fault") as bar:
        for fault in order:
            if len(found) == count:
                break
            entry = verdicts.get(key(asdict(fault)))
            if reason_of_equivalence(fault):
                entry = {"target": name, **asdict(fault), "verdict": "survived"}
            elif entry is None:
                judge = judge or Judge(target, tree)
                entry = {"target": name, **asdict(fault), "verdict": judge(fault)}
                with report.open("a") as file:
                    file.write(json.dumps(entry) + "\n")
            if entry["verdict"] != "does not compile":
                found.append(entry)
                bar.update()
    return found


def key(entry: dict) -> tuple:
    return tuple(entry[name] for name in ("path", "start", "before", "after", "text"))


def summary(name: str, entries: list[dict]) -> str:
    fields = Fault.__dataclass_fields__
    survivors = [
        Fault(**{field: entry[field] for field in fields})
        for entry in entries
        if entry["verdict"] == "survived"
    ]
    reasons = [reason_of_equivalence(fault) for fault in survivors]
    equivalent = len(list(filter(None, reasons)))
    counted = len(entries) - equivalent
    seen = len(entries) - len(survivors)
    lines = [
        f"{name}: {len(entries)} faults, {equivalent} of them change no result; "
        f"the tests see {seen} of {counted}, {seen / max(counted, 1):.0%}"
    ]
    for command, number in Counter(e["verdict"].split("\n")[0] for e in entries).most_common():
        lines.append(f"  {number:4d} {command}")
    for fault, reason in zip(survivors, reasons, strict=True):
        lines.append(f"  {'equivalent' if reason else 'SURVIVED'}: {fault}")
        lines += [f"      {reason}"] * bool(reason)
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(prog="mutation", description=__doc__)
    parser.add_argument("targets", nargs="*", choices=[[], *TARGETS], default=[*TARGETS])
    parser.add_argument("--files", nargs="+", default=["*"], metavar="GLOB", help="of the sources")
    parser.add_argument("--count", type=int, default=60, help="of each target (default: 60)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--report", type=Path, default=FOLDER / "report.jsonl")
    args = parser.parse_args()
    args.report.parent.mkdir(parents=True, exist_ok=True)
    results = {
        name: judged(name, args.count, args.seed, args.report, args.files) for name in args.targets
    }
    print("\n".join(summary(name, entries) for name, entries in results.items()))


if __name__ == "__main__":
    main()
