r"""Trains the detectors of the paper's Tables 3 and 4, and prints the tables beside the paper's.

    %(prog)s --table 3 --num-gpus 8 --weights 'output/imagenet/{row}.pth'
    %(prog)s --rows MNV2 MNV2_dk_l3 --num-gpus 8 --weights ... --test-dev
    %(prog)s --scale shapes \
        --rows MNV2 MNV2_dk_g3 MNV2_dk_l3 MNV2_dcn MNV2_dcn_dk_l3
    %(prog)s --scale shapes --collect-only

On COCO, AP is that of val2017; the paper's is that of test-dev, for which --test-dev makes the
files to submit. On shapes (tools/prepare_shapes.py), the networks train with the demo's settings,
those of a seed from the same random weights and on the same pictures in the same order, and the
tables have the gains over the rigid network, with intervals of 95 %% confidence.

Every run has a folder OUTPUT/ROW/seed_N. The same command again goes on where it was stopped;
finished runs are not repeated. OUTPUT/tables.md and tables.csv follow what is finished, and but for
COCO a plot of the gains, gains.png.
"""

import argparse
import shlex
import sys
from pathlib import Path

from ..evaluation.reproduction import (
    SCALES,
    TABLES,
    Settings,
    check,
    check_scale,
    execute,
    plan,
    select_rows,
)
from ..evaluation.reproduction_tables import plot_gains, write_tables

SEEDS = {"coco": [42], "shapes": [0, 1, 2], "pretrained": [0, 1, 2]}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--scale", choices=SCALES, default="coco")
    parser.add_argument("--table", type=int, nargs="+", choices=TABLES, default=TABLES)
    parser.add_argument(
        "--rows", nargs="+", metavar="ROW", default=(),
        help="such as MNV2 R_50_DW_dk_g1_l3, named as in configs/ImageNet (default: all)",
    )  # fmt: skip
    parser.add_argument("--seeds", type=int, nargs="+", help="default: 42 on COCO, else 0, 1, 2")
    parser.add_argument("--num-gpus", type=int, default=1, help="of each run (default: 1)")
    parser.add_argument(
        "--weights", metavar="FILE", default="",
        help="pretrained backbone; {row} in it becomes the name of each row",
    )  # fmt: skip
    parser.add_argument("--test-dev", action="store_true", help="make files for COCO's server")
    parser.add_argument("--output", type=Path, help="default: output/tables_SCALE")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--dry-run", action="store_true", help="only print the commands")
    what.add_argument("--collect-only", action="store_true", help="only print the tables")
    parser.add_argument(
        "--opts", nargs=argparse.REMAINDER, default=[], metavar="KEY VALUE",
        help="last: overrides of the configuration, for all runs",
    )  # fmt: skip
    args = parser.parse_args()
    if args.test_dev and args.scale != "coco":
        parser.error("--test-dev: expected --scale coco")
    args.seeds = args.seeds or SEEDS[args.scale]
    args.output = (args.output or Path("output") / f"tables_{args.scale}").resolve()
    return args


def report(rows: dict[str, dict[str, str]], args: argparse.Namespace) -> None:
    print(write_tables(rows, args.output, args.scale))
    if args.scale != "coco":
        plot_gains(rows, args.output)


def main() -> None:
    args = parse_arguments()
    try:
        rows = select_rows(args.table, args.rows)
        if args.collect_only:
            check_scale(args.output, args.scale)
            report(rows, args)
            return
        settings = Settings(args.scale, args.num_gpus, args.weights, args.opts)
        runs = plan(rows, settings, args.output, args.seeds, test_dev=args.test_dev)
        if args.dry_run:
            for command in (command for run in runs for command in run.commands):
                print(shlex.join(command))
            return
        check(runs)
        settings.save(args.output)
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
    failures = 0
    for number, run in enumerate(runs, start=1):
        print(f"[{number}/{len(runs)}] {run}: {run.folder}", flush=True)
        try:
            execute(run)
        except RuntimeError as error:
            print(f"error: {error}", file=sys.stderr, flush=True)
            failures += 1
        write_tables(rows, args.output, args.scale)
    report(rows, args)
    if failures:
        sys.exit(f"error: {failures} of {len(runs)} runs failed; the same command tries them again")


if __name__ == "__main__":
    main()
