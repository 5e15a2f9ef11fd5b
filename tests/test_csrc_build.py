"""What the compiler says of the kernels that matter most, K = 3, S = 4 in float and bfloat16, and
whether the extension has them.

Compiling takes a minute or more, so it is on request: DK_TEST_CUDA_BUILD=1. Other architectures
than sm_80 and sm_90 are named like DK_TEST_CUDA_ARCHITECTURES="89 120".
"""

import os
import shutil
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from ptx.build import kernel_sources, ptxas_report

import dk_detectron.ops  # noqa: F401  (registers the operators)

ARCHITECTURES = os.environ.get("DK_TEST_CUDA_ARCHITECTURES", "80 90").split()

# Bytes stored and loaded, of a thread that has 512 and more in registers.
MATRIX_SPILLS = 160
# The same of backward by differences: of a tile or a block.
BACKWARD_SPILLS = 80

pytestmark = [
    pytest.mark.skipif(not shutil.which("nvcc"), reason="needs nvcc"),
    pytest.mark.skipif(
        not os.environ.get("DK_TEST_CUDA_BUILD"), reason="takes minutes: DK_TEST_CUDA_BUILD=1"
    ),
]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_kernels_of_scope_4_do_not_spill(architecture):
    """Those on tensor cores, and backward, do, a little, but not in their loops over taps."""
    sources = [path for path in kernel_sources() if path.stem.endswith(("_float", "_bfloat16"))]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        reports = list(pool.map(lambda path: ptxas_report(path, f"sm_{architecture}"), sources))
    seen = 0
    for source, report in zip(sources, reports, strict=True):
        for name, use in report.items():
            print(source.name, name, use)
            # Mangled template arguments: ..., K = 3, S = 4, or, for NCHW, only those. Of columns:
            # V = 4, S = 4.
            if "Li3ELi4E" in name or ("columns" in name and "Li4ELi4E" in name):
                seen += 1
                most = BACKWARD_SPILLS if "15backward_kernel" in name else 0
                assert use["spilled"] <= most, f"sm_{architecture}: {name} spills: {use}"
            if "matrix_kernel" in name and ("Li4E" in name or "dense" in name):
                seen += 1
                assert use["spilled"] <= MATRIX_SPILLS, f"sm_{architecture}: {name} spills: {use}"
    # With and without data_offset, and NCHW; backward likewise; columns with and without; on tensor
    # cores, forward of both types and backward of bfloat16; dense, of known sizes and of any.
    assert seen == 2 * (3 + 2 + 2) + 3 + 2


@pytest.mark.parametrize("name", ["deform_kernel_conv2d", "deform_kernel_conv2d_backward"])
def test_every_operator_with_a_cpu_kernel_has_one_for_cuda(name):
    operator = f"dk_detectron::{name}"
    for key in "CPU", "CUDA":
        assert torch._C._dispatch_has_kernel_for_dispatch_key(operator, key), key
