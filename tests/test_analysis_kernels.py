"""What layers do at a place, against the oracle and by hand."""

import itertools
from collections import OrderedDict

import numpy as np
import pytest
import reference
import torch
import torchvision
from matplotlib.backends.backend_agg import FigureCanvasAgg
from torch import nn

from dk_detectron.analysis import ReceptiveFields, observe
from dk_detectron.analysis.kernel_figures import (
    LayerView,
    draw_histograms,
    draw_kernels,
    draw_samples,
)
from dk_detectron.analysis.kernels import (
    OffsetStatistics,
    chain,
    sampling_points,
    tap_points,
    tap_shifts,
    view_scope,
)
from dk_detectron.layers import (
    CondConv2d,
    DeformConv2d,
    DeformKernelConv2d,
    GlobalDeformKernel2d,
    LocalDeformKernel2d,
)


class Torchvision(nn.Module):
    def __init__(self, groups=1):
        super().__init__()
        self.offset = nn.Conv2d(4, 2 * 9 * groups, 3, padding=1)
        self.conv = torchvision.ops.DeformConv2d(4, 4, 3, padding=1)

    def forward(self, x):
        return self.conv(x, offset=self.offset(x))


def network():
    torch.manual_seed(0)
    net = nn.Sequential(
        OrderedDict(
            local=LocalDeformKernel2d(4, 4, 3, padding=1, groups=4),
            everywhere=GlobalDeformKernel2d(4, 4, (1, 3), padding=(0, 1), scope_size=(2, 5)),
            dcn=DeformConv2d(4, 4, 3, stride=2, padding=1, groups=4),
            gates=CondConv2d(4, 4, 1),
            both=DeformKernelConv2d(4, 4, 3, padding=2, dilation=2, groups=4),
            theirs=Torchvision(),
        )
    ).double()
    for name, parameter in net.named_parameters():
        if "generator" in name or "offset" in name:
            nn.init.normal_(parameter, std=0.4)
    return net


IMAGE = torch.rand(4, 9, 12, dtype=torch.float64)


def inputs(net):
    """What each layer gets."""
    found, x = {}, IMAGE[None]
    for name, layer in net.named_children():
        found[name] = x
        x = layer(x)
    return found


@torch.no_grad()
def test_observations_are_what_the_generators_say():
    net = network().train()
    seen, given = observe(net, IMAGE), inputs(net)
    assert list(seen) == ["local", "everywhere", "dcn", "gates", "both", "theirs.conv"]
    assert [set(s.values) for s in seen.values()] == [
        {"kernel_offset"}, {"kernel_offset"}, {"data_offset"}, {"gate"},
        {"kernel_offset", "data_offset"}, {"data_offset"},
    ]  # fmt: skip
    assert seen["dcn"].input_size == (9, 12) and seen["dcn"].output_size == (5, 6)
    for name, kind in ("local", "kernel_offset"), ("dcn", "data_offset"), ("both", "data_offset"):
        expected = getattr(net.get_submodule(name), f"{kind}_generator")(given[name])[0]
        torch.testing.assert_close(seen[name].values[kind], expected, rtol=1e-12, atol=1e-13)
    expected = net.theirs.offset(given["theirs"])[0]
    values = seen["theirs.conv"].values["data_offset"]
    torch.testing.assert_close(values, expected, rtol=1e-12, atol=1e-13)
    gates = net.gates.gate_generator(given["gates"].mean((2, 3)))[0].sigmoid()
    torch.testing.assert_close(seen["gates"].values["gate"], gates, rtol=1e-12, atol=1e-13)
    assert net.training and not any(m._forward_hooks for m in net.modules())
    with pytest.raises(ValueError, match="model: expected layers of dk_detectron.layers"):
        observe(nn.Conv2d(4, 4, 1), IMAGE)


@torch.no_grad()
@pytest.mark.parametrize("name", ["local", "everywhere", "both"])
def test_the_kernel_at_a_place_is_the_oracles(name):
    net = network()
    layer, seen = net.get_submodule(name), observe(net, IMAGE)[name]
    cell = 2, 3
    view = view_scope(seen, cell)
    bias = layer.kernel_offset_generator.bias
    offset = seen.values["kernel_offset"]
    offset = offset if name == "everywhere" else offset[:, 2, 3]
    rest, here = (
        reference.sample_kernel(layer.weight, o[None], layer.kernel_size)[0].flatten(0, 1)
        for o in (bias, offset)
    )
    strongest = rest.flatten(1).norm(dim=1).argmax()
    np.testing.assert_allclose(view.kernel, here[strongest], rtol=1e-12, atol=1e-13)
    np.testing.assert_allclose(view.rest_kernel, rest[strongest], rtol=1e-12, atol=1e-13)
    np.testing.assert_array_equal(view.scope, layer.weight.flatten(0, 1)[strongest])
    assert view.change == pytest.approx(float((here - rest).norm() / rest.norm()))
    assert view.change > 0.05
    for t, (i, j) in enumerate(itertools.product(*map(range, layer.kernel_size))):
        for axis, tap in enumerate((i, j)):
            size = layer.scope_size[axis]
            place = (size - layer.kernel_size[axis]) / 2 + tap + offset[2 * t + axis].item()
            assert view.places[t, axis] == pytest.approx(place)
            if not 0 <= place <= size - 1:
                assert view.clipped[t]
    assert view.clipped.dtype == bool and not view.clipped.all()


def test_taps_on_the_picture_are_where_the_operator_reads():
    """A convolution of a picture of coordinates reads them: the mean of its taps' places."""
    layer = DeformConv2d(2, 2, 3, stride=2, padding=1, dilation=2, groups=2, bias=False).double()
    nn.init.normal_(layer.data_offset_generator.weight, std=0.02)
    with torch.no_grad():
        layer.weight.fill_(1 / 9)
    x = torch.stack(torch.meshgrid(torch.arange(21.0), torch.arange(25.0), indexing="ij"))
    image = x.double()
    (seen,) = observe(layer, image).values()
    fields = ReceptiveFields(layer, image)
    for cell in (4, 5), (3, 8):
        points = tap_points(seen, fields, cell)
        row, column = layer(image[None])[0][:, cell[0], cell[1]].tolist()
        assert points.mean(0).tolist() == pytest.approx([column + 0.5, row + 0.5])
        grid = np.array(list(itertools.product((-2, 0, 2), repeat=2)))
        moved = seen.values["data_offset"][:, cell[0], cell[1]].view(9, 2).numpy()
        np.testing.assert_allclose(tap_shifts(seen, cell), grid + moved)
        assert fields.cell(fields.centre(cell)) == cell


def test_rigid_taps_are_a_grid():
    net = network()
    seen = observe(net, IMAGE)
    points = tap_points(seen["local"], ReceptiveFields(net, IMAGE, "local"), (4, 6))
    expected = [(6.5 + x, 4.5 + y) for y, x in itertools.product((-1, 0, 1), repeat=2)]
    assert [tuple(point) for point in points.tolist()] == expected
    wide = tap_points(seen["everywhere"], ReceptiveFields(net, IMAGE, "everywhere"), (0, 0))
    assert wide.tolist() == [[-0.5, 0.5], [0.5, 0.5], [1.5, 0.5]]


def test_samples_pass_the_layers_one_after_the_other():
    """Three convolutions whose taps all move by whole pixels: the sum of the moves."""
    moves = {"0": (1, 2), "1": (0, -1), "3": (-2, 1)}
    net = nn.Sequential(
        DeformConv2d(1, 1, 3, padding=1), DeformConv2d(1, 1, 3, stride=2, padding=1),
        nn.Conv2d(1, 1, 1), DeformConv2d(1, 1, 3, padding=1),
    )  # fmt: skip
    for name, move in moves.items():
        with torch.no_grad():
            net[int(name)].data_offset_generator.bias.copy_(torch.tensor(move).repeat(9))
    image = torch.rand(1, 40, 40)
    seen = observe(net, image)
    assert chain(seen, "3", 3) == ["3", "1", "0"]
    assert chain(seen, "3", 2) == ["3", "1"] and chain(seen, "0", 3) == ["0"]
    points = sampling_points(seen, ["3", "1", "0"], ReceptiveFields(net, image, "0"), (10, 10))
    steps = list(itertools.product((-1, 0, 1), repeat=2))
    expected = {
        (20.5 + 2 * (1 + a[1]) + (-1 + b[1]) + (2 + c[1]), 20.5 + 2 * (-2 + a[0]) + b[0] + 1 + c[0])
        for a, b, c in itertools.product(steps, repeat=3)
    }
    assert len(points) == 9**3 and set(map(tuple, points.tolist())) == expected
    # At the border, what leaves a feature map is gone: three of nine taps, then of those.
    few = sampling_points(seen, ["3", "1", "0"], ReceptiveFields(net, image, "0"), (19, 19))
    assert 0 < len(few) < 9**3
    far = seen["3"].values["data_offset"]
    far += 1000
    assert sampling_points(seen, ["3", "0"], ReceptiveFields(net, image, "0"), (5, 5)).shape == (
        0,
        2,
    )
    # Layers of other sizes do not feed one another.
    seen["1"].output_size = 19, 19
    assert chain(seen, "3", 3) == ["3"]


def test_of_groups_of_offsets_the_first_counts():
    net = Torchvision(groups=2).double()
    nn.init.normal_(net.offset.bias)
    (seen,) = observe(net, IMAGE).values()
    offset = seen.values["data_offset"][:18, 3, 4].detach().view(9, 2)
    grid = list(itertools.product((-1, 0, 1), repeat=2))
    np.testing.assert_allclose(tap_shifts(seen, (3, 4)), offset.numpy() + grid)


@torch.no_grad()
def test_statistics_add_up(monkeypatch):
    net = network()
    images = [IMAGE, IMAGE.flip(1), 5 * IMAGE]
    found = OffsetStatistics()
    offsets = []
    for image in images:
        seen = observe(net, image)["local"]
        found.add(seen, "kernel_offset")
        offsets.append(seen.values["kernel_offset"])
    every = torch.stack(offsets)
    taps = torch.tensor(list(itertools.product((0, 1, 2), repeat=2)))[:, :, None, None]
    places = every.unflatten(1, (9, 2)) + taps + 0.5
    outside = ((places < 0) | (places > 3)).any(2)
    numbers = found.numbers()
    assert numbers["clipped"] == pytest.approx(outside.double().mean().item())
    assert 0 < numbers["clipped"] < 1
    assert numbers["mean"] == pytest.approx(every.abs().mean().item(), rel=1e-6)
    assert numbers["largest"] == pytest.approx(every.abs().max().item(), rel=1e-6)
    assert numbers["q50"] == pytest.approx(np.median(every), rel=1e-5)
    assert len(np.concatenate(found.values)) == every.numel()
    monkeypatch.setattr("dk_detectron.analysis.kernels.SAMPLES", 100)
    few = OffsetStatistics()
    few.add(seen, "kernel_offset")
    assert 90 < len(few.values[0]) <= 100 and few.taps == 9 * 9 * 12
    seen.values["kernel_offset"][0, 0, 0] = torch.inf
    with pytest.raises(ValueError, match="kernel_offset: expected finite offsets"):
        few.add(seen, "kernel_offset")
    everywhere = OffsetStatistics()
    everywhere.add(observe(net, IMAGE)["everywhere"], "kernel_offset")
    assert everywhere.taps == 3


def pixels_of(figure):
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())


def test_figures_show_what_they_are_given():
    net = network()
    seen = observe(net, IMAGE)
    picture = np.zeros((9, 12, 3), np.uint8)
    views = [
        LayerView("first", view_scope(seen["local"], (2, 3)), np.array([[3.5, 2.5]])),
        LayerView("second", None, np.array([[30.0, 2.5]])),  # outside the picture
    ]
    figure = draw_kernels("title", picture, (3.5, 2.5), views)
    texts = {text.get_text() for axes in figure.axes for text in axes.texts}
    assert {f"{value:.2f}" for value in views[0].scope.kernel.flat} <= texts
    titles = [axes.get_title() for axes in figure.axes]
    assert titles[0] == "first" and titles[4] == "second"
    assert titles[3] == f"kernel here: changed by {views[0].scope.change:.0%}"
    dots = [line.get_xydata()[0] for line in figure.axes[1].lines if line.get_marker() == "o"]
    read = views[0].scope.places.clip(0, 3)[:, ::-1]
    np.testing.assert_allclose(dots[1::2], read)
    assert np.ptp(pixels_of(figure)) == 255
    alone = draw_kernels("title", picture, (3.5, 2.5), views[1:])
    assert len(alone.axes) == 1

    places = np.array([[1.0, 2.0], [3.0, 4.0]])
    figure = draw_samples("title", picture, [("a", (1, 1), places), ("b", (1, 1), places[:0])])
    np.testing.assert_array_equal(figure.axes[0].lines[1].get_xydata(), places)
    assert [a.get_title() for a in figure.axes] == [
        "a\n2 places on the picture",
        "b\n0 places on the picture",
    ]
    assert np.ptp(pixels_of(figure)) == 255


def test_histograms_have_a_row_for_each_layer():
    wide, still = OffsetStatistics(), OffsetStatistics()
    layer = LocalDeformKernel2d(1, 1, 3, padding=1)
    for statistics, scale in (wide, 2.0), (still, 0.0):
        nn.init.constant_(layer.kernel_offset_generator.bias, scale)
        (seen,) = observe(layer, torch.rand(1, 4, 4)).values()
        statistics.add(seen, "kernel_offset")
    layers = {"wide": wide, "still": still}
    figure = draw_histograms("title", "kernel_offset", layers)
    density = figure.axes[0].images[0].get_array().filled(0)
    assert density.shape[0] == 2 and density.sum(1).tolist() == [1, 1]
    assert density[1, 40] == 1 and density[0, -1] == 1
    assert [text.get_text() for text in figure.axes[0].get_yticklabels()] == ["wide", "still"]
    bars = [bar.get_width() for bar in figure.axes[1].patches]
    # Of rows and columns moved by 2 only the first of each stay inside: one tap of nine.
    assert bars == pytest.approx([100 * 8 / 9, 0])
    assert np.ptp(pixels_of(figure)) == 255
    data = draw_histograms("title", "data_offset", {"still": still})
    assert len(data.axes) == 2  # and the colours


@torch.no_grad()
def test_of_a_layer_that_runs_on_several_maps_the_first_counts():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = LocalDeformKernel2d(4, 4, 3, padding=1, groups=4).double()
            nn.init.normal_(self.layer.kernel_offset_generator.weight, std=0.4)

        def forward(self, x):
            return self.layer(self.layer(x)[:, :, ::2, ::2])

    net = Twice()
    seen = observe(net, IMAGE)["layer"]
    assert seen.input_size == seen.output_size == (9, 12)
    expected = net.layer.kernel_offset_generator(IMAGE[None])[0]
    torch.testing.assert_close(seen.values["kernel_offset"], expected, rtol=1e-12, atol=1e-13)
