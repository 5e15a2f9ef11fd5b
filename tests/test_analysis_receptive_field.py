"""Effective receptive fields: the paper's equations, other networks, and what is refused."""

import importlib.util
import math
import sys
import types
from itertools import product

import pytest
import torch
import torch.nn.functional as F
import torchvision
from detectron2.layers import get_norm
from detectron2.modeling import build_model
from torch import nn

from dk_detectron.analysis import ReceptiveFields, effective_receptive_field, offsets
from dk_detectron.analysis.forward import deepest_feature, run
from dk_detectron.analysis.offsets import derivative
from dk_detectron.layers import (
    CondConv2d,
    DeformConv2d,
    DeformKernelConv2d,
    GlobalDeformKernel2d,
    LocalDeformKernel2d,
)
from dk_detectron.model_zoo import load_config

SIZE = 7
TAPS = list(product((-1, 0, 1), repeat=2))


class Torchvision(nn.Module):
    """torchvision's deformable convolution, with a generator of its offsets."""

    def __init__(self):
        super().__init__()
        self.data_offset_generator = nn.Conv2d(1, 18, 3, padding=1)
        self.layer = torchvision.ops.DeformConv2d(1, 1, 3, padding=1, bias=False)
        self.weight = self.layer.weight

    def forward(self, x):
        return self.layer(x, self.data_offset_generator(x))


def layer(kind, **arguments):
    """A layer 1 -> 1 whose offsets differ from place to place, some of them beyond the scope."""
    if kind is Torchvision:
        made = Torchvision()
    else:
        made = kind(1, 1, 3, padding=1, bias=False, **arguments)
    for name, parameter in made.named_parameters():
        if "generator" in name:
            nn.init.normal_(parameter, std=0.5)
    return made.double()


KINDS = {
    "rigid, eq. 3": nn.Conv2d,
    "local DK, eq. 8": LocalDeformKernel2d,
    "global DK, eq. 8": GlobalDeformKernel2d,
    "DCN, eq. 10": DeformConv2d,
    "torchvision's DCN, eq. 10": Torchvision,
    "DCN + DK, eq. 11": DeformKernelConv2d,
}


# The equations, as sums over all paths from an output to the pixels. They share with the package
# neither code nor autograd: Python's own numbers, loops over taps, cells and pixels.


def bilinear(a: float, b: int) -> float:
    """Along one axis, eq. 12."""
    return max(0.0, 1 - abs(a - b))


def offsets_of(module, x, kind):
    """[row, column][tap][j]: what a generator predicts for the input x [1, 1, H, W]."""
    generator = getattr(module, f"{kind}_offset_generator", None)
    if generator is None:
        return lambda tap, j: (0.0, 0.0)
    if isinstance(generator, nn.Linear):
        values = F.linear(x.mean((2, 3)), generator.weight, generator.bias)[0, :, None, None]
        values = values.expand(-1, SIZE, SIZE)
    else:
        values = F.conv2d(x, generator.weight, generator.bias, padding=1)[0]
    return lambda tap, j: (values[2 * tap][j].item(), values[2 * tap + 1][j].item())


def kernel_value(module, offset, tap) -> float:
    """W at k + offset, clipped to the scope (eq. 7 and 12)."""
    weight = module.weight[0, 0]
    place = [
        min(max(k + (size - 1) / 2 + o, 0), size - 1)
        for k, o, size in zip(TAPS[tap], offset, weight.shape, strict=True)
    ]
    return sum(
        bilinear(place[0], row) * bilinear(place[1], column) * weight[row, column].item()
        for row, column in product(*map(range, weight.shape))
    )


def pixels_near(place):
    """The pixels of an infinite image that bilinear interpolation reads at a place."""
    for row, column in product(*((math.floor(p), math.floor(p) + 1) for p in place)):
        share = bilinear(place[0], row) * bilinear(place[1], column)
        if share:
            yield (row, column), share


class Step:
    """One layer at its input: the pixels that output j reads, and with what factor."""

    def __init__(self, module, x):
        kernel, data = (offsets_of(module, x, kind) for kind in ("kernel", "data"))
        self.reads = {}
        for j in product(range(SIZE), repeat=2):
            reads = self.reads[j] = []
            for tap, k in enumerate(TAPS):
                value = kernel_value(module, kernel(tap, j), tap)
                place = [a + b + c for a, b, c in zip(j, k, data(tap, j), strict=True)]
                for pixel, share in pixels_near(place):
                    if all(0 <= p < SIZE for p in pixel):
                        reads.append((pixel, share * value))

    def output(self, x):
        out = torch.zeros_like(x)
        for j, reads in self.reads.items():
            out[0, 0][j] = sum(factor * x[0, 0][i].item() for i, factor in reads)
        return out


def sum_over_paths(steps, j, gates=None):
    """R(i; j) for every i: the factors along each path, multiplied, and summed over the paths."""
    field = torch.zeros(SIZE, SIZE, dtype=torch.float64)

    def follow(place, depth, factor):
        if gates is not None and depth >= 0:
            factor *= gates[depth][place]
        if depth < 0:
            field[place] += factor
        elif factor:
            for pixel, share in steps[depth].reads[place]:
                follow(pixel, depth - 1, factor * share)

    follow(j, len(steps) - 1, 1.0)
    return field


def centre_of(cell):
    """The point (x, y) of a pixel."""
    return cell[1] + 0.5, cell[0] + 0.5


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_fields_of_linear_networks_are_the_papers(kind):
    layers = [layer(kind) for _ in range(3)]
    image = torch.rand(1, SIZE, SIZE, dtype=torch.float64)
    x, steps = image[None], []
    for module in layers:
        steps.append(Step(module, x))
        x = steps[-1].output(x)
    cells = [(3, 3), (0, 0), (6, 2)]
    net = nn.Sequential(*layers)
    assert net(image[None]).sub(x).abs().max() < 1e-12
    fields = effective_receptive_field(net, image, [centre_of(c) for c in cells], attached=False)
    for field, cell in zip(fields, cells, strict=True):
        expected = sum_over_paths(steps, cell).abs()
        assert expected.max() > 1e-3
        torch.testing.assert_close(field, expected, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("kind", [nn.Conv2d, LocalDeformKernel2d, DeformKernelConv2d])
def test_relu_gates_the_paths(kind):
    """The equation after 6: a path counts if every unit on it fires."""
    layers = [layer(kind) for _ in range(3)]
    image = torch.rand(1, SIZE, SIZE, dtype=torch.float64)
    x, steps, gates = image[None], [], []
    for module in layers:
        steps.append(Step(module, x))
        x = steps[-1].output(x)
        gates.append({j: float(x[0, 0][j] > 0) for j in product(range(SIZE), repeat=2)})
        x = x.relu()
    net = nn.Sequential(*(part for module in layers for part in (module, nn.ReLU())))
    fires = [j for j in product(range(SIZE), repeat=2) if gates[-1][j]][::5]
    points = [centre_of(j) for j in fires]
    fields = effective_receptive_field(net, image, points, attached=False)
    for field, cell in zip(fields, fires, strict=True):
        expected = sum_over_paths(steps, cell, gates).abs()
        torch.testing.assert_close(field, expected, rtol=1e-12, atol=1e-13)
    assert any((field == 0).any() and field.any() for field in fields)  # it is porous


def test_a_norm_folds_into_the_kernel():
    norm = get_norm("BN", 1).double()
    with torch.no_grad():
        norm.weight.fill_(-1.7), norm.bias.fill_(0.3)
        norm.running_mean.fill_(0.2), norm.running_var.fill_(0.7)
    conv = layer(nn.Conv2d)
    folded = layer(nn.Conv2d)
    with torch.no_grad():
        folded.weight.copy_(conv.weight * -1.7 / math.sqrt(0.7 + norm.eps))
    net = nn.Sequential(conv, norm, layer(nn.Conv2d))
    net.train()
    image = torch.rand(1, SIZE, SIZE, dtype=torch.float64)
    (field,) = effective_receptive_field(net, image, [(3.5, 3.5)])
    steps = [Step(module, image[None]) for module in (folded, net[2])]
    torch.testing.assert_close(field, sum_over_paths(steps, (3, 3)).abs(), rtol=1e-12, atol=1e-13)
    assert net.training and norm.training and norm.running_mean.item() == pytest.approx(0.2)


@pytest.mark.parametrize(
    "kind",
    [LocalDeformKernel2d, GlobalDeformKernel2d, DeformConv2d, DeformKernelConv2d, CondConv2d],
)
@pytest.mark.parametrize("attached", [True, False])
def test_the_derivative_is_that_of_a_small_change(kind, attached):
    """Attached, of all that a pixel changes, with taps beyond the scope; else at given offsets."""
    net = nn.Sequential(layer(kind), nn.Sigmoid(), layer(kind))
    image = torch.rand(1, SIZE, SIZE, dtype=torch.float64)
    cell = (2, 4)
    (field,) = effective_receptive_field(net, image, [centre_of(cell)], attached=attached)
    generators = [g for module in net[::2] for g in module.generators]
    given = []
    handles = [g.register_forward_hook(lambda _, __, out: given.append(out)) for g in generators]
    net(image[None])
    for handle in handles:
        handle.remove()
    if kind in (LocalDeformKernel2d, DeformKernelConv2d):  # a scope of 4: from -0.5 to 3.5
        assert any((out[:, :2] < -0.5).any() for out in given)
    if not attached:
        for generator, out in zip(generators, given, strict=True):
            generator.register_forward_hook(lambda _, __, ___, out=out: out)
    step = 1e-6
    for i in product(range(SIZE), repeat=2):
        change = torch.zeros_like(image)
        change[0][i] = step
        with torch.no_grad():
            ends = [net((image + sign * change)[None])[0, 0][cell] for sign in (1, -1)]
        expected = abs(ends[0] - ends[1]) / (2 * step)
        # Of the second order, and rounding over the step.
        torch.testing.assert_close(field[i], expected, rtol=1e-5, atol=1e-8)


def test_offsets_held_fixed_are_another_field():
    net = layer(LocalDeformKernel2d)
    image = torch.rand(1, SIZE, SIZE, dtype=torch.float64)
    attached, held = (
        effective_receptive_field(net, image, [(3.5, 3.5)], attached=a) for a in (True, False)
    )
    assert (attached - held).abs().max() > 0.01
    assert not net._forward_hooks and all(p.requires_grad for p in net.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())


def test_masks_of_a_modulated_convolution_are_held_as_well():
    class Modulated(Torchvision):
        def forward(self, x):
            mask = self.data_offset_generator(x)[:, :9].sigmoid()
            return self.layer(x, mask=mask, offset=self.data_offset_generator(x))

    net = Modulated().double()
    image = torch.rand(1, SIZE, SIZE, dtype=torch.float64, requires_grad=True)
    with derivative(net, attached=False):
        (held,) = torch.autograd.grad(net(image[None])[0, 0, 3, 3], image)
    offset = net.data_offset_generator(image[None]).detach()
    given = torchvision.ops.deform_conv2d(
        image[None], offset, net.weight, padding=1, mask=offset[:, :9].sigmoid()
    )
    (expected,) = torch.autograd.grad(given[0, 0, 3, 3], image)
    torch.testing.assert_close(held, expected, rtol=1e-12, atol=1e-13)


# Theoretical fields, and the cells that points are taken to.


def published(name):
    """Networks whose field others have published (Araujo et al. 2019), or arithmetic gives."""
    if name == "AlexNet":
        return torchvision.models.alexnet(weights=None).features, None, 195, 32
    if name == "VGG-16":
        return torchvision.models.vgg.make_layers(torchvision.models.vgg.cfgs["D"]), None, 212, 32
    if name == "ResNet-50":
        cfg = load_config("ImageNet/R_50.yaml", ["MODEL.RESNETS.STRIDE_IN_1X1", True])
        return build_model(cfg), "backbone.res5", 483, 32
    if name == "ResNet-50, stride in 3x3":
        return torchvision.models.resnet50(weights=None), "layer4", 427, 32
    # Each of its 18 3x3 convolutions adds twice the stride of what it reads.
    field = 1 + 2 * sum([1, 2, 2, 4, 4, 8, 8, 8, *[16] * 7, 32, 32, 32])
    return build_model(load_config("ImageNet/MNV2_dk_l3.yaml")), "backbone.res5", field, 32


@pytest.mark.parametrize(
    "name", ["AlexNet", "VGG-16", "ResNet-50", "ResNet-50, stride in 3x3", "MobileNet-V2, DK"]
)
def test_theoretical_fields_are_the_published_ones(name):
    model, output, width, stride = published(name)
    fields = ReceptiveFields(model, torch.rand(3, 128, 192), output)
    one, other = fields.theoretical((1, 1)), fields.theoretical((1, 2))
    assert one[2] - one[0] == one[3] - one[1] == width
    assert [b - a for a, b in zip(one, other, strict=True)] == [stride, 0, stride, 0]


class Maze(nn.Module):
    """All that a field goes through, linear and with positive weights."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(1, 2, (3, 5), stride=(1, 2), padding=(0, 1), bias=False)
        self.pool = nn.AvgPool2d(3, 2, 1)
        self.dilated = nn.Conv2d(2, 2, 3, padding="same", dilation=2, bias=False)
        self.up = nn.ConvTranspose2d(4, 2, 4, 2, 1, bias=False)
        for parameter in self.parameters():
            nn.init.ones_(parameter)

    def forward(self, x):
        x = F.pad(x, (2, 5, 1, 3))[:, :, :, 1:]
        x = self.stem(x)
        deep = self.dilated(self.pool(x))
        deep = torch.cat([deep, deep], 1)[:, :, :, : x.shape[3]]
        big = F.conv2d(self.up(deep), torch.ones(2, 1, 3, 3).double(), padding=1, groups=2)
        small = F.interpolate(F.interpolate(deep, scale_factor=2), scale_factor=1.0)
        return big + small[:, :2]


def test_theoretical_fields_bound_the_effective_ones_exactly():
    """Of a network in which nothing cancels, they are the pixels with a derivative."""
    image = torch.rand(1, 61, 83, dtype=torch.float64)
    fields = ReceptiveFields(Maze().double(), image)
    for cell in product((0, 7, 16, fields.size[0] - 1), (0, 5, 11, fields.size[1] - 1)):
        rows, columns = (fields.effective(cell) > 0).nonzero(as_tuple=True)
        x0, y0, x1, y1 = fields.theoretical(cell)
        assert (rows.min(), rows.max() + 1) == (max(y0, 0), min(y1, 61)), cell
        assert (columns.min(), columns.max() + 1) == (max(x0, 0), min(x1, 83)), cell


@pytest.mark.parametrize("corners", [True, False])
def test_theoretical_fields_through_bilinear_interpolation(corners):
    class Enlarging(nn.Module):
        def forward(self, x):
            return F.interpolate(x, (23, 9), mode="bilinear", align_corners=corners)

    fields = ReceptiveFields(Enlarging(), torch.rand(1, 11, 12, dtype=torch.float64))
    for cell in product(range(23), range(9)):
        reached = (fields.effective(cell) > 1e-9).nonzero()
        box = fields.theoretical(cell)
        low, high = reached.min(0).values.tolist(), (reached.max(0).values + 1).tolist()
        # The second of two pixels may have no share.
        assert box[0] <= low[1] <= high[1] <= box[2] <= high[1] + 1
        assert box[1] <= low[0] <= high[0] <= box[3] <= high[0] + 1


@pytest.mark.parametrize(
    "function",
    [
        lambda x: F.interpolate(x, (5, 11)),
        lambda x: F.interpolate(x, scale_factor=1.7),
        lambda x: x[:, :, -5:, 1::2],
        lambda x: F.pad(x, (-1, 2, -2, 0)),
    ],
    ids=["enlarged", "by a factor", "from the end", "cut off"],
)
def test_theoretical_fields_follow_places(function):
    class Function(nn.Module):
        def forward(self, x):
            return function(x * 1.0)

    fields = ReceptiveFields(Function(), torch.rand(1, 9, 7, dtype=torch.float64))
    for cell in product(*map(range, fields.size)):
        for row, column in fields.effective(cell).nonzero().tolist():
            assert fields.theoretical(cell) == (column, row, column + 1, row + 1), cell


def test_circular_padding_reads_the_far_edge():
    convolution = nn.Conv2d(1, 1, 3, padding=1, padding_mode="circular")
    fields = ReceptiveFields(convolution, torch.rand(1, 6, 6))
    assert fields.effective((0, 0))[5, 5] > 0
    assert fields.theoretical((0, 0)) == (-math.inf, -math.inf, math.inf, math.inf)


def test_what_reaches_everywhere_has_no_bound():
    class Gated(nn.Module):
        def forward(self, x):
            return x * x.mean((2, 3), keepdim=True)

    fields = ReceptiveFields(Gated(), torch.rand(1, 8, 8))
    assert fields.theoretical((2, 3)) == (-math.inf, -math.inf, math.inf, math.inf)
    assert fields.cell((3.2, 2.9)) == (2, 3)
    whole = ReceptiveFields(nn.AdaptiveAvgPool2d(2), torch.rand(1, 8, 12))
    assert [whole.cell(p) for p in ((1, 1), (11, 1), (5, 7))] == [(0, 0), (0, 1), (1, 0)]


@pytest.fixture(scope="module")
def detector():
    cfg = load_config("demo/shapes_MNV2_FPN_dk_l3.yaml", ["MODEL.FPN.OUT_CHANNELS", 8])
    return build_model(cfg)


PICTURE = torch.randint(0, 256, (3, 70, 100), dtype=torch.uint8)  # which a detector pads


@pytest.mark.parametrize(
    "output, stride",
    [
        ("backbone.bottom_up.res2", 4),
        ("backbone.bottom_up.res5", 32),
        ("backbone.p2", 4),
        ("backbone.fpn_output4", 16),
        ("proposal_generator.rpn_head.conv", 4),
    ],
)
def test_points_of_a_padded_picture_go_to_the_cell_above_them(detector, output, stride):
    fields = ReceptiveFields(detector, PICTURE, output)
    assert fields.size == (96 / stride, 128 / stride)
    for x, y in (0, 0), (50, 20), (33, 69), (99.9, 70):
        row, column = fields.cell((x, y))
        # The first cell is centred on the first pixel's centre, but for FPN's enlarged maps.
        centre = row * stride + 0.5, column * stride + 0.5
        assert max(abs(centre[0] - y), abs(centre[1] - x)) <= stride / 2 + 1
    field = fields.effective(fields.cell((50, 20)))
    assert field.shape == (70, 100) and field.sum() > 0


def test_a_detector_runs_no_further_than_the_feature(detector, monkeypatch):
    monkeypatch.setattr(detector.roi_heads, "forward", None)
    detector.train()
    detector.backbone.bottom_up.stem.requires_grad_(False)
    learning = [p.requires_grad for p in detector.parameters()]
    name = deepest_feature(detector)
    assert name == "backbone.bottom_up.res5"
    (field,) = effective_receptive_field(detector, PICTURE, [(50, 35)], name)
    assert field.sum() > 0
    assert all(module.training for module in detector.modules())
    assert learning == [p.requires_grad for p in detector.parameters()] and False in learning
    assert all(p.grad is None for p in detector.parameters())


def test_the_projects_classifier_takes_pixels():
    torch.manual_seed(0)
    model = build_model(load_config("ImageNet/MNV2_dk_l3.yaml"))
    image = torch.randint(0, 256, (3, 64, 64)).float()
    assert deepest_feature(model) == "backbone.res5"
    (field,) = effective_receptive_field(model, image, [(32, 32)], "backbone.res4")
    normal = model.normalize(image)
    (other,) = effective_receptive_field(model.backbone, normal, [(32, 32)], "res4")
    scale = (field / other).flatten()
    torch.testing.assert_close(scale.mean(), 1 / model.pixel_std.mean(), rtol=0.05, atol=0)


def test_torchvisions_detector_resizes_and_pads():
    model = torchvision.models.detection.retinanet_resnet50_fpn(
        weights=None, weights_backbone=None, min_size=96, max_size=160
    )
    fields = ReceptiveFields(model, torch.rand(3, 48, 75), "backbone.0")
    assert fields.size == (12, 20)  # 96x150 in 96x160, at a stride of 8
    assert fields.cell((37.5, 24)) == (6, 9)
    assert fields.effective((6, 9)).argmax() // 75 in range(18, 30)


def test_names_of_feature_maps():
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Sequential(nn.Conv2d(1, 1, 1), nn.Conv2d(1, 1, 3))
            self.idle = nn.Conv2d(1, 1, 1)

        def forward(self, x):
            return {"small": self.body(x), "list": [x, 3.0], "logits": x.mean((2, 3))}

    net, image = Named(), torch.rand(1, 5, 6)
    assert ReceptiveFields(net, image, "small").size == (3, 4)
    assert ReceptiveFields(net, image, "body.0").size == (5, 6)
    assert ReceptiveFields(net, image, "body").size == (3, 4)
    for output, message in {
        "large": "expected one of small, list, logits after .*, got 'large'",
        None: "expected one of small, list, logits",
        "logits": r"expected a feature map \[1, C, H, W\], got \[1, 1\] of logits",
        "list": "got list of list",
        "idle": "'idle' has not been called",
        "body.x": "expected the name of a submodule, got 'body.x'",
        "cellar.res5": "got 'cellar.res5'; the model has body, idle",
    }.items():
        with pytest.raises(ValueError, match=f"^output: .*{message}"):
            ReceptiveFields(net, image, output)
        assert not any(m._forward_hooks for m in net.modules())
    pair = nn.Module()
    pair.forward = lambda x: [x, x[:, :, 1:]]
    assert ReceptiveFields(pair, image, "1").size == (4, 6)


def test_what_has_no_field_is_refused():
    image = torch.rand(1, 5, 6)
    net = nn.Conv2d(1, 1, 3, padding=1)
    with pytest.raises(ValueError, match=r"image: expected one picture \[C, H, W\], got \[1, 1, 5"):
        effective_receptive_field(net, image[None], [(0, 0)])
    with pytest.raises(ValueError, match=r"image: .*got \[1, 0, 6\]"):
        effective_receptive_field(net, image[:, :0], [(0, 0)])
    for point in (6.5, 1), (-1, 0), (math.nan, 2):
        with pytest.raises(ValueError, match="points: expected x from 0 to 6 and y from 0 to 5"):
            effective_receptive_field(net, image, [point])
    assert effective_receptive_field(net, image, []).shape == (0, 5, 6)

    class Blind(nn.Module):
        @torch.no_grad()
        def forward(self, x):
            return x * 2

    with pytest.raises(ValueError, match="depends on the image"):
        effective_receptive_field(Blind(), image, [(0, 0)])
    with torch.no_grad():
        net.weight[0, 0, 1, 1] = math.nan
    with pytest.raises(ValueError, match="model: expected finite derivatives"):
        effective_receptive_field(net, image, [(3, 3)])


def test_grey_tiny_and_half_precision_pictures():
    net = nn.Conv2d(1, 4, 3, padding=1).to(torch.bfloat16)
    with torch.no_grad():
        (field,) = effective_receptive_field(net, torch.full((1, 1, 1), 7), [(1, 1)])
    assert field.shape == (1, 1) and field > 0


class Theirs(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.modulated = "Modulated" in kind.__name__
        taps = 27 if self.modulated else 18
        self.offset, self.layer = nn.Conv2d(1, taps, 3, padding=1), kind(1, 1, 3, padding=1)

    def forward(self, x):
        offset = self.offset(x)
        if self.modulated:
            return self.layer(x, offset[:, :18], offset[:, 18:].sigmoid())
        return self.layer(x, offset)


@pytest.fixture
def detectron2_layers(monkeypatch):
    """detectron2's own, whether or not its extension, which holds their GPU kernels, is built."""
    monkeypatch.setitem(sys.modules, "detectron2._C", types.ModuleType("detectron2._C"))
    spec = importlib.util.find_spec("detectron2.layers.deform_conv")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    kinds = module.DeformConv, module.ModulatedDeformConv
    monkeypatch.setattr(offsets, "FOREIGN", kinds)
    return kinds


@pytest.mark.parametrize("which", [0, 1], ids=["DeformConv", "ModulatedDeformConv"])
def test_detectron2s_layers_need_a_gpu(detectron2_layers, which):
    kind = detectron2_layers[which]
    with pytest.raises(NotImplementedError, match="take a GPU, or torchvision.ops.DeformConv2d"):
        effective_receptive_field(Theirs(kind), torch.rand(1, 6, 6), [(3, 3)])


def test_other_errors_of_a_model_are_its_own():
    def fail(x):
        raise NotImplementedError("forward")

    net = nn.Module()
    net.forward = fail
    with pytest.raises(NotImplementedError, match="^forward$"):
        run(net, torch.rand(1, 2, 2))
