"""Compiles the operators for the CPU, into build/extension*/.

PYTHONPATH=tests python -m extension.build [quick|address|thread] [TREE]    builds and prints the
library's path. quick: compiles in a third of the time, and computes more slowly. TREE: another copy
of the project, from which the kernels for instruction sets that do not run here are taken.
"""

import sys
import sysconfig
from pathlib import Path

import torch
from compiling import ROOT, SANITIZERS, Recipe

HERE = Path(__file__).resolve().parent
CSRC = ROOT / "csrc"


def lower_sets() -> set[str]:
    """The instruction sets whose kernels do not run here."""
    here = torch.backends.cpu.get_cpu_capability().lower()
    return {"baseline", "avx2", "avx512"} - {here.replace("default", "baseline")}


def lower_kernels() -> list[Path]:
    return sorted(path for name in lower_sets() for path in (CSRC / "cpu").glob(f"{name}_*.cpp"))


def sources(others: Path) -> list[Path]:
    """Of all parts, those for lower instruction sets from another copy of the project."""
    lower = lower_kernels()
    return [
        *sorted(CSRC.glob("*.cpp")),
        *sorted(set((CSRC / "cpu").glob("*.cpp")) - set(lower)),
        # These last: of what all of them define, the linker takes the first.
        *(others / path.relative_to(ROOT) for path in lower),
    ]


def recipe(kind: str | None, others: Path = ROOT) -> Recipe:
    # Those of setup.py that change results; -O1, which compiles in a third of the time.
    flags = [
        *("-std=c++20", "-O1", "-g1", "-fPIC", "-Wall", "-Wno-unknown-pragmas"),
        *("-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math"),
        *("-DPy_LIMITED_API=0x030A0000", f"-I{sysconfig.get_path('include')}"),
    ]
    own = {
        None: [],
        "quick": ["-O0", "-g0"],
        "address": ["-include", str(HERE / "checked_vectors.h"), "-Wno-psabi"],
        "thread": [],
    }[kind]
    return Recipe(
        name="_C",
        sources=[
            *sources(others),
            *([HERE / "threads.cpp"] if kind == "thread" else []),
        ],
        includes=[CSRC, HERE],
        flags=[*flags, *SANITIZERS.get(kind, []), *own],
        # No sanitizer looks at kernels that do not run.
        own_flags={
            path.name: [*flags, "-O0", "-g0"]
            for path in (lower_kernels() if kind in ("address", "thread") else ())
        },
        # The function of torch's C shim in threads.cpp goes before torch's own.
        links=["-Wl,-Bsymbolic"],
    )


def build(kind: str | None = None, others: str | Path = ROOT) -> Path:
    """Returns the shared library, built anew if any source changed since."""
    folder = ROOT / "build" / "-".join(filter(None, ["extension", kind]))
    return recipe(kind, Path(others)).build(folder)


if __name__ == "__main__":
    print(build(*sys.argv[1:]))
