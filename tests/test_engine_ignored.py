"""Keys without effect: refused, and in no configuration of this project."""

import pytest
from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, Backbone

from dk_detectron.engine.ignored import check_ignored
from dk_detectron.model_zoo import CONFIGS, load_config

RESNET = "COCO-Detection/faster_rcnn_R_50_FPN_dk_l3_1x.yaml"
RESNET_DW = "COCO-Detection/faster_rcnn_R_50_DW_FPN_dk_l3_1x.yaml"
RIGID = "COCO-Detection/faster_rcnn_MNV2_FPN_1x.yaml"
GLOBAL = "COCO-Detection/faster_rcnn_MNV2_FPN_dk_g3_1x.yaml"
CLASSIFIER = "ImageNet/MNV2.yaml"
KERNEL, BACKBONE = "MODEL.DEFORM_KERNEL", "MODEL.BACKBONE"
DETECTRON2S = [f"{BACKBONE}.NAME", "build_resnet_fpn_backbone"]


@pytest.mark.parametrize("config", sorted(CONFIGS.glob("*/*.yaml")), ids=lambda path: path.stem)
def test_no_configuration_of_ours_has_any(config):
    check_ignored(load_config(config))


@pytest.mark.parametrize(
    ("config", "opts", "message"),
    [
        (RESNET, DETECTRON2S, f"{KERNEL}.CONV_3X3: expected 'rigid', since build_resnet_fpn_back"),
        (RESNET_DW, DETECTRON2S, "CONV_3X3: .*take a MODEL.BACKBONE.NAME of dk_detectron"),
        (
            RESNET,
            [*DETECTRON2S, f"{KERNEL}.CONV_3X3", "rigid",
             f"{BACKBONE}.GRADIENT_CHECKPOINTING", True],
            "GRADIENT_CHECKPOINTING: expected False",
        ),
        (GLOBAL, [f"{KERNEL}.MODULATED", True], "without local offsets makes no use of it"),
        (GLOBAL, [f"{KERNEL}.OFFSET_GENERATOR", "separable"], "OFFSET_GENERATOR: .*CONV_3X3 local"),
        (RIGID, [f"{KERNEL}.OFFSET_GROUPS", 0], "OFFSET_GROUPS: expected 1"),
        (RIGID, [f"{KERNEL}.SCOPE_SIZE_3X3", 7], "expected 4, since CONV_3X3 'rigid' makes no use"),
        (GLOBAL, [f"{KERNEL}.SCOPE_SIZE_1X1", 3], "set .*CONV_1X1 local or global"),
        (RIGID, ["MODEL.RESNETS.NORM", "BN"], "set MODEL.MOBILENETV2.NORM"),
        (CLASSIFIER, ["SOLVER.MAX_ITER", 100], "MAX_ITER: expected 40000, .* set SOLVER.EPOCHS"),
        (CLASSIFIER, ["SOLVER.WARMUP_ITERS", 9], "WARMUP_ITERS: .*SOLVER.WARMUP_EPOCHS, or"),
        (RIGID, ["SOLVER.AMP.PRECISION", "bfloat16"], "set SOLVER.AMP.ENABLED True"),
    ],
)  # fmt: skip
def test_keys_that_the_network_does_not_read(config, opts, message):
    with pytest.raises(ValueError, match=message):
        check_ignored(load_config(config, opts))


@pytest.mark.parametrize(
    ("config", "opts"),
    [
        (RESNET_DW, [f"{KERNEL}.MODULATED", True, f"{KERNEL}.SCOPE_SIZE_3X3", 5]),
        (GLOBAL, [f"{KERNEL}.SCOPE_SIZE_3X3", 5]),
        (RIGID, [f"{KERNEL}.DATA_OFFSET_ON_PER_STAGE", [False, False, False, True],
                 f"{KERNEL}.OFFSET_GROUPS", 2]),
        (CLASSIFIER, ["SOLVER.EPOCHS", 0, "SOLVER.MAX_ITER", 100, "SOLVER.WARMUP_ITERS", 9]),
        (RIGID, ["SOLVER.AMP.PRECISION", "bfloat16", "SOLVER.AMP.ENABLED", True]),
        # Who makes a network adaptive by deformify may look at its offsets.
        (RIGID, [*DETECTRON2S, f"{KERNEL}.VIS_PERIOD", 100]),
    ],
)  # fmt: skip
def test_keys_that_it_reads(config, opts):
    check_ignored(load_config(config, opts))


def test_a_strangers_backbone_may_read_them():
    class Stranger(Backbone):
        def __init__(self, cfg: CfgNode, input_shape: ShapeSpec):
            super().__init__()

    BACKBONE_REGISTRY.register(Stranger)
    check_ignored(load_config(RESNET, [f"{BACKBONE}.NAME", "Stranger"]))
