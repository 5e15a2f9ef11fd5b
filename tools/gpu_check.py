"""What the test suite cannot check of the CUDA operators (run by tools/gpu_check.sh).

CUDA against CPU on the shapes of the networks, bitwise repeatability, capture in a CUDA graph, a
second stream, tensors of more than 2^31 elements, and layers compiled by torch.compile.
"""

import argparse
import copy
import itertools
import sys

import torch
from torch import nn

from dk_detectron.layers import KINDS
from dk_detectron.ops import deform_kernel_conv2d

# The status of a check that this GPU cannot run, for a reason that is the last line printed.
LEFT_OUT = 77
TYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
# Channels, height, width, stride: of the networks, and tiny ones for compute-sanitizer.
SIZES = (128, 50, 76, 1), (1024, 13, 19, 1), (256, 51, 77, 2), (96, 28, 28, 1), (17, 30, 31, 1)
TINY_SIZES = (32, 9, 13, 1), (144, 17, 10, 2)


def make(channels, height, width, dtype, kernel, data, *, stride=1, scope=4, batch=2, groups=None):
    """Random tensors on the GPU and the call's arguments; channels_last."""
    generator = torch.Generator("cuda").manual_seed(0)
    groups = groups or channels

    def normal(*shape):
        return torch.randn(*shape, generator=generator, device="cuda", dtype=dtype)

    def offset():
        # Odd multiples of 1/32: off the cells, where a rounding error would decide a gradient.
        out = [(size - 1) // stride + 1 for size in (height, width)]
        steps = torch.randint(-32, 32, (batch, 18, *out), generator=generator, device="cuda")
        return (steps + 0.5).div(16).to(torch.promote_types(dtype, torch.float32))

    tensors = {
        "input": normal(batch, channels, height, width).contiguous(
            memory_format=torch.channels_last
        ),
        "weight": normal(channels, channels // groups, *[scope if kernel else 3] * 2),
        "bias": normal(channels),
        "kernel_offset": offset() if kernel else None,
        "data_offset": offset() if data else None,
    }
    return tensors, {"kernel_size": 3, "stride": stride, "padding": 1, "groups": groups}


def run(tensors, arguments):
    """Output and gradients."""
    leaves = {k: None if t is None else t.detach().requires_grad_() for k, t in tensors.items()}
    output = deform_kernel_conv2d(**leaves, **arguments)
    present = {k: t for k, t in leaves.items() if t is not None}
    gradients = torch.autograd.grad(output, list(present.values()), torch.ones_like(output))
    return {"output": output.detach(), **dict(zip(present, gradients, strict=True))}


def double_on_cpu(tensors):
    return {k: None if t is None else t.cpu().double() for k, t in tensors.items()}


def check_against_cpu(sizes=SIZES, denseness=(True, False)):
    for size, dtype, (kernel, data), last, dense in itertools.product(
        sizes, TYPES, [(True, False), (False, True), (True, True)], [True, False], denseness
    ):
        channels, height, width, stride = size
        if dense and channels > 256:
            continue
        options = {"stride": stride, "groups": 1 if dense else None}
        tensors, arguments = make(channels, height, width, dtype, kernel, data, **options)
        if not last:
            tensors["input"] = tensors["input"].contiguous()
        actual = run(tensors, arguments)
        expected = run(double_on_cpu(tensors), arguments)
        rounding = torch.finfo(dtype).eps if dtype != torch.float64 else 1e-9
        for name in expected:
            error = (actual[name].cpu().double() - expected[name]).abs().max()
            scale = expected[name].abs().max()
            limit = 8 * max(rounding, 1e-6 if dtype != torch.float64 else 0) * scale
            what = f"{size} {dtype} {kernel=} {data=} {dense=} {name}"
            assert error <= limit, f"{what}: {error} > {limit}"
    print("CUDA equals CPU", flush=True)


def check_repeatability():
    torch.use_deterministic_algorithms(True)
    for kernel, data in (True, False), (False, True), (True, True):
        for groups in 128, 1:
            tensors, arguments = make(128, 50, 76, torch.bfloat16, kernel, data, groups=groups)
            first = run(tensors, arguments)
            for _ in range(5):
                again = run(tensors, arguments)
                for name in first:
                    assert torch.equal(first[name], again[name]), f"{name} is not repeatable"
    torch.use_deterministic_algorithms(False)
    print("bitwise repeatable", flush=True)


def check_graph_and_stream():
    tensors, arguments = make(128, 50, 76, torch.float32, True, False)
    expected = run(tensors, arguments)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        # Long work first: a kernel on another stream would not wait for the input.
        torch.cuda._sleep(100_000_000)
        late = {k: None if t is None else t.clone() for k, t in tensors.items()}
        actual = run(late, arguments)
    torch.cuda.current_stream().wait_stream(side)
    for name in expected:
        torch.testing.assert_close(actual[name], expected[name], rtol=0, atol=0)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run(tensors, arguments)
    for tensor in captured.values():
        tensor.fill_(float("nan"))
    graph.replay()
    torch.cuda.synchronize()
    for name in expected:
        torch.testing.assert_close(captured[name], expected[name], rtol=0, atol=0)
    print("streams and graphs", flush=True)


def check_large():
    """Over 2^31 elements: the last image must come out as it does alone."""
    if torch.cuda.get_device_properties(0).total_memory < 60 * 2**30:
        print("needs a GPU with 60 GB")
        sys.exit(LEFT_OUT)
    batch, channels, size = 34, 1024, 256
    tensors, arguments = make(channels, size, size, torch.bfloat16, True, False, batch=batch)
    assert tensors["input"].numel() > 2**31
    for layout in torch.channels_last, torch.contiguous_format:
        tensors["input"] = tensors["input"].contiguous(memory_format=layout)
        alone = {
            k: t[-1:].contiguous(memory_format=layout) if k == "input" else t[-1:].contiguous()
            if k == "kernel_offset" else t
            for k, t in tensors.items()
        }  # fmt: skip
        actual, expected = run(tensors, arguments), run(alone, arguments)
        for name in "output", "input", "kernel_offset":
            torch.testing.assert_close(actual[name][-1:], expected[name])
        del actual, expected
        torch.cuda.empty_cache()
    print("more than 2^31 elements", flush=True)


def check_compiled():
    """Layers of every kind compile whole, once for all sizes of images, and compute the same."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    torch.manual_seed(0)
    depthwise = [layer(16, 16, 3, padding=1, groups=16) for layer in KINDS.values()]
    layers = nn.Sequential(*depthwise, KINDS["local"](16, 24, 3, padding=1)).cuda()
    for parameter in layers.parameters():  # generators start at zero
        nn.init.normal_(parameter, std=0.1)
    torch._dynamo.reset()
    # Not layers.compile(): torch 2.11 skips a Sequential and compiles what is in it, one by one.
    compiled = torch.compile(copy.deepcopy(layers), fullgraph=True, dynamic=True)
    sizes = (2, 16, 24, 40), (2, 16, 40, 24), (3, 16, 32, 56)
    for size in sizes:
        with torch._dynamo.config.patch(error_on_recompile=size != sizes[0]):
            assert_trains_alike(layers, compiled, size)
    print("compiled", flush=True)


def assert_trains_alike(layers, compiled, size):
    x = torch.randn(size, device="cuda").contiguous(memory_format=torch.channels_last)
    results = []
    for model in layers, compiled:
        leaf = x.clone().requires_grad_()
        output = model(leaf)
        gradients = torch.autograd.grad(output.square().mean(), [leaf, *model.parameters()])
        results.append([output, *gradients])
    for expected, actual in zip(*results, strict=True):
        # Rounding differs: of sums that the compiler orders anew, seen through taps.
        limit = 1e-3 * expected.abs().max().item()
        torch.testing.assert_close(actual, expected, rtol=1e-3, atol=limit)


def check_short():
    check_against_cpu(TINY_SIZES)


def check_unwritten():
    """No matrix products: of what cuBLAS writes, compute-sanitizer's initcheck misses a part."""
    check_against_cpu(TINY_SIZES, denseness=[False])


CHECKS = {
    "cpu": check_against_cpu,
    "repeat": check_repeatability,
    "graph": check_graph_and_stream,
    "large": check_large,
    "compiled": check_compiled,
    "short": check_short,
    "unwritten": check_unwritten,
}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "check", choices=CHECKS, help="short, unwritten: tiny shapes, for compute-sanitizer"
    )
    CHECKS[parser.parse_args().check]()


if __name__ == "__main__":
    main()
