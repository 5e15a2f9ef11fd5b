"""The configuration keys of this project, added to detectron2's defaults."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from detectron2.config import CfgNode


def is_classifier(cfg: CfgNode) -> bool:
    """Whether the network is a classifier of images, not a detector."""
    return cfg.MODEL.META_ARCHITECTURE == "ImageClassifier"


def add_dk_config(cfg: CfgNode) -> None:
    """Adds every key of dk_detectron to ``cfg``, all off: a plain config is unchanged.

    Also registers with detectron2 what the keys can name: backbones, the classifier, data sets.
    """
    # Here, and not above: whoever wants the operators alone need not wait for detectron2's models.
    from detectron2.config import CfgNode as CN

    from . import data, modeling  # noqa: F401

    # Which convolutions of the residual blocks adapt, and how.
    cfg.MODEL.DEFORM_KERNEL = CN()
    # The 1x1 convolutions (not the shortcut projections) and the 3x3 ones, which are depthwise in
    # ResNet-DW and MobileNet-V2, and dense or grouped in detectron2's ResNet and ResNeXt
    # (MODEL.BACKBONE.NAME "build_resnet_dk_fpn_backbone"); each one of:
    #   "rigid"        an ordinary convolution
    #   "local"        local deformable kernel: kernel offsets per output location
    #   "global"       global deformable kernel: kernel offsets per image
    #   "conditional"  conditional convolution (SCC): a mixture of experts per image
    cfg.MODEL.DEFORM_KERNEL.CONV_1X1 = "rigid"
    cfg.MODEL.DEFORM_KERNEL.CONV_3X3 = "rigid"
    # Scope sizes of deformable kernels.
    cfg.MODEL.DEFORM_KERNEL.SCOPE_SIZE_1X1 = 2
    cfg.MODEL.DEFORM_KERNEL.SCOPE_SIZE_3X3 = 4
    # Deformable convolution (DCN) in the 3x3 of res2, res3, res4, res5: data offsets, alone or
    # (with CONV_3X3 "local") together with kernel offsets.
    cfg.MODEL.DEFORM_KERNEL.DATA_OFFSET_ON_PER_STAGE = [False, False, False, False]
    # Histograms of every layer's offsets go to TensorBoard every so many steps; 0 for never.
    cfg.MODEL.DEFORM_KERNEL.VIS_PERIOD = 0
    # Experts of a conditional convolution: 8 in the paper's MobileNet-V2, 2 in its ResNet-50-DW.
    cfg.MODEL.DEFORM_KERNEL.NUM_EXPERTS = 8
    # What predicts offsets for every location: "full", the paper's convolution from all channels;
    # "separable", a depthwise and a 1x1 convolution, of a sixth of its cost; or "shared", of the
    # input of each stage a separable one, and of that a 1x1 convolution for each 3x3 layer.
    cfg.MODEL.DEFORM_KERNEL.OFFSET_GENERATOR = "full"
    # Whether each tap of these layers also has a factor that follows the input, as in DCNv2, of 1
    # at the start. The paper has none.
    cfg.MODEL.DEFORM_KERNEL.MODULATED = False
    # Each of so many parts of a layer's input channels has offsets (and factors) of its own.
    cfg.MODEL.DEFORM_KERNEL.OFFSET_GROUPS = 1

    # ResNet-DW takes detectron2's own MODEL.RESNETS keys, of which it uses DEPTH (50, 101 or 152),
    # WIDTH_PER_GROUP (doubled, as in the paper), STEM_OUT_CHANNELS, RES2_OUT_CHANNELS,
    # STRIDE_IN_1X1, NORM and OUT_FEATURES.
    cfg.MODEL.MOBILENETV2 = CN()
    cfg.MODEL.MOBILENETV2.OUT_FEATURES = ["res2", "res3", "res4", "res5"]
    # Any norm that detectron2.layers.get_norm knows: "FrozenBN", "BN", "SyncBN", "GN", ...
    cfg.MODEL.MOBILENETV2.NORM = "FrozenBN"
    # Channels of res5: 1280, with the final 1x1 convolution, or 320, without.
    cfg.MODEL.MOBILENETV2.RES5_CHANNELS = 1280

    # Keep activations in channels_last, the layout in which the operators are fastest. On a CPU it
    # pays for deformable kernels with AVX-512 (2 to 4 % of a training step, 7 to 10 % of
    # inference). With AVX2 it pays in inference alone (6 %): the dense convolutions of a training
    # step lose more by it (6 % with deformable kernels, 14 % without; docs/benchmarks.md). No GPU
    # has been measured.
    cfg.MODEL.CHANNELS_LAST = False

    # Compile the backbone with torch.compile, with dynamic shapes. The first steps take minutes;
    # on a CPU, torch's compiler nevertheless starts again for every new image size.
    cfg.MODEL.BACKBONE.COMPILE = False
    # Gradient checkpointing: the residual blocks keep their inputs alone and compute the rest again
    # in the backward pass. The same gradients with less memory, in about a third more time.
    cfg.MODEL.BACKBONE.GRADIENT_CHECKPOINTING = False

    # Image classification (MODEL.META_ARCHITECTURE "ImageClassifier").
    cfg.MODEL.CLASSIFIER = CN()
    cfg.MODEL.CLASSIFIER.NUM_CLASSES = 1000

    # The learning rate of every offset generator is multiplied by this: 0.01 in the paper's
    # ResNet-50-DW, 0.1 in its MobileNet-V2.
    cfg.SOLVER.OFFSET_LR_FACTOR = 1.0
    # The gradient of every offset generator is scaled down to at most this norm; 0 for no limit. A
    # generator sums over all channels, so that in a pretrained network its gradient is hundreds of
    # times that of any other weight: without the limit, fine-tuning diverges (docs/start.md).
    cfg.SOLVER.CLIP_OFFSET_GRADIENTS = 0.0
    # "SGD", or "AdamW", with which a detector from scratch learns in far fewer steps.
    cfg.SOLVER.OPTIMIZER = "SGD"

    # Of mixed precision (SOLVER.AMP.ENABLED): "float16", with scaled gradients, or "bfloat16".
    cfg.SOLVER.AMP.PRECISION = "float16"

    # Brightness, contrast and saturation of training images vary by up to this, as a share.
    cfg.INPUT.COLOR_JITTER = 0.0

    # The weights' exponential moving average, kept and evaluated beside them: this much of it stays
    # in an iteration, such as 0.9999. 0 for none.
    cfg.SOLVER.EMA_DECAY = 0.0

    # Of classifiers only. If not 0, SOLVER.MAX_ITER and SOLVER.WARMUP_ITERS follow from these, the
    # number of training images and SOLVER.IMS_PER_BATCH, and SOLVER.CHECKPOINT_PERIOD and
    # TEST.EVAL_PERIOD are an epoch at most.
    cfg.SOLVER.EPOCHS = 0
    cfg.SOLVER.WARMUP_EPOCHS = 0
    # The side of a classifier's images. In training they are random parts of a picture; in
    # evaluation the centre, after its shorter side became INPUT.MIN_SIZE_TEST.
    cfg.INPUT.CROP_SIZE = 224
    # A picture that cannot be read: named, counted and left out, instead of an error.
    cfg.DATALOADER.SKIP_CORRUPT = False
