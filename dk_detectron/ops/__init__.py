"""The operators: functions of tensors."""

from . import registration  # noqa: F401  (registers fake kernels and derivatives)
from .composed import composed_deform_kernel_conv2d
from .dispatch import implementation
from .functional import deform_kernel_conv2d, per_image_conv2d, sample_kernel
from .sampling import axis_coefficients, outside_scope, rest_kernel, tap_locations

__all__ = [
    "axis_coefficients",
    "composed_deform_kernel_conv2d",
    "deform_kernel_conv2d",
    "implementation",
    "outside_scope",
    "per_image_conv2d",
    "rest_kernel",
    "sample_kernel",
    "tap_locations",
]
