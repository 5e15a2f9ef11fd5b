"""Generators of offsets, the separable one too; and what layers take of others' states."""

from functools import partial

import pytest
import torch
from torch import nn

from dk_detectron.engine.optimizer import build_optimizer, parameter_groups
from dk_detectron.layers import (
    KINDS,
    OFFSET_GENERATORS,
    DeformConv2d,
    DeformKernelConv2d,
    GlobalDeformKernel2d,
    LocalDeformKernel2d,
    SeparableConv2d,
    embed_scope,
)
from dk_detectron.layers.costs import count_multiply_adds, count_parameters
from dk_detectron.model_zoo import CONFIGS, load_config
from dk_detectron.modeling import mobilenet_v2

LOCAL = [LocalDeformKernel2d, DeformConv2d, DeformKernelConv2d]
SCOPED = [LocalDeformKernel2d, GlobalDeformKernel2d, DeformKernelConv2d]


def randomize(layer: nn.Module, scale: float = 0.3) -> nn.Module:
    for generator in layer.generators:
        for parameter in generator.parameters():
            nn.init.normal_(parameter, std=scale)
    return layer


@pytest.mark.parametrize("layer", LOCAL)
def test_a_separable_generator_is_a_depthwise_and_a_1x1_convolution(layer):
    arguments = (6, 6, (3, 5), (2, 1), (1, 3), (1, 2), 6)
    layer = randomize(layer(*arguments, offset_generator="separable").double())
    x = torch.randn(2, 6, 9, 11, dtype=torch.float64)
    depthwise = nn.Conv2d(6, 6, (3, 5), (2, 1), (1, 3), (1, 2), 6, bias=False).double()
    pointwise = nn.Conv2d(6, 30, 1).double()
    for generator in layer.generators:
        depthwise.load_state_dict(generator.depthwise.state_dict())
        pointwise.load_state_dict({"weight": generator.weight, "bias": generator.bias})
        torch.testing.assert_close(generator(x), pointwise(depthwise(x)))
    assert "offset_generator=separable" in repr(layer)


@pytest.mark.parametrize("layer", LOCAL)
def test_with_a_separable_generator_a_layer_starts_rigid_and_then_learns(layer):
    rigid = nn.Conv2d(6, 6, 3, padding=1, groups=6).double()
    layer = layer(6, 6, 3, padding=1, groups=6, offset_generator="separable").double()
    layer.set_rigid_weight(rigid.weight.detach())
    layer.bias.data.copy_(rigid.bias.data)
    x = torch.randn(2, 6, 9, 11, dtype=torch.float64)
    torch.testing.assert_close(layer(x), rigid(x), rtol=1e-10, atol=1e-12)
    optimizer = torch.optim.SGD(layer.parameters(), 0.1)
    layer(x).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    layer(x).square().sum().backward()  # the depthwise part learns from the second step on
    for name, parameter in layer.named_parameters():
        assert parameter.grad.abs().sum() > 0, name


def test_what_a_separable_generator_costs():
    """By hand: C * 2K * K + 2K becomes C * (K + 2K) + 2K weights; multiply-adds likewise."""
    layers = {
        kind: LocalDeformKernel2d(64, 64, 3, padding=1, groups=64, offset_generator=kind)
        for kind in ("full", "separable")
    }
    weights = {kind: count_parameters(layer.generators[0]) for kind, layer in layers.items()}
    assert weights == {"full": 64 * 18 * 9 + 18, "separable": 64 * (9 + 18) + 18}
    x = torch.randn(1, 64, 10, 12)
    costs = {k: count_multiply_adds(m, x)["Conv2d"] for k, m in layers.items()}
    assert costs == {"full": 120 * 64 * 18 * 9, "separable": 120 * 64 * (9 + 18)}


def test_the_key_reaches_every_local_layer():
    opts = ["MODEL.DEFORM_KERNEL.OFFSET_GENERATOR", "separable"]
    cfg = load_config(CONFIGS / "ImageNet" / "MNV2_dcn_dk_l3.yaml", opts)
    from detectron2.modeling import build_backbone

    backbone = build_backbone(cfg)
    generators = [m for n, m in backbone.named_modules() if n.endswith("offset_generator")]
    assert len(generators) == 17 + 14
    assert all(isinstance(generator, SeparableConv2d) for generator in generators)
    cfg.MODEL.DEFORM_KERNEL.OFFSET_GENERATOR = "cheap"
    with pytest.raises(ValueError, match="DEFORM_KERNEL.OFFSET_GENERATOR: expected one of full"):
        build_backbone(cfg)
    with pytest.raises(ValueError, match="offset_generator: expected one of full, .* got 'cheap'"):
        mobilenet_v2(conv3x3="local", offset_generator="cheap")
    with pytest.raises(ValueError, match="offset_generator: expected one of full, separable"):
        LocalDeformKernel2d(4, 4, 3, offset_generator="cheap")
    with pytest.raises(TypeError, match="offset_generator"):
        GlobalDeformKernel2d(4, 4, 3, offset_generator="separable")


def test_the_optimizer_treats_the_whole_of_a_separable_generator_apart():
    """Its rate, and one limit for the gradient of all three tensors together."""
    model = nn.Sequential(LocalDeformKernel2d(6, 6, 3, groups=6, offset_generator="separable"))
    randomize(model[0])
    groups = parameter_groups(model, 1.0, weight_decay=0.1, offset_lr_factor=0.5)
    rates = {name: (g["lr"], g["weight_decay"]) for g in groups for name in g["param_names"]}
    assert rates == {
        "0.weight": (1.0, 0.1),
        "0.bias": (1.0, 0.1),
        "0.kernel_offset_generator.weight": (0.5, 0.1),
        "0.kernel_offset_generator.bias": (0.5, 0.0),
        "0.kernel_offset_generator.depthwise.weight": (0.5, 0.1),
    }
    optimizer = build_optimizer(groups, lr=1.0, clip_offset_gradients=0.01)
    model(torch.randn(2, 6, 8, 8)).square().sum().backward()
    optimizer.step()
    gradients = [p.grad for p in model[0].kernel_offset_generator.parameters()]
    assert torch.cat([g.flatten() for g in gradients]).norm() == pytest.approx(0.01, rel=1e-3)


# ---- states of others
# -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("learnt", [False, True], ids=["fresh", "learnt"])
def test_a_layer_loads_the_weights_of_a_rigid_one_exactly(kind, learnt):
    """By plain ``load_state_dict``, strictly, whatever its generators have learnt."""
    rigid = nn.Conv2d(6, 8, 3, padding=1, groups=2).double()
    layer = KINDS[kind](6, 8, 3, padding=1, groups=2).double()
    model = nn.Sequential(nn.Identity(), randomize(layer) if learnt else layer)
    model.load_state_dict({f"1.{name}": tensor for name, tensor in rigid.state_dict().items()})
    x = torch.randn(2, 6, 9, 11, dtype=torch.float64)
    torch.testing.assert_close(model(x), rigid(x), rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(layer.rigid_weight(), rigid.weight, rtol=1e-9, atol=1e-11)


def rigid_and(kind: str, **arguments) -> tuple[nn.Conv2d, nn.Module]:
    """A rigid convolution with a single tap along an axis, and a layer in its place."""
    rigid = nn.Conv2d(6, 8, (1, 3), padding=(0, 1), groups=2)
    return rigid, KINDS[kind](6, 8, (1, 3), padding=(0, 1), groups=2, **arguments)


@pytest.mark.parametrize("kind", KINDS)
def test_rigid_weights_become_the_same_whatever_the_seed(kind):
    """Or processes of one training, of different seeds, would go on with different networks."""
    rigid, layer = rigid_and(kind)
    states = []
    for seed in 0, 1:
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        layer.load_state_dict(rigid.state_dict())
        assert torch.equal(torch.get_rng_state(), before)
        states.append({name: tensor.clone() for name, tensor in layer.state_dict().items()})
    for name, tensor in states[0].items():
        assert torch.equal(states[1][name], tensor), name


@pytest.mark.parametrize(
    "own, loaded, device",
    [
        (torch.float32, torch.float32, "meta"),
        (torch.float32, torch.float64, "cpu"),
        (torch.float16, torch.float16, "cpu"),
    ],
)
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_made_of_assigned_weights_is_of_their_type(kind, own, loaded, device):
    rigid, layer = rigid_and(kind, dtype=own, device=device)
    rigid.to(loaded)
    layer.load_state_dict(rigid.state_dict(), assign=True)
    assert {(p.dtype, p.device.type) for p in layer.parameters()} == {(loaded, "cpu")}
    x = torch.randn(2, 6, 5, 7, dtype=loaded)
    limit = {"rtol": 1e-9, "atol": 1e-11} if loaded == torch.float64 else {}
    if loaded == torch.float16:
        limit = {"rtol": 0.01, "atol": 0.01}
    torch.testing.assert_close(layer(x), rigid(x), **limit)


@pytest.mark.parametrize("kind", KINDS)
def test_weights_may_be_assigned_where_new_tensors_have_no_values(kind):
    """Whoever loads large networks has the whole of it in ``with torch.device("meta")``."""
    sources = [rigid_and(kind)[0]]
    if KINDS[kind] in SCOPED:
        sources.append(randomize(rigid_and(kind, scope_size=(1, 3))[1]))
    for source in sources:
        with torch.device("meta"):
            _, layer = rigid_and(kind)
            layer.load_state_dict(source.state_dict(), assign=True)
        x = torch.randn(2, 6, 5, 7)
        torch.testing.assert_close(layer(x), source(x))


VARIANTS = [(kind, {}) for kind in KINDS]
VARIANTS += [("dcn+local", {"offset_generator": o, "modulated": True}) for o in OFFSET_GENERATORS]


@pytest.mark.parametrize("kind, options", VARIANTS)
@pytest.mark.parametrize("last", ["generators", "layer"])
def test_a_layer_from_meta_is_the_same_once_reset(kind, options, last):
    """By itself, or module after module, in either order, as FSDP and others do it."""
    arguments = {"kernel_size": 3, "groups": 2, **options}
    layer = KINDS[kind](6, 8, device="meta", **arguments).to_empty(device="cpu")
    for parameter in layer.parameters():
        nn.init.constant_(parameter, torch.nan)
    torch.manual_seed(3)
    layer.reset_parameters()
    torch.manual_seed(3)
    for name, tensor in KINDS[kind](6, 8, **arguments).state_dict().items():
        assert torch.equal(layer.state_dict()[name], tensor), name
    modules = [*layer.modules()] if last == "generators" else [*layer.modules()][::-1]
    for module in modules:
        module.reset_parameters()
    assert not any(g.weight.any() or g.bias.any() for g in layer.generators)


def test_the_depthwise_part_of_a_generator_is_kept_or_drawn():
    """What it is of, on "meta", is nothing to be copied."""
    options = {"offset_generator": "separable"}
    rigid, layer = rigid_and("local", **options)
    before = layer.kernel_offset_generator.depthwise.weight.detach().clone()
    layer.load_state_dict(rigid.state_dict())
    assert torch.equal(layer.kernel_offset_generator.depthwise.weight, before)
    _, layer = rigid_and("local", device="meta", **options)
    layer.load_state_dict(rigid.state_dict(), assign=True)
    drawn = layer.kernel_offset_generator.depthwise.weight.detach()
    assert drawn.std() == pytest.approx(before.std(), rel=0.5)


def test_hooks_do_not_matter_to_loading(tmp_path):
    """They may hold what cannot be copied."""
    rigid, layer = rigid_and("local")
    with open(tmp_path / "log.txt", "w") as log:
        layer.register_forward_hook(partial(print, file=log))
        layer.load_state_dict(rigid.state_dict())
    torch.testing.assert_close(layer.rigid_weight(), rigid.weight)


@pytest.mark.parametrize("kind", KINDS)
def test_a_layers_own_state_is_loaded_as_it_is(kind):
    source = randomize(KINDS[kind](4, 4, 3, groups=2))
    target = KINDS[kind](4, 4, 3, groups=2)
    target.load_state_dict(source.state_dict())
    for name, tensor in source.state_dict().items():
        assert torch.equal(target.state_dict()[name], tensor), name


# Even and odd differences, of each axis.
@pytest.mark.parametrize("scopes", [(3, 4), (4, 5), (4, 6), (3, 9), ((3, 4), (6, 4)), (4, (7, 5))])
@pytest.mark.parametrize("layer", SCOPED)
def test_a_smaller_scope_lies_exactly_in_a_larger_one(layer, scopes):
    """With offsets of several cells, of which many are clipped; gradients of the data too."""
    small, large = (
        layer(6, 6, 3, padding=1, groups=6, scope_size=scope).double() for scope in scopes
    )
    randomize(small, 1.0)
    large.load_state_dict(small.state_dict())
    x = torch.randn(2, 6, 9, 11, dtype=torch.float64)
    torch.testing.assert_close(large(x), small(x), rtol=1e-10, atol=1e-12)


def test_single_taps_lie_exactly_in_a_larger_scope_too():
    small, large = (GlobalDeformKernel2d(6, 8, 1, scope_size=s).double() for s in (2, 3))
    randomize(small)
    large.load_state_dict(small.state_dict())
    x = torch.randn(2, 6, 5, 5, dtype=torch.float64)
    torch.testing.assert_close(large(x), small(x), rtol=1e-10, atol=1e-12)


def test_embedding_by_hand():
    row = torch.tensor([[[[1.0, 2.0, 6.0]]]])
    scope, move = embed_scope(row, (1, 5))
    assert scope.flatten().tolist() == [1, 1, 2, 6, 6] and move.tolist() == [0, 0]
    scope, move = embed_scope(row, (2, 4))
    assert scope[0, 0].tolist() == [[1, 2, 6, 6]] * 2 and move.tolist() == [-0.5, -0.5]


def test_a_larger_scope_does_not_fit_into_a_smaller_one():
    small, large = (LocalDeformKernel2d(4, 4, 3, groups=4, scope_size=s) for s in (4, 5))
    model = nn.Sequential(small)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    message = (
        r"0.weight: expected a scope of at most \(4, 4\), got \(5, 5\): a smaller scope cannot hold"
    )
    with pytest.raises(RuntimeError, match=message):
        model.load_state_dict(nn.Sequential(large).state_dict())
    assert torch.equal(model.state_dict()["0.weight"], before["0.weight"])
    with pytest.raises(RuntimeError, match="size mismatch"):  # another number of channels
        small.load_state_dict(LocalDeformKernel2d(6, 6, 3, groups=6, scope_size=3).state_dict())
