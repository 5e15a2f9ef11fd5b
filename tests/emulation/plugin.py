"""Runs operator tests over the CUDA sources: calls on CPU tensors go to the emulated kernels.

`with emulated_cuda("forward"):` does it for as long as it lasts.
"""

import os
from contextlib import contextmanager

import torch

import dk_detectron.ops  # noqa: F401  (the schemas come from there)

from .build import build

# Under a sanitizer one order has to do.
ORDERS = os.environ.get("DK_EMULATED_ORDERS", "forward reverse seed1 seed2").split()
OPERATORS = ["deform_kernel_conv2d", "deform_kernel_conv2d_backward"]
_library = torch.library.Library("dk_emulated", "DEF")


def load() -> None:
    """Builds and loads the emulated operators, torch.ops.dk_emulated, once per process."""
    if not hasattr(torch.ops.dk_emulated, OPERATORS[0]):
        library = os.environ.get("DK_EMULATED_LIBRARY")  # a sanitizer's build: sanitize.sh
        torch.ops.load_library(library or str(build()))
        for name in OPERATORS:
            schema = str(getattr(torch.ops.dk_detectron, name).default._schema)
            _library.define(schema.removeprefix("dk_detectron::"))


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
