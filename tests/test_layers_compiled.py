"""torch.compile of every layer: no break in the graph, one graph for all sizes of images."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from dk_detectron.layers import KINDS

SIZES = (12, 16), (9, 21), (20, 8)


def make(kind: str, kernel: int):
    """A depthwise 3x3, or a pointwise layer, whose offsets and gates follow the input."""
    options = {"padding": 1, "groups": 6} if kernel == 3 else {}
    layer = KINDS[kind](6, 6, kernel, **options)
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            if "_generator." in name:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return layer


def trained(function, layer, x):
    """Output and all gradients."""
    x = x.clone().requires_grad_()
    output = function(x)
    inputs = [x, *layer.parameters()]
    return [output.detach(), *torch.autograd.grad(output.square().sum(), inputs)]


def assert_trains_alike(compiled, layer):
    for height, width in SIZES:
        x = torch.randn(2, 6, height, width)
        for actual, expected in zip(
            trained(compiled, layer, x), trained(layer, layer, x), strict=True
        ):
            scale = float(expected.abs().max())
            torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5 * max(scale, 1))


@pytest.mark.parametrize("kernel", [3, 1], ids=["depthwise", "pointwise"])
@pytest.mark.parametrize("kind", KINDS)
def test_one_graph_for_all_sizes(kind, kernel):
    torch._dynamo.reset()
    layer = make(kind, kernel)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, backend=counter, fullgraph=True, dynamic=True)
    assert_trains_alike(compiled, layer)
    assert counter.frame_count == 1


@pytest.mark.parametrize("kind", ["global", "conditional"])
def test_inductor_trains_at_several_sizes(kind):
    """It has to know the groups of a convolution, and batch * groups is none of those."""
    torch._dynamo.reset()
    layer = make(kind, 3)
    assert_trains_alike(torch.compile(layer, fullgraph=True, dynamic=True), layer)
