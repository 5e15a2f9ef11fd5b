"""Writes all about a run, or several side by side, onto one page that needs no network.

    %(prog)s output/dk
    %(prog)s output/rigid output/dk --output comparison.html

Configuration, curves of loss and AP, AP by class and size, precision and recall, confusions, kinds
of errors, the best and the worst pictures, receptive fields, offsets, costs, versions. What they
mean is in docs/seeing.md.
"""

import argparse
import sys
from collections.abc import Iterable
from pathlib import Path

from detectron2.utils.collect_env import collect_env_info
from tqdm import tqdm

from ..collect_env import collect_build_info
from ..evaluation.report import read_run, write_report
from ._networks import distinct_names


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "runs", nargs="+", metavar="RUN_DIR", type=Path, help="the OUTPUT_DIR of a training"
    )
    parser.add_argument(
        "--output", metavar="FILE", type=Path, help="(default: report.html in the first RUN_DIR)"
    )
    parser.add_argument(
        "--threshold", type=float, default=0.5,
        help="least score of confusions and of detections on pictures (default: 0.5)",
    )  # fmt: skip
    parser.add_argument(
        "--count", type=int, default=4,
        help="number of best and of worst pictures, and of objects to look at (default: 4)",
    )  # fmt: skip
    args = parser.parse_args()
    if args.count < 1:
        parser.error(f"--count: expected 1 or more, got {args.count}")
    if not 0 <= args.threshold <= 1:
        parser.error(f"--threshold: expected a score from 0 to 1, got {args.threshold}")
    return args


def progress(items: Iterable, what: str) -> Iterable:
    return tqdm(items, desc=what, disable=None)


def main() -> None:
    args = parse_arguments()
    path = args.output or args.runs[0] / "report.html"
    try:
        names = distinct_names(args.runs)
        runs = [read_run(folder, name) for folder, name in zip(args.runs, names, strict=True)]
        write_report(
            runs,
            path,
            versions=f"{collect_env_info()}\n{collect_build_info()}",
            threshold=args.threshold,
            count=args.count,
            progress=progress,
        )
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
    print(f"Report: {path}")


if __name__ == "__main__":
    main()
