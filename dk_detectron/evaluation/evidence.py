"""Do deformable kernels help? Narrow networks on small deformed pictures, many seeds of each.

A seed is a draw of data, of the initial weights that networks share, and of the order of pictures;
results of the same seed are pairs. Settings were chosen by a search on other seeds and pictures.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache, partial
from statistics import fmean

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..analysis import count_multiply_adds, count_parameters
from ..analysis.ablation import REPLACEMENTS, generators, replaced_offsets, watch_taps
from ..data.datasets import datasets_root
from ..data.deformed import MATCHING, TASKS, VALIDATION, Sample, Task
from ..engine.optimizer import build_optimizer, parameter_groups
from ..layers import (
    AdaptiveConv2d,
    CondConv2d,
    DeformConv2d,
    DeformKernelConv2d,
    GlobalDeformKernel2d,
    LocalDeformKernel2d,
    msra_fill,
)
from ..modeling.small import small_network

CHANNELS, STEM_STRIDE, STRIDES = 24, 2, (1, 2, 1, 2, 1)
STEPS, BATCH, TEST_BATCH = 600, 32, 500
MOMENTUM, DECAY = 0.9, 4e-5  # the paper's

# Which of the depthwise layers are deformable.
LAYERS = {"all": (0, 1, 2, 3, 4), "first two": (0, 1), "last two": (3, 4)}


class GatedConv2d(nn.Conv2d):
    """A control: the generator of local DK, but what it predicts scales channels and moves no taps.

    Output y[c] of the convolution at a place becomes 2 * sigmoid(g[c mod 2K]) * y[c], g being the
    2K numbers that would have been the offsets there.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, **arguments):
        super().__init__(in_channels, out_channels, kernel_size, **arguments)
        arguments = {**arguments, "groups": 1, "bias": True}
        count = 2 * kernel_size**2
        self.gate_offset_generator = nn.Conv2d(in_channels, count, kernel_size, **arguments)
        nn.init.zeros_(self.gate_offset_generator.weight)
        nn.init.zeros_(self.gate_offset_generator.bias)  # type: ignore[arg-type]
        self.register_buffer("gate", torch.arange(out_channels) % count, persistent=False)

    def forward(self, input: Tensor) -> Tensor:
        gates = 2 * self.gate_offset_generator(input).sigmoid()
        return super().forward(input) * gates.index_select(1, self.gate)


WIDER = "rigid, wider"
# The depthwise convolutions of each kind of network, given the scope where there is one.
KINDS: dict[str, Callable[..., Callable[..., nn.Module]]] = {
    "rigid": lambda scope: nn.Conv2d,
    WIDER: lambda scope: nn.Conv2d,
    "channel gates": lambda scope: GatedConv2d,
    "conditional": lambda scope: CondConv2d,
    "global DK": lambda scope: partial(GlobalDeformKernel2d, scope_size=scope),
    "local DK": lambda scope: partial(LocalDeformKernel2d, scope_size=scope),
    "local DK, separable": lambda scope: partial(
        LocalDeformKernel2d, scope_size=scope, offset_generator="separable"
    ),
    "DCN": lambda scope: DeformConv2d,
    "DCN + local DK": lambda scope: partial(DeformKernelConv2d, scope_size=scope),
}
# Seconds of a training step over the rigid network's, for the estimate of the time left.
RELATIVE_COST = dict(zip(KINDS, (1, 2, 1.9, 1.2, 1.8, 2.5, 2.3, 2.7, 4), strict=True))


@dataclass(frozen=True)
class Run:
    """One training.

    Attributes:
        data: one of TASKS.
        kind: one of KINDS.
        width: channels; the wider control has as many as cost what local DK of this width does.
        scope: size of the scope, where there is one.
        layers: which depthwise layers are of the kind, one of LAYERS; the others are rigid.
        rate: the learning rate's peak.
        factor: of the generators' learning rate.
        limit: of each generator's gradient norm; 0 for none.
        search: tested on validation pictures alone, to choose settings by.
    """

    data: str
    kind: str
    width: int = CHANNELS
    scope: int = 4
    layers: str = "all"
    rate: float = 0.1
    factor: float = 0.1
    limit: float = 1.0
    steps: int = STEPS
    search: bool = False
    seed: int = 0

    @property
    def cost(self) -> float:
        return self.steps * RELATIVE_COST[self.kind] * self.width / CHANNELS


# ---- networks


def build_network(run: Run, in_channels: int, classes: int) -> nn.Sequential:
    """The network of a run, from the weights that the rigid one of the same seed starts with."""
    channels = count_channels(run.kind, run.width, in_channels, classes)
    torch.manual_seed(run.seed)
    rigid = _assemble(lambda index: nn.Conv2d, channels, in_channels, classes)
    for module in rigid:
        if isinstance(module, nn.Conv2d):
            msra_fill(module)
    kind, where = KINDS[run.kind](run.scope), LAYERS[run.layers]
    network = _assemble(
        lambda index: kind if index in where else nn.Conv2d, channels, in_channels, classes
    )
    for module, twin in zip(network.children(), rigid.children(), strict=True):
        if isinstance(module, AdaptiveConv2d):
            module.set_drawn_weight(twin.get_parameter("weight").detach())
        else:
            module.load_state_dict(twin.state_dict(), strict=False)
    return network


def _assemble(
    convolution: Callable[[int], Callable[..., nn.Module]],
    channels: int,
    in_channels: int,
    classes: int,
) -> nn.Sequential:
    def depthwise(index: int, stride: int) -> nn.Module:
        return convolution(index)(
            channels, channels, 3, stride=stride, padding=1, groups=channels, bias=False
        )

    return small_network(depthwise, channels, in_channels, classes, STEM_STRIDE, STRIDES)


@lru_cache
def count_channels(kind: str, width: int, in_channels: int, classes: int) -> int:
    """``width``; of the wider control, as many as give it what the network with local DK costs.

    No fewer parameters and no fewer multiply-adds: here both are the same within a few percent.
    """
    if kind != WIDER:
        return width

    def costs(kind: str, width: int) -> tuple[int, int]:
        network = build_network(Run("", kind, width), in_channels, classes)
        return count_parameters(network), _multiply_adds(in_channels, network)

    local = costs("local DK", width)
    return next(
        channels
        for channels in itertools.count(width)
        if all(a >= b for a, b in zip(costs("rigid", channels), local, strict=True))
    )


def _multiply_adds(in_channels: int, network: nn.Module) -> int:
    return sum(count_multiply_adds(network, torch.zeros(1, in_channels, 28, 28)).values())


# ---- training and tests


@lru_cache(maxsize=2)
def draw_task(data: str, seed: int) -> Task:
    return TASKS[data](seed, datasets_root())


def train(run: Run) -> dict:
    """Trains a run's network, tests it, and looks at why.

    Returns:
        ``errors`` in percent, by test; ``loss``, the mean of the last 20 steps; ``parameters``,
        ``multiply_adds``, ``seconds``; and what LOOKS return, by name, of a trained network.

    Raises:
        FileNotFoundError: the data are not there.
    """
    torch.set_num_threads(1)
    task = draw_task(run.data, run.seed)
    in_channels = task.train.images.shape[1]
    network = build_network(run, in_channels, task.classes)
    start = time.perf_counter()
    losses = list(_train(network, run, task.train))
    seconds = time.perf_counter() - start
    network.eval()
    tests = {VALIDATION: task.validation} if run.search else task.tests
    return {
        "errors": {
            name: rate for test in tests for name, rate in _test(network, test, tests[test])
        },
        "loss": fmean(losses[-20:]),
        "parameters": count_parameters(network),
        "multiply_adds": _multiply_adds(in_channels, network),
        "seconds": round(seconds, 1),
        **(
            {}
            if run.search
            else {n: look(network, task.tests[MATCHING]) for n, look in LOOKS.items()}
        ),
    }


def _batches(count: int, steps: int, seed: int) -> Iterator[Tensor]:
    """Indices of pictures: as often as they last, each once in another order."""
    generator = torch.Generator().manual_seed(seed)
    while steps > 0:
        batches = torch.randperm(count, generator=generator).split(BATCH)[: count // BATCH]
        yield from batches[:steps]
        steps -= len(batches)


def _train(network: nn.Module, run: Run, sample: Sample) -> Iterator[float]:
    """SGD, one cycle of the rate: a tenth of it warm-up, then cosine. Yields the losses."""
    groups = parameter_groups(network, run.rate, DECAY, offset_lr_factor=run.factor)
    optimizer = build_optimizer(
        groups, clip_offset_gradients=run.limit, lr=run.rate, momentum=MOMENTUM, nesterov=True
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, [group["lr"] for group in groups], total_steps=run.steps, pct_start=0.1,
        cycle_momentum=False,
    )  # fmt: skip
    for batch in _batches(len(sample.labels), run.steps, run.seed):
        loss = F.cross_entropy(network(sample.images[batch]), sample.labels[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        yield float(loss.detach())


@torch.no_grad()
def find_wrong(network: nn.Module, sample: Sample) -> Tensor:
    """[N]: which pictures are misclassified."""
    # In one order for all, by chance: the shapes' classes come in turn.
    order = torch.randperm(len(sample.labels), generator=torch.Generator().manual_seed(0))
    wrong = torch.empty(len(order), dtype=torch.bool)
    for batch in order.split(TEST_BATCH):
        wrong[batch] = network(sample.images[batch]).argmax(1) != sample.labels[batch]
    return wrong


def _test(network: nn.Module, name: str, sample: Sample) -> Iterator[tuple[str, float]]:
    """The error in percent; of MATCHING also by thirds of the objects' sizes."""
    wrong = find_wrong(network, sample)
    yield name, _percent(wrong)
    if name == MATCHING:
        thirds = sample.sizes.argsort().tensor_split(3)
        for third, indices in zip(("small", "medium", "large"), thirds, strict=True):
            yield f"{name}, {third}", _percent(wrong[indices])


def _percent(wrong: Tensor) -> float:
    return round(100 * float(wrong.float().mean()), 3)


# ---- why


def look_at_offsets(network: nn.Module, sample: Sample) -> dict[str, dict[str, float]]:
    """Of each layer with a scope: ``analysis.ablation.look_at_taps``."""
    with watch_taps(network) as seen:
        find_wrong(network, Sample(*(part[:TEST_BATCH] for part in sample)))
    return seen


def try_replacements(network: nn.Module, sample: Sample) -> dict[str, float]:
    """The error in percent on TEST_BATCH pictures, also with each of REPLACEMENTS."""
    if not generators(network):
        return {}
    part = Sample(*(values[:TEST_BATCH] for values in sample))
    errors = {"own": _percent(find_wrong(network, part))}
    for name in REPLACEMENTS:
        with replaced_offsets(network, name):
            errors[name] = _percent(find_wrong(network, part))
    return errors


# What is asked of every trained network, on the pictures of the matching test.
LOOKS: dict[str, Callable[[nn.Module, Sample], dict]] = {
    "taps": look_at_offsets,
    "replaced": try_replacements,
}
