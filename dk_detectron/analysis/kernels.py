"""What deformable layers do at a place: where their taps sample the scope, and the picture."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..ops import outside_scope, sample_kernel, tap_locations
from .offsets import Observation
from .receptive_field import ReceptiveFields

OFFSETS = "kernel_offset", "data_offset"
# Of each picture and layer, at most so many offsets are kept for histograms.
SAMPLES = 100_000


@dataclass(frozen=True)
class ScopeView:
    """A deformable kernel at one place of its feature map (eq. 7 and 12).

    Attributes:
        scope: [S_h, S_w], of the channels whose kernel is strongest.
        rest, places: [K, 2], (row, column) in the scope, where the taps are by the generator's bias
            alone, and here; also where these lie outside.
        clipped: [K], whether the tap is kept inside.
        rest_kernel, kernel: [K_h, K_w], of the same channels, sampled at both.
        change: norm of the change of all channels' kernels, over that of the kernels at rest.
    """

    scope: np.ndarray
    rest: np.ndarray
    places: np.ndarray
    clipped: np.ndarray
    rest_kernel: np.ndarray
    kernel: np.ndarray
    change: float


def offset_at(observation: Observation, kind: str, cell: tuple[int, int]) -> Tensor:
    """The offsets [2*K] at a place; of several groups of offsets, the first."""
    offset = observation.values[kind]
    offset = offset if offset.dim() == 1 else offset[:, cell[0], cell[1]]
    return offset[: 2 * int(np.prod(kernel_size(observation.layer)))]


def kernel_size(layer: Any) -> tuple[int, int]:
    """Of an adaptive layer, of whichever library."""
    return tuple(layer.weight.shape[2:]) if not hasattr(layer, "scope_size") else layer.kernel_size


@torch.no_grad()
def view_scope(observation: Observation, cell: tuple[int, int]) -> ScopeView:
    """What the kernel of a layer with kernel offsets is at a place; of several groups, the first.

    Factors of the taps are left aside.
    """
    layer: Any = observation.layer
    size = layer.kernel_size
    weight = layer.weight.detach().double().cpu()
    weight = weight.chunk(layer.offset_groups, int(layer.groups == 1))[0]
    here = offset_at(observation, "kernel_offset", cell)
    offset = torch.stack([layer.kernel_offset_generator.bias[: len(here)], here])
    offset = offset.double().cpu()
    rest, places = torch.stack(tap_locations(offset, layer.scope_size, size), -1).numpy()
    row, column = outside_scope(offset[1:], layer.scope_size, size)
    kernels = sample_kernel(weight, offset, size).flatten(1, 2)  # [2, channels, K_h, K_w]
    strongest = kernels[0].flatten(1).norm(dim=1).argmax()
    return ScopeView(
        scope=weight.flatten(0, 1)[strongest].numpy(),
        rest=rest,
        places=places,
        clipped=(row | column)[0].numpy(),
        rest_kernel=kernels[0, strongest].numpy(),
        kernel=kernels[1, strongest].numpy(),
        change=float((kernels[1] - kernels[0]).norm() / kernels[0].norm()),
    )


def tap_shifts(observation: Observation, cell: tuple[int, int]) -> np.ndarray:
    """Where a layer's taps read its input, from the centre of their rigid grid: [K, 2] of rows and
    columns of the input."""
    layer: Any = observation.layer
    (rows, columns), dilation = kernel_size(layer), layer.dilation
    grid = np.mgrid[:rows, :columns].reshape(2, -1).T.astype(float)
    shifts = (grid - np.array([rows - 1, columns - 1]) / 2) * np.array(dilation)
    if "data_offset" in observation.values:
        offset = offset_at(observation, "data_offset", cell)
        shifts += offset.double().cpu().numpy().reshape(-1, 2)
    return shifts


def tap_points(
    observation: Observation, fields: ReceptiveFields, cell: tuple[int, int]
) -> np.ndarray:
    """The same as points (x, y) of the picture, [K, 2].

    Args:
        fields: of the layer's output.
    """
    stride = np.array(fields.strides) / np.array(observation.layer.stride)
    return np.array(fields.centre(cell)) + (tap_shifts(observation, cell) * stride)[:, ::-1]


def chain(observations: dict[str, Observation], last: str, levels: int) -> list[str]:
    """The names of up to ``levels`` layers with data offsets that feed one another, last first.

    One feeds the next if its output has the size of the next one's input; what lies between them,
    such as 1x1 convolutions, is taken to leave places as they are.
    """
    names = [name for name, seen in observations.items() if "data_offset" in seen.values]
    found = [last]
    for name in reversed(names[: names.index(last)]):
        if len(found) == levels or (
            observations[name].output_size != observations[found[-1]].input_size
        ):
            break
        found.append(name)
    return found


def sampling_points(
    observations: dict[str, Observation],
    names: list[str],
    fields: ReceptiveFields,
    cell: tuple[int, int],
) -> np.ndarray:
    """Where the taps of several layers lead, one after the other: points (x, y), up to K**levels.

    As in Dai et al. 2017, Figure 6. Taps that leave a feature map see nothing, and are left out.

    Args:
        names: of :func:`chain`.
        fields: of the output of the last of ``names``.
        cell: of the first of ``names``.
    """
    cells = [cell]
    for name in names[:-1]:
        seen = observations[name]
        cells = [read for c in cells for read in _cells_read(seen, c)]
    points = [tap_points(observations[names[-1]], fields, c) for c in cells]
    return np.concatenate(points) if points else np.empty((0, 2))


def _cells_read(observation: Observation, cell: tuple[int, int]) -> list[tuple[int, int]]:
    """The places of a layer's input that are nearest to where its taps read it."""
    layer: Any = observation.layer
    reach = (np.array(kernel_size(layer)) - 1) * np.array(layer.dilation)
    centre = np.array(cell) * np.array(layer.stride) - np.array(layer.padding) + reach / 2
    places = np.rint(centre + tap_shifts(observation, cell)).astype(int)
    inside = ((places >= 0) & (places < np.array(observation.input_size))).all(1)
    return [(int(row), int(column)) for row, column in places[inside]]


@dataclass
class OffsetStatistics:
    """The offsets of one kind in one layer, over pictures.

    Attributes:
        taps: number of taps.
        clipped: number of those outside the scope.
        largest, total: maximum and sum of absolute values.
        values: offsets, or an even selection of them, from each picture.
    """

    taps: int = 0
    clipped: int = 0
    largest: float = 0.0
    total: float = 0.0
    values: list[np.ndarray] = field(default_factory=list)

    def add(self, observation: Observation, kind: str) -> None:
        """The offsets of one more picture.

        Raises:
            ValueError: they are not finite.
        """
        offset = observation.values[kind].float()
        if not offset.isfinite().all():
            raise ValueError(
                f"{kind}: expected finite offsets, got others; the network has diverged"
            )
        self.taps += offset.numel() // 2
        self.largest = max(self.largest, float(offset.abs().max()))
        self.total += float(offset.abs().sum(dtype=torch.float64))
        if kind == "kernel_offset":
            layer: Any = observation.layer
            row, column = outside_scope(offset[None], layer.scope_size, layer.kernel_size)
            self.clipped += int((row | column).sum())
        flat = offset.flatten()
        self.values.append(flat[:: -(-len(flat) // SAMPLES)].cpu().numpy())

    def numbers(self) -> dict[str, float]:
        """Their mean and largest absolute value, quantiles, and the share of clipped taps."""
        values = np.concatenate(self.values)
        quantiles = dict(
            zip(("q05", "q50", "q95"), np.quantile(values, (0.05, 0.5, 0.95)), strict=True)
        )
        return {
            "mean": self.total / (2 * self.taps),
            "largest": self.largest,
            **{name: float(value) for name, value in quantiles.items()},
            "clipped": self.clipped / self.taps,
        }


def no_statistics() -> dict[str, dict[str, OffsetStatistics]]:
    """Of each kind of offsets, those of layers by name: of no picture yet."""
    return {kind: defaultdict(OffsetStatistics) for kind in OFFSETS}


def add_statistics(
    statistics: dict[str, dict[str, OffsetStatistics]], seen: dict[str, Observation]
) -> None:
    """Adds what :func:`~dk_detectron.analysis.observe` gave of one more picture.

    Raises:
        ValueError: offsets are not finite.
    """
    for name, observation in seen.items():
        for kind in observation.values.keys() & set(OFFSETS):
            statistics[kind][name].add(observation, kind)
