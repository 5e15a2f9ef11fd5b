"""Derivatives by every way that torch has: all agree with the composed function, in float64."""

import pytest
import torch
import torch.nn.functional as F
from conftest import Case, every_offset, every_path
from torch.autograd import forward_ad, gradgradcheck
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vmap

from dk_detectron.layers import (
    CondConv2d,
    DeformConv2d,
    DeformKernelConv2d,
    GlobalDeformKernel2d,
    LocalDeformKernel2d,
)
from dk_detectron.ops import (
    composed_deform_kernel_conv2d,
    deform_kernel_conv2d,
    derivatives,
    per_image_conv2d,
    sample_kernel,
)

LAYERS = [LocalDeformKernel2d, GlobalDeformKernel2d, DeformConv2d, DeformKernelConv2d, CondConv2d]


def inside(case: Case) -> dict:
    """The case's tensors, with taps that stay inside the scope, where all derivatives agree."""
    tensors = case.tensors(torch.float64)
    if tensors["kernel_offset"] is not None:
        taps = case.kernel[0] * case.kernel[1]
        tensors["kernel_offset"][:, : 2 * taps].clamp_(-0.4, 0.4)
    return {name: tensor for name, tensor in tensors.items() if tensor is not None}


def functions(which: dict, **shape):
    """The operator and the composed function, of the tensors in their order; and these."""
    case = Case(**{"modulated": True, **which, **shape})
    tensors = inside(case)
    given = {"bias": None, "kernel_offset": None, "data_offset": None}

    def function(operator):
        return lambda *values: operator(
            **given | dict(zip(tensors, values, strict=True)), **case.arguments
        )

    return function(deform_kernel_conv2d), function(composed_deform_kernel_conv2d), tensors


def assert_same(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)


def every_argument(tensors) -> tuple[int, ...]:
    return tuple(range(len(tensors)))


@every_path
@every_offset
def test_torch_func_grad(groups, which):
    operator, composed, tensors = functions(which, groups=groups)
    places = every_argument(tensors)
    found, expected = (
        grad(lambda *t, f=f: f(*t).square().sum(), places)(*tensors.values())
        for f in (operator, composed)
    )
    assert_same(found, expected)


@every_path
@every_offset
def test_the_compiled_kernels_run_under_torch_func(groups, which, monkeypatch):
    """And not the composed function, which is slow."""
    operator, _, tensors = functions(which, groups=groups)
    called = []
    monkeypatch.setattr(derivatives, "composed_deform_kernel_conv2d", called.append)
    grad(lambda *t: operator(*t).square().sum(), every_argument(tensors))(*tensors.values())
    assert not called


@every_offset
@pytest.mark.parametrize("jacobian", [jacrev, jacfwd], ids=["jacrev", "jacfwd"])
def test_jacobians(which, jacobian):
    operator, composed, tensors = functions(which)
    places = every_argument(tensors)
    values = tuple(tensors.values())
    found = jacobian(lambda *t: operator(*t).sum((0, 2)), places)(*values)
    assert_same(found, jacrev(lambda *t: composed(*t).sum((0, 2)), places)(*values))


@every_path
@every_offset
def test_forward_mode(groups, which):
    operator, composed, tensors = functions(which, groups=groups)
    values = tuple(tensors.values())
    tangents = tuple(torch.randn_like(value) for value in values)
    _, expected = jvp(composed, values, tangents)
    _, found = jvp(operator, values, tangents)
    assert_same(found, expected)
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(*pair) for pair in zip(values, tangents, strict=True)]
        assert_same(forward_ad.unpack_dual(operator(*duals)).tangent, expected)
    # A number of its own: the slope along the tangents.
    step = 1e-6
    ahead, behind = (
        operator(*(v + sign * step * t for v, t in zip(values, tangents, strict=True)))
        for sign in (1, -1)
    )
    torch.testing.assert_close(found, (ahead - behind) / (2 * step), rtol=1e-5, atol=1e-7)


@every_path
@every_offset
def test_second_derivatives(groups, which):
    sizes = {"size": (3, 2), "kernel": (2, 2), "scope": (3, 3), "padding": (1, 1)}
    operator, _, tensors = functions(which, batch=1, groups=min(groups, 2), channels=2, **sizes)
    assert gradgradcheck(operator, tuple(t.requires_grad_() for t in tensors.values()))


@every_offset
def test_second_derivatives_by_torch_func(which):
    operator, composed, tensors = functions(which, batch=1, channels=2, size=(4, 3))
    input, *others = tensors.values()

    def loss(f):
        return lambda x: f(x, *others).pow(3).sum()

    expected = hessian(loss(composed))(input)
    for way in hessian, lambda f: jacrev(jacrev(f)), lambda f: jacfwd(jacfwd(f)):
        assert_same(way(loss(operator))(input), expected)


@every_path
@every_offset
@pytest.mark.parametrize(
    "mapped",
    [
        ("input", "kernel_offset", "data_offset"),
        ("weight", "bias"),
        ("bias",),
        ("kernel_offset", "weight"),
    ],
    ids=["data", "weights", "bias", "some"],
)
@pytest.mark.parametrize("dim", [0, 1])
def test_vmap_is_a_loop(groups, which, mapped, dim):
    operator, _, tensors = functions(which, groups=groups)
    if "data_offset" in tensors and "kernel_offset" in mapped and len(mapped) == 2:
        mapped = ("data_offset", "weight")
    scales = 1.0, 0.9, 0.8
    dims = tuple(dim if name in mapped else None for name in tensors)
    values = [
        value if d is None else torch.stack([scale * value for scale in scales], d)
        for value, d in zip(tensors.values(), dims, strict=True)
    ]
    loop = [
        operator(*(scale * v if n in mapped else v for n, v in tensors.items())) for scale in scales
    ]
    assert_same(vmap(operator, dims)(*values), torch.stack(loop))


def of_offset_groups(x):
    weight, offset = torch.ones(4, 1, 3, 3).to(x), torch.full((len(x), 36, 4, 5), 0.2).to(x)
    return deform_kernel_conv2d(x, weight, None, offset, kernel_size=3, groups=4, offset_groups=2)


def of_a_kernel_an_image(x):
    return per_image_conv2d(x, torch.ones(len(x), 6, 2, 3, 3).to(x), groups=2)


@pytest.mark.parametrize("function", [of_offset_groups, of_a_kernel_an_image])
def test_vmap_of_channels_last(function):
    """There, torch cannot say whether a tensor is."""
    images = torch.randn(3, 2, 6, 7, 4, dtype=torch.float64).movedim(-1, 2)
    assert_same(vmap(function)(images), torch.stack([function(image) for image in images]))


@every_offset
def test_jacobians_of_channels_last(which):
    """Which vmap and the composed function make together."""
    operator, _, tensors = functions(which)
    values = list(tensors.values())
    values[0] = values[0].contiguous(memory_format=torch.channels_last)

    def sums(x):
        return operator(x, *values[1:]).sum((0, 2))

    assert_same(jacfwd(sums)(values[0]), jacrev(sums)(values[0]))


def test_vmap_without_offsets():
    """There, torch cannot say whether a tensor is channels_last."""
    images = torch.randn(3, 2, 6, 7, 4).movedim(-1, 2)
    weight = torch.randn(5, 4, 3, 3)
    found = vmap(lambda x: deform_kernel_conv2d(x, weight, kernel_size=3))(images)
    torch.testing.assert_close(found.flatten(0, 1), F.conv2d(images.flatten(0, 1), weight))


@every_path
@every_offset
@pytest.mark.parametrize("of_weight", [False, True], ids=["data", "weight"])
def test_gradients_of_every_sample(groups, which, of_weight):
    operator, composed, tensors = functions(which, groups=groups)
    shared = {k: v for k, v in tensors.items() if k in ("weight", "bias")}
    samples = {k: v.unsqueeze(1) for k, v in tensors.items() if k not in shared}
    names = [*tensors]

    def loss(f):
        return lambda *t: f(*t).pow(2).sum()

    dims = tuple(None if name in shared else 0 for name in names)
    places = tuple(i for i, name in enumerate(names) if of_weight or name not in shared)
    values = [samples.get(name, tensors[name]) for name in names]
    found = vmap(grad(loss(operator), places), dims)(*values)
    for i in range(len(tensors["input"])):
        item = [samples[n][i] if n in samples else tensors[n] for n in names]
        assert_same([f[i] for f in found], list(grad(loss(composed), places)(*item)))


@pytest.mark.parametrize("layer", LAYERS)
def test_layers(layer):
    """Each way against .backward(), which the other tests hold against the oracle."""
    layer = layer(4, 4, 3, padding=1, groups=4).double()
    for generator in layer.generators:
        torch.nn.init.normal_(generator.weight, std=0.01)
        torch.nn.init.normal_(generator.bias, std=0.01)
    x = torch.randn(2, 4, 6, 5, dtype=torch.float64)
    v = torch.randn_like(x)

    def loss(x):
        return layer(x).pow(3).sum()

    (expected,) = torch.autograd.grad(loss(x.requires_grad_()), x)
    x = x.detach()
    assert_same(grad(loss)(x), expected)
    assert_same(jacfwd(loss)(x), expected)
    assert_same(vmap(grad(lambda sample: loss(sample[None])))(x), expected)
    assert_same(jvp(loss, (x,), (v,))[1], (expected * v).sum())
    # Along v, the slope of the gradient is the second derivative.
    _, second = jvp(grad(loss), (x,), (v,))
    step = 1e-6
    slope = (grad(loss)(x + step * v) - grad(loss)(x - step * v)) / (2 * step)
    torch.testing.assert_close(second, slope, rtol=1e-4, atol=1e-6)
    y = x.clone().requires_grad_()
    (first,) = torch.autograd.grad(loss(y), y, create_graph=True)
    (twice,) = torch.autograd.grad((first * v).sum(), y)
    torch.testing.assert_close(twice, slope, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("layer", LAYERS)
def test_autocast_in_a_transform_gives_the_gradients_of_backward(layer):
    layer = layer(4, 4, 3, padding=1, groups=4)
    for generator in layer.generators:
        torch.nn.init.normal_(generator.weight, std=0.01)
    x = torch.randn(2, 4, 6, 5)

    def loss(parameters, x):
        with torch.autocast("cpu", torch.bfloat16):
            output = functional_call(layer, parameters, (x,))
        assert output.dtype == torch.bfloat16
        return output.float().pow(2).sum()

    parameters = dict(layer.named_parameters())
    values = [*parameters.values(), x.requires_grad_()]
    expected = torch.autograd.grad(loss(parameters, x), values)
    found, of_x = grad(loss, (0, 1))(parameters, x)
    torch.testing.assert_close([*found.values(), of_x], list(expected), rtol=0.02, atol=0.02)
    each = vmap(grad(lambda sample: loss(parameters, sample[None])))(x)
    torch.testing.assert_close(each, expected[-1], rtol=0.02, atol=0.02)


def test_the_global_kernels():
    weight = torch.randn(4, 2, 4, 4, dtype=torch.float64)
    offset = torch.rand(3, 18, dtype=torch.float64) * 0.8 - 0.4
    x = torch.randn(3, 4, 6, 6, dtype=torch.float64)

    def loss(weight, offset):
        kernels = sample_kernel(weight, offset, 3)
        return per_image_conv2d(x, kernels, padding=1, groups=2).pow(3).sum()

    values = weight.requires_grad_(), offset.requires_grad_()
    expected = torch.autograd.grad(loss(*values), values)
    values = weight.detach(), offset.detach()
    for way in grad, jacrev, jacfwd:
        assert_same(way(loss, (0, 1))(*values), expected)
    assert gradgradcheck(loss, tuple(v.requires_grad_() for v in values))


def test_forward_mode_is_the_true_derivative_at_clipped_taps():
    """Zero, since the output does not change; the backward pass leads back inside instead."""
    x, weight = torch.ones(1, 1, 1, 1).double(), torch.arange(4.0).double().view(1, 1, 2, 2)
    offset = torch.full((1, 2, 1, 1), -3.0).double()
    tangent = torch.ones_like(offset)

    def output(offset):
        return deform_kernel_conv2d(x, weight, kernel_offset=offset, kernel_size=1)

    _, found = jvp(output, (offset,), (tangent,))
    assert found.item() == 0
    # Descent on the negative output moves the tap to larger values, back inside.
    assert (grad(lambda o: -output(o).sum())(offset) < 0).all()
