r"""Finds objects in pictures, folders, videos or a webcam, by the detector that a run has trained.

    %(prog)s output/mnv2_dk_l3 photographs street.jpg clip.mp4 --output predictions
    %(prog)s output/mnv2_dk_l3 0 --output webcam                        # until Ctrl-C

RUN_DIR is the OUTPUT_DIR of a training, finished or not: its configuration and its last checkpoint
are used. OUTPUT gets the drawn pictures and videos, coco_instances_results.json with
image_info.json, and predictions.csv. What cannot be read is named and left out; then the exit
status is 1.
"""

import argparse
import sys
from pathlib import Path

from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from ..data.faults import EXAMPLES
from ..data.inputs import find_inputs
from ..engine.outputs import predict_into
from ..engine.prediction import Predictor

THRESHOLD = 0.5


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run_dir", metavar="RUN_DIR", help="the OUTPUT_DIR of a training")
    parser.add_argument(
        "inputs", metavar="INPUT", nargs="+",
        help="a picture, a folder that is searched with all below it, a video, or the number of a "
        "webcam",
    )  # fmt: skip
    parser.add_argument(
        "--output", type=Path, default=Path("predictions"),
        help="a folder, new or empty (default: predictions)",
    )  # fmt: skip
    parser.add_argument(
        "--threshold", type=float,
        help=f"least score, of all outputs (default: that of --opts, else {THRESHOLD})",
    )  # fmt: skip
    parser.add_argument("--crops", action="store_true", help="also write what is in each box")
    parser.add_argument("--batch", type=int, default=1, help="pictures at once (default: 1)")
    parser.add_argument("--device", help="such as cpu or cuda:1 (default: as in training)")
    parser.add_argument(
        "--weights", metavar="FILE",
        help="in the place of the run's last checkpoint, such as model_final_ema.pth",
    )  # fmt: skip
    parser.add_argument(
        "--opts", nargs="+", default=[], metavar="KEY VALUE", help="over the run's configuration"
    )
    return parser.parse_args()


def threshold(args: argparse.Namespace) -> float | None:
    """The least score; None if ``--opts`` has it."""
    in_opts = any(key.endswith(".SCORE_THRESH_TEST") for key in args.opts[::2])
    return THRESHOLD if args.threshold is None and not in_opts else args.threshold


def main() -> None:
    args = parse_arguments()
    try:
        inputs = find_inputs(args.inputs, leave_out=args.output)
        predictor = Predictor(
            args.run_dir,
            weights=args.weights,
            device=args.device,
            threshold=threshold(args),
            batch_size=args.batch,
            opts=args.opts,
        )
        if inputs.others:
            print(
                f"{len(inputs.others):,} other files in the folders, left out, such as "
                f"{', '.join(inputs.others[:EXAMPLES])}: name pictures and videos themselves"
            )
        print(f"Weights: {predictor.weights}, on {predictor.cfg.MODEL.DEVICE}")
        with logging_redirect_tqdm():
            summary = predict_into(args.output, predictor, inputs, crops=args.crops, progress=tqdm)
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
    print(f"{args.output}: {summary.objects:,} objects in {summary.images:,} images")
    if summary.faults:
        sys.exit(f"error: {len(summary.faults):,} inputs could not be read")


if __name__ == "__main__":
    main()
