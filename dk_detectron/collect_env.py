"""What to put into an issue: detectron2's report on the environment, and this project's build.

python -m dk_detectron.collect_env

It runs as well where the compiled operators do not load, and says why.
"""

from __future__ import annotations

from pathlib import Path

import torch
from detectron2.utils.collect_env import collect_env_info, detect_compute_compatibility
from tabulate import tabulate
from torch.utils.cpp_extension import CUDA_HOME

import dk_detectron

PACKAGE = Path(dk_detectron.__file__).parent


def collect_operators() -> list[tuple[str, object]]:
    """The compiled operators, and where they are from; or why they do not load."""
    try:
        from .ops.library import DEVICES, extension_file
    except ImportError as error:
        files = ", ".join(path.name for path in PACKAGE.glob("_C*")) or "no file"
        return [("operators", f"do not load: {error}"), ("_C", files)]
    extension = extension_file()
    rows: list[tuple[str, object]] = [
        ("operators", extension),
        ("kernels for", ", ".join(sorted(DEVICES - {"meta"}))),
    ]
    if "cuda" in DEVICES:
        rows.append(("CUDA architectures", detect_compute_compatibility(CUDA_HOME, str(extension))))
    return rows


def collect_build_info() -> str:
    """A table of the version, the compiled operators and where they are from."""
    return tabulate(
        [
            ("dk_detectron", f"{dk_detectron.__version__} @{PACKAGE}"),
            *collect_operators(),
            ("CPU level", torch.backends.cpu.get_cpu_capability()),
            ("ABI", "Python's limited API, libtorch's stable ABI"),
        ]
    )


def main() -> None:
    print(collect_env_info())
    print(collect_build_info())


if __name__ == "__main__":
    main()
