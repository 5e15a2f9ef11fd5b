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
        "dk_detectron._C, the compiled operators, is missing, or does not load into torch "
        f"{torch.__version__}, which must be 2.10 or newer and have the CUDA it was built for: "
        f"{error}. Build it, in a clone with `pip install --no-build-isolation -e .`"
    )


try:
    _EXTENSION = import_module("dk_detectron._C")
except ImportError as error:
    raise ImportError(explain(error)) from error


def _has_kernel(key: str) -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key("dk_detectron::deform_kernel_conv2d", key)


# Types of devices that the extension has kernels for; "meta" has the fake one.
DEVICES = {"meta", *(device for device in ("cpu", "cuda") if _has_kernel(device.upper()))}


def extension_file() -> Path:
    return Path(str(_EXTENSION.__file__))
