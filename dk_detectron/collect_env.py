"""What to put into an issue: detectron2's report on the environment, and this project's build.

python -m dk_detectron.collect_env
"""

from __future__ import annotations

from pathlib import Path

import torch
from detectron2.utils.collect_env import collect_env_info, detect_compute_compatibility
from tabulate import tabulate
from torch.utils.cpp_extension import CUDA_HOME

import dk_detectron

from .ops.library import DEVICES, extension_file


def collect_build_info() -> str:
    """A table of the version, the compiled operators and where they are from."""
    extension = extension_file()
    rows = [
        ("dk_detectron", f"{dk_detectron.__version__} @{Path(dk_detectron.__file__).parent}"),
        ("operators", extension),
        ("kernels for", ", ".join(sorted(DEVICES - {"meta"}))),
        ("CPU level", torch.backends.cpu.get_cpu_capability()),
        ("ABI", "Python's limited API, libtorch's stable ABI"),
    ]
    if "cuda" in DEVICES:
        rows.append(("CUDA architectures", detect_compute_compatibility(CUDA_HOME, str(extension))))
    return tabulate(rows)


def main() -> None:
    print(collect_env_info())
    print(collect_build_info())


if __name__ == "__main__":
    main()
