"""Deformable Kernels (ICLR 2020) for detectron2. Importing this package registers everything."""

from . import data, modeling, ops
from .config import add_dk_config
from .ops import deform_kernel_conv2d, sample_kernel

__version__ = "0.2.0"
__all__ = ["add_dk_config", "data", "deform_kernel_conv2d", "modeling", "ops", "sample_kernel"]
