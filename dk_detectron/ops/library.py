"""Loads the extension ``dk_detectron._C``, which registers the operators with torch.

Schemas are in ``csrc/deform_kernel.cpp``, kernels in ``csrc/cpu`` and ``csrc/cuda``.
"""

from importlib import import_module
from importlib.metadata import distributions
from pathlib import Path

import torch

PACKAGE = Path(__file__).parents[1]


def explain(error: ImportError) -> str:
    """What is wrong, and what helps."""
    for distribution in distributions(name="dk_detectron"):
        installed = Path(str(distribution.locate_file("dk_detectron"))).resolve()
        if installed != PACKAGE and any(installed.glob("_C*")):
            return (
                f"{PACKAGE} is a clone without compiled operators, and hides the installed "
                f"{installed}: start Python in another folder, or make the installation of the "
                "clone itself, `pip install --no-build-isolation -e .`"
            )
    return (
        "dk_detectron._C, the compiled operators, is missing or was built for another PyTorch: "
        f"{error}. Build it, in a clone with `pip install --no-build-isolation -e .`"
    )


try:
    _EXTENSION = import_module("dk_detectron._C")
except ImportError as error:
    raise ImportError(explain(error)) from error


def has_kernel(device: str) -> bool:
    """Whether the extension has kernels for a type of device, such as "cuda"."""
    key = "Meta" if device == "meta" else device.upper()
    return torch._C._dispatch_has_kernel_for_dispatch_key("dk_detectron::deform_kernel_conv2d", key)


def extension_file() -> Path:
    return Path(str(_EXTENSION.__file__))
