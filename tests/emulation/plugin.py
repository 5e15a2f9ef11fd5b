"""Runs operator tests over the CUDA sources: calls on CPU tensors go to the emulated kernels.

`with emulated_cuda("forward"):` does it for as long as it lasts.
"""

import ctypes
import os
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import torch

import dk_detectron.ops  # noqa: F401  (the schemas come from there)

from .build import build

# Under a sanitizer one order has to do.
ORDERS = os.environ.get("DK_EMULATED_ORDERS", "forward reverse seed1 seed2").split()
OPERATORS = ["deform_kernel_conv2d", "deform_kernel_conv2d_backward"]
_library = torch.library.Library("dk_emulated", "DEF")
_LAUNCHER = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.c_char_p, ctypes.c_uint, ctypes.c_uint, ctypes.c_size_t, ctypes.c_int,
    ctypes.POINTER(ctypes.c_void_p), ctypes.POINTER(ctypes.c_size_t),
)  # fmt: skip


@cache
def load() -> Path:
    """Builds and loads the emulated operators, torch.ops.dk_emulated; returns their library."""
    path = Path(os.environ.get("DK_EMULATED_LIBRARY") or build())  # a sanitizer's: sanitize.sh
    torch.ops.load_library(str(path))
    for name in OPERATORS:
        schema = str(getattr(torch.ops.dk_detectron, name).default._schema)
        _library.define(schema.removeprefix("dk_detectron::"))
    return path


def call(namespace: str, tensors: dict, case) -> dict[str, torch.Tensor]:
    """Output and every gradient of the raw operators of a namespace."""
    operators = getattr(torch.ops, namespace)
    output = operators.deform_kernel_conv2d(**tensors, **case.arguments)
    generator = torch.Generator().manual_seed(1)
    grad_output = torch.randint(-8, 9, output.shape, generator=generator).to(output) / 4
    names = ["input", "weight", "kernel_offset", "data_offset"]
    inputs = {name: tensors[name] for name in names}
    mask = [tensor is not None for tensor in inputs.values()]
    gradients = operators.deform_kernel_conv2d_backward(
        grad_output,
        **inputs,
        output_mask=mask,
        deterministic=torch.are_deterministic_algorithms_enabled(),
        **case.arguments,
    )
    present = [f"grad_{name}" for name, needed in zip(names, mask, strict=True) if needed]
    return {"output": output, **dict(zip(present, gradients, strict=True))}


@contextmanager
def order(name: str):
    """The order in which the emulated threads and blocks take turns."""
    before = os.environ.get("DK_EMULATED_ORDER")
    os.environ["DK_EMULATED_ORDER"] = name
    try:
        yield
    finally:
        if before is None:
            del os.environ["DK_EMULATED_ORDER"]
        else:
            os.environ["DK_EMULATED_ORDER"] = before


@contextmanager
def launcher(take):
    """Every launch is offered to a function, which says whether it took it.

    Args:
        take: of the kernel's mangled name, the grid, the block, the bytes of shared memory, the
            number of arguments, pointers to them and their sizes. It must not raise.
    """
    library = ctypes.CDLL(str(load()))
    function = _LAUNCHER(take)
    library.dk_emulated_set_launcher(function)
    try:
        yield
    finally:
        library.dk_emulated_set_launcher(None)


@contextmanager
def emulated_cuda(order_name: str = "forward"):
    """Replaces the CPU kernels of dk_detectron by the emulated CUDA kernels."""
    load()
    library = torch.library.Library("dk_detectron", "IMPL")
    try:
        for name in OPERATORS:
            library.impl(name, getattr(torch.ops.dk_emulated, name).default, "CPU")
        with order(order_name):
            yield
    finally:
        library._destroy()
