"""Networks as files that run without their Python code: ONNX, torch.export, AOTInductor.

What is written is run again, at two sizes of images, and compared with the network.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from detectron2.export import TracingAdapter
from detectron2.modeling import GeneralizedRCNN
from detectron2.structures import Instances
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

from .layers.modes import evaluation_mode
from .ops import library
from .ops.composed import composed_sample_kernel

FORMATS = {"onnx": ".onnx", "export": ".pt2", "aoti": ".pt2"}
OPSET = 18
# The largest difference of a sound file's outputs, over the largest output; float32.
TOLERANCE = 1e-3
# That largest output, at least: zeros have no scale of their own.
SMALLEST = 1e-6
# Of an instance, in the order of a detector's outputs.
FIELDS = ("pred_boxes", "scores", "pred_classes", "pred_masks")

Outputs = dict[str, Tensor]


class ExportError(RuntimeError):
    """A network that cannot be exported, or a file that does not compute what the network does."""


@dataclass
class Exported:
    """A file that has been written and verified.

    Attributes:
        path: of the file.
        outputs: their names, in order.
        sizes: (height, width) of the images that it was run with.
        differences: the largest one of each output, absolute.
    """

    path: Path
    outputs: list[str]
    sizes: list[tuple[int, int]]
    differences: dict[str, float]

    def __str__(self) -> str:
        sizes = " and ".join(f"{h}x{w}" for h, w in self.sizes)
        lines = [f"{name}: {value:.2g}" for name, value in self.differences.items()]
        return f"{self.path}, largest differences at {sizes}: {', '.join(lines)}"


def export(model: nn.Module, image: Tensor, path: str | Path, format: str = "onnx") -> Exported:
    """Writes ``model``, in evaluation mode, for images of any height and width.

    "onnx" has standard operators alone: ours are decomposed into them. "export" and "aoti" call
    the compiled operators, which :func:`dk_detectron.ops.library.extension_file` has:
    ``torch.ops.load_library`` loads it, without the rest of this package.

    Args:
        model: takes a batch of images, as backbones and classifiers do, and gives a tensor, several
            by name, or a list of them, named "output_0" and so on; or a detector of detectron2, for
            "onnx" alone.
        image: an example, [N, C, H, W]; of a detector [C, H, W], pixels of 0 to 255. Height and
            width are multiples of all strides; N is fixed.
        path: where to write, .onnx or .pt2; replaced once the whole of it is written and verified.
        format: "onnx"; "export", which ``torch.export.load`` reads; or "aoti", compiled for the
            processor of ``image``, which ``torch._inductor.aoti_load_package`` reads.

    Raises:
        ValueError: an argument does not work.
        ModuleNotFoundError: a package for ONNX is missing.
        ExportError: the network cannot be exported, or the file computes something else, or there
            is nothing to compare, as no object is found. Nothing has been written.
    """
    path = Path(path)
    detector = image.dim() == 3
    _check_arguments(model, image, path, format)
    images = [image, _resized(image)]
    network = partial(_detect, model) if detector else partial(_named, model)
    path.parent.mkdir(parents=True, exist_ok=True)
    evaluating = evaluation_mode(model)
    with evaluating, torch.no_grad(), TemporaryDirectory(dir=path.parent) as folder:
        expected = [network(x) for x in images]
        _check_comparable(images, expected)
        written = Path(folder, path.name)
        found = _written(format, model, images, written, list(expected[0]))
        pairs = list(zip(expected, found, strict=True))
        differences = _differences([_paired(*p) for p in pairs] if detector else pairs)
        os.replace(written, path)
    sizes = [(x.shape[-2], x.shape[-1]) for x in images]
    return Exported(path, list(expected[0]), sizes, differences)


def _check_arguments(model: nn.Module, image: Tensor, path: Path, format: str) -> None:
    """Raises ``ValueError`` on one that does not work."""
    if format not in FORMATS:
        raise ValueError(f"format: expected one of {', '.join(FORMATS)}, got {format!r}")
    if path.suffix != FORMATS[format]:
        raise ValueError(f"path: expected a name that ends in {FORMATS[format]}, got {path}")
    if image.dim() == 3:
        if format != "onnx":
            raise ValueError(
                f"format: expected 'onnx' for a whole detector, got {format!r}, which cannot "
                "follow how many objects an image has: export its backbone"
            )
        return  # a detector pads its images itself
    multiple = getattr(model, "size_divisibility", 0) or 1
    height, width = image.shape[-2:]
    if height % multiple or width % multiple:
        raise ValueError(
            f"image: expected height and width that are multiples of {multiple}, got "
            f"{height}x{width}"
        )


def _resized(image: Tensor) -> Tensor:
    """Twice as wide, and turned: what a file has fixed by mistake shows there."""
    return torch.cat([image, image.flip(-1)], -1).mT.contiguous()


def _named(model: Callable, image: Tensor) -> Outputs:
    """The network's outputs by name.

    Raises:
        ExportError: one is no tensor.
    """
    outputs = model(image)
    if isinstance(outputs, list | tuple):
        outputs = {f"output_{i}": output for i, output in enumerate(outputs)}
    elif not isinstance(outputs, dict):
        outputs = {"output": outputs}
    for name, output in outputs.items():
        if not isinstance(output, Tensor):
            raise ExportError(
                f"{name}: expected a tensor from the network, got a {type(output).__name__}: wrap "
                "the network in one that returns its tensors alone"
            )
    return outputs


def _detect(model: nn.Module, image: Tensor) -> Outputs:
    """A detector's objects, in pixels of ``image``."""
    return _fields(*_infer(model, [{"image": image}]))


def _infer(model: nn.Module, inputs: list[dict[str, Tensor]]) -> list[Instances]:
    if isinstance(model, GeneralizedRCNN):
        return model.inference(inputs, do_postprocess=False)
    return [output["instances"] for output in model(inputs)]


def _fields(instances: Instances) -> Outputs:
    found = {name: instances.get(name) for name in FIELDS if instances.has(name)}
    return {name: getattr(value, "tensor", value) for name, value in found.items()}


# ---- the formats --------------------------------------------------------------------------------


def _import(name: str) -> Any:
    try:
        return import_module(name)
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"{name}: expected it to be installed for ONNX: pip install 'dk_detectron[onnx]'"
        ) from error


def _write_onnx(model: nn.Module, image: Tensor, path: Path, names: Sequence[str]):
    onnx, onnxruntime = _import("onnx"), _import("onnxruntime")
    network, inputs = model, (image,)
    if image.dim() == 3:
        network = TracingAdapter(
            model, [{"image": image}], lambda model, x: tuple(_fields(*_infer(model, x)).values())
        )
    elif not isinstance(model(image), Tensor):
        network = TracingAdapter(model, inputs, lambda model, x: tuple(_named(model, x).values()))
    axes = {image.dim() - 2: "height", image.dim() - 1: "width"}
    with warnings.catch_warnings():
        # The newer exporter, through torch.export, cannot follow detectors.
        warnings.simplefilter("ignore")
        torch.onnx.export(
            network, inputs, str(path), dynamo=False, opset_version=OPSET, input_names=["image"],
            output_names=list(names), dynamic_axes={"image": axes},
        )  # fmt: skip
    onnx.checker.check_model(str(path), full_check=True)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])

    def run(x: Tensor) -> Outputs:
        outputs = session.run(list(names), {"image": x.cpu().numpy()})
        return dict(zip(names, map(torch.from_numpy, outputs), strict=True))

    return run


def _program(model: nn.Module, image: Tensor) -> torch.export.ExportedProgram:
    any_size = {2: torch.export.Dim.AUTO, 3: torch.export.Dim.AUTO}
    try:
        program = torch.export.export(model, (image,), dynamic_shapes=(any_size,))
    except Exception as error:  # of many kinds, and torch's own
        raise ExportError(f"model: expected one that torch.export follows: {error}") from error
    # What is written in Python becomes torch's own: the library of operators does not have it.
    return program.run_decompositions(
        {torch.ops.dk_detectron.sample_kernel.default: composed_sample_kernel}
    )


def _write_program(model: nn.Module, image: Tensor, path: Path, names: Sequence[str]):
    torch.export.save(_program(model, image), path)
    return partial(_named, torch.export.load(path).module())


def _write_package(model: nn.Module, image: Tensor, path: Path, names: Sequence[str]):
    torch._inductor.aoti_compile_and_package(_program(model, image), package_path=str(path))
    return partial(_named, torch._inductor.aoti_load_package(str(path)))


WRITERS: dict[str, Callable] = {
    "onnx": _write_onnx,
    "export": _write_program,
    "aoti": _write_package,
}


def _written(
    format: str, model: nn.Module, images: Sequence[Tensor], path: Path, names: Sequence[str]
) -> list[Outputs]:
    """What the file that is written gives for each image.

    Raises:
        ModuleNotFoundError: a package for ONNX is missing.
        ExportError: whatever else the writers do not do.
    """
    try:
        run = WRITERS[format](model, images[0], path, names)
        return [run(image) for image in images]
    except (ExportError, ModuleNotFoundError, OSError):
        raise
    except Exception as error:  # of many kinds: torch's, onnx's and onnxruntime's own
        cure = "" if format == "onnx" else (
            ". If it is about a size: torch.export fixes those of 1, as small images have in the "
            "last features; give a larger one"
        )  # fmt: skip
        raise ExportError(
            f"model: expected one that {format!r} can express and run, best in float32; got "
            f"{type(error).__name__}: {error}{cure}; nothing has been written"
        ) from error


def operators() -> Path:
    """The library that "export" and "aoti" need, for ``torch.ops.load_library``."""
    return library.extension_file()


# ---- the comparison -----------------------------------------------------------------------------


def _check_comparable(images: Sequence[Tensor], expected: Sequence[Outputs]) -> None:
    """Raises ``ExportError`` where the network finds nothing, which any file would give as well."""
    for image, outputs in zip(images, expected, strict=True):
        if not any(output.numel() for output in outputs.values()):
            height, width = image.shape[-2:]
            raise ExportError(
                "image: expected one with objects that the network finds, to compare them with the "
                f"file's, got none at {height}x{width}: give a picture of some (--image PICTURE), "
                "or lower SCORE_THRESH_TEST, which the file then has too; nothing has been written"
            )


def _differences(pairs: Sequence[tuple[Outputs, Outputs]]) -> dict[str, float]:
    """The largest absolute one of each output.

    Raises:
        ExportError: one is more than :data:`TOLERANCE`, or of another shape.
    """
    differences = {}
    for expected, found in pairs:
        for name, tensor in expected.items():
            if found[name].shape != tensor.shape:
                raise ExportError(
                    f"{name}: expected {list(tensor.shape)} as from the network, the file gave "
                    f"{list(found[name].shape)}; nothing has been written"
                )
            if not tensor.numel():
                continue
            reference = _signed(tensor)
            difference = float((found[name].to(reference) - reference).abs().max())
            largest = max(SMALLEST, float(reference.abs().max()))
            if not difference <= TOLERANCE * largest:
                raise ExportError(
                    f"{name}: expected the file to give what the network gives, to {TOLERANCE:g} "
                    f"of its largest, {largest:.3g}; got a difference of {difference:.3g}; nothing "
                    "has been written"
                )
            differences[name] = max(difference, differences.get(name, 0.0))
    return differences


def _signed(tensor: Tensor) -> Tensor:
    """What can be subtracted: neither can booleans, nor bytes below zero."""
    return tensor.long() if tensor.dtype in (torch.bool, torch.uint8) else tensor


def _paired(expected: Outputs, found: Outputs) -> tuple[Outputs, Outputs]:
    """Detections in one order, each once: rounding may swap those of nearly the same score."""
    if any(found[name].shape != tensor.shape for name, tensor in expected.items()):
        return expected, found
    ours, theirs = (
        torch.cat(
            [side["pred_boxes"], side["scores"][:, None], side["pred_classes"][:, None]], 1
        ).cpu()  # a file's outputs are there, the network's perhaps not
        for side in (expected, found)
    )
    if not len(ours):
        return expected, found
    distances = torch.cdist(ours, theirs, p=float("inf")).nan_to_num(nan=torch.inf).clamp(max=1e6)
    order = torch.from_numpy(linear_sum_assignment(distances.numpy())[1])
    return expected, {name: tensor[order] for name, tensor in found.items()}
