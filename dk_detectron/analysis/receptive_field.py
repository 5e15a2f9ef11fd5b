"""Effective receptive fields (section 3.1; Luo et al. 2016), of any network and feature map.

    R(i; j) = sum_c | d (sum_co O[co, j]) / d I[c, i] |

How much the output at place j moves, summed over its channels, for every pixel i of the picture: at
once by one backward pass.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .forward import explained, feature_map, frozen, place
from .offsets import derivative
from .theoretical import FieldGraph, recorded_units


class ReceptiveFields:
    """The fields of one feature map of one picture: one forward pass, and a backward one for each.

    Places in the picture are points (x, y) in pixels, from 0 to its width and height: the centre of
    its first pixel is (0.5, 0.5). Those of the feature map are cells (row, column).

    Attributes:
        size: (height, width) of the feature map.
        strides: (down, across) from cell to cell, in pixels.
    """

    def __init__(
        self, model: nn.Module, image: Tensor, output: str | None = None, *, attached: bool = True
    ):
        """As :func:`effective_receptive_field`."""
        self._image = place(model, image).requires_grad_()
        with (
            frozen(model),
            derivative(model, attached=attached),
            recorded_units(model) as units,
            torch.enable_grad(),
        ):
            self._output = feature_map(model, self._image, output)
        if not self._output.requires_grad:
            raise ValueError(
                f"output: expected a feature map that depends on the image, got {output!r}, which "
                "does not, or was computed without gradients"
            )
        self._graph = FieldGraph(self._output, self._image, units)
        self.size = tuple(self._output.shape[2:])
        self._axes = [self._centres(axis) for axis in range(2)]
        self.strides = self._axes[0][1], self._axes[1][1]

    def _centres(self, axis: int) -> tuple[float, float]:
        """Along an axis, the pixel at which the first cell's field is centred, and their stride."""
        cells, pixels = self.size[axis], self._image.shape[1 + axis]
        first, last = (self._graph.field(n, n).centre[axis] for n in (0, cells - 1))
        if cells > 1 and last > first:
            return first, (last - first) / (cells - 1)
        # A single cell; or the theoretical field is not known, and cells are spread evenly.
        return pixels / cells / 2 - 0.5, pixels / cells

    def cell(self, point: Sequence[float]) -> tuple[int, int]:
        """The place of the feature map whose field is centred nearest to a point.

        Raises:
            ValueError: the point is outside the picture.
        """
        height, width = self._image.shape[1:]
        x, y = point
        if not (0 <= x <= width and 0 <= y <= height):
            raise ValueError(
                f"points: expected x from 0 to {width} and y from 0 to {height}, got ({x}, {y})"
            )
        row, column = (
            min(max(round((pixel - first) / stride), 0), cells - 1)
            for pixel, (first, stride), cells in zip(
                (y - 0.5, x - 0.5), self._axes, self.size, strict=True
            )
        )
        return row, column

    def centre(self, cell: tuple[float, float]) -> tuple[float, float]:
        """The point (x, y) at which a cell's theoretical field is centred."""
        y, x = (
            n * stride + first + 0.5 for n, (first, stride) in zip(cell, self._axes, strict=True)
        )
        return x, y

    def effective(self, cell: tuple[int, int]) -> Tensor:
        """R of a cell, [H, W].

        Raises:
            ValueError: it is not finite.
            NotImplementedError: detectron2's own deformable convolution, on a CPU.
        """
        row, column = cell
        with explained(), torch.enable_grad():
            value = self._output[0, :, row, column].sum()
            (gradient,) = torch.autograd.grad(value, self._image, retain_graph=True)
        field = gradient.abs().sum(0)
        if not field.isfinite().all():
            raise ValueError(
                "model: expected finite derivatives, got others; its weights, or the picture's "
                "pixels, are not finite or far too large"
            )
        return field

    def theoretical(self, cell: tuple[int, int]) -> tuple[float, float, float, float]:
        """The box (x0, y0, x1, y1) of the pixels that can have an influence, by the rigid taps.

        In pixels, also outside the picture; infinite where there is no bound, or none known, as
        behind a global pool. Offsets, gates and the statistics of norms are left aside.
        """
        field = self._graph.field(*cell)
        return field.low[1], field.low[0], field.high[1] + 1, field.high[0] + 1


def effective_receptive_field(
    model: nn.Module,
    image: Tensor,
    points: Sequence[Sequence[float]] | Tensor,
    output: str | None = None,
    *,
    attached: bool = True,
) -> Tensor:
    """How much each pixel of a picture contributes to a feature map at given points.

    The model runs in evaluation mode, once, no further than the feature map, and is left as it was.
    Each point takes a backward pass.

    Args:
        model: any network: a detector of detectron2 or torchvision, a classifier, a backbone. Of
            layers that deform: those of :mod:`dk_detectron.layers` and
            ``torchvision.ops.DeformConv2d`` anywhere, detectron2's on a GPU.
        image: one picture [C, H, W] as the model takes it: for detectors and the project's
            classifier pixels of 0 to 255, for others what they are trained on. Derivatives are
            for this unit.
        points: P of (x, y), in pixels; (0.5, 0.5) is the centre of the first. Each is taken to the
            place of the feature map whose theoretical field is centred nearest.
        output: which feature map: the name of a submodule, or a key of a dict that it returns (see
            :func:`dk_detectron.analysis.forward.feature_map`). The model's own result by default.
        attached: whether the derivative also goes through what adapts the layers: offsets, gates
            and masks. With it, the default, the field is what a small change of each pixel does, in
            all. Without, they are held fixed: eq. 8, 10 and 11, in which the offsets are given, and
            which say where the kernel's taps look, not what the generators look at.

    Returns:
        [P, H, W], not negative, on the model's device.

    Raises:
        ValueError: no such output, a point outside the picture, a result that is not finite.
        NotImplementedError: detectron2's own deformable convolution, on a CPU.
    """
    fields = ReceptiveFields(model, image, output, attached=attached)
    cells = [fields.cell(point) for point in torch.as_tensor(points).reshape(-1, 2).tolist()]
    found = [fields.effective(cell) for cell in cells]
    return torch.stack(found) if found else image.new_empty(0, *image.shape[1:])
