"""``torch.use_deterministic_algorithms(True)``: the same bits every time, with several threads.

On the CPU. What the CUDA kernels do under this switch is in tests/test_csrc_emulated.py.
"""

import pytest
import torch
from conftest import BOTH, DATA, KERNEL, Case, run
from torch import nn

from dk_detectron.engine.optimizer import build_optimizer, parameter_groups
from dk_detectron.layers import KINDS
from dk_detectron.modeling import mobilenet_v2
from dk_detectron.ops import (
    composed_deform_kernel_conv2d,
    deform_kernel_conv2d,
    per_image_conv2d,
    sample_kernel,
)

every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
every_layout = pytest.mark.parametrize(
    "layout", [torch.contiguous_format, torch.channels_last], ids=["NCHW", "channels_last"]
)


@pytest.fixture(autouse=True)
def _four_threads(deterministic):
    """Whose order is another every time, in tensors large enough for all of them."""
    threads = torch.get_num_threads()
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(threads)


def assert_repeats(function) -> None:
    """``function`` returns tensors by name."""
    first = function()
    for _ in range(2):
        again = function()
        assert all(torch.equal(again[name], tensor) for name, tensor in first.items())


@every_dtype
@every_layout
@pytest.mark.parametrize("groups", [32, 4, 1], ids=["depthwise", "grouped", "dense"])
@pytest.mark.parametrize("which", [KERNEL, DATA, BOTH], ids=["kernel", "data", "both"])
@pytest.mark.parametrize(
    "function", [deform_kernel_conv2d, composed_deform_kernel_conv2d], ids=["compiled", "composed"]
)
def test_the_operator(function, which, groups, layout, dtype):
    case = Case(channels=32, groups=groups, size=(17, 19), scope=(3, 3), modulated=True, **which)
    tensors = case.tensors(dtype)
    tensors["input"] = tensors["input"].contiguous(memory_format=layout)
    assert_repeats(lambda: run(function, tensors, case.arguments))


@every_dtype
def test_kernels_for_every_image(dtype):
    tensors = {
        "weight": torch.randn(32, 1, 4, 4, dtype=dtype),
        "kernel_offset": torch.randn(3, 18, dtype=dtype),
        "x": torch.randn(3, 32, 17, 19, dtype=dtype),
    }

    def convolve(weight, kernel_offset, x):
        kernels = sample_kernel(weight, kernel_offset, 3)
        return per_image_conv2d(x, kernels, padding=1, groups=32)

    assert_repeats(lambda: run(convolve, tensors, {}))


# Arguments beyond channels: a depthwise, a grouped, a dense and a pointwise convolution.
SHAPES = {
    "depthwise": {"kernel_size": 3, "padding": 1, "groups": 16},
    "grouped": {"kernel_size": 3, "padding": 1, "groups": 4, "stride": 2},
    "dense": {"kernel_size": 3, "padding": 1},
    "pointwise": {"kernel_size": 1},
}


def learn(layer: nn.Module) -> nn.Module:
    """Generators that follow the input."""
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            if "_generator." in name:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return layer


def gradients(layer: nn.Module, x: torch.Tensor) -> dict[str, torch.Tensor]:
    x = x.clone(memory_format=torch.preserve_format).requires_grad_()
    output = layer(x)
    inputs = {"input": x, **dict(layer.named_parameters())}
    found = torch.autograd.grad(output.float().square().sum(), list(inputs.values()))
    return {"output": output.detach(), **dict(zip(inputs, found, strict=True))}


@every_dtype
@every_layout
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", KINDS)
def test_every_layer(kind, shape, layout, dtype):
    layer = learn(KINDS[kind](16, 16, **SHAPES[shape])).to(dtype)
    x = torch.randn(2, 16, 33, 31, dtype=dtype).contiguous(memory_format=layout)
    assert_repeats(lambda: gradients(layer, x))


@pytest.mark.parametrize("kind", ["local", "dcn", "dcn+local"])
@pytest.mark.parametrize(
    "option", [{"offset_generator": "separable"}, {"offset_groups": 2}], ids=str
)
def test_options_of_layers(option, kind):
    layer = learn(KINDS[kind](16, 16, 3, padding=1, groups=16, modulated=True, **option))
    assert_repeats(lambda: gradients(layer, torch.randn(2, 16, 33, 31, generator=seeded())))


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def test_steps_of_training():
    def train():
        torch.manual_seed(0)
        data_offset = [False, True, False, False]
        model = mobilenet_v2(
            conv1x1="global", conv3x3="local", data_offset=data_offset, norm="BN",
            out_features=["res3"],
        )  # fmt: skip
        groups = parameter_groups(model, 0.01, 1e-4)
        optimizer = build_optimizer(groups, lr=0.01, clip_offset_gradients=0.05)
        for _ in range(3):
            loss = model(torch.randn(2, 3, 64, 96))["res3"].square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return model.state_dict()

    assert_repeats(train)
