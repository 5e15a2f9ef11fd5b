"""Which implementation runs, and why."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from .library import DEVICES

WARNED: set[str] = set()


def why_composed(input: Tensor) -> str:
    """Why no compiled kernel takes the input, in words; empty if one does."""
    device = input.device.type
    if device == "cuda" and torch.version.hip:  # by that name torch calls AMD's GPUs as well
        return "dk_detectron has no kernels for ROCm"
    if device not in DEVICES:
        cure = ": build it where there is a GPU, or with FORCE_CUDA=1" if device == "cuda" else ""
        return f"dk_detectron has been built without kernels for {device}{cure}"
    return ""


def for_onnx() -> bool:
    """Whether a graph for ONNX is being made, which has no operators but its own."""
    return torch.jit.is_tracing() and torch.onnx.is_in_onnx_export()


def warn_composed(reason: str) -> None:
    """Says so once, for each reason, when a user waits for what a compiled kernel would do."""
    if torch.compiler.is_compiling() or for_onnx() or reason in WARNED:
        return
    WARNED.add(reason)
    warnings.warn(
        f"deform_kernel_conv2d runs composed of PyTorch's own operators, as {reason}. That takes "
        "memory for S_h * S_w times the input; where there are compiled kernels, they have been "
        "measured 54 to 200 times as fast on a CPU for depthwise convolutions, 1.5 to 28 times for "
        "others",
        stacklevel=3,
    )


def implementation(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    kernel_offset: Tensor | None = None,
    data_offset: Tensor | None = None,
    **_,
) -> str:
    """What :func:`deform_kernel_conv2d` runs for these arguments, which are its own.

    Returns:
        "compiled CPU AVX512" (or AVX2, DEFAULT), "compiled CUDA", "composed", or, without offsets,
        "torch.nn.functional.conv2d".
    """
    if kernel_offset is None and data_offset is None:
        return "torch.nn.functional.conv2d"
    if why_composed(input):
        return "composed"
    if input.device.type == "cpu":
        return f"compiled CPU {torch.backends.cpu.get_cpu_capability()}"
    return f"compiled {input.device.type.upper()}"
