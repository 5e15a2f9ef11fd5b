r"""Draws what deformable layers learn: kernels, taps and offsets.

    %(prog)s output/dk output/dcn_dk
    %(prog)s output/dk --images street.jpg --points 120,80 --layers backbone.bottom_up.res4.5.conv2

Of each network NAME, into OUTPUT_DIR:

    NAME_kernels_I.png   at the centre of object I: where each tap samples its scope, the kernel
                         that this makes, and where the taps are on the picture
    NAME_samples_I.png   where data offsets lead from there, over the last --levels layers
    NAME_*_offsets.png   histograms by layer over all these pictures, each once, and the share of
                         clipped taps
    NAME_offsets.csv     the same in numbers

docs/seeing.md tells how to read them. Works on the layers of dk_detectron.layers, and on deformable
convolutions of torchvision and detectron2.
"""

import argparse
import sys
from hashlib import sha256
from pathlib import Path

from ..analysis.kernel_figures import LayerView, draw_histograms, draw_kernels, draw_samples
from ..analysis.kernels import (
    OFFSETS,
    add_statistics,
    chain,
    no_statistics,
    sampling_points,
    tap_points,
    view_scope,
)
from ..analysis.objects import Picture
from ..analysis.offsets import Observation, observe
from ..analysis.receptive_field import ReceptiveFields
from . import _subjects
from ._networks import Network, add_arguments, load_networks, named, save, write_table


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_arguments(parser)
    _subjects.add_arguments(parser)
    parser.add_argument(
        "--layers", nargs="+", metavar="NAME",
        help="layers to draw (default: the last of each size of feature map)",
    )  # fmt: skip
    parser.add_argument(
        "--levels", type=int, default=3, help="of layers that data offsets pass (default: 3)"
    )
    parser.add_argument(
        "--output-dir", type=Path, default=Path("output/kernels"), help="default: %(default)s"
    )
    args = parser.parse_args()
    _subjects.check_arguments(parser, args)
    if args.levels < 1:
        parser.error("--levels: expected a number of at least 1")
    return args


def with_offsets(network: Network, picture: Picture) -> dict[str, Observation]:
    """The layers with offsets.

    Raises:
        ValueError: there are none.
    """
    seen = {
        name: observation
        for name, observation in observe(network.model, picture.image).items()
        if observation.values.keys() & set(OFFSETS)
    }
    if not seen:
        raise ValueError("expected layers with offsets, got gates alone")
    return seen


def choose_layers(names: list[str] | None, seen: dict[str, Observation]) -> list[str]:
    """Those of the command line, or the last of each size of feature map.

    Raises:
        ValueError: there is no such layer.
    """
    if names is None:
        return list({observation.output_size: name for name, observation in seen.items()}.values())
    if unknown := [name for name in names if name not in seen]:
        raise ValueError(f"--layers: expected some of {', '.join(seen)}, got {', '.join(unknown)}")
    return names


def look(args: argparse.Namespace, network: Network) -> None:
    """Everything of one network."""
    stem = network.stem
    statistics, counted = no_statistics(), set()
    for number, (label, (picture,)) in enumerate(_subjects.subjects(args, [network.cfg]), start=1):
        seen = with_offsets(network, picture)
        title = f"{network.name}, {label}"
        content = sha256(picture.pixels.tobytes()).digest()
        if content not in counted:  # for another of its objects
            counted.add(content)
            add_statistics(statistics, seen)
        draw_subject(args, network, picture, seen, title, f"{stem}_{{}}_{number}.png")
    table = []
    for kind, layers in statistics.items():
        if layers:
            title = f"{network.name}: {kind.replace('_', ' ')}s"
            save(draw_histograms(title, kind, layers), args.output_dir / f"{stem}_{kind}s.png")
            table += [{"kind": kind, "layer": n, **layers[n].numbers()} for n in layers]
    write_table(table, args.output_dir / f"{stem}_offsets.csv")


def draw_subject(
    args: argparse.Namespace,
    network: Network,
    picture: Picture,
    seen: dict[str, Observation],
    title: str,
    file: str,
) -> None:
    point = picture.objects[0].centre
    views, samples = [], []
    for name in choose_layers(args.layers, seen):
        fields = ReceptiveFields(network.model, picture.image, name)
        cell, observation = fields.cell(point), seen[name]
        scope = view_scope(observation, cell) if "kernel_offset" in observation.values else None
        views.append(LayerView(name, scope, tap_points(observation, fields, cell)))
        if "data_offset" in observation.values:
            names = chain(seen, name, args.levels)
            first = ReceptiveFields(network.model, picture.image, names[-1])
            label = f"{name} and {len(names) - 1} before"
            samples.append((label, point, sampling_points(seen, names, first, cell)))
    save(
        draw_kernels(title, picture.pixels, point, views), args.output_dir / file.format("kernels")
    )
    if samples:
        figure = draw_samples(title, picture.pixels, samples)
        save(figure, args.output_dir / file.format("samples"))


def main() -> None:
    args = parse_arguments()
    try:
        networks = load_networks(args)
        args.output_dir.mkdir(parents=True, exist_ok=True)
        for network in networks:
            with named(network):
                look(args, network)
    except (NotImplementedError, OSError, ValueError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
