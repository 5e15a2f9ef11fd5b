r"""Makes a checkpoint for a configuration's network out of another network's, with equal outputs.

    %(prog)s mobilenet_v2-b0353104.pth mnv2_dk_l3.pth \
        --config-file COCO-Detection/faster_rcnn_MNV2_FPN_dk_l3_1x.yaml

SRC is a file or URL, .pth, .pt or .safetensors: a MobileNet-V2 of torchvision or timm, a ResNet of
torchvision for detectron2's own, or a classifier or detector of this project. DST is for
MODEL.WEIGHTS, which takes SRC too and converts it in passing. Prints what became of every tensor;
if one does not fit, nothing is written.
"""

import argparse
import sys

from detectron2.modeling import build_model

from ..model_zoo import load_config
from ..weights import convert_file


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("source", metavar="SRC", help="checkpoint to convert")
    parser.add_argument("target", metavar="DST", help="checkpoint to write, .pth")
    parser.add_argument("--config-file", required=True, help="YAML of the network to convert to")
    parser.add_argument("--allow-partial", action="store_true", help="write what fits, if not all")
    parser.add_argument("opts", nargs="*", help="KEY VALUE pairs over the configuration")
    args = parser.parse_intermixed_args()
    try:
        model = build_model(load_config(args.config_file, args.opts))
        print(convert_file(args.source, args.target, model, args.allow_partial))
    except (OSError, ValueError) as error:
        sys.exit(f"{parser.prog}: {error}")
    print(f"\nWritten: {args.target}")


if __name__ == "__main__":
    main()
