"""Compiles csrc/cuda with g++ over the shadow headers, into build/emulation*/; cached by content.

python tests/emulation/build.py [address|thread]    builds and prints the library's path
"""

import hashlib
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from filelock import FileLock
from torch.utils.cpp_extension import include_paths

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]

_SANITIZERS = {
    None: [],
    "address": ["-fsanitize=address,undefined,float-cast-overflow", "-fno-sanitize-recover=all"],
    "thread": ["-fsanitize=thread"],
}


def build(
    sanitizer: str | None = None, csrc: Path = ROOT / "csrc", folder: Path | None = None
) -> Path:
    """Returns the shared library, built from `csrc` if any source changed since."""
    folder = folder or ROOT / "build" / "-".join(filter(None, ["emulation", sanitizer]))
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / "lock"):  # tests run in several processes
        return _build(sanitizer, csrc, folder)


def _build(sanitizer: str | None, csrc: Path, folder: Path) -> Path:
    # csrc as a quoted path as well: the fallback of `#include "cuda/..."` in register_emulated.cpp.
    includes = [HERE / "include", csrc, *include_paths()]
    flags = [
        *("-x", "c++", "-std=c++20", "-O1", "-g1", "-fPIC", "-Wall", "-Wno-unknown-pragmas"),
        "-ffp-contract=off",  # the CUDA compiler decides for itself; here, every build is the same
        *_SANITIZERS[sanitizer],
        *(f"-I{path}" for path in includes),
    ]
    # Not the registration for CUDA: register_emulated.cpp stands in.
    sources = [
        *(path for path in sorted((csrc / "cuda").iterdir()) if path.suffix in (".cu", ".cpp")),
        *sorted(HERE.glob("*.cpp")),
    ]
    sources = [path for path in sources if path.name != "register_cuda.cpp"]
    headers = [
        path
        for where in (csrc, HERE / "include")
        for path in sorted(where.rglob("*"))
        if path.suffix in (".h", ".cuh")
    ]
    common = [path.read_bytes() for path in headers] + [repr([torch.__version__, flags]).encode()]
    compiler = os.environ.get("CXX", "g++")

    def compile_source(source: Path) -> Path:
        key = hashlib.sha256(b"\0".join([source.read_bytes(), *common])).hexdigest()[:16]
        target = folder / f"{source.stem}-{key}.o"
        if not target.exists():
            partial = target.with_suffix(".tmp")
            own_flags = flags
            if sanitizer == "thread" and source.name == "emulator.cpp":
                own_flags = [f for f in flags if not f.startswith("-fsanitize")]
                own_flags.append("-DDK_THREAD_SANITIZER")
            subprocess.run([compiler, *own_flags, "-c", source, "-o", partial], check=True)
            partial.rename(target)
        return target

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compile_source, sources))
    key = hashlib.sha256(repr(objects).encode()).hexdigest()[:16]
    library = folder / f"dk_emulated-{key}.so"
    if not library.exists():
        libraries = Path(torch.__file__).parent / "lib"
        partial = library.with_suffix(".tmp")
        # -Bsymbolic: the functions of torch's C shim in emulator.cpp go before torch's own.
        links = [f"-L{libraries}", f"-Wl,-rpath,{libraries},-Bsymbolic", "-ltorch_cpu"]
        subprocess.run(
            [compiler, "-shared", *_SANITIZERS[sanitizer], *objects, "-o", partial, *links],
            check=True,
        )
        partial.rename(library)
    for stale in {*folder.glob("*.o"), *folder.glob("*.so")} - {*objects, library}:
        stale.unlink(missing_ok=True)
    return library


if __name__ == "__main__":
    print(build(*sys.argv[1:]))
