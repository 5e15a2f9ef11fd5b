"""Is a data set in COCO's format on disk, whole and sound; and if not, what to do."""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from itertools import combinations
from pathlib import Path

from detectron2.data import MetadataCatalog
from tabulate import tabulate

from .coco import Survey, survey
from .datasets import require_coco
from .faults import EXAMPLES, Findings
from .pictures import Looks, check_pictures, look_at_pictures

MOST_CLASSES = 80  # in a table


@dataclass(frozen=True)
class Release:
    """What COCO published: the number of images, and the archives to unzip."""

    images: int
    image_archive: str
    json_archive: str
    categories: int = 80


COCO = {
    "coco_2017_train": Release(
        118_287, "zips/train2017.zip", "annotations/annotations_trainval2017.zip"
    ),
    "coco_2017_val": Release(5_000, "zips/val2017.zip", "annotations/annotations_trainval2017.zip"),
    "coco_2017_test-dev": Release(
        20_288, "zips/test2017.zip", "annotations/image_info_test2017.zip"
    ),
}


@dataclass
class Report:
    """What was found in a data set.

    Attributes:
        problems: each with its cure.
        repairs: what training and evaluation read otherwise than it is written, or leave out.
        notes: what is odd but does no harm, because detectron2 deals with it.
        survey: of the JSON, if it can be read.
        left_out: names of the pictures that are not to be used.
        contents: the hash of each sound picture, by file name, if they were all read.
    """

    name: str
    images: int = 0
    annotations: int = 0
    categories: int = 0
    problems: list[tuple[str, str]] = field(default_factory=list)
    repairs: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    survey: Survey | None = None
    left_out: list[str] = field(default_factory=list)
    contents: dict[str, str] = field(default_factory=dict)

    def lines(self) -> list[str]:
        """Problems, with each cure once, after all that it cures; repairs and notes."""
        cures: dict[str, list[str]] = {}
        for problem, cure in self.problems:
            cures.setdefault(cure, []).append(f"  problem: {problem}")
        lines = [line for cure, problems in cures.items() for line in (*problems, f"  do: {cure}")]
        lines += [f"  repaired: {repair}" for repair in self.repairs]
        return lines + [f"  note: {note}" for note in self.notes]

    def table(self) -> str:
        """Boxes by class and size, and what of the file is not learnt."""
        if self.survey is None or not self.survey.has_annotations:
            return f"{self.name}: {self.images:,} images without annotations"
        rows = [
            [name, sum(boxes), *boxes]
            for name, boxes in zip(self.survey.classes, self.survey.boxes, strict=True)
        ]
        total = ["all", *(sum(column) for column in list(zip(*rows, strict=True))[1:])]
        if len(rows) > MOST_CLASSES:
            rows = rows[:MOST_CLASSES] + [[f"... and {len(rows) - MOST_CLASSES} more"]]
        headers = ["class", "boxes", "small", "medium", "large"]
        return (
            f"{self.name}: {self.images:,} images, {self.survey.empty:,} of them without objects; "
            f"{self.annotations:,} annotations, {self.survey.crowds:,} of them crowds, which are "
            "not learnt\n" + tabulate([*rows, total], headers, tablefmt="github")
        )


def check_dataset(name: str, progress: Callable[..., Iterable] | None = None) -> Report:
    """Checks a data set: its JSON, its annotations, and every image that it lists.

    All images are decoded, by as many processes as there are cores.

    Args:
        name: as registered, or coco:JSON:IMAGES.
        progress: shows it, called as `tqdm` is, with an iterable and its ``total``.

    Raises:
        ValueError: it is no data set in COCO's format.
    """

    report = _examine(name, partial(check_pictures, decode=True, progress=progress))
    twice = Findings()
    for one, other in duplicates(report.contents):
        twice.add("image whose content another one has", f"{one}, as {other}")
    report.notes += twice.lines()
    if name in COCO and report.survey:
        json_cure, _ = _cures(name, *_files(name))
        for what in "images", "categories":
            expected, found = getattr(COCO[name], what), getattr(report, what)
            if found != expected:
                message = f"{_files(name)[0]}: expected {expected:,} {what}, got {found:,}"
                report.problems.append((message, json_cure))
    return report


def gate(
    name: str, progress: Callable[..., Iterable] | None = None, *, skip: bool = False
) -> Report:
    """What must be known before training or evaluation: a quicker look, remembered.

    Args:
        skip: whether pictures at fault are left out, and counted, if others are not.

    Raises:
        ValueError: the data set is of no use; all that is wrong is named, with its cure.
    """
    report = _examine(name, partial(look_at_pictures, progress=progress), skip=skip)
    if report.problems:
        raise ValueError("\n".join([f"DATASETS: {name} cannot be used as it is", *report.lines()]))
    return report


def class_conflict(reports: list[Report]) -> str | None:
    """Where two data sets number their classes differently, if they do."""
    first, *others = [report for report in reports if report.survey]
    assert first.survey
    for other in others:
        assert other.survey
        if first.survey.classes != other.survey.classes:
            pairs = zip(first.survey.classes, other.survey.classes, strict=False)
            k, (one, two) = next(
                ((k, pair) for k, pair in enumerate(pairs) if pair[0] != pair[1]),
                (0, ("", "")),
            )
            where = f"class {k} is {one!r} and {two!r}" if one else "they differ in number"
            return (
                f"DATASETS: expected the same categories, in the order of their ids, in "
                f"{first.name} ({len(first.survey.classes)}) and {other.name} "
                f"({len(other.survey.classes)}), but {where}; give both JSON files the same "
                "list of categories"
            )
    return None


def duplicates(contents: dict[str, str]) -> list[tuple[str, str]]:
    """Pictures, by name, whose content an earlier one has, which is named second."""
    first: dict[str, str] = {}
    pairs = ((name, first.setdefault(content, name)) for name, content in contents.items())
    return [(name, other) for name, other in pairs if other is not name]


def shared_images(reports: list[Report]) -> list[str]:
    """Which data sets share images: the same files or, where all were read, the same content."""
    return [
        f"{len(common):,} images are in {one.name} as well as in {two.name}, such as "
        f"{', '.join(common[:EXAMPLES])}: if one is to train and the other to test, the test "
        "measures what was learnt by heart"
        for one, two in combinations(reports, 2)
        if (common := _common(one, two))
    ]


def _common(one: Report, two: Report) -> list[str]:
    paths, contents = set(_paths(two).values()), set(two.contents.values())
    return [
        name
        for name, path in _paths(one).items()
        if path in paths or one.contents.get(name) in contents
    ]


def _paths(report: Report) -> dict[str, str]:
    _, root = _files(report.name)
    images = report.survey.images if report.survey else []
    return {name: os.path.normpath(os.path.join(root, name)) for name, _, _ in images}


def _files(name: str) -> tuple[str, str]:
    metadata = MetadataCatalog.get(name)
    return str(metadata.json_file), str(metadata.image_root)


def _examine(name: str, look: Callable[[list, str], Looks], *, skip: bool = False) -> Report:
    require_coco(name)
    json_file, image_root = _files(name)
    json_cure, image_cure = _cures(name, json_file, image_root)
    report = Report(name)
    try:
        found = report.survey = survey(json_file)
    except (OSError, ValueError) as error:
        report.problems.append((str(error), json_cure))
    else:
        report.images, report.annotations = len(found.images), found.annotations
        report.categories = len(found.classes)
        report.problems += [(f"{json_file}: {line}", json_cure) for line in found.faults]
        report.repairs, report.notes = list(found.repairs), list(found.notes)
    if not os.path.isdir(image_root):
        report.problems.append((f"{image_root}: no such folder", image_cure))
    elif report.survey:
        looks = look(report.survey.images, image_root)
        report.contents = looks.hashes
        if skip and len(looks.faulty) < report.images:
            report.left_out = looks.faulty
            report.repairs += [
                f"{line}; left out (DATALOADER.SKIP_CORRUPT)" for line in looks.lines
            ]
        else:
            report.problems += [(f"{image_root}: {line}", image_cure) for line in looks.lines]
    return report


def _cures(name: str, json_file: str, image_root: str) -> tuple[str, str]:
    """What to do if the JSON is at fault, and if images are."""
    if name in COCO:
        # Every archive brings a folder of its own: annotations, train2017, ...
        folders = Path(json_file).parent.parent, Path(image_root).parent
        archives = COCO[name].json_archive, COCO[name].image_archive
        json_cure, image_cure = (
            f"wget -c http://images.cocodataset.org/{archive} && "
            f"unzip -qo {Path(archive).name} -d {shlex.quote(str(folder))}"
            for archive, folder in zip(archives, folders, strict=True)
        )
        return json_cure, image_cure
    if cure := MetadataCatalog.get(name).get("how_to_get"):
        return cure, cure
    return (
        "correct the file, or the json_file that the data set is registered with",
        "restore the images, or correct the image_root that the data set is registered with",
    )
