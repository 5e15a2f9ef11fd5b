"""Makes the shapes data set under $DETECTRON2_DATASETS (default: datasets/).

%(prog)s                 # shapes: detection, COCO format
%(prog)s --classes       # shapes_classes: classification, class folders
"""

import argparse
import sys

from ..data.datasets import datasets_root
from ..data.shapes import OUTLINES, write_class_split, write_split
from ..data.writing import make_folder


class Formatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """The docstring as it is, and defaults."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Formatter)
    parser.add_argument(
        "--classes",
        action="store_true",
        help="one object an image, in folders train/CLASS and val/CLASS, without --test",
    )
    parser.add_argument("--train", type=int, default=2000, help="number of training images")
    parser.add_argument("--val", type=int, default=200, help="number of validation images")
    parser.add_argument("--test", type=int, default=200, help="number of unlabelled test images")
    parser.add_argument("--side", type=int, default=256, help="typical side of an image, in pixels")
    parser.add_argument("--seed", type=int, default=0, help="everything is a function of it")
    parser.add_argument(
        "--force", action="store_true", help="replace a set made with other arguments"
    )
    args = vars(parser.parse_args())
    force, classes = args.pop("force"), args.pop("classes")
    if classes:
        del args["test"]
    splits = [split for split in ("train", "val", "test") if split in args]
    least = len(OUTLINES) if classes else 1
    if min(args[split] for split in splits) < least or args["side"] < 64:
        parser.error(f"expected at least {least} images in every split and a side of at least 64")
    write = write_class_split if classes else write_split

    def build(folder):
        for split in splits:
            write(folder, split, args[split], seed=args["seed"], side=args["side"])

    target = datasets_root() / ("shapes_classes" if classes else "shapes")
    try:
        made = make_folder(target, args, build, force=force)
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
    print(f"{target}: {'made' if made else 'already there'}")


if __name__ == "__main__":
    main()
