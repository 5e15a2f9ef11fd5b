"""Compiles for the PTX tests, into build/ptx/; cached by content.

python tests/ptx/build.py [NAME...]    makes the PTX of csrc/cuda/NAME.cu (default: all)
"""

import hashlib
import os
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import torch
from filelock import FileLock
from torch.utils.cpp_extension import COMMON_NVCC_FLAGS, include_paths

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
FOLDER = ROOT / "build" / "ptx"
ARCHITECTURE = "sm_90"

_NVCC = ["nvcc", "-ptx", "-std=c++20", "-O3", "-lineinfo", f"-arch={ARCHITECTURE}"]
_GXX = ["-std=c++20", "-O1", "-fPIC", "-shared", "-Wall"]


def kernel_sources() -> list[Path]:
    return sorted((ROOT / "csrc" / "cuda").glob("*.cu"))


def compile_ptx(source: Path) -> Path:
    """The PTX of a .cu file; its lines are those of the source (``.loc``)."""
    includes = [f"-I{path}" for path in (ROOT / "csrc", *include_paths())]
    return _make(source, ".ptx", [*_NVCC, *COMMON_NVCC_FLAGS, *includes], _nvcc_version())


def build_arena() -> Path:
    libraries = Path(torch.__file__).parent / "lib"
    links = [f"-L{libraries}", f"-Wl,-rpath,{libraries}", "-lc10"]
    command = [os.environ.get("CXX", "g++"), *_GXX, *(f"-I{path}" for path in include_paths())]
    return _make(HERE / "arena.cpp", ".so", command, torch.__version__, links)


def ptxas_report(ptx: Path) -> dict[str, dict[str, int]]:
    """Registers and spilled bytes of each kernel, by mangled name."""
    report = _make(ptx, ".txt", ["ptxas", f"-arch={ARCHITECTURE}", "-v"], _nvcc_version())
    pattern = (
        r"Function properties for (\S+)\n"
        r".*?(\d+) bytes spill stores, (\d+) bytes spill loads\n.*?Used (\d+) registers"
    )
    return {
        name: {"spilled": int(stores) + int(loads), "registers": int(registers)}
        for name, stores, loads, registers in re.findall(pattern, report.read_text())
    }


def _make(source: Path, suffix: str, command: list[str], version: str, links=()) -> Path:
    """Runs a compiler unless its output for this very input is there. A .txt has what it said."""
    key = hashlib.sha256(repr([version, command, links]).encode())
    for path in (source, *_headers()):
        key.update(path.read_bytes() + b"\0")
    name = source.stem.partition("-")[0]
    target = FOLDER / f"{name}-{key.hexdigest()[:16]}{suffix}"
    FOLDER.mkdir(parents=True, exist_ok=True)
    with FileLock(FOLDER / f"{name}{suffix}.lock"):  # tests run in several processes
        if not target.exists():
            for stale in FOLDER.glob(f"{name}-*{suffix}"):
                stale.unlink()
            partial = target.with_suffix(".tmp")
            output = os.devnull if suffix == ".txt" else partial
            result = subprocess.run(
                [*command, str(source), "-o", str(output), *links], capture_output=True, text=True
            )
            if result.returncode:
                raise RuntimeError(f"{' '.join(command)} {source} failed:\n{result.stderr}")
            if suffix == ".txt":
                partial.write_text(result.stderr)
            partial.rename(target)
    return target


@cache
def _headers() -> list[Path]:
    return [path for path in sorted((ROOT / "csrc").rglob("*")) if path.suffix in (".h", ".cuh")]


@cache
def _nvcc_version() -> str:
    return subprocess.run(["nvcc", "--version"], capture_output=True, text=True).stdout


if __name__ == "__main__":
    for path in kernel_sources():
        if not sys.argv[1:] or path.stem in sys.argv[1:]:
            print(compile_ptx(path), flush=True)
