"""Deformable kernels as pictures: taps in the scope, kernels, taps on the picture, histograms."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from .kernels import OffsetStatistics, ScopeView

TAP, CLIPPED, POINT = "black", "darkorange", "yellow"
VALUES = "RdBu_r"
UNITS = {"kernel_offset": "scope cells", "data_offset": "pixels of the feature map"}
BINS = 81


@dataclass(frozen=True)
class LayerView:
    """A layer at the place above a point of a picture.

    Attributes:
        name: of the layer.
        scope: of its deformable kernel, if it has one.
        points: [K, 2], (x, y), where its taps are on the picture.
    """

    name: str
    scope: ScopeView | None
    points: np.ndarray


def _picture(axes: Axes, pixels: np.ndarray, point: Sequence[float]) -> None:
    height, width = pixels.shape[:2]
    axes.imshow(pixels, extent=(0, width, height, 0))
    axes.plot(*point, "+", color=POINT, ms=8, mew=1.5)
    axes.set(xlim=(0, width), ylim=(height, 0), xticks=[], yticks=[])


def _kernel(axes: Axes, kernel: np.ndarray, limit: float) -> None:
    axes.imshow(kernel, cmap=VALUES, vmin=-limit, vmax=limit)
    for (row, column), value in np.ndenumerate(kernel):
        dark = abs(value) > 0.6 * limit
        axes.text(
            column, row, f"{value:.2f}", ha="center", va="center", fontsize=6,
            color="white" if dark else "black",
        )  # fmt: skip
    axes.set(xticks=[], yticks=[])


def _scope(axes: Axes, view: ScopeView, limit: float) -> None:
    """The cells, and an arrow for every tap from where it rests to where it is read."""
    rows, columns = view.scope.shape
    axes.imshow(view.scope, cmap=VALUES, vmin=-limit, vmax=limit)
    read = np.clip(view.places, 0, (rows - 1, columns - 1))
    for (row, column), (to_row, to_column), clipped in zip(
        view.rest, read, view.clipped, strict=True
    ):
        colour = CLIPPED if clipped else TAP
        axes.plot(column, row, "o", ms=4, mfc="none", mec="grey", mew=0.9)
        axes.annotate(
            "", (to_column, to_row), (column, row),
            arrowprops={"arrowstyle": "-", "color": colour, "lw": 1, "shrinkA": 0, "shrinkB": 0},
        )  # fmt: skip
        axes.plot(to_column, to_row, "o", ms=5, mfc=colour, mec="white", mew=0.5)
    axes.set(xlim=(-0.6, columns - 0.4), ylim=(rows - 0.4, -0.6))
    axes.set(xticks=range(columns), yticks=range(rows))
    axes.tick_params(labelsize=6, length=2)


def draw_kernels(
    title: str, pixels: np.ndarray, point: Sequence[float], layers: Sequence[LayerView]
) -> Figure:
    """A row for each layer: its taps on the picture, in the scope, and the kernel they make.

    Args:
        pixels: [H, W, 3], RGB, uint8.
        point: (x, y).
    """
    columns = 4 if any(layer.scope for layer in layers) else 1
    figure = Figure(
        figsize=(2.2 * columns + 0.2, 2.25 * len(layers) + 0.8), dpi=110, layout="constrained"
    )
    figure.suptitle(title, fontsize=9, fontweight="bold", parse_math=False)
    grid = figure.subplots(len(layers), columns, squeeze=False)
    for axes, layer in zip(grid, layers, strict=True):
        _picture(axes[0], pixels, point)
        axes[0].plot(*layer.points.T, ".", color="red", ms=4)
        axes[0].set_title(layer.name, fontsize=7)
        for other in axes[1:]:
            other.set_axis_off()
        if (view := layer.scope) is None:
            continue
        limit = float(abs(view.scope).max()) or 1.0
        for other in axes[1:]:
            other.set_axis_on()
        _scope(axes[1], view, limit)
        axes[1].set_title("taps in the scope", fontsize=7)
        _kernel(axes[2], view.rest_kernel, limit)
        axes[2].set_title("kernel at rest", fontsize=7)
        _kernel(axes[3], view.kernel, limit)
        axes[3].set_title(f"kernel here: changed by {view.change:.0%}", fontsize=7)
    handles = [Line2D([], [], color="red", marker=".", ls="", label="taps on the picture")]
    if columns > 1:
        circle: dict[str, Any] = {"marker": "o", "ls": "", "ms": 5}
        handles += [
            Line2D([], [], mfc="none", mec="grey", label="where a tap rests", **circle),
            Line2D([], [], color=TAP, label="where it samples", **circle),
            Line2D([], [], color=CLIPPED, label="clipped", **circle),
        ]
    figure.legend(
        handles=handles, loc="outside lower center", ncols=len(handles), fontsize=7, frameon=False
    )
    return figure


def draw_samples(
    title: str, pixels: np.ndarray, panels: Sequence[tuple[str, Sequence[float], np.ndarray]]
) -> Figure:
    """Where the taps of several layers lead on the picture.

    Args:
        panels: of each, what is written above it, the point, and the places [N, 2] of (x, y).
    """
    ratio = pixels.shape[0] / pixels.shape[1]
    size = 3.2 * len(panels) + 0.2, 3.2 * ratio + 0.6
    figure = Figure(figsize=size, dpi=110, layout="constrained")
    figure.suptitle(title, fontsize=9, fontweight="bold", parse_math=False)
    for axes, (name, point, places) in zip(
        figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True
    ):
        _picture(axes, pixels, point)
        axes.plot(*places.T, ".", color="red", ms=3, alpha=0.5, mec="none")
        inside = ((places >= 0) & (places <= pixels.shape[1::-1])).all(1).sum()
        axes.set_title(f"{name}\n{inside} places on the picture", fontsize=7)
    return figure


def draw_histograms(title: str, kind: str, layers: Mapping[str, OffsetStatistics]) -> Figure:
    """The offsets of one kind: a row for each layer, and its share of clipped taps."""
    values = [np.concatenate(statistics.values) for statistics in layers.values()]
    # Nearly all of every layer; a wild one does not squeeze the others.
    reach = max(float(np.quantile(abs(v), 0.999)) for v in values) or 1.0
    edges = np.linspace(-reach, reach, BINS + 1)
    density = np.stack([np.histogram(v.clip(-reach, reach), edges)[0] / len(v) for v in values])
    kernel = kind == "kernel_offset"
    figure = Figure(figsize=(7.5, 0.22 * len(layers) + 1.4), dpi=110, layout="constrained")
    figure.suptitle(title, fontsize=9, fontweight="bold", parse_math=False)
    wide, *narrow = np.atleast_1d(
        figure.subplots(1, 1 + kernel, width_ratios=(4, 1)[: 1 + kernel], sharey=True)
    )
    image = wide.imshow(
        np.where(density > 0, density, np.nan) ** 0.5, aspect="auto", cmap="viridis",
        extent=(-reach, reach, len(layers) - 0.5, -0.5), interpolation="nearest",
    )  # fmt: skip
    colours = figure.colorbar(image, ax=wide, pad=0.01)
    colours.set_label("share of offsets in a bin", fontsize=7)
    colours.ax.yaxis.set_major_formatter(lambda value, _: f"{value**2:.2g}")
    colours.ax.tick_params(labelsize=6)
    wide.set_yticks(range(len(layers)), list(layers), fontsize=6)
    wide.set_xlabel(f"offset in {UNITS[kind]}", fontsize=7)
    wide.tick_params(axis="x", labelsize=6)
    for axes in narrow:
        shares = [100 * s.clipped / s.taps for s in layers.values()]
        axes.barh(range(len(layers)), shares, color=CLIPPED)
        axes.set_xlabel("% of taps clipped", fontsize=7)
        axes.set_xlim(0, max(1, 1.1 * max(shares)))
        axes.tick_params(labelsize=6)
    return figure
