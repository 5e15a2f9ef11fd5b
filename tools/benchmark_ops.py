#!/usr/bin/env python
"""Times the operators against their peers: rigid, composed and torchvision's, on CPU or CUDA.

    tools/benchmark_ops.py --quick
    tools/benchmark_ops.py --dense
    tools/benchmark_ops.py --device cuda --dtype bfloat16 --json out.json --plot out.png

All contenders of a workload take turns in one process, and only ratios within one run are worth
quoting. One that fails the accuracy gate is shown but not ranked: what it has computed, of the very
tensors on which it is timed, is compared with float64. If it is ours, the exit status is 1.

Each is timed in two states: cold, after so much other memory was read and written that the cache
holds nothing else, and warm, after a call on the same tensors, which are in it as far as they fit.

"x floor" is the time over that in which a copy moves as many bytes as must be read and written.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from functools import cache
from itertools import accumulate
from pathlib import Path

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler's complaint that there is no GPU

import torch
import torch.nn.functional as F
from tabulate import tabulate
from torch import Tensor, nn
from torchvision.ops import deform_conv2d
from tqdm import tqdm

from dk_detectron.commands._outputs import output_file
from dk_detectron.layers import DeformKernelConv2d, LocalDeformKernel2d, spread_offset
from dk_detectron.ops import composed_deform_kernel_conv2d, deform_kernel_conv2d

# Relative to the largest value of the float64 result.
GATE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
# Calls in one CUDA graph, over inputs that together exceed the second-level cache of any GPU.
GRAPH_CALLS = 20
COLD_BYTES = 240 * 2**20
# Read and written before each cold call on a CPU: more than its caches, as far as they are its own.
OTHER_BYTES = 64 * 2**20
# Calls on a CPU that are timed together as warm.
WARM_CALLS = 3
STATES = "cold", "warm"
# A contender that has taken this long sits out the remaining rounds of a workload.
ENOUGH_SECONDS = 1.0


@dataclass(frozen=True)
class Workload:
    """A convolution on [n, c, h, w], depthwise and channels_last unless told otherwise."""

    name: str
    n: int
    c: int
    h: int
    w: int
    kernel: int = 3
    scope: int = 4
    stride: int = 1
    offsets: str = "trained"
    data_offset: bool = False
    channels_last: bool = True
    groups: int | None = None
    out: int | None = None

    @property
    def out_channels(self) -> int:
        return self.out or self.c

    def weight_shape(self, size: int) -> list[int]:
        return [self.out_channels, self.c // self.arguments["groups"], size, size]

    @property
    def arguments(self) -> dict:
        pair = [self.kernel] * 2, [self.stride] * 2, [self.kernel // 2] * 2, [1, 1]
        names = "kernel_size", "stride", "padding", "dilation"
        return dict(zip(names, pair, strict=True)) | {"groups": self.groups or self.c}


def stages(n: int, height: int, width: int) -> list[Workload]:
    """The depthwise convolutions of ResNet-50-DW at strides 4 to 32."""
    sizes = [(128 * 2**i, -(-height // (4 * 2**i)), -(-width // (4 * 2**i))) for i in range(4)]
    return [Workload(f"res{i + 2}", n, *size) for i, size in enumerate(sizes)]


def dense_workloads(stages: list[Workload]) -> list[Workload]:
    """ResNet-50's 3x3 convolutions, of half the depthwise ones' width; 1x1 ones; ResNeXt-50's."""
    main = [replace(w, name=f"{w.name}, dense", c=w.c // 2, groups=1) for w in stages]
    res2, res3 = main[:2]
    one = {"kernel": 1, "scope": 2}
    return main + [
        replace(res2, name="res2, 1x1, 64 to 256", out=256, **one),
        replace(res3, name="res3, 1x1, 512 to 128", c=512, out=128, **one),
        replace(res3, name="res3, dense, stride 2", h=2 * res3.h, w=2 * res3.w, stride=2),
        replace(res3, name="res3, dense, contiguous", channels_last=False),
        replace(res3, name="res3, dense, scope 3", scope=3),
        replace(res3, name="res3, dense, scope 5", scope=5),
        replace(res3, name="res3, dense, DCN + DK", data_offset=True),
        replace(stages[1], name="res3, 32 groups", groups=32),
    ]


def workloads(quick: bool, dense: bool, device: str) -> list[Workload]:
    """One image at half of 800 x 1216 on a CPU, two whole ones on a GPU; then the variations."""
    main = stages(2, 800, 1216) if device == "cuda" else stages(1, 400, 608)
    if dense:
        return dense_workloads(main)[: 4 if quick else None]
    if quick:
        return main
    res3 = replace(main[1], name="res3")
    variations = [replace(res3, name=f"{res3.name}, scope {s}", scope=s) for s in (3, 5, 9)]
    variations += [replace(res3, name=f"{res3.name}, {c} channels", c=c) for c in (96, 144, 145)]
    variations += [
        replace(res3, name=f"{res3.name}, offsets {kind}", offsets=kind)
        for kind in ("zero", "normal 0.3", "normal 1", "uniform", "one cell")
    ]
    return main + [
        *variations,
        replace(res3, name="res3, stride 2", stride=2),
        replace(res3, name="res3, kernel 5, scope 6", kernel=5, scope=6),
        replace(res3, name="res3, contiguous", channels_last=False),
        replace(res3, name="res3, DCN + DK", data_offset=True),
        Workload("224, batch 32", 32, 256, 28, 28),
    ]


def off_knots(offsets: Tensor) -> Tensor:
    """To the next odd multiple of 1/32, all of which float32 and most of which bfloat16 has.

    Among millions of others some lie next to a cell, whose derivative is this side's or that's by a
    rounding error.
    """
    return (offsets * 16).floor().add(0.5).div(16)


def draw_offsets(kind: str, shape: list[int], kernel: int, scope: int) -> Tensor:
    """Kind "trained": where a warm start puts the taps, moved as far as fine-tuning moves them."""
    if kind == "trained":
        start = spread_offset([scope] * 2, [kernel] * 2).float()
        return off_knots(start.view(-1, 1, 1) + 0.2 * torch.randn(shape))
    if kind.startswith("normal"):
        return off_knots(torch.randn(shape) * float(kind.split()[1]))
    if kind == "uniform":
        return off_knots((torch.rand(shape) - 0.5) * 2 * scope)
    # "one cell": all clipped into the first.
    return torch.full(shape, 0.0 if kind == "zero" else -float(scope))


def draw_inputs(w: Workload, device: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """Everything that any contender needs, with gradients asked for."""
    out_h, out_w = ((size - 1) // w.stride + 1 for size in (w.h, w.w))
    offsets = [w.n, 2 * w.kernel**2, out_h, out_w]
    with torch.device(device):
        tensors = {
            "input": torch.randn(w.n, w.c, w.h, w.w).to(dtype),
            "rigid": torch.randn(w.weight_shape(w.kernel)).to(dtype),
            "scope": torch.randn(w.weight_shape(w.scope)).to(dtype),
            "kernel_offset": draw_offsets(w.offsets, offsets, w.kernel, w.scope),
            "data_offset": off_knots(torch.randn(offsets)),
            "grad": torch.randn(w.n, w.out_channels, out_h, out_w).to(dtype),
        }
    layout = torch.channels_last if w.channels_last else torch.contiguous_format
    tensors = {name: t.contiguous(memory_format=layout) for name, t in tensors.items()}
    return {name: t.requires_grad_(name != "grad") for name, t in tensors.items()}


# ---- contenders: from inputs to (output, what it is differentiated by) ---------------------------

Contender = Callable[[Workload, dict[str, Tensor]], tuple[Tensor, list[Tensor]]]


def rigid(w: Workload, t: dict[str, Tensor]):
    arguments = {k: v for k, v in w.arguments.items() if k != "kernel_size"}
    return F.conv2d(t["input"], t["rigid"], None, **arguments), [t["input"], t["rigid"]]


def _deformable(function, w: Workload, t: dict[str, Tensor]):
    data_offset = t["data_offset"] if w.data_offset else None
    by = [t["input"], t["scope"], t["kernel_offset"]] + [data_offset] * w.data_offset
    scope = t["scope"], None, t["kernel_offset"], data_offset
    return function(t["input"], *scope, **w.arguments, clip=True), by


def ours(w: Workload, t: dict[str, Tensor]):
    return _deformable(deform_kernel_conv2d, w, t)


def composed(w: Workload, t: dict[str, Tensor]):
    return _deformable(composed_deform_kernel_conv2d, w, t)


# With fullgraph, too many shapes are an error; otherwise the calls with further ones are eager.
_compiled = torch.compile(composed_deform_kernel_conv2d, dynamic=False, fullgraph=True)


def compiled(w: Workload, t: dict[str, Tensor]):
    return _deformable(_compiled, w, t)


def torchvision_dcn(w: Workload, t: dict[str, Tensor]):
    sizes = {k: w.arguments[k] for k in ("stride", "padding", "dilation")}
    offset = t["data_offset"].to(t["input"].dtype)
    out = deform_conv2d(t["input"], offset, t["rigid"], **sizes)
    return out, [t["input"], t["rigid"], t["data_offset"]]


CONTENDERS: dict[str, Contender] = {
    "rigid": rigid,
    "ours": ours,
    "composed": composed,
    "compiled": compiled,
    "torchvision DCN": torchvision_dcn,
}
# What a contender computes, if that is not what the composed operator does.
REFERENCES = {name: CONTENDERS[name] for name in ("rigid", "torchvision DCN")}


# ---- measuring -----------------------------------------------------------------------------------


def measuring(device: str) -> AbstractContextManager:
    """For all that follows, on a GPU a stream of its own.

    Backward runs on the stream of its forward, and the default one cannot be captured in a graph.
    """
    return torch.cuda.stream(torch.cuda.Stream()) if device == "cuda" else nullcontext()


def total_bytes(tensors: Iterable[Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


class Calls:
    """Forward and backward of a contender as two functions that can be timed."""

    def __init__(self, contender: Contender, w: Workload, tensors: dict[str, Tensor]):
        self.output, by = contender(w, tensors)
        self.grad = tensors["grad"]
        self.by = by

        @torch.no_grad()
        def forward() -> Tensor:
            return contender(w, tensors)[0]

        self.forward = forward

    def backward(self) -> tuple[Tensor, ...]:
        return torch.autograd.grad(self.output, self.by, self.grad, retain_graph=True)

    def least_bytes(self, direction: str) -> int:
        """To be read and written; backward, every input has a gradient as large."""
        inputs, output = total_bytes(self.by), total_bytes([self.grad])
        return inputs + output if direction == "forward" else 2 * inputs + output


def exact_results(exact: Contender, w: Workload, tensors: dict[str, Tensor]) -> list[Tensor]:
    """Output and gradients in float64, image by image: all at once could have no room."""
    images = []
    for i in range(w.n):
        high = {
            name: (t if name in ("rigid", "scope") else t[i : i + 1]).detach().double()
            for name, t in tensors.items()
        }
        high = {name: t.requires_grad_(name != "grad") for name, t in high.items()}
        output, by = exact(replace(w, n=1), high)
        images.append([output.detach(), *torch.autograd.grad(output, by, high["grad"])])
    output, grad_input, grad_weight, *grad_offsets = zip(*images, strict=True)
    return [
        torch.cat(output), torch.cat(grad_input), sum(grad_weight), *map(torch.cat, grad_offsets)
    ]  # fmt: skip


def accurate(results: list[Tensor], exact: list[Tensor]) -> bool:
    gate = GATE[results[0].dtype]  # the offsets' gradients are float32
    return all(
        bool((a.double() - b).abs().max() <= gate * b.abs().max())
        for a, b in zip(results, exact, strict=True)
    )


def traced(call: Callable, device: str) -> tuple[tuple[Tensor, ...], int]:
    """What a call returns, and the peak of the bytes allocated beyond that."""
    if device == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        result = call()
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated() - before
    else:
        with torch.profiler.profile(profile_memory=True) as profile:
            result = call()
        # Of the raw events; profile.events() folds them into the operators that allocate.
        events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
        events.sort(key=lambda e: e.start_ns())
        peak = max(accumulate((e.nbytes() for e in events), initial=0))
    results = result if isinstance(result, tuple) else (result,)
    return results, max(0, peak - total_bytes(results))


@contextmanager
def no_garbage_collection() -> Iterator[None]:
    """As `timeit` does: a collection, of the profiler's events above all, takes over a second."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


@no_garbage_collection()
def time_once(calls: list[Callable], device: str) -> float:
    """Seconds of one call, the mean over ``calls``; on a GPU they are captured in a graph.

    Of one thread on a CPU, its processor time: what others do on the machine shows less in it.
    """
    if device == "cpu":
        clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
        start = clock()
        for call in calls:
            call()
        return (clock() - start) / len(calls)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for call in calls:
        call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3 / len(calls)


def captured(calls: list[Callable]) -> Callable:
    """GRAPH_CALLS calls, going round the given ones, as one graph; one by one if that cannot be."""

    def go_round() -> None:
        for i in range(GRAPH_CALLS):
            calls[i % len(calls)]()

    go_round()  # what is only done the first time
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
            go_round()
    except RuntimeError as error:
        tqdm.write(f"Not in a CUDA graph, so launching counts as well: {error}", file=sys.stderr)
        return go_round
    return graph.replay


def rotation(w: Workload, device: str, dtype: torch.dtype) -> list[dict[str, Tensor]]:
    """Input sets to go round, so that a GPU's cache is cold; one on a CPU, as in a network."""
    first = draw_inputs(w, device, dtype)
    size = total_bytes(first.values())
    count = min(GRAPH_CALLS, -(-COLD_BYTES // size)) if device == "cuda" else 1
    return [first] + [draw_inputs(w, device, dtype) for _ in range(count - 1)]


@cache
def other_memory() -> Tensor:
    return torch.zeros(OTHER_BYTES, dtype=torch.uint8)


def fill_cache() -> None:
    """With what no contender reads."""
    other_memory().add_(1)


class Timed:
    """Seconds of one call on each set of inputs, round by round, in either state."""

    def __init__(self, functions: list[Callable], device: str):
        self.device = device
        self.seconds: dict[str, list[float]] = {state: [] for state in STATES}
        if device == "cuda":
            self.cold, self.warm = [captured(functions)], [captured(functions[:1])]
        else:
            self.cold, self.warm = functions, functions * WARM_CALLS

    def time_round(self) -> None:
        """Both states: what is cold leaves the cache warm, on a GPU a graph of the warm calls."""
        if self.device == "cpu":
            fill_cache()
        self.seconds["cold"].append(time_once(self.cold, self.device))
        if self.device == "cuda":
            time_once(self.warm, self.device)
        self.seconds["warm"].append(time_once(self.warm, self.device))

    def tired(self) -> bool:
        return sum(sum(seconds) for seconds in self.seconds.values()) >= ENOUGH_SECONDS

    def milliseconds(self, state: str) -> list[float]:
        calls = GRAPH_CALLS if self.device == "cuda" else 1
        return [seconds / calls * 1e3 for seconds in self.seconds[state]]

    def median(self, state: str) -> float:
        return statistics.median(self.milliseconds(state))


def measure(w: Workload, names: list[str], device: str, dtype: torch.dtype, rounds: int) -> list:
    """One row per contender and pass, with the times of either state."""
    torch._dynamo.reset()  # of a function, it compiles no more than a few shapes
    sets = rotation(w, device, dtype)
    rows, timed, exact = [], [], {}
    for name in names:
        if name == "torchvision DCN" and dtype == torch.bfloat16:
            continue  # has no kernel for it
        contender = CONTENDERS[name]
        calls = [Calls(contender, w, tensors) for tensors in sets]
        reference = REFERENCES.get(name, composed)
        if reference not in exact:
            exact[reference] = exact_results(reference, w, sets[0])
        correct = accurate([calls[0].forward(), *calls[0].backward()], exact[reference])
        for direction in "forward", "backward":
            functions = [getattr(c, direction) for c in calls]
            results, _ = traced(functions[0], device)
            again, extra_bytes = traced(functions[0], device)  # without the workspaces of cuBLAS
            row = {**asdict(w), "contender": name, "pass": direction, "accurate": correct}
            row["repeatable"] = all(torch.equal(a, b) for a, b in zip(results, again, strict=True))
            row |= {"extra_bytes": extra_bytes, "least_bytes": calls[0].least_bytes(direction)}
            rows.append(row)
            timed.append(Timed(functions, device))
    ruler = Timed([tensors["input"].detach().clone for tensors in sets], device)
    for _ in range(rounds):
        ruler.time_round()
        for contender in timed:
            if not contender.tired():
                contender.time_round()
    rigid = {r["pass"]: t for r, t in zip(rows, timed, strict=True) if r["contender"] == "rigid"}
    copied = 2 * total_bytes([sets[0]["input"]])
    for row, contender in zip(rows, timed, strict=True):
        for state in STATES:
            times, median = contender.milliseconds(state), contender.median(state)
            row[state] = {
                "milliseconds": median,
                "range": [min(times), max(times)],
                "over_rigid": median / rigid[row["pass"]].median(state),
                "over_copy": median / ruler.median(state),
                "over_floor": median / ruler.median(state) * copied / row["least_bytes"],
            }
    return rows


def measure_layer(w: Workload, device: str, dtype: torch.dtype, rounds: int) -> dict:
    """Training step of the whole layer, generators included, over that of a rigid convolution."""
    arguments = {"padding": w.kernel // 2, "device": device, "dtype": dtype}
    arguments["groups"] = w.arguments["groups"]
    shape = w.c, w.out_channels, w.kernel, w.stride
    deformable = DeformKernelConv2d if w.data_offset else LocalDeformKernel2d
    layers = [
        nn.Conv2d(*shape, **arguments),
        deformable(*shape, scope_size=w.scope, **arguments),
    ]
    tensors = draw_inputs(w, device, dtype)

    def step(layer: nn.Module) -> Callable:
        return lambda: layer(tensors["input"]).backward(tensors["grad"])

    seconds = [[time_once([step(layer)], device) for layer in layers] for _ in range(rounds + 1)]
    medians = [statistics.median(column) for column in zip(*seconds[1:], strict=True)]
    return {"name": w.name, "over_rigid": medians[1] / medians[0], "milliseconds": medians[1] * 1e3}


# ---- reporting -----------------------------------------------------------------------------------


def machine(device: str) -> dict:
    name = torch.cuda.get_device_name() if device == "cuda" else platform.processor()
    return {
        "device": name or platform.machine(),
        "capability": torch.backends.cpu.get_cpu_capability() if device == "cpu" else None,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda if device == "cuda" else None,
        "command": " ".join(sys.argv),
    }


def time_columns(times: dict) -> list:
    span = "{:.3g}-{:.3g}".format(*times["range"])
    ratios = (times[f"over_{what}"] for what in ("rigid", "copy", "floor"))
    return [times["milliseconds"], span, *ratios]


def ranked(row: dict, value: float) -> float:
    """The value, or nan if the contender is inaccurate."""
    return value if row["accurate"] else math.nan


def print_tables(rows: list[dict], layers: list[dict]) -> None:
    for direction in "forward", "backward":
        table = [
            [
                row["name"],
                row["contender"] + ("" if row["accurate"] else " (inaccurate: not ranked)"),
                *(column for state in STATES for column in time_columns(row[state])),
                row["extra_bytes"] / 2**20,
                "yes" if row["repeatable"] else "no",
            ]
            for row in rows
            if row["pass"] == direction
        ]
        header = ["", ""]
        for state in STATES:
            header += [f"{state}, ms", "range", "x rigid", "x copy", "x floor"]
        header += ["extra MiB", "repeats"]
        print(f"\n{direction}\n")
        formats = "", "", *(".3f", "", ".2f", ".2f", ".2f") * len(STATES), ".2f"
        print(tabulate(table, header, tablefmt="github", floatfmt=formats))
    print("\nforward and backward, cold, times faster than\n")
    pairs: dict[tuple[str, str], float] = {}
    for row in rows:
        key = row["name"], row["contender"]
        pairs[key] = pairs.get(key, 0) + ranked(row, row["cold"]["milliseconds"])
    peers = [c for c in dict.fromkeys(row["contender"] for row in rows) if c != "ours"]
    names = dict.fromkeys(row["name"] for row in rows)
    factors = {n: [pairs[n, c] / pairs[n, "ours"] for c in peers] for n in names}
    table = [[n, *(None if math.isnan(x) else x for x in line)] for n, line in factors.items()]
    print(tabulate(table, ["", *peers], tablefmt="github", floatfmt=".2f", missingval="–"))
    print("\nwhole layer, generator included, training step\n")
    table = [[layer["name"], layer["milliseconds"], layer["over_rigid"]] for layer in layers]
    print(tabulate(table, ["", "ms", "x rigid"], tablefmt="github", floatfmt=".2f"))


def plot(rows: list[dict], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(12, 4), sharey=True, layout="constrained")
    names = list(dict.fromkeys(row["name"] for row in rows))
    contenders = list(dict.fromkeys(row["contender"] for row in rows))
    for axis, direction in zip(axes, ("forward", "backward"), strict=True):
        for i, contender in enumerate(contenders):
            wanted = contender, direction
            mine = {r["name"]: r for r in rows if (r["contender"], r["pass"]) == wanted}
            at = [j + i / (len(contenders) + 1) for j in range(len(names))]
            width = 1 / (len(contenders) + 1)
            heights = {
                s: [ranked(mine[name], mine[name][s]["over_rigid"]) for name in names]
                for s in STATES
            }
            axis.bar(at, heights["cold"], width, label=contender, align="edge")
            warm = "warm" if contender == contenders[-1] else None
            centers = [x + width / 2 for x in at]
            axis.plot(centers, heights["warm"], "k.", markersize=3, label=warm)
        middle = len(contenders) / (len(contenders) + 1) / 2
        axis.set_xticks(
            [j + middle for j in range(len(names))],
            names,
            rotation=45,
            ha="right",
            rotation_mode="anchor",
        )
        axis.set(title=direction, yscale="log", ylabel="time over rigid")
        axis.axhline(1, color="black", linewidth=0.5)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=6)
    figure.savefig(path, dpi=120)


def check_ours(rows: list[dict], dtype: torch.dtype) -> None:
    """Ends the program with a message if ours has failed the gate."""
    wrong = dict.fromkeys(r["name"] for r in rows if r["contender"] == "ours" and not r["accurate"])
    if wrong:
        sys.exit(
            f"ours: expected results within {GATE[dtype]:g} of float64's largest, "
            f"got others on {', '.join(wrong)}: quote no times before tests/test_ops.py passes"
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1), help="on a CPU")
    parser.add_argument("--rounds", type=int, help="default: 5 if quick, else 15")
    parser.add_argument("--quick", action="store_true", help="the four stages, without torchvision")
    parser.add_argument("--dense", action="store_true", help="convolutions that are not depthwise")
    parser.add_argument("--compiled", action="store_true", help="also the composed one, compiled")
    parser.add_argument("--json", metavar="FILE", type=output_file)
    parser.add_argument("--plot", metavar="FILE.png", type=output_file)
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: no GPU is available")
    torch.set_num_threads(args.threads)
    torch.backends.cudnn.allow_tf32 = False  # with which none would pass the gate
    torch.manual_seed(0)
    dtype = getattr(torch, args.dtype)
    rounds = args.rounds or (5 if args.quick else 15)
    dropped = {"compiled"} if not args.compiled else set()
    dropped |= {"torchvision DCN"} if args.quick else set()
    names = [name for name in CONTENDERS if name not in dropped]
    rows, layers = [], []
    with measuring(args.device):
        for w in tqdm(workloads(args.quick, args.dense, args.device), desc="Workloads"):
            rows += measure(w, names, args.device, dtype, rounds)
            layers.append(measure_layer(w, args.device, dtype, rounds))
    print(machine(args.device))
    print_tables(rows, layers)
    if args.json:
        report = {"machine": machine(args.device), "rows": rows, "layers": layers}
        with open(args.json, "w") as f:
            json.dump(report, f, indent=1)
    if args.plot:
        plot(rows, args.plot)
    check_ours(rows, dtype)


if __name__ == "__main__":
    main()
