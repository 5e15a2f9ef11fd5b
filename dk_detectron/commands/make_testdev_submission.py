r"""Turns detectron2's results on test-dev into the zip that COCO's server accepts.

    %(prog)s \
        output/mnv2_dk_l3/test-dev/inference/coco_2017_test-dev/coco_instances_results.json \
        datasets/coco/annotations/image_info_test-dev2017.json output/submission --name mnv2_dk_l3

Validates every result, keeps the best 100 of each image, rounds boxes to 2 decimals and scores to
5, and writes OUT_DIR/detections_test-dev2017_NAME_results.json and .zip. Faulty results are counted
and dropped, boxes that stick out of their image counted and clipped; with --strict, any of them
fails, and nothing is written. The input may be larger than the memory, or compressed by gzip.

Results with masks become a submission of masks, unless --task says that it is of their boxes.
"""

import argparse
import os
import sys
from pathlib import Path

from tqdm import tqdm

from ..data.faults import Findings
from ..evaluation import submission
from ..evaluation.results import read_results


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("results", metavar="RESULTS", help="coco_instances_results.json")
    parser.add_argument("image_info", metavar="IMAGE_INFO", help="image_info_test-dev2017.json")
    parser.add_argument("out_dir", metavar="OUT_DIR", type=Path)
    parser.add_argument("--name", metavar="ALG", default="dk", help="algorithm (default: dk)")
    parser.add_argument(
        "--task", choices=submission.TASKS, help="what to submit (default: masks if there are any)"
    )
    parser.add_argument("--strict", action="store_true", help="fail on any violation")
    args = parser.parse_args()
    try:
        submission.file_name(args.name)
        submission.check_folder(args.out_dir)
        images, categories = submission.read_image_info(args.image_info)
        print(f"{args.image_info}: {len(images):,} images, {len(categories)} categories")
        notes = Findings()
        with tqdm(total=os.path.getsize(args.results), unit="B", unit_scale=True) as bar:
            results = read_results(args.results, notes, bar.update)
            collected = submission.collect(results, images, categories, args.task, args.results)
        for line in notes.lines() + collected.notes.lines():
            print(f"note: {line}")
        violations = collected.violations.lines()
        for line in violations:
            print(f"violation: {line}")
        print(
            f"{args.results}: kept {collected.kept:,} of {collected.total:,} results "
            f"({collected.task}), in {len(collected.best):,} of {len(images):,} images"
        )
        if violations and args.strict:
            sys.exit("error: --strict allows no violation; nothing was written")
        print(submission.write(collected, args.out_dir, args.name))
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
