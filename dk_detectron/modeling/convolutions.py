"""Which convolutions the residual blocks of each stage have, by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from math import gcd
from typing import NamedTuple

from detectron2.layers import Conv2d
from torch import nn

from ..layers import KINDS, OFFSET_GENERATORS
from ..ops.arguments import pair

STAGES = ("res2", "res3", "res4", "res5")
NORMS = ("", "BN", "SyncBN", "FrozenBN", "GN", "nnSyncBN", "naiveSyncBN", "naiveSyncBN_N", "LN")

# One kind for all stages, or of each stage by name; those that are not named are rigid.
Kinds = str | Mapping[str, str]
Norm = str | Callable[[int], nn.Module]


class BlockConvs(NamedTuple):
    """Constructors of a residual block's convolutions, with the arguments of ``nn.Conv2d``."""

    conv1x1: Callable[..., nn.Module] = Conv2d
    conv3x3: Callable[..., nn.Module] = Conv2d


def stage_convs(
    conv1x1: Kinds = "rigid",
    conv3x3: Kinds = "rigid",
    scope_size_1x1: int = 2,
    scope_size_3x3: int = 4,
    data_offset: Sequence[bool] = (False, False, False, False),
    num_experts: int = 8,
    offset_generator: str = "full",
    modulated: bool = False,
    offset_groups: int = 1,
) -> dict[str, BlockConvs]:
    """The constructors for the blocks of the stem and of each stage.

    Args:
        conv1x1: of the 1x1 convolutions but the shortcuts': "rigid", "local" (deformable kernel),
            "global" or "conditional"; or these by stage, such as {"res4": "local"}.
        conv3x3: the same of the depthwise 3x3 convolutions.
        scope_size_1x1, scope_size_3x3: of deformable kernels.
        data_offset: whether res2, res3, res4, res5 have deformable convolutions as their 3x3,
            alone ("rigid") or with local deformable kernels ("local").
        num_experts: of conditional convolutions.
        offset_generator: of offsets for every location: "full", the paper's; "separable"; or
            "shared": a separable one of each stage's input predicts features, of which each of its
            3x3 layers makes its offsets. That of a 1x1 convolution is then full.
        modulated: whether the taps of such layers have factors, as in DCNv2.
        offset_groups: parts of their input channels that have offsets of their own.

    Raises:
        ValueError: a kind or stage is unknown, a scope is smaller than its kernel, or two choices
            do not go together.
    """
    if len(data_offset) != len(STAGES):
        raise ValueError(
            f"data_offset: expected one value for each of {', '.join(STAGES)}, got {data_offset}"
        )
    pair("scope_size_1x1", scope_size_1x1, 1)
    pair("scope_size_3x3", scope_size_3x3, 3)
    deformable = dict(zip(STAGES, data_offset, strict=True))
    kinds_1x1, kinds_3x3 = _by_stage("conv1x1", conv1x1), _by_stage("conv3x3", conv3x3)

    if offset_generator not in OFFSET_GENERATORS:
        raise ValueError(
            f"offset_generator: expected one of {', '.join(OFFSET_GENERATORS)}, got "
            f"{offset_generator!r}"
        )
    local = {
        "offset_generator": offset_generator,
        "modulated": modulated,
        "offset_groups": offset_groups,
    }
    # The input of a 1x1 convolution may be of another size than its stage's features, and its
    # generator is small.
    local_1x1 = local | {"offset_generator": "full"} if offset_generator == "shared" else local

    def convs(stage: str) -> BlockConvs:
        conv1x1 = _constructor("conv1x1", kinds_1x1[stage], scope_size_1x1, num_experts, local_1x1)
        conv3x3 = _constructor("conv3x3", kinds_3x3[stage], scope_size_3x3, num_experts, local)
        if deformable.get(stage):
            conv3x3 = _deformable(kinds_3x3[stage], scope_size_3x3, local)
        return BlockConvs(conv1x1, conv3x3)

    return {stage: convs(stage) for stage in ("stem", *STAGES)}


def _by_stage(name: str, kinds: Kinds) -> dict[str, str]:
    stages = ("stem", *STAGES)
    if isinstance(kinds, str):
        return dict.fromkeys(stages, kinds)
    if unknown := set(kinds) - set(stages):
        raise ValueError(f"{name}: expected stages of {', '.join(stages)}, got {unknown}")
    return {stage: kinds.get(stage, "rigid") for stage in stages}


def _constructor(
    name: str, kind: str, scope_size: int, num_experts: int, local: dict
) -> Callable[..., nn.Module]:
    constructors: dict[str, Callable[..., nn.Module]] = {
        "rigid": Conv2d,
        "local": partial(KINDS["local"], scope_size=scope_size, **local),
        "global": partial(KINDS["global"], scope_size=scope_size),
        "conditional": partial(KINDS["conditional"], num_experts=num_experts),
    }
    if kind not in constructors:
        raise ValueError(f"{name}: expected one of {', '.join(constructors)}, got {kind!r}")
    return constructors[kind]


def _deformable(kind: str, scope_size: int, local: dict) -> Callable[..., nn.Module]:
    constructors: dict[str, Callable[..., nn.Module]] = {
        "rigid": partial(KINDS["dcn"], **local),
        "local": partial(KINDS["dcn+local"], scope_size=scope_size, **local),
    }
    if kind not in constructors:
        raise ValueError(
            f"data_offset: expected 3x3 convolutions to be one of {', '.join(constructors)} where "
            f"it is on, got {kind!r}"
        )
    return constructors[kind]


def norm_layer(norm: Norm) -> Norm:
    """What ``detectron2.layers.get_norm`` takes, with a "GN" for any number of channels.

    detectron2's has 32 groups, which do not divide the 16, 24 or 144 channels of MobileNet-V2.

    Raises:
        ValueError: a name that detectron2 does not know.
    """
    if isinstance(norm, str) and norm not in NORMS:
        raise ValueError(f"norm: expected one of {', '.join(map(repr, NORMS))}, got {norm!r}")
    return (lambda channels: nn.GroupNorm(gcd(32, channels), channels)) if norm == "GN" else norm


def check_out_features(out_features: Sequence[str]) -> list[str]:
    """Raises ``ValueError`` if a requested feature does not exist."""
    known = ("stem", *STAGES)
    if isinstance(out_features, str) or not out_features or not set(out_features) <= set(known):
        raise ValueError(f"out_features: expected some of {', '.join(known)}, got {out_features}")
    return list(out_features)
