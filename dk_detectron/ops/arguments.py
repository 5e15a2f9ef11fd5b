"""What the operators accept, said in one wording, and the sizes that follow from it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

Size = int | Sequence[int]
# As for torch's own operators, double stays double.
AUTOCAST_FROM = torch.float32, torch.float16, torch.bfloat16


def shape(tensor: Tensor) -> list[int]:
    return list(tensor.shape)


def pair(name: str, value: Size, least: int) -> tuple[int, int]:
    """Both of two numbers, or one for both."""
    pair = tuple(value) if isinstance(value, Sequence) else (value, value)
    if len(pair) != 2 or any(not isinstance(v, int | torch.SymInt) or v < least for v in pair):
        raise ValueError(f"{name}: expected an integer >= {least} or two of them, got {value!r}")
    return pair


def output_size(input, kernel_size, stride, padding, dilation) -> list[int]:
    return [
        (input.shape[2 + i] + 2 * padding[i] - dilation[i] * (kernel_size[i] - 1) - 1) // stride[i]
        + 1
        for i in range(2)
    ]


def checked_output_size(input, kernel_size, stride, padding, dilation) -> list[int]:
    """:func:`output_size`; raises where there is no output."""
    size = output_size(input, kernel_size, stride, padding, dilation)
    if any(pixels < 1 for pixels in size):  # not min, on which torch.compile guards
        raise ValueError(
            f"input: {shape(input)} with padding {padding} is smaller than the kernel "
            f"{tuple(kernel_size)} with dilation {dilation}"
        )
    return size


def output_format(input: Tensor) -> torch.memory_format:
    """channels_last in, channels_last out; ``csrc/deform_kernel.h`` has the same rule."""
    channels_last = input.shape[1] > 1 and input.stride(1) == 1
    return torch.channels_last if channels_last else torch.contiguous_format


def in_transform() -> bool:
    """Whether a transform of ``torch.func`` is at work."""
    return (
        not torch.compiler.is_compiling()
        and torch._C._functorch.peek_interpreter_stack() is not None
    )


def in_format_of(input: Tensor, output: Tensor) -> Tensor:
    """``output``, in :func:`output_format`; in a transform as it lies, since vmap cannot tell."""
    return output if in_transform() else output.contiguous(memory_format=output_format(input))


def autocasts(device: str) -> bool:
    """Whether autocast is on; "meta" has none, and torch refuses to be asked."""
    return device != "meta" and torch.is_autocast_enabled(device)


def type_in_operator(tensor: Tensor) -> torch.dtype:
    """That of ``tensor`` as an operator takes it, which autocast may have cast."""
    device = tensor.device.type
    casts = tensor.dtype in AUTOCAST_FROM and autocasts(device)
    return torch.get_autocast_dtype(device) if casts else tensor.dtype


def autocast(*tensors: Tensor | None) -> list[Tensor | None]:
    """``tensors`` as an operator takes them."""
    return [None if tensor is None else tensor.to(type_in_operator(tensor)) for tensor in tensors]


def check_floating(**tensors: Tensor | None) -> None:
    """Raises on integers, of which rounding would make something else."""
    for name, tensor in tensors.items():
        if tensor is not None and not tensor.is_floating_point():
            raise TypeError(f"{name}: expected a floating point type, got {tensor.dtype}")


def check_images(input: Tensor) -> None:
    """Raises on anything but a batch of images."""
    if input.dim() != 4:
        raise ValueError(f"input: expected [N, C_in, H, W], got {shape(input)}")


def check_groups(
    groups: int, channels: int, name: str = "input channels", argument: str = "groups"
) -> None:
    """Raises unless ``groups`` divides the channels, which are called ``name``."""
    if not isinstance(groups, int | torch.SymInt) or groups < 1 or channels % groups:
        raise ValueError(f"{argument}: expected a divisor of the {channels} {name}, got {groups!r}")


def check_outputs(weight: str, channels: int, groups: int, bias: Tensor | None) -> None:
    """Raises unless ``groups`` divides the output channels, each of which has its bias, if any."""
    if channels % groups:
        raise ValueError(f"{weight}: {channels} output channels do not divide into {groups} groups")
    if bias is not None and shape(bias) != [channels]:
        raise ValueError(f"bias: expected [{channels}], got {shape(bias)}")


def check(
    input,
    weight,
    bias,
    kernel_offset,
    data_offset,
    *,
    kernel_size,
    stride,
    padding,
    dilation,
    groups,
):
    """Raises on every user error that :func:`deform_kernel_conv2d` names."""
    check_images(input)
    check_floating(input=input, kernel_offset=kernel_offset, data_offset=data_offset)
    channels = input.shape[1]
    check_groups(groups, channels)
    if weight.dim() != 4 or weight.shape[1] != channels // groups or 0 in weight.shape[2:]:
        raise ValueError(
            f"weight: expected [C_out, {channels // groups}, S_h, S_w] "
            f"({channels} input channels / {groups} groups), got {shape(weight)}"
        )
    check_outputs("weight", weight.shape[0], groups, bias)
    out_size = checked_output_size(input, kernel_size, stride, padding, dilation)
    taps = kernel_size[0] * kernel_size[1]
    plain, modulated = ([input.shape[0], channels * taps, *out_size] for channels in (2, 3))
    for name, offset in ("kernel_offset", kernel_offset), ("data_offset", data_offset):
        factors = name == "data_offset" or data_offset is None
        if offset is None or shape(offset) == plain or factors and shape(offset) == modulated:
            continue
        more = "or 3*K_h*K_w with factors" if factors else "with factors in data_offset, if any"
        raise ValueError(
            f"{name}: expected [N, 2*K_h*K_w, H_out, W_out] = {plain}, {more}, got {shape(offset)}"
        )
    for name, tensor in (
        ("weight", weight),
        ("bias", bias),
        ("kernel_offset", kernel_offset),
        ("data_offset", data_offset),
    ):
        if tensor is not None and tensor.device != input.device:
            raise RuntimeError(
                f"{name}: expected device {input.device} like input, got {tensor.device}"
            )
    for name, tensor in ("weight", weight), ("bias", bias):
        if tensor is not None and type_in_operator(tensor) != type_in_operator(input):
            raise TypeError(f"{name}: expected type {input.dtype} like input, got {tensor.dtype}")
