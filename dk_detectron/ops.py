"""Deformable-kernel convolution: public functions, composed implementation, fake kernels, autograd.

Shapes, used throughout:

    N, C_in, C_out   batch size, input and output channels
    H, W             input size;  H_out, W_out: output size
    K_h, K_w         kernel size: the taps of one output location, K = K_h * K_w of them, row-major
    S_h, S_w         scope size: the cells of the stored weight that the taps sample, S = S_h * S_w
    kernel_offset    [N, 2*K, H_out, W_out], channel 2t: row, 2t+1: column of tap t, in scope cells
    data_offset      [N, 2*K, H_out, W_out], the same layout, in input pixels

The operators are registered by the extension ``dk_detectron._C``: schemas in
``csrc/deform_kernel.cpp``, kernels in ``csrc/cpu`` and ``csrc/cuda``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

try:
    from . import _C  # noqa: F401  (registers the operators)
except ImportError as error:
    raise ImportError(
        "dk_detectron._C, the compiled operators, is missing, or does not load into torch "
        f"{torch.__version__}, which must be 2.10 or newer and have the CUDA it was built for: "
        f"{error}. Build it with `python setup.py build_ext --inplace` in a clone, or "
        "`pip install --no-build-isolation .`"
    ) from error

__all__ = [
    "deform_kernel_conv2d",
    "sample_kernel",
    "per_image_conv2d",
    "composed_deform_kernel_conv2d",
    "axis_coefficients",
    "tap_locations",
    "outside_scope",
    "rest_kernel",
]

Size = int | Sequence[int]


# ---- public functions
# ------------------------------------------------------------------------------


def deform_kernel_conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    kernel_offset: Tensor | None = None,
    data_offset: Tensor | None = None,
    *,
    kernel_size: Size,
    stride: Size = 1,
    padding: Size = 0,
    dilation: Size = 1,
    groups: int = 1,
    clip: bool = True,
) -> Tensor:
    """Convolution whose kernel, data, or both are sampled at learnt offsets (eq. 7, 9 and 11).

        O[n,co,p] = b[co] + sum_t sum_ci I[n, ci, p*stride - pad + k_t*dilation +
        data_offset[n,t,p]]
                                       * W[co,ci](clip(k0 + k_t + kernel_offset[n,t,p]))

    W(.) is bilinear interpolation in the scope (eq. 12) and k0 = (scope_size - kernel_size) / 2
    centres the unit-spaced taps in it. Without ``kernel_offset`` the taps rest there; without
    ``data_offset`` they read the rigid grid; without both this is an ordinary convolution.

    The image is zero outside, as in ``torchvision.ops.deform_conv2d``. An infinite offset reads the
    clipped edge of the scope, or zero; a NaN makes its output locations NaN; neither reads out of
    bounds. (An infinite or NaN pixel in the first row or column also shows where a data offset
    leads outside: it is multiplied by zero.) ``channels_last`` in, ``channels_last`` out.

    Args:
        input: [N, C_in, H, W].
        weight: [C_out, C_in / groups, S_h, S_w], the scope.
        bias: [C_out].
        kernel_offset: [N, 2*K, H_out, W_out], in scope cells.
        data_offset: [N, 2*K, H_out, W_out], in input pixels.
        kernel_size: (K_h, K_w), or one number for both; likewise the next three.
        groups: any divisor of both channel numbers. Depthwise (groups = C_in = C_out) runs in one
            direct kernel; the others go through a matrix product with S columns instead of K.
        clip: keep the sampling location inside [0, S - 1]. A tap that its offset takes outside
            reads the edge. Its offset's gradient, summed over the channels, is what it would be on
            the edge where descent leads back inside, and zero where it leads further out. (The true
            derivative, zero outside, would leave the tap there for ever.) If off, cells outside the
            scope count as zero.

    Returns:
        [N, C_out, H_out, W_out].

    Raises:
        ValueError: a size or shape is wrong.
        TypeError: tensors of different types.
        RuntimeError: tensors on different devices.
    """
    sizes = {
        "kernel_size": _pair("kernel_size", kernel_size, 1),
        "stride": _pair("stride", stride, 1),
        "padding": _pair("padding", padding, 0),
        "dilation": _pair("dilation", dilation, 1),
    }
    _check(input, weight, bias, kernel_offset, data_offset, groups=groups, **sizes)
    if kernel_offset is None:
        weight = rest_kernel(weight, sizes["kernel_size"], clip)
        if data_offset is None:
            del sizes["kernel_size"]
            return F.conv2d(input, weight, bias, groups=groups, **sizes)
    depthwise = groups == input.shape[1] == weight.shape[0]
    function = (
        torch.ops.dk_detectron.deform_kernel_conv2d
        if depthwise and input.device.type in _DEVICES_WITH_KERNEL
        else composed_deform_kernel_conv2d
    )
    return function(
        input, weight, bias, kernel_offset, data_offset, groups=groups, clip=clip, **sizes
    )


def sample_kernel(
    weight: Tensor, kernel_offset: Tensor, kernel_size: Size, *, clip: bool = True
) -> Tensor:
    """Samples one K_h x K_w kernel per image from a scope (eq. 12): the global deformable kernel.

    Args:
        weight: [C_out, C_in / groups, S_h, S_w], the scope.
        kernel_offset: [N, 2*K], channel 2t: row, 2t+1: column of tap t, in scope cells.
        kernel_size: (K_h, K_w), or one number for both.
        clip: as in :func:`deform_kernel_conv2d`.

    Returns:
        [N, C_out, C_in / groups, K_h, K_w].

    Raises:
        ValueError: a shape is wrong.
    """
    size = _pair("kernel_size", kernel_size, 1)
    if weight.dim() != 4 or 0 in weight.shape[2:]:
        raise ValueError(f"weight: expected [C_out, C_in/groups, S_h, S_w], got {_shape(weight)}")
    channels = 2 * size[0] * size[1]
    if kernel_offset.dim() != 2 or kernel_offset.shape[1] != channels:
        raise ValueError(
            f"kernel_offset: expected [N, {channels}] for kernel_size {size}, "
            f"got {_shape(kernel_offset)}"
        )
    return torch.ops.dk_detectron.sample_kernel(weight, kernel_offset, size, clip=clip)


def per_image_conv2d(
    input: Tensor,
    kernels: Tensor,
    bias: Tensor | None = None,
    stride: Size = 1,
    padding: Size = 0,
    dilation: Size = 1,
    groups: int = 1,
) -> Tensor:
    """``F.conv2d`` with a kernel of its own for every image.

    Args:
        input: [N, C_in, H, W].
        kernels: [N, C_out, C_in / groups, K_h, K_w].
        bias: [C_out].

    Returns:
        [N, C_out, H_out, W_out].
    """
    kernels = kernels.to(input.dtype)
    memory_format = _output_format(input)
    stride, padding = _pair("stride", stride, 1), _pair("padding", padding, 0)
    if list(kernels.shape[3:]) == [1, 1] and groups == 1 and padding == [0, 0]:
        # A batch of matrix products, without any copy in either memory format.
        x = input[:, :, :: stride[0], :: stride[1]]
        matrices = kernels.flatten(2)
        if memory_format == torch.channels_last:
            output = (x.flatten(2).transpose(1, 2) @ matrices.transpose(1, 2)).transpose(1, 2)
        else:
            output = matrices @ x.flatten(2)
        output = output.unflatten(2, x.shape[2:])
        return output if bias is None else output + bias.to(output.dtype).view(-1, 1, 1)
    n = input.shape[0]
    if n == 0:
        kernel = kernels.new_empty(kernels.shape[1:])
        return F.conv2d(input, kernel, bias, stride, padding, dilation, groups)
    output = F.conv2d(
        input.reshape(1, -1, *input.shape[2:]), kernels.flatten(0, 1), None,
        stride, padding, dilation, n * groups,
    )  # fmt: skip
    output = output.unflatten(1, (n, -1)).squeeze(0)
    if bias is not None:
        output = output + bias.to(output.dtype).view(-1, 1, 1)
    return output.contiguous(memory_format=memory_format)


# ---- checks
# ----------------------------------------------------------------------------------------


def _shape(tensor: Tensor) -> list[int]:
    return list(tensor.shape)


def _pair(name: str, value: Size, least: int) -> list[int]:
    pair = [value, value] if isinstance(value, int) else list(value)
    if len(pair) != 2 or any(not isinstance(v, int | torch.SymInt) or v < least for v in pair):
        raise ValueError(f"{name}: expected an integer >= {least} or two of them, got {value!r}")
    return pair


def _output_size(input, kernel_size, stride, padding, dilation) -> list[int]:
    return [
        (input.shape[2 + i] + 2 * padding[i] - dilation[i] * (kernel_size[i] - 1) - 1) // stride[i]
        + 1
        for i in range(2)
    ]


def _check(
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
    if input.dim() != 4:
        raise ValueError(f"input: expected [N, C_in, H, W], got {_shape(input)}")
    if not input.is_floating_point():
        raise TypeError(f"input: expected a floating point type, got {input.dtype}")
    channels = input.shape[1]
    if not isinstance(groups, int | torch.SymInt) or groups < 1 or channels % groups:
        raise ValueError(
            f"groups: expected a divisor of the {channels} input channels, got {groups}"
        )
    if weight.dim() != 4 or weight.shape[1] != channels // groups or 0 in weight.shape[2:]:
        raise ValueError(
            f"weight: expected [C_out, {channels // groups}, S_h, S_w] "
            f"({channels} input channels / {groups} groups), got {_shape(weight)}"
        )
    if weight.shape[0] % groups:
        raise ValueError(
            f"weight: {weight.shape[0]} output channels do not divide into {groups} groups"
        )
    if bias is not None and _shape(bias) != [weight.shape[0]]:
        raise ValueError(f"bias: expected [{weight.shape[0]}], got {_shape(bias)}")
    output_size = _output_size(input, kernel_size, stride, padding, dilation)
    if any(size < 1 for size in output_size):  # not min, on which torch.compile guards
        raise ValueError(
            f"input: {_shape(input)} with padding {padding} is smaller than the kernel "
            f"{kernel_size} with dilation {dilation}"
        )
    expected = [input.shape[0], 2 * kernel_size[0] * kernel_size[1], *output_size]
    for name, offset in ("kernel_offset", kernel_offset), ("data_offset", data_offset):
        if offset is not None and _shape(offset) != expected:
            raise ValueError(
                f"{name}: expected [N, 2*K_h*K_w, H_out, W_out] = {expected}, got {_shape(offset)}"
            )
        if offset is not None and not offset.is_floating_point():
            raise TypeError(f"{name}: expected a floating point type, got {offset.dtype}")
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
    if not torch.is_autocast_enabled(input.device.type):
        for name, tensor in ("weight", weight), ("bias", bias):
            if tensor is not None and tensor.dtype != input.dtype:
                raise TypeError(
                    f"{name}: expected type {input.dtype} like input, got {tensor.dtype}"
                )


# ---- composed implementation
# -----------------------------------------------------------------------


class _Clip(torch.autograd.Function):
    """Clips a location to [0, size - 1]; ``inward`` of ``csrc/bilinear.h`` is its backward."""

    @staticmethod
    def forward(location: Tensor, size: int) -> Tensor:
        return location.clamp(0, size - 1)

    @staticmethod
    def setup_context(ctx, inputs, output):
        location, ctx.size = inputs
        ctx.save_for_backward(location)

    @staticmethod
    def backward(ctx, grad: Tensor):
        (location,) = ctx.saved_tensors
        outward = (location < 0) & (grad > 0) | (location > ctx.size - 1) & (grad < 0)
        return grad.masked_fill(outward, 0), None


def _locate(
    location: Tensor, size: int, *, scope: bool = False, clip: bool = False
) -> tuple[Tensor, Tensor]:
    """The lower of the two cells around each location, and the share of the upper one.

    The derivative at a cell is that towards the next one; at the last cell of a scope, towards the
    one before. ``csrc/bilinear.h`` is the same for the compiled kernels.
    """
    if clip:
        location = _Clip.apply(location, size)
    else:
        # Everything further out reads the same zeros: keep infinities out of the sums.
        location = location.clamp(-2, size + 1)
    lower = location.detach().floor()
    if scope and size > 1:
        lower = lower - (location.detach() == size - 1).to(lower.dtype)
    share = location - lower
    # A scope of one cell is constant: a gradient of zero, not the absence of one.
    return lower, 0 * share if clip and size == 1 else share


def axis_coefficients(location: Tensor, size: int, clip: bool = True) -> Tensor:
    """Bilinear coefficients [..., size] of locations [...] along one axis of a scope."""
    lower, share = (t.unsqueeze(-1) for t in _locate(location, size, scope=True, clip=clip))
    cell = torch.arange(size, dtype=location.dtype, device=location.device)
    zero = 0 * share  # NaN for a NaN location, so that the output shows it
    return torch.where(cell == lower, 1 - share, zero) + torch.where(cell == lower + 1, share, zero)


def _split_offset(offset: Tensor) -> tuple[Tensor, Tensor]:
    """[N, 2*K, ...] -> row and column offsets, [N, K, ...] each."""
    offset = offset.unflatten(1, (-1, 2))
    return offset[:, :, 0], offset[:, :, 1]


def _tap_grid(kernel_size: Sequence[int], like: Tensor) -> tuple[Tensor, Tensor]:
    """Row and column of every tap, [K] each, shaped to broadcast against ``like`` [N, K, ...]."""
    rows, columns = torch.meshgrid(
        *(torch.arange(k, dtype=like.dtype, device=like.device) for k in kernel_size), indexing="ij"
    )
    shape = [-1] + [1] * (like.dim() - 2)
    return rows.reshape(shape), columns.reshape(shape)


def tap_locations(
    kernel_offset: Tensor, scope_size: Sequence[int], kernel_size: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """Offsets [N, 2*K, ...] -> row and column of the taps in the scope, [N, K, ...] each."""
    offsets = _split_offset(kernel_offset)
    row, column = (
        tap + (scope - kernel) / 2 + offset
        for tap, scope, kernel, offset in zip(
            _tap_grid(kernel_size, offsets[0]), scope_size, kernel_size, offsets, strict=True
        )
    )
    return row, column


def outside_scope(
    kernel_offset: Tensor, scope_size: Sequence[int], kernel_size: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """Offsets [N, 2*K, ...] -> whether the taps' row and column is clipped, [N, K, ...] each.

    Those of NaN are counted as such.
    """
    locations = tap_locations(kernel_offset, scope_size, kernel_size)
    row, column = (
        ~((location >= 0) & (location <= size - 1))
        for location, size in zip(locations, scope_size, strict=True)
    )
    return row, column


def _scope_coefficients(
    kernel_offset: Tensor, scope_size: Sequence[int], kernel_size: Sequence[int], clip: bool
) -> Tensor:
    """B of eq. 12: offsets [N, 2*K, ...] -> coefficients [N, K, ..., S] of taps on cells."""
    locations = tap_locations(kernel_offset, scope_size, kernel_size)
    rows, columns = (
        axis_coefficients(location, size, clip)
        for location, size in zip(locations, scope_size, strict=True)
    )
    return (rows.unsqueeze(-1) * columns.unsqueeze(-2)).flatten(-2)


def rest_kernel(weight: Tensor, kernel_size: Sequence[int], clip: bool = True) -> Tensor:
    """The kernel at zero offset: [.., .., S_h, S_w] -> [.., .., K_h, K_w]."""
    if list(weight.shape[2:]) == list(kernel_size):
        return weight
    zero = torch.zeros(1, 2 * kernel_size[0] * kernel_size[1], dtype=torch.float64)
    read = _scope_coefficients(zero, weight.shape[2:], kernel_size, clip)[0].to(weight)  # [K, S]
    return (weight.flatten(2) @ read.t()).unflatten(2, list(kernel_size))


def _deformed_columns(
    input: Tensor, data_offset: Tensor, kernel_size, stride, padding, dilation
) -> Tensor:
    """The data of every tap (eq. 9), [N, C_in, K, H_out*W_out]; the image is zero outside."""
    channels, *size = input.shape[1:]
    offsets = _split_offset(data_offset)
    located = []
    for axis, tap in enumerate(_tap_grid(kernel_size, offsets[0])):
        pixel = torch.arange(offsets[0].shape[2 + axis], dtype=tap.dtype, device=tap.device)
        rest = pixel.view([1, -1, 1] if axis == 0 else [1, 1, -1]) * stride[axis] - padding[axis]
        located.append(_locate(rest + tap * dilation[axis] + offsets[axis], size[axis]))
    (row, share_row), (column, share_column) = located
    columns = 0
    for i, coef_row in enumerate((1 - share_row, share_row)):
        for j, coef_column in enumerate((1 - share_column, share_column)):
            y, x = row + i, column + j
            inside = (y >= 0) & (y < size[0]) & (x >= 0) & (x < size[1])
            coef = torch.where(inside, coef_row * coef_column, 0 * (share_row + share_column))
            index = torch.where(inside, y * size[1] + x, 0).long().flatten(1).unsqueeze(1)
            value = input.flatten(2).gather(2, index.expand(-1, channels, -1))
            columns = columns + value * coef.flatten(1).unsqueeze(1).to(value.dtype)
    return columns.unflatten(2, (kernel_size[0] * kernel_size[1], -1))


def _at_least_float(offset: Tensor | None) -> Tensor | None:
    """Locations need more bits than half precision has."""
    return offset.float() if offset is not None and offset.element_size() < 4 else offset


def composed_deform_kernel_conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    kernel_offset: Tensor | None,
    data_offset: Tensor | None,
    *,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    clip: bool,
) -> Tensor:
    """:func:`deform_kernel_conv2d` out of PyTorch's own operators, for every grouping and device.

    The sum is regrouped so that the output channels meet the scope in an ordinary matrix product:

        G[n,ci,l,p] = sum_t B[n,t,l,p] * I[n, ci, p + k_t (+ data_offset)]
        O[n,co,p]   = sum_ci sum_l W[co,ci,l] * G[n,ci,l,p]

    Differentiable any number of times. Needs memory for G, S times the input.
    """
    kernel_offset, data_offset = _at_least_float(kernel_offset), _at_least_float(data_offset)
    if kernel_offset is None:
        weight = rest_kernel(weight, kernel_size, clip)
    if data_offset is None:
        columns = F.unfold(input, kernel_size, dilation, padding, stride)
        columns = columns.unflatten(1, (input.shape[1], -1))
    else:
        columns = _deformed_columns(input, data_offset, kernel_size, stride, padding, dilation)
    if kernel_offset is not None:
        coefficients = _scope_coefficients(kernel_offset, weight.shape[2:], kernel_size, clip)
        coefficients = coefficients.flatten(2, 3).to(columns.dtype)
        columns = torch.einsum("nckp,nkps->ncsp", columns, coefficients)
    grouped = columns.unflatten(1, (groups, -1)).flatten(2, 3)  # [N, groups, C_in/groups*S, p]
    rows = weight.unflatten(0, (groups, -1)).flatten(2)  # [groups, C_out/groups, C_in/groups*S]
    output = (rows @ grouped).flatten(1, 2)
    if bias is not None:
        output = output + bias.to(output.dtype).unsqueeze(-1)
    output_size = _output_size(input, kernel_size, stride, padding, dilation)
    return output.unflatten(2, output_size).contiguous(memory_format=_output_format(input))


# ---- registration
# ----------------------------------------------------------------------------------


def _output_format(input: Tensor) -> torch.memory_format:
    """channels_last in, channels_last out; ``csrc/deform_kernel.h`` has the same rule."""
    channels_last = input.shape[1] > 1 and input.stride(1) == 1
    return torch.channels_last if channels_last else torch.contiguous_format


_library = torch.library.Library("dk_detectron", "FRAGMENT")
_library.define(
    "sample_kernel(Tensor weight, Tensor kernel_offset, SymInt[2] kernel_size, *, bool clip=True) "
    "-> Tensor"
)


@torch.library.impl(_library, "sample_kernel", "CompositeImplicitAutograd")
def _(weight, kernel_offset, kernel_size, *, clip=True):
    coefficients = _scope_coefficients(kernel_offset, weight.shape[2:], kernel_size, clip)
    kernels = weight.flatten(0, 1).flatten(1) @ coefficients.to(weight.dtype).transpose(1, 2)
    return kernels.unflatten(2, list(kernel_size)).unflatten(1, weight.shape[:2])


_AUTOCAST_FROM = torch.float32, torch.float16, torch.bfloat16


def _register_autocast(device: str) -> None:
    """Activations and weights take the lower precision type; offsets keep theirs, since a location
    needs more bits than bfloat16 has."""

    @torch.library.impl(_library, "deform_kernel_conv2d", f"Autocast{device.upper()}")
    def _(input, weight, bias, kernel_offset, data_offset, **arguments):
        dtype = torch.get_autocast_dtype(device)
        input, weight, bias = (
            # As for torch's own operators, double stays double.
            t.to(dtype) if t is not None and t.dtype in _AUTOCAST_FROM else t
            for t in (input, weight, bias)
        )
        with torch.autocast(device, enabled=False):
            return torch.ops.dk_detectron.deform_kernel_conv2d(
                input, weight, bias, kernel_offset, data_offset, **arguments
            )


_register_autocast("cpu")
_register_autocast("cuda")


@torch.library.register_fake("dk_detectron::deform_kernel_conv2d")
def _(input, weight, bias, kernel_offset, data_offset, *, groups, clip, **sizes):
    _check(input, weight, bias, kernel_offset, data_offset, groups=groups, **sizes)
    shape = [input.shape[0], weight.shape[0], *_output_size(input, **sizes)]
    return torch.empty(
        shape, dtype=input.dtype, device=input.device, memory_format=_output_format(input)
    )


@torch.library.register_fake("dk_detectron::deform_kernel_conv2d_backward")
def _(grad_output, input, weight, kernel_offset, data_offset, *, output_mask, **_):
    gradients = (
        torch.empty(
            input.shape, dtype=input.dtype, device=input.device, memory_format=_output_format(input)
        ),
        torch.empty_like(weight, memory_format=torch.contiguous_format),
        None if kernel_offset is None else torch.empty_like(kernel_offset),
        None if data_offset is None else torch.empty_like(data_offset),
    )
    return [g for g, needed in zip(gradients, output_mask, strict=True) if needed]


def _save_for_backward(ctx, inputs, keyword_only_inputs, output):
    input, weight, _, kernel_offset, data_offset = inputs
    ctx.save_for_backward(input, weight, kernel_offset, data_offset)
    ctx.arguments = keyword_only_inputs


def _backward(ctx, grad_output):
    need_input, need_weight, need_bias, *need_offsets = ctx.needs_input_grad[:5]
    output_mask = [need_input, need_weight, *need_offsets]
    gradients = [None] * 4
    if any(output_mask):
        needed = torch.ops.dk_detectron.deform_kernel_conv2d_backward(
            grad_output,
            *ctx.saved_tensors,
            output_mask=output_mask,
            deterministic=torch.are_deterministic_algorithms_enabled(),
            **ctx.arguments,
        )
        gradients = [needed.pop(0) if mask else None for mask in output_mask]
    grad_bias = grad_output.sum((0, 2, 3)) if need_bias else None
    return gradients[0], gradients[1], grad_bias, gradients[2], gradients[3]


def _refuse_double_backward(ctx, *grads):
    raise RuntimeError(
        "deform_kernel_conv2d: the compiled operator has no second derivative; "
        "dk_detectron.ops.composed_deform_kernel_conv2d has"
    )


torch.library.register_autograd(
    "dk_detectron::deform_kernel_conv2d", _backward, setup_context=_save_for_backward
)
torch.library.register_autograd(
    "dk_detectron::deform_kernel_conv2d_backward", _refuse_double_backward
)

_DEVICES_WITH_KERNEL = {
    device
    for device in ("cpu", "cuda", "meta")
    if torch._C._dispatch_has_kernel_for_dispatch_key(
        "dk_detectron::deform_kernel_conv2d", device.upper() if device != "meta" else "Meta"
    )
}
