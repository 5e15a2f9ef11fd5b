#!/usr/bin/env python
"""Trains or evaluates an image classifier, with detectron2's standard command line.

    tools/train_imagenet.py --config-file configs/ImageNet/MNV2_dk_l3.yaml --num-gpus 8 \
        OUTPUT_DIR output/imagenet_mnv2_dk_l3
    tools/train_imagenet.py --config-file ... --num-gpus 8 --resume OUTPUT_DIR ...
    tools/train_imagenet.py --config-file ... --eval-only MODEL.WEIGHTS output/.../model_final.pth

Any folders of class folders do as data, without registration:

    tools/train_imagenet.py --config-file ... MODEL.CLASSIFIER.NUM_CLASSES 200 \
        DATASETS.TRAIN "('birds/train',)" DATASETS.TEST "('birds/val',)"

Without a GPU it runs on the CPU; there --num-gpus is the number of processes.
"""

from dk_detectron.engine import ClassificationTrainer, command_line

if __name__ == "__main__":
    command_line(ClassificationTrainer, __doc__)
