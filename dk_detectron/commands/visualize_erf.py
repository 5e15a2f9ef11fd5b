r"""Draws effective receptive fields of networks side by side, with their numbers (Figures 4 and 6).

    %(prog)s output/rigid output/dcn output/dk output/dcn_dk
    %(prog)s output/rigid output/dk --deform --dataset coco:val.json:images --count 5
    %(prog)s output/dk --images street.jpg --points 120,80 300,200
    %(prog)s output/rigid output/dk --table --dataset coco_2017_val

At the centres of the boxes of some objects, from large to small, or at given points. --table
measures them at all objects instead: OUTPUT_DIR/fields_NETWORK.csv has a row for each, and grows
picture by picture, so that the same command goes on where it was stopped. What the numbers mean is
in docs/seeing.md.
"""

import argparse
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from tabulate import tabulate
from tqdm import tqdm

from ..analysis.field_figures import draw_fields, view_field
from ..analysis.field_survey import correlations, means_by_size, survey_fields
from ..analysis.forward import deepest_feature
from ..analysis.measures import overlap
from ..analysis.objects import DEFORMATIONS, Picture
from ..analysis.receptive_field import ReceptiveFields
from ..weights import write_text
from . import _subjects
from ._networks import Network, add_arguments, load_networks, named, save, write_table

ROWS = 3  # of a page
SHOWN = "number", "dead", "in_box", "in_mask", "radius_50", "radius_90", "field_size", "aspect"


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_arguments(parser)
    _subjects.add_arguments(parser)
    parser.add_argument(
        "--deform", action="store_true", help="also of the picture rotated by -90°, scaled by 1.5"
    )
    parser.add_argument(
        "--feature", metavar="NAME", help="submodule (default: the backbone's last stage)"
    )
    parser.add_argument(
        "--fixed-offsets", action="store_true",
        help="hold offsets and gates fixed (eq. 8), instead of differentiating through them",
    )  # fmt: skip
    parser.add_argument("--table", action="store_true", help="measure all objects; no pictures")
    parser.add_argument("--limit", type=int, help="of --table: so many pictures, evenly spread")
    parser.add_argument(
        "--output-dir", type=Path, default=Path("output/erf"), help="default: %(default)s"
    )
    args = parser.parse_args()
    _subjects.check_arguments(parser, args)
    if args.table and args.images:
        parser.error("--table: expected a data set, got --images")
    if args.limit is not None and args.limit < 1:
        parser.error("--limit: expected a number of at least 1")
    return args


def panels(args, networks: list[Network], seen: list[Picture]) -> Iterator[tuple[str, list]]:
    """The rows of one subject: a label, and a panel for each network."""
    originals = []
    names = DEFORMATIONS if args.deform else ["original"]
    for name in names:
        deform, undo = DEFORMATIONS[name]
        row = []
        for i, (network, original) in enumerate(zip(networks, seen, strict=True)):
            picture = deform(original)
            with named(network):
                fields = ReceptiveFields(
                    network.model,
                    picture.image,
                    args.feature or deepest_feature(network.model),
                    attached=not args.fixed_offsets,
                )
                panel = view_field(fields, picture)
            if name == "original":
                originals.append(panel.field)
            else:
                back = undo(panel.field, originals[i].shape)
                panel.numbers["overlap"] = overlap(back, originals[i])
            row.append(panel)
        yield name, row


def draw(args: argparse.Namespace, networks: list[Network]) -> None:
    """Pages of three rows, each saved as soon as it is full, and the numbers of all panels."""
    titles = [network.name for network in networks]
    how = "derivatives " + ("at fixed offsets" if args.fixed_offsets else "through the offsets")
    waiting, page, written = [], 1, []

    def finish() -> None:
        nonlocal page
        save(draw_fields(titles, waiting, how), args.output_dir / f"erf_{page}.png")
        write_table(written, args.output_dir / "erf.csv")
        waiting.clear()
        page += 1

    for label, seen in _subjects.subjects(args, [network.cfg for network in networks]):
        for name, row in panels(args, networks, seen):
            waiting.append((f"{label}\n{name}" if args.deform else label, row))
            written += [
                {"network": title, "picture": label, "deformation": name, **panel.numbers}
                for title, panel in zip(titles, row, strict=True)
            ]
            if len(waiting) == ROWS:
                finish()
    if waiting:
        finish()


def measure_all(args: argparse.Namespace, networks: list[Network]) -> None:
    """Rows for all objects, into a file for each network; their means and correlations printed."""
    pictures = _subjects.dataset(args, networks[0].cfg)
    means: list[list] = []
    ranks: list[list] = []
    for network in networks:
        with named(network):
            rows = survey_fields(
                network.model,
                network.cfg,
                pictures,
                args.output_dir / f"fields_{network.stem}.csv",
                args.feature or deepest_feature(network.model),
                attached=not args.fixed_offsets,
                settings=network.settings,
                limit=args.limit,
                progress=partial(tqdm, desc=network.name, unit="image", disable=None),
            )
        for mean in means_by_size(rows):
            means.append([network.name, mean["objects"], *(mean[name] for name in SHOWN)])
        ranks.append([network.name, *correlations(rows).values()])
    tables = (
        tabulate(means, ["network", "objects", *SHOWN], tablefmt="github", floatfmt=".3g"),
        "Rank correlations of object ~ field:",
        tabulate(ranks, ["network", *correlations([])], tablefmt="github", floatfmt=".2f"),
    )
    text = "\n\n".join(tables)
    write_text(args.output_dir / "fields.md", text + "\n")
    print(text)


def main() -> None:
    args = parse_arguments()
    try:
        networks = load_networks(args)
        args.output_dir.mkdir(parents=True, exist_ok=True)
        (measure_all if args.table else draw)(args, networks)
    except (NotImplementedError, OSError, ValueError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
