r"""Trains the small networks of docs/evidence.md, and makes its tables and plots anew.

    %(prog)s --list
    %(prog)s                                      # everything, with MNIST in $DETECTRON2_DATASETS
    %(prog)s --experiments digits scope --seeds 0 1 2 --workers 2
    %(prog)s --report-only

OUTPUT/results.jsonl has a line for every finished run: the same command goes on after an
interruption, and several may work on the same file. OUTPUT/tables.md and the plots follow.
"""

import argparse
import sys
from importlib.util import find_spec
from pathlib import Path

from tabulate import tabulate

from ..evaluation.evidence import train
from ..evaluation.evidence_plan import experiments, plan
from ..evaluation.evidence_plots import write_report
from ..evaluation.runs import execute, of_run, read_results

RESULTS_FILE = "results.jsonl"


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = [*experiments()]
    parser.add_argument(
        "--experiments", nargs="+", choices=names, default=names, metavar="NAME",
        help=f"some of {', '.join(names)} (default: all)",
    )  # fmt: skip
    parser.add_argument("--seeds", type=int, nargs="+", default=(), help="default: the page's")
    parser.add_argument("--workers", type=int, default=1, help="processes, of one thread each")
    parser.add_argument(
        "--output", type=Path, default=Path("output/evidence"), help="default: %(default)s"
    )
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--list", action="store_true", help="only say what is done and what is not")
    what.add_argument("--report-only", action="store_true", help="only make tables and plots")
    return parser.parse_args()


def list_runs(names: list[str], seeds: list[int], results: list[dict]) -> str:
    """A row for each experiment: its runs, those that are finished, and the seconds these took."""
    rows = []
    for name in names:
        runs = plan([name], seeds)
        found = [r for r in (of_run(run, results) for run in runs) if r]
        rows.append([name, len(runs), len(found), sum(r["seconds"] for r in found)])
    return tabulate(rows, ["experiment", "runs", "finished", "seconds of these"], "github")


def check_packages() -> None:
    """Raises ``ImportError`` before hours of training, not after them."""
    for name in "matplotlib", "scipy":
        if find_spec(name) is None:
            raise ImportError(
                f"{name}: expected for tables and plots, got none: "
                "pip install 'dk_detectron[evidence]'"
            )


def main() -> None:
    args = parse_arguments()
    path = args.output / RESULTS_FILE
    try:
        check_packages()
        if args.list:
            print(list_runs(args.experiments, args.seeds, read_results(path)))
            return
        if not args.report_only:
            runs = plan(args.experiments, args.seeds)
            execute(runs, train, path, workers=args.workers, cost=lambda run: run.cost)
        print(write_report(read_results(path), args.output))
    except (ImportError, OSError, ValueError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
