"""One picture through any network, as far as a chosen feature map."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from torchvision.models.detection.transform import GeneralizedRCNNTransform

from ..layers.modes import evaluation_mode
from ..modeling.classifier import ImageClassifier


class _Reached(Exception):
    """What was asked for is there; the rest of the network need not run."""


def run(model: nn.Module, image: Tensor) -> Any:
    """Calls a network on one picture [C, H, W], in the way of the library that it comes from.

    detectron2's models and this project's ``ImageClassifier`` take pixels as they are in the file
    and normalise them; torchvision's detectors take a list; any other takes [1, C, H, W].

    Raises:
        NotImplementedError: detectron2's own deformable convolution, on a CPU.
    """
    with explained():
        if hasattr(model, "preprocess_image"):
            return model([{"image": image}])
        if isinstance(model, ImageClassifier):
            return model({"image": image.unsqueeze(0)})
        if isinstance(getattr(model, "transform", None), GeneralizedRCNNTransform):
            return model([image])
        return model(image.unsqueeze(0))


@contextmanager
def explained() -> Iterator[None]:
    """Says what helps where detectron2's deformable convolution does not run."""
    try:
        yield
    except NotImplementedError as error:
        if "not supported on CPUs" not in str(error):
            raise
        raise NotImplementedError(
            "model: expected layers that run on a CPU, backward too, got detectron2's deformable "
            f"convolution ({error}): take a GPU, or torchvision.ops.DeformConv2d and "
            "dk_detectron.layers.DeformConv2d, whose weights are the same"
        ) from error


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, and no parameter learns; afterwards all is as it was."""
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        for parameter in learning:
            parameter.requires_grad_(False)
        with evaluation_mode(model):
            yield
    finally:
        for parameter in learning:
            parameter.requires_grad_(True)


def place(model: nn.Module, image: Tensor) -> Tensor:
    """A picture on the device and in the floating-point type of a network.

    Raises:
        ValueError: it is no picture [C, H, W].
    """
    if image.dim() != 3 or 0 in image.shape:
        raise ValueError(f"image: expected one picture [C, H, W], got {list(image.shape)}")
    like = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
    return image.detach().to(like)


def feature_map(model: nn.Module, image: Tensor, output: str | None = None) -> Tensor:
    """The feature map [1, C, H, W] of one picture.

    Args:
        image: [C, H, W], as :func:`run` takes it.
        output: the name of a submodule, whose first call counts, such as "backbone.res5"; if its
            result is a dict or list, with the key after a dot, such as "backbone.p3" or, of the
            model's own, "p3". The model's own result by default.

    Raises:
        ValueError: there is no such output, or it is no feature map.
    """
    module, key = _locate(model, output)
    found: list[Any] = []

    def stop(_, __, result):
        found.append(result)
        raise _Reached

    handle = module.register_forward_hook(stop)
    try:
        run(model, image)
    except _Reached:
        pass
    finally:
        handle.remove()
    if not found:
        raise ValueError(f"output: expected a module that runs, {output!r} has not been called")
    result = _entry(found[0], key, output)
    if not isinstance(result, Tensor) or result.dim() != 4 or len(result) != 1:
        got = list(result.shape) if isinstance(result, Tensor) else type(result).__name__
        raise ValueError(
            f"output: expected a feature map [1, C, H, W], got {got} of {output or 'the model'}; "
            "name a submodule that returns one"
        )
    return result


def _locate(model: nn.Module, output: str | None) -> tuple[nn.Module, str | None]:
    """A module, and the key of its result."""
    modules = dict(model.named_modules())
    name, key = output or "", None
    if name not in modules:
        name, _, key = name.rpartition(".")
    if name not in modules:
        known = ", ".join(n for n in modules if n and "." not in n)
        raise ValueError(
            f"output: expected the name of a submodule or a key of its result, got {output!r}; "
            f"the model has {known}"
        )
    return modules[name], key


def _entry(result: Any, key: str | None, output: str | None) -> Any:
    if isinstance(result, list | tuple):
        result = {str(i): value for i, value in enumerate(result)}
    if isinstance(result, dict):
        if key not in result:
            raise ValueError(
                f"output: expected one of {', '.join(map(str, result))} after the module's name, "
                f"got {output!r}"
            )
        return result[key]
    if key is not None:
        raise ValueError(f"output: expected the name of a submodule, got {output!r}")
    return result


def deepest_feature(model: nn.Module) -> str:
    """The name of the last stage of a detectron2 model's backbone, below a feature pyramid.

    Raises:
        ValueError: the model has no backbone that tells its stages.
    """
    name, backbone = "backbone", cast(Any, getattr(model, "backbone", None))
    if hasattr(backbone, "bottom_up"):
        name, backbone = "backbone.bottom_up", backbone.bottom_up
    if not hasattr(backbone, "output_shape"):
        raise ValueError(
            "output: expected a name, as the model has no backbone with an output_shape(), such "
            f"as detectron2's: {type(model).__name__}"
        )
    shapes = backbone.output_shape()
    return f"{name}.{max(shapes, key=lambda stage: shapes[stage].stride)}"
