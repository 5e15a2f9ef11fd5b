"""Convolutions that adapt to their input: deformable kernels and what the paper compares them with.

All take ``nn.Conv2d``'s arguments in its order, and ``norm`` and ``activation`` as
``detectron2.layers.Conv2d`` does. What adapts them is predicted from the input by small generators
whose weights start at zero, so that every layer starts as a rigid convolution: a drawn one, or the
given one (:meth:`AdaptiveConv2d.set_rigid_weight`). ``docs/start.md`` has the evidence for how.
"""

from collections.abc import Callable

from .adaptive import AdaptiveConv2d, CondConv2d, msra_fill
from .generators import OFFSET_GENERATORS, SHARED_FEATURES, LocalConv2d, SeparableConv2d
from .scope import (
    DeformConv2d,
    DeformKernelConv2d,
    GlobalDeformKernel2d,
    LocalDeformKernel2d,
    ScopeConv2d,
)
from .start import embed_scope, lift_to_scope, spread_offset
from .zero_generators import GENERATOR

# What configurations and `deformify` call them.
KINDS: dict[str, Callable[..., AdaptiveConv2d]] = {
    "local": LocalDeformKernel2d,
    "global": GlobalDeformKernel2d,
    "conditional": CondConv2d,
    "dcn": DeformConv2d,
    "dcn+local": DeformKernelConv2d,
}

__all__ = [
    "GENERATOR",
    "KINDS",
    "OFFSET_GENERATORS",
    "SHARED_FEATURES",
    "AdaptiveConv2d",
    "CondConv2d",
    "DeformConv2d",
    "DeformKernelConv2d",
    "GlobalDeformKernel2d",
    "LocalConv2d",
    "LocalDeformKernel2d",
    "ScopeConv2d",
    "SeparableConv2d",
    "embed_scope",
    "lift_to_scope",
    "msra_fill",
    "spread_offset",
]
