"""What a command looks at on pictures: objects of a data set, or points of any picture."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from detectron2.config import CfgNode
from tqdm import tqdm

from ..analysis.objects import CocoPictures, Object, Picture, read_picture
from ..data.faults import ROUNDING


def parse_point(text: str) -> tuple[float, float]:
    x, y = map(float, text.split(","))
    return x, y


def add_dataset_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--dataset", metavar="NAME",
        help="registered, or coco:JSON:IMAGES (default: the first network's DATASETS.TEST)",
    )  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments that say where to look."""
    add_dataset_argument(parser)
    parser.add_argument("--images", nargs="+", metavar="FILE", help="pictures, instead")
    parser.add_argument(
        "--points", nargs="+", metavar="X,Y", type=parse_point,
        help="where on --images, in pixels of the file (default: the centre)",
    )  # fmt: skip
    parser.add_argument(
        "--count", type=int, default=3,
        help="number of the data set's objects, from large to small (default: 3)",
    )  # fmt: skip


def check_arguments(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    if args.points and not args.images:
        parser.error("--points: expected --images that they are on")
    if args.count < 1:
        parser.error("--count: expected a number of at least 1")


def dataset(args: argparse.Namespace, cfg: CfgNode) -> CocoPictures:
    """The data set of the command line, or that of a configuration.

    Raises:
        ValueError, FileNotFoundError: there is none, or it is of no use.
    """
    names = [args.dataset] if args.dataset else cfg.DATASETS.TEST
    if not names:
        raise ValueError("--dataset: expected a data set, as the network's DATASETS.TEST is empty")
    return CocoPictures(names[0])


def subjects(
    args: argparse.Namespace, cfgs: Sequence[CfgNode]
) -> Iterable[tuple[str, list[Picture]]]:
    """Of each subject, a label, and its picture with one object as each network gets it.

    Raises:
        ValueError, FileNotFoundError: a data set or picture is of no use.
    """
    if args.images:
        total = len(args.images) * len(args.points or [()])
        found = _points(args, cfgs)
    else:
        pictures = dataset(args, cfgs[0])
        chosen = pictures.spread(args.count)
        total, found = len(chosen), _objects(pictures, chosen, cfgs)
    return tqdm(found, total=total, desc="Looking", disable=None)


def _objects(
    pictures: CocoPictures, chosen: list[tuple[int, int]], cfgs: Sequence[CfgNode]
) -> Iterator[tuple[str, list[Picture]]]:
    for image_id, identifier in chosen:
        seen = [pictures.read(image_id, cfg, only=[identifier]) for cfg in cfgs]
        yield f"{seen[0].name}: {seen[0].objects[0].category}", seen


def _points(
    args: argparse.Namespace, cfgs: Sequence[CfgNode]
) -> Iterator[tuple[str, list[Picture]]]:
    points = args.points or []
    things = [Object(0, "", 0, (*point, *point)) for point in points]
    for path in args.images:
        pictures = [read_picture(path, cfg, things) for cfg in cfgs]
        label = Path(path).name
        if not points:
            yield label, [_with_point(picture, _middle(picture), label) for picture in pictures]
        for number, (x, y) in enumerate(points):
            where = f"{label} at {x:g},{y:g}"
            yield where, [_with_point(p, p.objects[number].centre, where) for p in pictures]


def _middle(picture: Picture) -> tuple[float, float]:
    height, width = picture.pixels.shape[:2]
    return width / 2, height / 2


def _with_point(picture: Picture, point: tuple[float, float], where: str) -> Picture:
    """A picture with one point of interest, in its pixels.

    Raises:
        ValueError: the point is not on it.
    """
    height, width = picture.pixels.shape[:2]
    x, y = min(max(point[0], 0), width), min(max(point[1], 0), height)
    if abs(x - point[0]) + abs(y - point[1]) > ROUNDING:
        raise ValueError(
            f"--points: expected points on the picture, of about {width / picture.scale:.0f}x"
            f"{height / picture.scale:.0f} pixels, got {where}"
        )
    return replace(picture, objects=(Object(0, "", 0, (x, y, x, y)),))
