r"""Trains or evaluates a detector, with detectron2's standard command line.

    %(prog)s --config-file COCO-Detection/faster_rcnn_MNV2_FPN_dk_l3_1x.yaml \
        --num-gpus 8 MODEL.WEIGHTS weights.pth OUTPUT_DIR output/mnv2_dk_l3
    %(prog)s --config-file ... --eval-only MODEL.WEIGHTS output/mnv2_dk_l3/model_final.pth \
        OUTPUT_DIR output/mnv2_dk_l3/val

Without a GPU it runs on the CPU; there --num-gpus is the number of processes.
"""

from ..engine import Trainer, command_line


def main() -> None:
    command_line(Trainer, __doc__)


if __name__ == "__main__":
    main()
