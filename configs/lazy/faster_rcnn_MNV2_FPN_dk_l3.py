"""COCO-Detection/faster_rcnn_MNV2_FPN_dk_l3_1x.yaml as a LazyConfig, for detectron2's lazy trainer.

train.init_checkpoint takes a checkpoint of this very network: dk-convert-weights makes one of
ImageNet weights.
"""

from detectron2 import model_zoo
from detectron2.config import LazyCall as L

from dk_detectron.engine import DetectionEvaluator
from dk_detectron.engine.optimizer import build_optimizer, parameter_groups
from dk_detectron.modeling import mobilenet_v2

model = model_zoo.get_config("common/models/mask_rcnn_fpn.py").model
for part in "mask_in_features", "mask_pooler", "mask_head":
    model.roi_heads.pop(part)
model.backbone.bottom_up = L(mobilenet_v2)(
    conv3x3="local",
    norm="FrozenBN",
    out_features=["res2", "res3", "res4", "res5"],
    freeze_at=2,
)
# ImageNet's statistics in RGB, as torchvision's weights expect.
model.pixel_mean, model.pixel_std = [123.675, 116.28, 103.53], [58.395, 57.12, 57.375]
model.input_format = "RGB"

dataloader = model_zoo.get_config("common/data/coco.py").dataloader
dataloader.train.mapper.image_format = "RGB"
dataloader.train.mapper.use_instance_mask = False
dataloader.evaluator = L(DetectionEvaluator)(dataset_name="${..test.dataset.names}")

optimizer = L(build_optimizer)(
    params=L(parameter_groups)(
        base_lr="${..lr}",
        weight_decay="${..weight_decay}",
        weight_decay_norm="${..weight_decay}",
        offset_lr_factor=0.1,
    ),
    clip_offset_gradients=0.05,
    lr=0.02,
    momentum=0.9,
    weight_decay=4e-5,
)
lr_multiplier = model_zoo.get_config("common/coco_schedule.py").lr_multiplier_1x
train = model_zoo.get_config("common/train.py").train
