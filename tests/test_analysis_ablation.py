"""Where taps are, and what replaces offsets."""

import pytest
import torch
from torch import nn

from dk_detectron.analysis.ablation import REPLACEMENTS, look_at_taps, replaced_offsets, watch_taps
from dk_detectron.layers import DeformConv2d, GlobalDeformKernel2d, LocalDeformKernel2d


def layer(kind=LocalDeformKernel2d, spread=0.5):
    made = kind(4, 4, 3, padding=1, groups=4)
    (generator,) = made.generators
    nn.init.normal_(generator.weight, std=spread)
    return made


def test_taps_by_hand():
    local = layer()
    local.kernel_offset_generator.bias.data.fill_(0.25)
    offset = torch.full((2, 18, 1, 1), 0.25)
    assert look_at_taps(local, offset) == {"moved": 0, "clipped": 0, "dead": 0}
    # The first tap rests at cell 0.5 of 0 to 3 along either axis: up by 1 is out.
    offset[:, 0] = -1
    offset[0, 1] = -1
    found = look_at_taps(local, offset)
    assert found["moved"] == pytest.approx(1.25 * 3 / 36)
    assert found["clipped"] == pytest.approx(3 / 36)
    assert found["dead"] == pytest.approx(1 / 18)


@pytest.mark.parametrize("kind", [LocalDeformKernel2d, GlobalDeformKernel2d])
def test_every_layer_with_a_scope_is_watched(kind):
    network = nn.Sequential(layer(kind), layer(kind), layer(DeformConv2d))
    with watch_taps(network) as seen:
        network(torch.randn(2, 4, 5, 5))
    before = dict(seen)
    network(torch.randn(2, 4, 5, 5))  # no longer
    assert seen == before
    assert list(seen) == ["0", "1"] and all(0 < look["moved"] < 10 for look in seen.values())


@pytest.mark.parametrize("kind", [LocalDeformKernel2d, GlobalDeformKernel2d, DeformConv2d])
def test_replacements_are_what_they_say(kind):
    torch.manual_seed(0)
    made = layer(kind)
    (generator,) = made.generators
    x = torch.randn(3, 4) if kind is GlobalDeformKernel2d else torch.randn(3, 4, 5, 5)
    own = generator(x)
    seen = {}
    for name in REPLACEMENTS:
        with replaced_offsets(made, name):
            seen[name] = generator(x)
    assert torch.equal(seen["another picture's"], own[[2, 0, 1]])
    for picture in range(3):
        mean = own[picture].flatten(1).mean(1) if own.dim() > 2 else own[picture]
        got = seen["mean over places"][picture]
        torch.testing.assert_close(got, mean.view(-1, *[1] * (own.dim() - 2)).expand_as(got))
    everywhere = own.transpose(0, 1).flatten(1).mean(1)
    got = seen["mean over all"].transpose(0, 1).flatten(1)
    torch.testing.assert_close(got, everywhere[:, None].expand_as(got))
    assert torch.equal(generator(x), own)  # outside of it, all is as before


def test_offsets_of_another_picture_change_what_follows():
    torch.manual_seed(0)
    made, x = layer(), torch.randn(3, 4, 5, 5)
    own = made(x)
    with replaced_offsets(made, "another picture's"):
        assert (made(x) - own).abs().max() > 0.01
