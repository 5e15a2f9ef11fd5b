#!/usr/bin/env python
"""Trains or evaluates a detector, with detectron2's standard command line.

    tools/train_net.py --config-file configs/COCO-Detection/faster_rcnn_MNV2_FPN_dk_l3_1x.yaml \
        --num-gpus 8 MODEL.WEIGHTS weights.pth OUTPUT_DIR output/mnv2_dk_l3
    tools/train_net.py --config-file ... --eval-only MODEL.WEIGHTS output/mnv2_dk_l3/model_final.pth

Without a GPU it runs on the CPU; there --num-gpus is the number of processes.
"""

from dk_detectron.engine import Trainer, command_line

if __name__ == "__main__":
    command_line(Trainer, __doc__)
