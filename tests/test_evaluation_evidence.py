"""The study of whether deformable kernels help: controls, pairs, statistics, and a run of it."""

import json
import sys
from dataclasses import replace

import pytest
import torch
from scipy import stats
from torch import nn

from dk_detectron.analysis import count_multiply_adds, count_parameters
from dk_detectron.analysis.ablation import generators
from dk_detectron.commands import reproduce_evidence
from dk_detectron.data.deformed import MATCHING, VALIDATION, Sample, Task
from dk_detectron.evaluation import evidence, evidence_report
from dk_detectron.evaluation.estimates import estimate, mean_and_deviation, paired_difference
from dk_detectron.evaluation.evidence import (
    CHANNELS,
    KINDS,
    LAYERS,
    WIDER,
    GatedConv2d,
    Run,
    build_network,
    count_channels,
    train,
)
from dk_detectron.evaluation.evidence_plan import SEARCH_SEEDS, SEEDS, experiments, plan
from dk_detectron.evaluation.evidence_report import Results
from dk_detectron.layers import AdaptiveConv2d, LocalDeformKernel2d, lift_to_scope
from dk_detectron.layers.start import centre_gain


def network(kind: str, **changes) -> nn.Sequential:
    return build_network(replace(Run("digits", kind), **changes), 1, 10)


# ---- pairs


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != WIDER])
def test_networks_of_a_seed_start_from_the_same_weights(kind):
    rigid, ours = network("rigid", seed=3), network(kind, seed=3)
    for index, (theirs, module) in enumerate(zip(rigid, ours, strict=True)):
        if not isinstance(module, AdaptiveConv2d):
            for name, value in theirs.state_dict().items():
                assert torch.equal(module.state_dict()[name], value), (index, name)
        elif hasattr(module, "scope_size"):
            gain = centre_gain(module.scope_size, module.kernel_size)
            scope = lift_to_scope(theirs.weight, module.scope_size) * gain
            torch.testing.assert_close(module.weight, scope)
        elif kind == "conditional":  # gates of one half
            torch.testing.assert_close(module.weight.sum(0) / 2, theirs.weight)
        else:
            assert torch.equal(module.weight, theirs.weight)
    # And another seed from others.
    assert not torch.equal(network(kind, seed=4)[0].weight, ours[0].weight)


@pytest.mark.parametrize(
    ("kind", "scope"), [("DCN", 4), ("channel gates", 4), ("conditional", 4), ("local DK", 3)]
)
def test_what_starts_rigid_has_the_same_outputs(kind, scope):
    x = torch.randn(2, 1, 28, 28)
    # In float32, through eleven layers.
    torch.testing.assert_close(
        network(kind, scope=scope)(x), network("rigid")(x), rtol=1e-4, atol=1e-5
    )


def test_pictures_come_in_the_same_order_for_all_of_a_seed():
    first, again = (torch.stack([*evidence._batches(100, 7, 5)]) for _ in range(2))
    assert torch.equal(first, again) and first.shape == (7, evidence.BATCH)
    assert len(first[:3].unique()) == 3 * evidence.BATCH  # 100 are three batches of 32
    assert not torch.equal(first, torch.stack([*evidence._batches(100, 7, 6)]))


# ---- controls


@pytest.mark.parametrize(("in_channels", "classes"), [(1, 10), (1, 6), (3, 6)])
def test_the_wider_control_costs_what_local_kernels_cost(in_channels, classes):
    picture = torch.zeros(1, in_channels, 28, 28)

    def costs(kind):
        made = build_network(Run("digits", kind), in_channels, classes)
        assert any(isinstance(module, AdaptiveConv2d) for module in made) == (kind == "local DK")
        return count_parameters(made), sum(count_multiply_adds(made, picture).values())

    control, local = costs(WIDER), costs("local DK")
    for ours, theirs in zip(control, local, strict=True):
        assert theirs <= ours <= 1.1 * theirs
    # One channel fewer is too cheap in one way or the other.
    width = count_channels(WIDER, CHANNELS, in_channels, classes) - 1
    narrower = build_network(Run("", "rigid", width), in_channels, classes)
    found = count_parameters(narrower), sum(count_multiply_adds(narrower, picture).values())
    assert any(ours < theirs for ours, theirs in zip(found, local, strict=True))


def test_gates_have_the_generators_of_local_kernels():
    gates, local = network("channel gates"), network("local DK")
    count = {
        name: [p.numel() for n, p in net.named_parameters() if "offset_generator" in n]
        for name, net in (("gates", gates), ("local", local))
    }
    assert count["gates"] == count["local"] and len(count["gates"]) == 2 * len(LAYERS["all"])


def test_gates_by_hand():
    layer = GatedConv2d(20, 20, 3, padding=1, groups=20, bias=False)
    layer.gate_offset_generator.bias.data.copy_(torch.arange(18.0))
    x = torch.randn(2, 20, 5, 5)
    plain = nn.functional.conv2d(x, layer.weight, padding=1, groups=20)
    for channel in range(20):
        gate = 2 * torch.sigmoid(torch.tensor(float(channel % 18)))
        torch.testing.assert_close(layer(x)[:, channel], gate * plain[:, channel])


@pytest.mark.parametrize("layers", LAYERS)
def test_layers_are_deformable_where_they_should_be(layers):
    found = [
        (index - 3) // 6
        for index, module in enumerate(network("local DK", layers=layers))
        if isinstance(module, LocalDeformKernel2d)
    ]
    assert tuple(found) == LAYERS[layers]


# ---- statistics


def test_intervals_by_hand_and_by_scipy():
    # The differences are 1, 2, 3, 4, 5: deviation sqrt(2.5); t of 4 degrees at 97.5 % is 2.7764.
    ours = dict(enumerate([11.0, 22.0, 33.0, 44.0, 55.0]))
    theirs = dict(enumerate([10.0, 20.0, 30.0, 40.0, 50.0]))
    found = paired_difference(ours, theirs | {9: 0.0})  # a seed without its pair does not count
    half = 2.776445 * (2.5 / 5) ** 0.5
    assert found.mean == pytest.approx(3) and found.seeds == 5
    assert (found.low, found.high) == pytest.approx((3 - half, 3 + half), rel=1e-5)
    interval = stats.ttest_rel([*ours.values()], [*theirs.values()]).confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((interval.low, interval.high))
    assert str(found) == "+3.0 (+1.0 to +5.0)"


def test_intervals_of_few():
    assert paired_difference({0: 1.0}, {1: 2.0}) is None
    assert estimate([2.0]) == (2.0, None, None, 1) and str(estimate([2.0])) == "+2.0"
    assert estimate([2.0, 2.0]) == (2.0, 2.0, 2.0, 2)


# ---- the plan


def test_the_plan_has_each_run_once_and_the_search_first():
    runs = plan()
    assert len(set(runs)) == len(runs)
    assert [run.search for run in runs] == sorted((run.search for run in runs), reverse=True)
    assert {run.seed for run in runs if run.search} == {*SEARCH_SEEDS}
    assert {run.seed for run in runs if not run.search}.isdisjoint(SEARCH_SEEDS)
    assert {*plan(["digits"])} | {*plan(["scope"])} <= {*runs}
    assert {run.seed for run in plan(["digits"], [7])} == {7}
    assert {run.kind for run in plan(["shapes"])} == {*KINDS} and len(SEEDS) >= 5
    with pytest.raises(ValueError, match="expected some of search, digits, .*, got digit"):
        plan(["digit"])


# ---- a run, end to end


def small_sample(count: int) -> Sample:
    labels = torch.arange(count) % 3
    images = torch.randn(count, 1, 12, 12, generator=torch.Generator().manual_seed(count))
    images[:, 0, :, :4] += 3 * labels[:, None, None]
    return Sample(images, labels, torch.linspace(0.3, 1, count))


def small_task(seed: int, root) -> Task:
    tests = {MATCHING: small_sample(48), "larger": small_sample(30)}
    return Task(3, small_sample(96), small_sample(36), tests)


@pytest.fixture
def small(monkeypatch):
    """Three easy classes of 12x12 pictures as both data sets."""
    monkeypatch.setattr(evidence, "TASKS", {"digits": small_task, "shapes": small_task})
    evidence.draw_task.cache_clear()
    yield
    evidence.draw_task.cache_clear()


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_learns_and_is_repeatable(small, kind):
    run = Run("digits", kind, rate=0.05, steps=30)
    result, again = train(run), train(run)
    assert result["loss"] < 1.0986 / 2  # half that of a guess
    assert list(result["errors"]) == [
        MATCHING, *(f"{MATCHING}, {size}" for size in ("small", "medium", "large")), "larger",
    ]  # fmt: skip
    thirds = [result["errors"][f"{MATCHING}, {size}"] for size in ("small", "medium", "large")]
    assert sum(thirds) / 3 == pytest.approx(result["errors"][MATCHING], abs=0.01)
    assert {**result, "seconds": 0} == {**again, "seconds": 0}
    deformable = "DK" in kind
    assert bool(result["taps"]) == deformable
    moves = deformable or kind in ("DCN", "channel gates")
    assert bool(result["replaced"]) == moves
    if moves:
        assert result["replaced"]["own"] == pytest.approx(result["errors"][MATCHING])


def test_taps_are_those_of_the_networks_own_offsets():
    """Not of those that the replacements, which come later, put before them."""
    torch.manual_seed(0)
    ours = network("local DK").eval()
    for generator in generators(ours):
        nn.init.normal_(generator.weight, std=0.2)
    alone = evidence.look_at_offsets(ours, small_sample(12))
    alone = {name: dict(look) for name, look in alone.items()}
    stored = {name: look(ours, small_sample(12)) for name, look in evidence.LOOKS.items()}
    assert len(alone) == 5 and stored["taps"] == alone


def test_the_search_sees_validation_pictures_alone(small):
    result = train(Run("shapes", "rigid", steps=2, search=True))
    assert list(result["errors"]) == [VALIDATION] and "replaced" not in result


def test_the_command_trains_and_reports(small, monkeypatch, tmp_path, capsys):
    few = "rigid", WIDER, "local DK"
    quick = {
        name: [replace(run, steps=2) for run in runs if run.kind in few and run.scope < 5]
        for name, runs in experiments().items()
    }
    for module in "evidence_plan", "evidence_report", "evidence_plots":
        monkeypatch.setattr(f"dk_detectron.evaluation.{module}.experiments", lambda: quick)

    def command(*arguments) -> str:
        arguments = "reproduce_evidence.py", *arguments, "--output", str(tmp_path)
        monkeypatch.setattr(sys, "argv", [*arguments])
        reproduce_evidence.main()
        return capsys.readouterr().out

    printed = command("--experiments", "digits", "layers", "--seeds", "0", "1")
    assert printed.strip() == (tmp_path / "tables.md").read_text().strip()
    for name in "kinds", "tests", "changes":
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    lines = [json.loads(x) for x in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert len(lines) == 2 * (3 + 2)  # one of the three settings of "layers" is among the digits
    errors = [Results(lines).errors(run) for run in quick["digits"]]
    table = printed.split("## digits: matching")[1].splitlines()[4:7]
    for kind, ours, line in zip(few, errors, table, strict=True):
        cells = [cell.strip() for cell in line.split("|")[1:-1]]
        assert cells[0] == kind and cells[3] == "2"
        assert cells[4] == mean_and_deviation(ours)
    assert cells[5] == str(paired_difference(errors[2], errors[0]))

    listed = command("--list", "--seeds", "0", "1", "2").splitlines()
    row = next(line for line in listed if line.startswith("| digits"))
    assert [cell.strip() for cell in row.split("|")[2:4]] == ["9", "6"]
    assert command("--report-only") == printed


def test_a_package_that_is_missing_is_said_before_training(small, monkeypatch, tmp_path):
    monkeypatch.setattr(
        reproduce_evidence, "find_spec", lambda name: None if name == "scipy" else name
    )
    monkeypatch.setattr(sys, "argv", ["x", "--output", str(tmp_path)])
    with pytest.raises(SystemExit, match=r"scipy: expected .* pip install 'dk_detectron\[evi"):
        reproduce_evidence.main()
    assert not list(tmp_path.iterdir())


def test_tables_of_nothing():
    assert "| local DK" in evidence_report.render(Results([]))
