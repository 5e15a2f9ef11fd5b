"""Makes the trees data set, real photographs, under $DETECTRON2_DATASETS (default: datasets/).

The photographs come out of the wheel of deepforest 1.5.2, which pip downloads (23 MB) and nothing
installs.
"""

import argparse
import sys
from functools import partial
from pathlib import Path

from ..data import trees
from ..data.datasets import datasets_root
from ..data.writing import make_folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--wheel", type=Path, help="the wheel, if it is already here")
    parser.add_argument("--force", action="store_true", help="replace a set made differently")
    args = parser.parse_args()
    target = datasets_root() / "trees"
    arguments = {"source": trees.REQUIREMENT, "tile": trees.TILE, "overlap": trees.OVERLAP}
    build = partial(trees.write_dataset, wheel=args.wheel)
    try:
        if args.wheel:
            trees.check_wheel(args.wheel)
        made = make_folder(target, arguments, build, force=args.force)
    except (OSError, RuntimeError, ValueError) as error:
        sys.exit(f"error: {error}")
    print(f"{target}: {'made' if made else 'already there'}")


if __name__ == "__main__":
    main()
