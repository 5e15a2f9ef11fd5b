r"""Trains or evaluates an image classifier, with detectron2's standard command line.

    %(prog)s --config-file ImageNet/MNV2_dk_l3.yaml --num-gpus 8 \
        OUTPUT_DIR output/imagenet_mnv2_dk_l3
    %(prog)s --config-file ... --num-gpus 8 --resume OUTPUT_DIR ...
    %(prog)s --config-file ... --eval-only MODEL.WEIGHTS output/.../model_final.pth

Any folders of class folders do as data, without registration:

    %(prog)s --config-file ... \
        DATASETS.TRAIN "('birds/train',)" DATASETS.TEST "('birds/val',)"

Without a GPU it runs on the CPU; there --num-gpus is the number of processes.
"""

from ..engine import ClassificationTrainer, command_line


def main() -> None:
    command_line(ClassificationTrainer, __doc__)


if __name__ == "__main__":
    main()
