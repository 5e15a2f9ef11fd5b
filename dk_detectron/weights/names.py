"""What other libraries and this project's networks call their tensors."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator

from torch import Tensor, nn

from ..layers import GENERATOR
from ..modeling.mobilenetv2 import GROUPS, STEM_GROUP
from ..modeling.resnetdw import BLOCKS_PER_STAGE
from .files import RENAMER, CheckpointError

# A backbone under a feature pyramid, one of its own, and one that was saved bare.
BACKBONE_PREFIXES = ("backbone.bottom_up.", "backbone.", "")
# The first convolution of every backbone of this project, and of detectron2's ResNet.
FIRST_WEIGHT = "stem.conv1.weight"
CLASSIFIER = "linear."
# Of any detector: pyramids, RPN and heads, RetinaNet's P6 and P7, and its head.
DETECTION_PARTS = (
    "backbone.fpn_",
    "backbone.top_block.",
    "proposal_generator.",
    "roi_heads.",
    "head.",
)


# Conversion
def _blocks() -> Iterator[tuple[int, int, list[str]]]:
    """MobileNet-V2's residual blocks: group, place in the group, our names of the convolutions."""
    count = Counter()
    for i, group in enumerate((STEM_GROUP, *GROUPS)):
        for j in range(group.num_blocks):
            block = "stem.block" if group is STEM_GROUP else f"{group.stage}.{count[group.stage]}"
            count[group.stage] += 1
            first = 2 if group.expansion == 1 else 1  # without expansion there is no conv1
            yield i, j, [f"{block}.conv{k}" for k in range(first, 4)]


# The convolution to 1280 channels, a block of its own after the last.
FINAL_CONV = f"res5.{sum(g.num_blocks for g in GROUPS if g.stage == 'res5')}.conv1"


def _torchvision_convs() -> Iterator[tuple[str, str, str]]:
    """torchvision's MobileNet-V2: convolution, its norm, our name of both."""
    yield "features.0.0", "features.0.1", "stem.conv1"
    for i, (_, _, convs) in enumerate(_blocks(), start=1):
        block, last = f"features.{i}.conv", len(convs) - 1
        for k, conv in enumerate(convs[:-1]):
            yield f"{block}.{k}.0", f"{block}.{k}.1", conv
        yield f"{block}.{last}", f"{block}.{last + 1}", convs[-1]
    yield f"features.{i + 1}.0", f"features.{i + 1}.1", FINAL_CONV


def _torchvision_resnet_convs() -> Iterator[tuple[str, str, str]]:
    """torchvision's ResNets and ResNeXts of bottlenecks: convolution, its norm, detectron2's name.

    Those of the largest: a smaller one has fewer blocks.
    """
    yield "conv1", "bn1", "stem.conv1"
    for stage, num_blocks in enumerate(map(max, *BLOCKS_PER_STAGE.values()), start=1):
        for i in range(num_blocks):
            theirs, ours = f"layer{stage}.{i}", f"res{stage + 1}.{i}"
            for k in 1, 2, 3:
                yield f"{theirs}.conv{k}", f"{theirs}.bn{k}", f"{ours}.conv{k}"
            yield f"{theirs}.downsample.0", f"{theirs}.downsample.1", f"{ours}.shortcut"


def _timm_convs() -> Iterator[tuple[str, str, str]]:
    """timm's mobilenetv2_100: convolution, its norm, our name of both."""
    yield "conv_stem", "bn1", "stem.conv1"
    for i, j, convs in _blocks():
        kinds = ["conv_dw", "conv_pw"] if len(convs) == 2 else ["conv_pw", "conv_dw", "conv_pwl"]
        for k, (kind, conv) in enumerate(zip(kinds, convs, strict=True), start=1):
            yield f"blocks.{i}.{j}.{kind}", f"blocks.{i}.{j}.bn{k}", conv
    yield "conv_head", "bn2", FINAL_CONV


TORCHVISION_RESNET = "torchvision's ResNet"
# Other libraries' networks: first weight, convolutions and classifier. Their norms have an epsilon
# of 1e-5, as have BN and FrozenBN here, so that statistics are taken as they are.
FOREIGN = {
    "torchvision's MobileNet-V2": ("features.0.0.weight", _torchvision_convs, "classifier.1"),
    TORCHVISION_RESNET: ("layer1.0.conv1.weight", _torchvision_resnet_convs, "fc"),
    "timm's MobileNet-V2": ("conv_stem.weight", _timm_convs, "classifier"),
}
# Those that detectron2 has given its own names, which are ours too; but for their classifiers.
CAFFE2_RESNET = "Caffe2's ResNet"
RENAMED = {"stem.fc.": TORCHVISION_RESNET, "fc1000.": CAFFE2_RESNET}
# MODEL.PIXEL_MEAN and MODEL.PIXEL_STD of their trainings, red first or blue first.
RGB = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)
PIXELS = dict.fromkeys(FOREIGN, ("RGB", *RGB)) | {
    CAFFE2_RESNET: ("BGR", (103.53, 116.28, 123.675), (1.0, 1.0, 1.0))
}


def unwrap(state: dict[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """The network in a state dict that has it under a name, such as Lightning's "model."

    Returns:
        Its tensors without that name, and the names of what lies outside.
    """
    known = [first for first, *_ in FOREIGN.values()]
    known += [prefix + FIRST_WEIGHT for prefix in BACKBONE_PREFIXES]
    if any(first in state for first in known):
        return state, []
    for first in known:
        wrappers = [name[: -len(first)] for name in state if name.endswith(f".{first}")]
        if not wrappers:
            continue
        # Of a moving average beside the weights, the weights.
        wrapper = min(wrappers, key=lambda wrapper: ("ema" in wrapper, len(wrapper)))
        inner = {n.removeprefix(wrapper): t for n, t in state.items() if n.startswith(wrapper)}
        return inner, [name for name in state if not name.startswith(wrapper)]
    return state, []


def model_names(state: dict[str, Tensor], prefix: str, source: str) -> tuple[str, dict[str, str]]:
    """What ``state`` is of, and its names in a model whose backbone's names start with ``prefix``.

    Raises:
        CheckpointError: it is of no known kind.
    """
    for kind, (first_weight, convs, classifier) in FOREIGN.items():
        if first_weight in state:
            modules = {classifier: CLASSIFIER[:-1]}
            for conv, norm, ours in convs():
                modules |= {conv: prefix + ours, norm: f"{prefix}{ours}.norm"}
            names = {}
            for name in state:
                module, _, tensor = name.rpartition(".")
                names[name] = f"{modules[module]}.{tensor}" if module in modules else name
            return kind, names
    for classifier, kind in RENAMED.items():
        if {FIRST_WEIGHT, f"{classifier}weight"} <= state.keys():
            return kind, {
                name: CLASSIFIER + name.removeprefix(classifier)
                if name.startswith(classifier)
                else prefix + name
                for name in state
            }
    for old in BACKBONE_PREFIXES:
        if old + FIRST_WEIGHT in state:
            return "this project's own", {
                name: prefix + name[len(old) :] if name.startswith(old) else name for name in state
            }
    if "conv1_w" in state:
        raise CheckpointError(
            f"{source}: expected names of PyTorch's, got Caffe2's (conv1_w, ...): rename its "
            f"tensors by {RENAMER} first"
        )
    raise CheckpointError(
        f"{source}: expected a MobileNet-V2 of torchvision (features.0.0.weight, ...) or timm "
        "(conv_stem.weight, ...), a ResNet of torchvision (layer1.0.conv1.weight, ...), or a "
        f"checkpoint of this project (backbone.{FIRST_WEIGHT}, ...), "
        f"got another network: {', '.join(list(state)[:4])}, ..."
    )


def pixels_conflict(kind: str, model: nn.Module) -> str | None:
    """What to know if pixels come to a model otherwise than to networks of a kind.

    No weight shows it. Of the means, red's is the largest, which tells the order of channels.
    """
    if kind not in PIXELS or not hasattr(model, "pixel_std"):
        return None
    order, mean, std = PIXELS[kind]
    own_mean, own_std = (getattr(model, f"pixel_{k}").flatten().tolist() for k in ("mean", "std"))
    is_turned = (own_mean[0] - own_mean[-1]) * (mean[0] - mean[-1]) < 0
    if not is_turned and all(0.5 < own / s < 2 for own, s in zip(own_std, std, strict=True)):
        return None
    return (
        f"{kind} as it is published was trained with INPUT.FORMAT {order}, MODEL.PIXEL_MEAN "
        f"{list(mean)}, MODEL.PIXEL_STD {list(std)}; here they are "
        f"{[round(x, 3) for x in own_mean]} and {[round(x, 3) for x in own_std]}, so that it "
        "would see other pixels"
    )


def may_be_unused(name: str, target: dict[str, Tensor], prefix: str) -> bool:
    """Whether a fitting source may have what ``target`` lacks; ``name`` as the model would say."""
    if name.startswith(prefix + FINAL_CONV):
        return not any(other.startswith(prefix + FINAL_CONV) for other in target)
    if f"{CLASSIFIER}weight" in target:
        return name.startswith(DETECTION_PARTS)
    return name.startswith(CLASSIFIER)


def generator_of(name: str) -> str:
    """The name of the generator that a tensor belongs to; "" if it belongs to none."""
    found = GENERATOR.search(name)
    return name[: found.end()] if found else ""


def part(name: str) -> str:
    """The part of a network that a tensor belongs to, for summaries."""
    if generator := GENERATOR.search(name):
        return generator[0]
    room = re.match(r"backbone\.(bottom_up|fpn|top_block)", name)
    return room[0] if room else name.partition(".")[0]
