"""Deformable Kernels (ICLR 2020) for detectron2.

:func:`add_dk_config` registers the backbones and data sets; the operators need torch alone.
"""

import sys
from importlib import import_module

from .config import add_dk_config

try:
    from . import ops
    from .deformify import deformify, undeformify
    from .ops import deform_kernel_conv2d, sample_kernel
except ImportError:  # the compiled operators do not load: why is for that command to report
    if "dk_detectron.collect_env" not in sys.orig_argv:
        raise

__version__ = "0.2.0"
__all__ = [
    "Predictor",
    "add_dk_config",
    "data",
    "deform_kernel_conv2d",
    "deformify",
    "modeling",
    "ops",
    "sample_kernel",
    "undeformify",
]
# Imported when they are first asked for, since detectron2's models take as long to import as torch.
ROOMS = (
    *("analysis", "data", "engine", "evaluation", "export", "layers", "model_zoo", "modeling"),
    "weights",
)


def __getattr__(name: str):
    if name in ROOMS:
        return import_module(f".{name}", __name__)
    if name == "Predictor":
        return import_module(".engine", __name__).Predictor
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *ROOMS})
