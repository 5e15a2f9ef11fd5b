"""What the compiler says of the kernels that matter most, K = 3, S = 4 in float and bfloat16, and
whether the extension has them.

Compiling takes a minute or more, so it is on request: DK_TEST_CUDA_BUILD=1.
"""

import os
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch.utils.cpp_extension import include_paths

import dk_detectron.ops  # noqa: F401  (registers the operators)

CSRC = Path(__file__).resolve().parents[1] / "csrc"

pytestmark = [
    pytest.mark.skipif(not shutil.which("nvcc"), reason="needs nvcc"),
    pytest.mark.skipif(
        not os.environ.get("DK_TEST_CUDA_BUILD"), reason="takes minutes: DK_TEST_CUDA_BUILD=1"
    ),
]


def ptxas_report(architecture: int, source: str) -> dict[str, dict[str, int]]:
    """Registers and spilled bytes of each kernel of a source file, by mangled name."""
    command = ["nvcc", "-std=c++20", "-O3", "-cubin", f"-arch=sm_{architecture}", "-Xptxas", "-v"]
    command += [f"-I{path}" for path in (CSRC, *include_paths())]
    command += ["-o", os.devnull, str(CSRC / "cuda" / source)]
    text = subprocess.run(command, check=True, capture_output=True, text=True).stderr
    pattern = (
        r"Function properties for (\S+)\n"
        r".*?(\d+) bytes spill stores, (\d+) bytes spill loads\n.*?Used (\d+) registers"
    )
    return {
        name: {"spilled": int(stores) + int(loads), "registers": int(registers)}
        for name, stores, loads, registers in re.findall(pattern, text)
    }


@pytest.mark.parametrize("architecture", [80, 90])
def test_kernels_of_scope_4_do_not_spill(architecture):
    sources = [
        f"{way}_{kind}.cu" for way in ("forward", "backward") for kind in ("float", "bfloat16")
    ]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        reports = list(pool.map(lambda source: ptxas_report(architecture, source), sources))
    seen = 0
    for source, report in zip(sources, reports, strict=True):
        for name, use in report.items():
            print(source, name, use)
            # Mangled template arguments: ..., K = 3, S = 4, or, for NCHW, only those.
            if "Li3ELi4E" in name:
                seen += 1
                assert use["spilled"] == 0, f"sm_{architecture}: {name} spills: {use}"
    assert seen == 2 * (3 + 2)  # with and without data_offset, and NCHW; backward likewise


@pytest.mark.parametrize("name", ["deform_kernel_conv2d", "deform_kernel_conv2d_backward"])
def test_every_operator_with_a_cpu_kernel_has_one_for_cuda(name):
    operator = f"dk_detectron::{name}"
    for key in "CPU", "CUDA":
        assert torch._C._dispatch_has_kernel_for_dispatch_key(operator, key), key
