#!/usr/bin/env python
"""Makes the shapes data set under $DETECTRON2_DATASETS (default: datasets/)."""

import argparse

from dk_detectron.data.datasets import datasets_root
from dk_detectron.data.shapes import write_split
from dk_detectron.data.writing import make_folder


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
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
    force = args.pop("force")
    if min(args["train"], args["val"], args["test"]) < 1 or args["side"] < 64:
        parser.error("expected at least one image in every split and a side of at least 64")

    def build(folder):
        for split in "train", "val", "test":
            write_split(folder, split, args[split], seed=args["seed"], side=args["side"])

    target = datasets_root() / "shapes"
    made = make_folder(target, args, build, force=force)
    print(f"{target}: {'made' if made else 'already there'}")


if __name__ == "__main__":
    main()
