"""Keys that a configuration sets without effect, since nothing of its network reads them."""

from __future__ import annotations

import re

from detectron2.config import CfgNode, get_cfg
from detectron2.modeling import BACKBONE_REGISTRY

from ..config import add_dk_config, is_classifier
from .checks import flat

# Keys that detectron2 or this project has, but not for every network: what to set instead.
OF_DETECTORS = {
    "DATALOADER.SAMPLER_TRAIN": "the class folders hold what is to be sampled",
    "INPUT.CROP.ENABLED": "training always crops, to INPUT.CROP_SIZE",
    "INPUT.MAX_SIZE_TEST": "set INPUT.CROP_SIZE",
    "INPUT.MAX_SIZE_TRAIN": "set INPUT.CROP_SIZE",
    "INPUT.MIN_SIZE_TRAIN": "set INPUT.CROP_SIZE",
    "MODEL.KEYPOINT_ON": "train a detector by dk-train (tools/train_net.py)",
    "MODEL.LOAD_PROPOSALS": "train a detector by dk-train (tools/train_net.py)",
    "MODEL.MASK_ON": "train a detector by dk-train (tools/train_net.py)",
    "TEST.AUG.ENABLED": "set INPUT.MIN_SIZE_TEST and INPUT.CROP_SIZE",
    "VIS_PERIOD": "look at the pictures themselves",
}
OF_CLASSIFIERS = {
    "INPUT.CROP_SIZE": "set INPUT.MIN_SIZE_TRAIN and INPUT.MIN_SIZE_TEST, or INPUT.CROP",
    "MODEL.CLASSIFIER.NUM_CLASSES": "set MODEL.ROI_HEADS.NUM_CLASSES",
    "SOLVER.EPOCHS": "set SOLVER.MAX_ITER",
    "SOLVER.WARMUP_EPOCHS": "set SOLVER.WARMUP_ITERS",
}
EPOCHS = "set SOLVER.EPOCHS and SOLVER.WARMUP_EPOCHS, or SOLVER.EPOCHS 0 to count in iterations"
OF_ITERATIONS = {"SOLVER.MAX_ITER": EPOCHS, "SOLVER.WARMUP_ITERS": EPOCHS}
OF_MIXED_PRECISION = {"SOLVER.AMP.PRECISION": "set SOLVER.AMP.ENABLED True"}
OF_OTHER_BACKBONES = {
    "MODEL.RESNETS.DEFORM_ON_PER_STAGE": "set MODEL.DEFORM_KERNEL.DATA_OFFSET_ON_PER_STAGE",
    "MODEL.RESNETS.DEFORM_MODULATED": "set MODEL.DEFORM_KERNEL.DATA_OFFSET_ON_PER_STAGE",
    "MODEL.RESNETS.DEFORM_NUM_GROUPS": "set MODEL.DEFORM_KERNEL.DATA_OFFSET_ON_PER_STAGE",
}
OF_RESNETS = {
    "MODEL.RESNETS.NORM": "set MODEL.MOBILENETV2.NORM",
    "MODEL.RESNETS.OUT_FEATURES": "set MODEL.MOBILENETV2.OUT_FEATURES",
}
OUR_BACKBONE = "take a MODEL.BACKBONE.NAME of dk_detectron, such as build_resnet_dk_fpn_backbone"
OF_OUR_BACKBONES = {
    "MODEL.DEFORM_KERNEL.CONV_1X1": OUR_BACKBONE,
    "MODEL.DEFORM_KERNEL.CONV_3X3": OUR_BACKBONE,
    "MODEL.DEFORM_KERNEL.DATA_OFFSET_ON_PER_STAGE": OUR_BACKBONE,
    "MODEL.BACKBONE.GRADIENT_CHECKPOINTING": "MobileNet-V2 and ResNet-DW of dk_detectron have it",
}
# MODEL.DEFORM_KERNEL.NUM_EXPERTS is not among these: the base of a family has it for all its kinds.
LOCAL = "set MODEL.DEFORM_KERNEL.CONV_3X3 local, or leave it out"
OF_LOCAL_KERNELS = {
    "MODEL.DEFORM_KERNEL.MODULATED": LOCAL,
    "MODEL.DEFORM_KERNEL.OFFSET_GENERATOR": LOCAL,
    "MODEL.DEFORM_KERNEL.OFFSET_GROUPS": LOCAL,
}


def check_ignored(cfg: CfgNode) -> None:
    """Raises ``ValueError`` if a key is set that would have no effect."""
    defaults, now = get_cfg(), flat(cfg)
    add_dk_config(defaults)
    unset = flat(defaults)
    for whose, keys in _ignored(cfg):
        for key, cure in keys.items():
            if now[key] != unset[key]:
                raise ValueError(
                    f"{key}: expected {unset[key]!r}, since {whose} makes no use of it, got "
                    f"{now[key]!r}: {cure}"
                )


def _ignored(cfg: CfgNode) -> list[tuple[str, dict[str, str]]]:
    """What makes no use of which keys."""
    name, kernels = cfg.MODEL.BACKBONE.NAME, cfg.MODEL.DEFORM_KERNEL
    classifier = is_classifier(cfg)
    ignored = [("a classifier", OF_DETECTORS) if classifier else ("a detector", OF_CLASSIFIERS)]
    if classifier and cfg.SOLVER.EPOCHS:
        ignored.append(("a classifier with SOLVER.EPOCHS", OF_ITERATIONS))
    if not cfg.SOLVER.AMP.ENABLED:
        ignored.append(("training without SOLVER.AMP.ENABLED", OF_MIXED_PRECISION))
    if re.search("mobilenetv2|resnet_dw", name):
        ignored.append((name, OF_OTHER_BACKBONES))
    if "mobilenetv2" in name:
        ignored.append((name, OF_RESNETS))
    # Other projects' backbones may well read the keys of this one.
    if BACKBONE_REGISTRY.get(name).__module__.startswith("detectron2."):
        ignored.append((name, OF_OUR_BACKBONES))
    if "local" not in (kernels.CONV_1X1, kernels.CONV_3X3) and not any(
        kernels.DATA_OFFSET_ON_PER_STAGE
    ):
        ignored.append(("a network without local offsets", OF_LOCAL_KERNELS))
    for size in "1X1", "3X3":
        if (kind := kernels[f"CONV_{size}"]) not in ("local", "global"):
            cure = f"set MODEL.DEFORM_KERNEL.CONV_{size} local or global, or leave it out"
            ignored.append(
                (f"CONV_{size} {kind!r}", {f"MODEL.DEFORM_KERNEL.SCOPE_SIZE_{size}": cure})
            )
    return ignored
