"""Receptive fields of all objects of a data set: a row each, means by size, rank correlations.

The paper's claim is that *"for smaller objects, it's better to have sharper kernels and thus denser
ERF; for larger objects, flatter kernels can be more beneficial for accumulating a wider ERF"*
(section 3.3). As a number: the rank correlation of the field's size with the object's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from detectron2.config import CfgNode
from scipy.stats import spearmanr
from torch import nn

from .measures import MEASURES, measure
from .objects import BUCKETS, CocoPictures, Object, Picture
from .receptive_field import ReceptiveFields
from .records import Records

COLUMNS = (
    "image_id", "annotation_id", "category", "area", "bucket", "x", "y", "object_size", *MEASURES,
    "field_size", "theoretical_width", "theoretical_height",
)  # fmt: skip
# What is compared by rank: of the object, and of the field.
CORRELATIONS = (
    ("object_size", "radius_50"),
    ("object_size", "radius_90"),
    ("object_size", "field_size"),
    ("box_aspect", "aspect"),
)


def describe(fields: ReceptiveFields, thing: Object, scale: float) -> tuple[np.ndarray, dict]:
    """The effective field [H, W] at an object's centre, and its row without ``image_id``.

    Args:
        scale: of the picture; ``object_size``, the root of the object's area, is in its pixels.
    """
    cell = fields.cell(thing.centre)
    field = fields.effective(cell).double().cpu().numpy()
    x0, y0, x1, y1 = fields.theoretical(cell)
    measured = measure(field, thing.centre, None if thing.is_point else thing.box, thing.mask)
    return field, {
        "annotation_id": thing.identifier,
        "category": thing.category,
        "area": float(thing.area),
        "bucket": thing.bucket,
        "x": thing.centre[0],
        "y": thing.centre[1],
        "object_size": scale * math.sqrt(thing.area),
        **measured,
        "field_size": math.sqrt(measured["axis_major"] * measured["axis_minor"]),
        "theoretical_width": x1 - x0,
        "theoretical_height": y1 - y0,
    }


def survey_fields(
    model: nn.Module,
    cfg: CfgNode,
    pictures: CocoPictures,
    path: Path,
    output: str,
    *,
    attached: bool = True,
    settings: dict | None = None,
    limit: int | None = None,
    progress: Callable[[list], Iterable] = iter,
) -> list[dict[str, Any]]:
    """Measures the field at the centre of every object's box; what is in the file is not repeated.

    Args:
        cfg: of the network's input.
        path: a CSV file of ``COLUMNS``, which grows picture by picture.
        output, attached: as of :func:`~dk_detectron.analysis.effective_receptive_field`.
        settings: what tells this network from others.
        limit: take so many pictures, evenly spread, instead of all.

    Returns:
        The rows of the file.

    Raises:
        FileExistsError: the file is of another network or other settings.
        ValueError: there are no objects, or a picture cannot be read.
    """
    chosen = [i for i in pictures.images if pictures.annotations(i)]
    if not chosen:
        raise ValueError(f"{pictures.name}: expected objects, got none that is not a crowd")
    if limit is not None and limit < len(chosen):
        chosen = [chosen[int(i * len(chosen) / limit)] for i in range(limit)]
    settings = {
        **(settings or {}), "dataset": pictures.name, "output": output, "attached": attached,
        "pictures": len(chosen),
    }  # fmt: skip
    records = Records(path, COLUMNS, settings)
    for image_id in progress([i for i in chosen if i not in records.done]):
        picture = pictures.read(image_id, cfg)
        records.add(
            [{"image_id": image_id, **row} for row in _rows(model, picture, output, attached)]
        )
    return records.rows()


def _rows(model: nn.Module, picture: Picture, output: str, attached: bool) -> list[dict]:
    fields = ReceptiveFields(model, picture.image, output, attached=attached)
    return [describe(fields, thing, picture.scale)[1] for thing in picture.objects]


def means_by_size(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of small, medium and large objects, and of all: their number, and the means of all numbers.

    ``dead`` is the number of fields that are zero everywhere; they have no part in the means.
    """
    numbers = [column for column in COLUMNS if column in ("object_size", "field_size", *MEASURES)]
    numbers.remove("angle")  # of which there is no mean
    means = []
    for bucket in (*BUCKETS, "all"):
        those = [row for row in rows if bucket in ("all", row["bucket"])]
        alive = [row for row in those if not math.isnan(row["radius_50"])]
        dead = len(those) - len(alive)
        mean = {name: _mean([row[name] for row in alive]) for name in numbers}
        means.append({"objects": bucket, "number": len(those), "dead": dead, **mean})
    return means


def _mean(values: Iterable[float]) -> float:
    known = [value for value in values if not math.isnan(value)]
    return sum(known) / len(known) if known else math.nan


def correlations(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Spearman's rank correlations of ``CORRELATIONS``, by "object_size ~ radius_50" and so on.

    NaN where fewer than three objects have both, or all have the same.
    """
    found = {}
    for one, other in CORRELATIONS:
        pairs = np.array([(row[one], row[other]) for row in rows], dtype=float).reshape(-1, 2)
        pairs = pairs[~np.isnan(pairs).any(1)]
        varied = len(pairs) > 2 and (np.ptp(pairs, axis=0) > 0).all()
        found[f"{one} ~ {other}"] = float(spearmanr(*pairs.T)[0]) if varied else math.nan
    return found
