"""Tells whether data sets are on disk, whole and sound, and what to do if not.

    %(prog)s                                  # the three parts of COCO 2017
    %(prog)s coco_2017_val shapes_val
    %(prog)s --json annotations/train.json --images images/train --html train.html

Exits with 1 if there are problems. The data sets are looked for in $DETECTRON2_DATASETS.
"""

import argparse
import json
import sys
from dataclasses import asdict
from functools import partial

from tqdm import tqdm

from ..data.checking import COCO, Report, check_dataset, class_conflict, shared_images
from ..data.datasets import PREFIX, datasets_root, require_coco
from ..data.page import write_page
from ._outputs import output_file


def print_report(report: Report) -> None:
    verdict = "incomplete" if report.problems else "complete"
    print(
        f"{report.name}: {verdict}; {report.images:,} images, {report.annotations:,} annotations, "
        f"{report.categories} categories"
    )
    print("\n".join(report.lines()), end="\n" if report.lines() else "")
    if report.survey and report.survey.has_annotations and not report.survey.faults:
        print(report.table())


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "names", nargs="*", help="as registered, or coco:JSON:IMAGES (default: COCO 2017)"
    )
    parser.add_argument("--json", help="a file of annotations in COCO's format, with --images")
    parser.add_argument("--images", help="the folder of its pictures")
    parser.add_argument(
        "--json-report", metavar="OUT", type=output_file, help="also write what was found as JSON"
    )
    parser.add_argument(
        "--html", metavar="OUT", type=output_file, help="also as a page, with charts and pictures"
    )
    args = parser.parse_args()
    if (args.json is None) != (args.images is None):
        parser.error("--json and --images: expected both, or neither")
    names = args.names + ([f"{PREFIX}{args.json}:{args.images}"] if args.json else [])
    try:
        for name in names:
            require_coco(name)
    except ValueError as error:
        parser.error(str(error))
    print(f"DETECTRON2_DATASETS: {datasets_root().resolve()}")
    reports = []
    for name in names or COCO:
        report = check_dataset(name, partial(tqdm, desc=name, unit="image", leave=False))
        print_report(report)
        reports.append(report)
    if args.json_report:
        found = [{k: v for k, v in asdict(r).items() if k != "contents"} for r in reports]
        args.json_report.write_text(json.dumps(found, indent=2))
    across = shared_images(reports)
    conflict = class_conflict(reports) if args.names and all(r.survey for r in reports) else None
    across += [conflict] if conflict else []
    print("\n".join(across), end="\n" if across else "")
    if args.html:
        write_page(reports, across, args.html)
    sys.exit(1 if conflict or any(report.problems for report in reports) else 0)


if __name__ == "__main__":
    main()
