"""Compiles csrc/cuda with g++ over the shadow headers, into build/emulation*/.

PYTHONPATH=tests python -m emulation.build [address|thread]    builds and prints the library's path
"""

import sys
from pathlib import Path

from compiling import ROOT, SANITIZERS, Recipe

HERE = Path(__file__).resolve().parent
CSRC = ROOT / "csrc"


def recipe(sanitizer: str | None) -> Recipe:
    base = [
        *("-x", "c++", "-std=c++20", "-O1", "-g1", "-fPIC", "-Wall", "-Wno-unknown-pragmas"),
        "-ffp-contract=off",  # the CUDA compiler decides for itself; here, every build is the same
    ]
    # Not the registration for CUDA: register_emulated.cpp stands in.
    sources = [
        *(path for path in sorted((CSRC / "cuda").iterdir()) if path.suffix in (".cu", ".cpp")),
        *sorted(HERE.glob("*.cpp")),
    ]
    # The thread sanitizer is told of the fibers by the emulator, which is not instrumented itself.
    own = {"emulator.cpp": [*base, "-DDK_THREAD_SANITIZER"]} if sanitizer == "thread" else {}
    return Recipe(
        name="dk_emulated",
        sources=[path for path in sources if path.name != "register_cuda.cpp"],
        # csrc as a quoted path too: the fallback of `#include "cuda/..."` in register_emulated.cpp.
        includes=[HERE / "include", CSRC],
        flags=[*base, *SANITIZERS[sanitizer]],
        # The functions of torch's C shim in emulator.cpp go before torch's own.
        links=["-Wl,-Bsymbolic"],
        own_flags=own,
    )


def build(sanitizer: str | None = None) -> Path:
    """Returns the shared library, built anew if any source changed since."""
    folder = ROOT / "build" / "-".join(filter(None, ["emulation", sanitizer]))
    return recipe(sanitizer).build(folder)


if __name__ == "__main__":
    print(build(*sys.argv[1:]))
