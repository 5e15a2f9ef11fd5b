r"""Tells what offsets or gates follow, class or scale, by t-SNE and by neighbours (Figure 3).

    %(prog)s output/scc output/dk
    %(prog)s output/dk --dataset coco_2017_val --layer backbone.bottom_up.res4.6.conv2

At the objects of some classes of a data set. Writes OUTPUT_DIR/dynamics.png and dynamics.md;
dynamics_NETWORK.csv has a row for each object, and grows picture by picture, so that the same
command goes on where it was stopped. docs/seeing.md tells how to read them.
"""

import argparse
import sys
from functools import partial
from pathlib import Path

from tabulate import tabulate
from tqdm import tqdm

from ..analysis.dynamics import agreement, choose_classes, choose_kind, collect, embed, neighbours
from ..analysis.dynamics_figures import Panel, draw_dynamics
from ..analysis.objects import CocoPictures
from ..weights import write_text
from . import _subjects
from ._networks import Network, add_arguments, load_networks, named, save

HEADER = (
    "network", "layer", "kind", "numbers", "objects", "same class", "by chance", "same scale",
    "by chance",
)  # fmt: skip


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_arguments(parser)
    _subjects.add_dataset_argument(parser)
    parser.add_argument("--layer", help="by its name (default: the last that adapts)")
    parser.add_argument(
        "--kind", choices=("kernel_offset", "data_offset", "gate"),
        help="of what adapts it (default: the first that it has)",
    )  # fmt: skip
    parser.add_argument(
        "--classes", type=int, default=10, help="number of classes, at random (default: 10)"
    )
    parser.add_argument("--limit", type=int, help="so many pictures, evenly spread (default: all)")
    parser.add_argument("--seed", type=int, default=0, help="of classes, t-SNE and shuffles")
    parser.add_argument(
        "--output-dir", type=Path, default=Path("output/dynamics"), help="default: %(default)s"
    )
    args = parser.parse_args()
    if args.classes < 1 or (args.limit is not None and args.limit < 1):
        parser.error("--classes, --limit: expected a number of at least 1")
    return args


def look_at(
    args: argparse.Namespace, network: Network, pictures: CocoPictures, classes: list[str]
) -> tuple[Panel, list]:
    """A row of the figure, and one of the table."""
    layer, kind = choose_kind(network.model, args.layer, args.kind)
    found = collect(
        network.model,
        network.cfg,
        pictures,
        args.output_dir / f"dynamics_{network.stem}.csv",
        layer,
        kind,
        classes,
        settings=network.settings,
        limit=args.limit,
        progress=partial(tqdm, desc=network.name, unit="image", disable=None),
    )
    near = neighbours(found)
    by = [agreement(near, labels, args.seed) for labels in (found.classes, found.deciles)]
    row = [network.name, layer, kind, found.values.shape[1], len(found.values)]
    for a in by:
        row += [f"{a.share:.1%}", f"{a.chance:.1%} ± {a.deviation:.1%}"]
    title = f"{network.name}: {kind.replace('_', ' ')}s ({found.values.shape[1]})"
    return Panel(title, found, embed(found.values, args.seed), *by), row


def look(args: argparse.Namespace, networks: list[Network]) -> None:
    pictures = _subjects.dataset(args, networks[0].cfg)
    classes = choose_classes(pictures, args.classes, args.seed)
    panels, table = [], []
    for network in networks:
        with named(network):
            panel, row = look_at(args, network, pictures, classes)
        panels.append(panel)
        table.append(row)
    text = tabulate(table, HEADER, tablefmt="github")
    write_text(args.output_dir / "dynamics.md", text + "\n")
    print(text)
    save(draw_dynamics(panels), args.output_dir / "dynamics.png")


def main() -> None:
    args = parse_arguments()
    try:
        networks = load_networks(args)
        args.output_dir.mkdir(parents=True, exist_ok=True)
        look(args, networks)
    except (NotImplementedError, OSError, ValueError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
