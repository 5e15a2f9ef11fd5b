"""Theoretical receptive fields, read from the graph that autograd keeps of a forward pass.

Along each axis, a place of a feature map depends on an interval of places of the map before. The
intervals are followed back from the feature map to the picture, over all paths.

Taps are taken where they rest: offsets, which may lead anywhere, are left aside, as are the gates
of conditional convolutions and the statistics of norms. So deformable convolutions and kernels have
the field of the rigid network, which is the paper's point: *"adapting the ERF while leaving the
receptive field untouched"* (section 1).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge

from ..layers import AdaptiveConv2d
from .offsets import FOREIGN

Node = Any  # of autograd's graph
# From places of an output to those of the input. [2, 4]: for both axes the first and last place of
# the field, and the first and last along the narrowest path.
Step = Callable[[np.ndarray], np.ndarray]

# Names of nodes, without Backward and a number, whose places are those of their inputs.
IN_PLACE = set(
    """Abs Add Addcmul Alias Clamp ClampMax ClampMin Clone CopySlices CudnnBatchNorm Div Elu Exp
    Gelu Hardsigmoid Hardswish Hardtanh LeakyRelu Log Maximum Minimum Mish Mul NativeBatchNorm
    NativeDropout NativeGroupNorm Neg Pow PreluKernel Relu Rsub Sigmoid Silu Softplus Sqrt Squeeze
    Sub Tanh Threshold ToCopy Unsqueeze Where""".split()
)  # CopySlices: torchvision's padding, which copies into the upper left corner
# The same, unless along rows or columns.
ALONG_CHANNELS = "Cat", "Select", "Split", "SplitWithSizes", "Stack", "Unbind"
# Layers that are one step, whatever they are made of.
WINDOWS = AdaptiveConv2d, *FOREIGN, nn.Conv2d, nn.ConvTranspose2d, nn.MaxPool2d, nn.AvgPool2d


class Unit(NamedTuple):
    """The call of a layer with a sliding window: the node of its input, and the step to it."""

    input: Node
    step: Step


def _both(step: Callable[[np.ndarray, int], np.ndarray]) -> Step:
    """A step that is given each axis in turn."""
    return lambda places: np.stack([step(places[axis], axis) for axis in range(2)])


def _same(places: np.ndarray) -> np.ndarray:
    return places


def _everything(places: np.ndarray) -> np.ndarray:
    return np.tile([-np.inf, np.inf], (2, 2))


def _pair(value: Any) -> tuple[Any, Any]:
    """Both of two numbers; one or a single one in a list stands for both."""
    both = tuple(value) if isinstance(value, list | tuple) else (value,)
    return (both[0], both[-1])


def _padding(padding, kernel, dilation) -> tuple[int, int]:
    if padding == "same":
        rows, columns = ((k - 1) * d // 2 for k, d in zip(kernel, dilation, strict=True))
        return rows, columns
    return (0, 0) if padding == "valid" else _pair(padding)


def _window(kernel, stride, padding, dilation=1) -> Step:
    kernel, dilation = _pair(kernel), _pair(dilation)
    stride = _pair(stride or kernel)  # of a pool without its own
    padding = _padding(padding, kernel, dilation)

    def step(places, axis):
        reach = (kernel[axis] - 1) * dilation[axis]
        return places * stride[axis] - padding[axis] + np.array([0, reach, 0, reach])

    return _both(step)


def _transposed_window(kernel, stride, padding, dilation=1) -> Step:
    kernel, stride, padding, dilation = map(_pair, (kernel, stride, padding, dilation))

    def step(places, axis):
        reach = (kernel[axis] - 1) * dilation[axis]
        shifted = (places + padding[axis] - np.array([reach, 0, reach, 0])) / stride[axis]
        return np.where([True, False, True, False], np.ceil(shifted), np.floor(shifted))

    return _both(step)


def _scaled(node: Node, neighbours: bool) -> Step:
    """Interpolation: nearest, that is, the one at or before; or between neighbours."""
    into, out = node._saved_self_sym_sizes[-2:], node._saved_output_size
    factors = node._saved_scales_h, node._saved_scales_w  # where it is told these, not the size
    corners = neighbours and node._saved_align_corners

    def step(places, axis):
        old, new = (1, factors[axis]) if factors[axis] else (into[axis], out[axis])
        if not neighbours:
            return np.floor(places * old / new)
        if corners and out[axis] > 1:
            location = places * (into[axis] - 1) / (out[axis] - 1)
        else:
            location = (places + 0.5) * old / new - 0.5
        return np.array([*map(np.floor, location[:1]), *map(np.ceil, location[1:2]), *location[2:]])

    return _both(step)


def _shifted(pad: tuple[int, ...]) -> Step:
    """Padding, of the last axis first; what is negative cuts off."""
    before = (_signed(pad[2]) if len(pad) > 2 else 0, _signed(pad[0]))
    return _both(lambda places, axis: places - before[axis])


def _signed(number: int) -> int:
    """A number of a node, which keeps those below zero as unsigned ones of 64 bits."""
    return number - 2**64 if number >= 2**63 else number


def _axis(node: Node) -> int:
    """The axis that a node is about: 0 or 1 of rows or columns, less of channels or the batch."""
    sizes = getattr(node, "_saved_self_sym_sizes", (1, 1, 1, 1))
    return _signed(node._saved_dim) % len(sizes) - len(sizes) + 2


def _sliced(node: Node) -> Step:
    axis, every = _axis(node), getattr(node, "_saved_step", 1)
    if axis < 0:
        return _same
    start, size = _signed(node._saved_start), node._saved_self_sym_sizes[axis - 2]
    start = start if start >= 0 else max(start + size, 0)
    return _both(lambda places, a: places * every + start if a == axis else places)


def _step(node: Node) -> Step:
    """What a node of autograd's graph does to places; what is not known may reach everywhere."""
    name = re.sub(r"^.*::|(Backward)?\d*$", "", node.name())
    if name in IN_PLACE or (name in ALONG_CHANNELS and _axis(node) < 0):
        return _same
    if name in ("Convolution", "MkldnnConvolution", "CudnnConvolution"):
        kind = _transposed_window if getattr(node, "_saved_transposed", False) else _window
        sizes = node._saved_stride, node._saved_padding, node._saved_dilation
        return kind(node._saved_weight.shape[2:], *sizes)
    if name == "MaxPool2DWithIndices":
        sizes = node._saved_stride, node._saved_padding, node._saved_dilation
        return _window(node._saved_kernel_size, *sizes)
    if name == "AvgPool2D":
        return _window(node._saved_kernel_size, node._saved_stride, node._saved_padding)
    if name in ("UpsampleNearest2D", "UpsampleBilinear2D"):
        return _scaled(node, neighbours=name == "UpsampleBilinear2D")
    if name == "ConstantPadNd":
        return _shifted(node._saved_pad)
    if name == "Slice":
        return _sliced(node)
    return _everything


def _layer(layer: nn.Module) -> Step:
    """What a layer with a sliding window does to places."""
    if getattr(layer, "padding_mode", "zeros") == "circular":  # it reads the far edge as well
        return _everything
    kind = _transposed_window if getattr(layer, "transposed", False) else _window
    return kind(layer.kernel_size, layer.stride, layer.padding, getattr(layer, "dilation", 1))


@contextmanager
def recorded_units(model: nn.Module) -> Iterator[dict[Node, Unit]]:
    """Within it, notes the calls of all layers with a sliding window, adaptive ones included."""
    units: dict[Node, Unit] = {}

    def note(layer, args, kwargs, output):
        input = next(iter([*args, *kwargs.values()]), None)
        maps = (t for t in (input, output))
        if not all(isinstance(t, Tensor) and t.dim() == 4 and t.requires_grad for t in maps):
            return
        units[get_gradient_edge(output).node] = Unit(get_gradient_edge(input).node, _layer(layer))

    handles = [
        module.register_forward_hook(note, with_kwargs=True)
        for module in model.modules()
        if isinstance(module, WINDOWS)
    ]
    try:
        yield units
    finally:
        for handle in handles:
            handle.remove()


class Field(NamedTuple):
    """The theoretical field of a place of a feature map, in places of the picture.

    Attributes:
        low, high: (row, column) of the first and the last pixel, also where these lie outside the
            picture; infinite if there is no bound, or none known.
        centre: (row, column) of the centre of its narrowest path; NaN if none is known.
    """

    low: tuple[float, float]
    high: tuple[float, float]
    centre: tuple[float, float]


class FieldGraph:
    """Fields of the places of one feature map."""

    def __init__(self, output: Tensor, image: Tensor, units: dict[Node, Unit]):
        """
        Args:
            output: the feature map.
            image: the leaf that it was computed from.
            units: of :func:`recorded_units`, around the forward pass.
        """
        self._start, self._end = (get_gradient_edge(t).node for t in (output, image))
        self._edges: dict[Node, list[tuple[Node, Step]]] = {}
        self._order = self._sort(units)

    def _inputs(self, node: Node, units: dict[Node, Unit]) -> list[tuple[Node, Step]]:
        if node in units:
            return [units[node]]
        step = _step(node)
        return [(before, step) for before, _ in node.next_functions if before is not None]

    def _sort(self, units: dict[Node, Unit]) -> list[Node]:
        """The nodes on the way to the picture, each before those that it is computed from."""
        order: list[Node] = []
        stack: list[tuple[Node, bool]] = [(self._start, False)]
        while stack:
            node, finished = stack.pop()
            if finished:
                order.append(node)
            elif node not in self._edges:
                self._edges[node] = self._inputs(node, units)
                stack.append((node, True))
                stack += [(before, False) for before, _ in self._edges[node]]
        return order[::-1]

    def field(self, row: float, column: float) -> Field:
        """The field of one place."""
        reached = {self._start: np.tile(np.array([[row], [column]], dtype=float), 4)}
        for node in self._order:
            for before, step in self._edges[node]:
                places = step(reached[node])
                reached[before] = _union(reached[before], places) if before in reached else places
        if self._end not in reached:
            raise ValueError("output: expected a feature map that depends on the image")
        low, high, *core = reached[self._end].T
        with np.errstate(invalid="ignore"):  # from minus to plus infinity
            centre = (core[0] + core[1]) / 2
        return Field(*((float(row), float(column)) for row, column in (low, high, centre)))


def _union(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """The hull of two fields, and the narrower of their cores."""
    low, high = np.minimum(one[:, :1], other[:, :1]), np.maximum(one[:, 1:2], other[:, 1:2])
    narrower = np.ptp(one[:, 2:], axis=1) <= np.ptp(other[:, 2:], axis=1)
    return np.hstack([low, high, np.where(narrower[:, None], one[:, 2:], other[:, 2:])])
