"""Receptive fields as pictures: those of several networks side by side (Figures 4 and 6)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Circle, Rectangle

from .field_survey import describe
from .objects import Picture
from .receptive_field import ReceptiveFields

HEAT = colormaps["inferno"]
BOX, FIELD, RADIUS = "deepskyblue", "white", "lime"
WIDTH = 2.6  # of a panel, in inches
# What hardly any pixel exceeds is as bright as can be.
BRIGHTEST = 0.995
# Fields are porous: drawn blurred by this, as a share of the picture's longer side.
BLUR = 1 / 150


@dataclass(frozen=True)
class Panel:
    """A field on its picture.

    Attributes:
        pixels: [H, W, 3], RGB, uint8.
        field: [H, W].
        point: (x, y).
        box: of the object, if there is one.
        theoretical: box of the theoretical field.
        numbers: a row of :func:`~dk_detectron.analysis.field_survey.describe`, and perhaps
            "overlap".
    """

    pixels: np.ndarray
    field: np.ndarray
    point: tuple[float, float]
    box: tuple[float, float, float, float] | None
    theoretical: tuple[float, float, float, float]
    numbers: dict[str, Any]


def view_field(fields: ReceptiveFields, picture: Picture) -> Panel:
    """The effective field at the centre of a picture's only object."""
    (thing,) = picture.objects
    field, numbers = describe(fields, thing, picture.scale)
    theoretical = fields.theoretical(fields.cell(thing.centre))
    box = None if thing.is_point else thing.box
    return Panel(picture.pixels, field, thing.centre, box, theoretical, numbers)


def heat(pixels: np.ndarray, field: np.ndarray) -> np.ndarray:
    """A picture in dark grey with a field over it, [H, W, 3] from 0 to 1.

    What one sees is the root of the field, slightly blurred, as a share of its brightest pixels'.
    """
    field = cv2.GaussianBlur(field, (0, 0), BLUR * max(field.shape))
    grey = cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY)[:, :, None] / 255
    if not field.any():
        return np.repeat(0.5 * grey, 3, 2)
    bright = np.quantile(field[field > 0], BRIGHTEST)
    strength = np.sqrt((field / bright).clip(0, 1))
    share = strength[:, :, None] ** 0.7
    return (1 - share) * 0.5 * grey + share * HEAT(0.15 + 0.85 * strength)[:, :, :3]


def _lines(numbers: dict[str, Any]) -> str:
    """What is written under a panel."""

    def text(name: str, unit: str = "", digits: int = 2) -> str:
        value = numbers[name]
        if math.isnan(value):
            return "–"
        return f"{value:.0%}" if unit == "%" else f"{value:.{digits}f}{unit}"

    lines = [
        f"in box {text('in_box', '%')}, in mask {text('in_mask', '%')}",
        f"50 % within {text('radius_50', '', 0)}, 90 % within {text('radius_90', ' px', 0)}",
        f"area: 50 % in {text('area_50', '%')}, 99 % in {text('area_99', '%')}",
        f"aspect {text('aspect')}, box {text('box_aspect')}",
    ]
    if "overlap" in numbers:
        lines.append(f"in common with original {text('overlap', '%')}")
    return "\n".join(lines)


def _draw(axes: Axes, panel: Panel) -> None:
    height, width = panel.field.shape
    axes.imshow(heat(panel.pixels, panel.field), extent=(0, width, height, 0))
    axes.set(xlim=(0, width), ylim=(height, 0), xticks=[], yticks=[])
    for box, colour, style in (panel.theoretical, FIELD, "--"), (panel.box, BOX, "-"):
        if box is not None:
            x0, y0, x1, y1 = np.clip(box, -9 * width - 9 * height, 9 * width + 9 * height)
            outline = Rectangle((x0, y0), x1 - x0, y1 - y0, fill=False, ec=colour, ls=style, lw=1.2)
            axes.add_patch(outline)
    if (radius := panel.numbers["radius_50"]) > 0:
        axes.add_patch(Circle(panel.point, radius, fill=False, ec=RADIUS, lw=0.8))
    axes.plot(*panel.point, "+", color=BOX, ms=6, mew=1.2)
    axes.set_xlabel(_lines(panel.numbers), fontsize=7, linespacing=1.4)


def draw_fields(
    titles: Sequence[str], rows: Sequence[tuple[str, Sequence[Panel]]], subtitle: str = ""
) -> Figure:
    """A page: a column for each network, a row for each picture.

    Args:
        titles: of the columns.
        rows: of each, what is written beside it, and a panel for each column.
        subtitle: what else must be said.
    """
    ratios = [max(p.field.shape[0] / p.field.shape[1] for p in panels) for _, panels in rows]
    text = 0.7  # of the numbers, in inches
    size = WIDTH * len(titles) + 0.3, WIDTH * sum(ratios) + text * len(rows) + 0.8
    figure = Figure(figsize=size, dpi=110, layout="constrained")
    grid = figure.subplots(
        len(rows), len(titles), squeeze=False,
        height_ratios=[WIDTH * ratio + text for ratio in ratios],
    )  # fmt: skip
    for axes_of_row, (label, panels) in zip(grid, rows, strict=True):
        axes_of_row[0].set_ylabel(label, fontsize=8, parse_math=False)
        for axes, panel in zip(axes_of_row, panels, strict=True):
            _draw(axes, panel)
    for axes, title in zip(grid[0], titles, strict=True):
        axes.set_title(title, fontsize=9, fontweight="bold", parse_math=False)
    handles = [
        Line2D([], [], color=BOX, marker="+", label="object's box and centre"),
        Line2D([], [], color=RADIUS, label="half of the mass"),
    ]
    if any(np.isfinite(panel.theoretical).all() for _, panels in rows for panel in panels):
        label = "theoretical receptive field"
        handles.append(Line2D([], [], color="grey", ls="--", label=label))
    figure.legend(
        handles=handles, loc="outside lower center", ncols=3, fontsize=7, frameon=False,
        title=subtitle or None, title_fontsize=7,
    )  # fmt: skip
    return figure
