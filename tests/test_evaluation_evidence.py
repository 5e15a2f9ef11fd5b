"""The study of whether deformable kernels help: controls, pairs, statistics, and a run of it."""

import json
import sys
from dataclasses import asdict, replace

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


def test_a_folder_that_cannot_be_is_said(small, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(sys, "argv", ["x", "--output", str(tmp_path / "file" / "evidence")])
    with pytest.raises(SystemExit, match=r"^error: .*file"):
        reproduce_evidence.main()


def test_tables_of_nothing():
    assert "| local DK" in evidence_report.render(Results([]))


def test_thirds_are_of_the_sizes_of_the_objects():
    sizes = torch.tensor([0.9, 0.1, 0.5, 0.2, 0.8, 0.6])
    sample = Sample(sizes.view(-1, 1, 1, 1), torch.zeros(6, dtype=torch.long), sizes)

    def wrong_of_small_ones(images):
        return torch.stack([images.flatten(), 0.6 - images.flatten()], 1)

    assert dict(evidence._test(wrong_of_small_ones, MATCHING, sample)) == {
        MATCHING: 33.333, "matching, small": 100, "matching, medium": 0, "matching, large": 0,
    }  # fmt: skip


def test_networks_are_tested_in_evaluation_mode(small, monkeypatch):
    modes, find_wrong = [], evidence.find_wrong

    def noting(network, sample):
        modes.append(any(module.training for module in network.modules()))
        return find_wrong(network, sample)

    monkeypatch.setattr(evidence, "find_wrong", noting)
    train(Run("digits", "local DK", steps=1))
    assert len(modes) > 2 and not any(modes)


def test_pictures_are_tested_in_an_order_by_chance():
    """Else the picture whose offsets replace one's own would be of the class before, always."""
    seen = []

    def network(images):
        seen.append(images.flatten())
        return torch.zeros(len(images), 2)

    numbers = torch.arange(200.0)
    evidence.find_wrong(network, Sample(numbers.view(-1, 1, 1, 1), numbers.long(), numbers))
    order = torch.cat(seen)
    assert torch.equal(order.sort().values, numbers)
    assert ((order.roll(1) - order) % 6 == 5).float().mean() < 0.5


def test_the_loss_is_that_of_the_end(small, monkeypatch):
    monkeypatch.setattr(evidence, "_train", lambda *_: map(float, range(100)))
    assert train(Run("digits", "rigid", search=True))["loss"] == 89.5


def test_the_settings_of_a_run_reach_its_optimizer(small, monkeypatch):
    made, build = [], evidence.build_optimizer

    def noting(groups, **options):
        rates = {name: g["lr"] for g in groups for name in g["param_names"]}
        made.append((rates, options["clip_offset_gradients"]))
        return build(groups, **options)

    monkeypatch.setattr(evidence, "build_optimizer", noting)
    train(Run("digits", "local DK", rate=0.05, factor=0.3, limit=0.7, steps=1))
    ((rates, limit),) = made
    assert limit == 0.7
    assert {"offset_generator" in n: rate for n, rate in rates.items()} == pytest.approx(
        {True: 0.3 * 0.05, False: 0.05}
    )


def result_of(run, seed, error, **changes):
    return {
        **asdict(replace(run, seed=seed)), "errors": {MATCHING: error}, "loss": 0.5,
        "parameters": 1000, "multiply_adds": 2_000_000, "taps": {}, "replaced": {}, **changes,
    }  # fmt: skip


def cells(table: str, row: str) -> list[str]:
    line = next(line for line in table.splitlines() if line.startswith(f"| {row} "))
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_tables_by_hand():
    runs = evidence_report._by_kind("digits")
    taps = {"2": {"moved": 0.25, "clipped": 0.05, "dead": 0.01}}
    looks = {"taps": taps, "replaced": dict.fromkeys(["own", *evidence.REPLACEMENTS], 9.0)}
    results = []
    for seed in range(3):
        results += [result_of(runs["rigid"], seed, 10.0 + seed)]
        results += [result_of(runs["rigid, wider"], seed, 7.0 + seed + 0.1 * seed**2)]
        replaced = looks["replaced"] | {"own": 8.0 + seed, "another picture's": 9.5 + 1.1 * seed}
        more = {**looks, "replaced": replaced}
        results += [result_of(runs["local DK"], seed, 8.0 + seed + 0.1 * seed, **more)]
        results += [result_of(runs["DCN"], seed, 10.0 + seed + (seed - 1))]
    found = Results(results)
    # Two points less than rigid, one more than the wider one, in every pair nearly the same.
    assert cells(evidence_report.tests_table(found, "digits"), "local DK")[1] == "9.1 ± 1.1 ▾▴"
    # As good as rigid in the mean, and three more than the wider one.
    assert cells(evidence_report.tests_table(found, "digits"), "DCN")[1] == "11.0 ± 2.0 ·▴"
    offsets = cells(evidence_report.offsets_table(found, "digits"), "local DK")
    assert offsets[1:4] == ["0.25 (0.25 to 0.25)", "5.0", "1.0"]
    assert offsets[5].startswith("+1.6 (")


def test_pairs_are_with_the_rigid_network_of_the_same_length():
    results = []
    for i, run in enumerate(experiments()["schedule"]):
        results.append(result_of(run, 0, 20.0 - i**2))
    table = evidence_report.pairs_table(Results(results), "schedule", "steps")
    lines = [line for line in table.splitlines() if "| local DK " in line]
    assert [[c.strip() for c in line.strip("|").split("|")][-2:] for line in lines] == [
        ["-4.0", "-3.0"], ["-16.0", "-9.0"], ["-28.0", "-15.0"],
    ]  # fmt: skip
