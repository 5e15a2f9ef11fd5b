"""Convolutions that adapt to their input: deformable kernels and what the paper compares them with.

All take ``nn.Conv2d``'s arguments in its order, and ``norm`` and ``activation`` as
``detectron2.layers.Conv2d`` does. What adapts them is predicted from the input by small generators
whose weights start at zero, so that every layer starts as a rigid convolution: a drawn one, or the
given one (:meth:`AdaptiveConv2d.set_rigid_weight`). ``docs/start.md`` has the evidence for how.
"""

from .adaptive import AdaptiveConv2d, CondConv2d, DeformConv2d, msra_fill
from .scope import DeformKernelConv2d, GlobalDeformKernel2d, LocalDeformKernel2d, ScopeConv2d
from .start import lift_to_scope, spread_offset

__all__ = [
    "AdaptiveConv2d",
    "CondConv2d",
    "DeformConv2d",
    "DeformKernelConv2d",
    "GlobalDeformKernel2d",
    "LocalDeformKernel2d",
    "ScopeConv2d",
    "lift_to_scope",
    "msra_fill",
    "spread_offset",
]
