"""Tells whether data sets are on disk, whole and sound, and what to do if not.

    %(prog)s                                  # the three parts of COCO 2017
    %(prog)s coco_2017_val shapes_val

Exits with 1 if there are problems. The data sets are looked for in $DETECTRON2_DATASETS.
"""

import argparse
import sys
from functools import partial

from tqdm import tqdm

from ..data.checking import COCO, Report, check_dataset
from ..data.datasets import datasets_root


def print_report(report: Report) -> None:
    verdict = "incomplete" if report.problems else "complete"
    print(
        f"{report.name}: {verdict}; {report.images:,} images, {report.annotations:,} annotations, "
        f"{report.categories} categories"
    )
    cures = {}  # each once, after all that it cures
    for problem, cure in report.problems:
        cures.setdefault(cure, []).append(problem)
    for cure, problems in cures.items():
        for problem in problems:
            print(f"  problem: {problem}")
        print(f"  do: {cure}")
    for note in report.notes:
        print(f"  note: {note}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", help="data sets, as registered (default: COCO 2017)")
    args = parser.parse_args()
    print(f"DETECTRON2_DATASETS: {datasets_root().resolve()}")
    problems = 0
    for name in args.names or COCO:
        try:
            report = check_dataset(name, partial(tqdm, desc=name, unit="image", leave=False))
        except ValueError as error:
            parser.error(str(error))
        print_report(report)
        problems += len(report.problems)
    sys.exit(1 if problems else 0)


if __name__ == "__main__":
    main()
