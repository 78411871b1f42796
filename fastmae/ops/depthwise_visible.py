"""depthwise_visible: a depthwise 7×7 convolution at visible positions only, which reads masked ones as zero.

The visible cells of an image lie one after another, and a table tells where each cell of the grid lies. So everything
else in a block of a masked ConvNeXt (Woo et al. 2023) is computed on visible positions without any mask.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F

from fastmae.ops import cpu
from fastmae.ops.backends import is_differentiable, ops_backend
from fastmae.ops.checks import check_devices, check_floating, check_ids, check_sizes, unless_hidden, values_are_read

KERNEL = 7  # rows and columns of weights
SIDES = (1, 2, 4, 8)  # of cells, in positions, which the kernels know: those of the four stages
LEAST_CHANNELS = 16  # that the kernels take


def slots_of(ids: torch.Tensor, grid_size: tuple[int, int]) -> torch.Tensor:
    """Returns where each cell of a grid lies among the visible ones: int32 [N, gh, gw], −1 where it is masked.

    Args:
        ids: int32 or int64 [N, K], numbers of the visible cells in row-major order of the grid, distinct in a row.
        grid_size: (gh, gw).
    """
    check_ids("ids", ids, ids.shape[0])
    check_sizes("grid_size", grid_size)
    N, K = ids.shape
    slots = torch.full((N, grid_size[0] * grid_size[1]), -1, dtype=torch.int32, device=ids.device)
    order = torch.arange(K, dtype=torch.int32, device=ids.device).expand(N, K)
    return slots.scatter(1, ids.long(), order).view(N, *grid_size)


def depthwise_visible(
    x: torch.Tensor, slots: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """Convolves each channel with its own 7×7 weights, at visible positions; masked ones and those outside are zero.

    Args:
        x: floating [N, K, s, s, C], the K visible cells of s×s positions of each image.
        slots: int32 or int64 [N, gh, gw] of ``slots_of``: which of the K cells lies there, −1 where it is masked. Each
            of the K occurs once.
        weight: floating [C, 1, 7, 7], as ``nn.Conv2d(C, C, 7, groups=C)`` has it.
        bias: floating [C], or None.

    Returns:
        [N, K, s, s, C] in the dtype of ``x``, computed in float32 (float64 if ``x`` is); the same as the convolution of
        the whole map with padding 3, masked cells zero, at visible cells. Differentiable in x, weight and bias; the
        gradients of the last two are added up in a fixed order. Equivalent to ``depthwise_visible_reference``,
        which computes cells of other sides than 1, 2, 4 and 8, and fewer than 16 channels.

    Raises:
        ValueError: a dtype, shape or device is wrong, or the slots of an image are not its K cells (on a GPU slots are
            checked only with ``check_ids``).
    """
    check_floating("x", x.dtype)
    if x.ndim != 5 or x.shape[2] != x.shape[3] or 0 in x.shape[1:]:
        raise ValueError(f"x must have shape [N, K, s, s, C], got {list(x.shape)}")
    if slots.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"slots must be int32 or int64, got {slots.dtype}")
    if slots.ndim != 3 or slots.shape[0] != x.shape[0]:
        raise ValueError(f"slots must have shape [{x.shape[0]}, gh, gw], got {list(slots.shape)}")
    C = x.shape[-1]
    check_floating("weight", weight.dtype)
    if weight.shape != (C, 1, KERNEL, KERNEL):
        raise ValueError(f"weight must have shape [{C}, 1, {KERNEL}, {KERNEL}], got {list(weight.shape)}")
    if bias is not None:
        check_floating("bias", bias.dtype)
        if bias.shape != (C,):
            raise ValueError(f"bias must have shape [{C}], got {list(bias.shape)}")
    check_devices(x=x, slots=slots, weight=weight, bias=bias)
    if is_differentiable():
        return depthwise_visible_reference(x, slots, weight, bias)
    return _depthwise_visible(x, slots, weight, bias)


def depthwise_visible_reference(
    x: torch.Tensor, slots: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """Defines the op in PyTorch: the whole map, its convolution, and the visible cells of that."""
    compute = _compute_dtype(x)
    added = None if bias is None else bias.to(compute)
    whole = whole_map(x.to(compute), slots)
    out = F.conv2d(whole, weight.to(compute), added, padding=KERNEL // 2, groups=weight.shape[0])
    return visible_cells(out, slots, x.shape[1]).to(x.dtype)


def whole_map(x: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
    """Returns the map [N, C, gh·s, gw·s] with the visible cells x [N, K, s, s, C] where they belong, zero elsewhere."""
    (N, _, s, _, C), (_, gh, gw) = x.shape, slots.shape
    padded = torch.cat((x, x.new_zeros(N, 1, s, s, C)), dim=1)  # −1 is the last one
    cells = padded[torch.arange(N, device=x.device)[:, None], slots.flatten(1).long()]
    return cells.view(N, gh, gw, s, s, C).permute(0, 5, 1, 3, 2, 4).reshape(N, C, gh * s, gw * s)


def visible_cells(whole: torch.Tensor, slots: torch.Tensor, K: int) -> torch.Tensor:
    """Returns the visible cells [N, K, s, s, C] of a map [N, C, gh·s, gw·s]: the inverse of ``whole_map``."""
    N, gh, gw = slots.shape
    s = whole.shape[2] // gh
    cells = whole.unflatten(3, (gw, s)).unflatten(2, (gh, s)).permute(0, 2, 4, 3, 5, 1).flatten(1, 2)
    return cells[torch.arange(N, device=whole.device)[:, None], _ids_of(slots, K)]


def _ids_of(slots: torch.Tensor, K: int) -> torch.Tensor:
    """Returns the cells' numbers int64 [N, K]: the inverse of ``slots_of``."""
    where = slots.flatten(1).long()
    numbers = torch.arange(where.shape[1], device=slots.device).expand_as(where)
    return numbers.new_zeros(where.shape[0], K + 1).scatter(1, torch.where(where < 0, K, where), numbers)[:, :K]


def _check_slots(slots: torch.Tensor, K: int) -> None:
    """Refuses slots that are not −1 and each of the K cells once. On a GPU this is done only with ``check_ids``."""
    if slots.numel() and values_are_read(slots):
        with unless_hidden():
            found = slots.flatten(1).long().sort(dim=1).values
            L = found.shape[1]
            expected = torch.arange(K - L, K, device=slots.device).clamp(min=-1)
            if L < K or not bool((found == expected).all()):
                raise ValueError(f"slots must hold each of 0 … {K - 1} once for each image, and −1 elsewhere")


def _backend(x: torch.Tensor, *others: torch.Tensor | None) -> str:
    backend = ops_backend(x.device, x.dtype, *(tensor.dtype for tensor in others if tensor is not None))
    return backend if x.shape[2] in SIDES and x.shape[4] >= LEAST_CHANNELS else "reference"


def _compute_dtype(x: torch.Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


@torch.library.custom_op("fastmae::depthwise_visible", mutates_args=())
def _depthwise_visible(
    x: torch.Tensor, slots: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    backend = _backend(x, weight, bias)
    if backend == "cpu":  # the extension checks the slots
        return cpu.depthwise_visible(x, slots, weight, bias)
    _check_slots(slots, x.shape[1])
    if backend == "triton":
        from fastmae.kernels.depthwise_visible import depthwise_visible_triton

        return depthwise_visible_triton(x, slots, _ids_of(slots, x.shape[1]), weight, bias)
    return depthwise_visible_reference(x, slots, weight, bias).contiguous()


@_depthwise_visible.register_fake
def _(x: torch.Tensor, slots: object, weight: object, bias: object) -> torch.Tensor:
    return x.new_empty(x.shape)


@torch.library.custom_op("fastmae::depthwise_visible_backward", mutates_args=())
def _depthwise_visible_backward(
    grad: torch.Tensor, x: torch.Tensor, slots: torch.Tensor, weight: torch.Tensor, wanted: Sequence[bool]
) -> list[torch.Tensor]:
    """Returns the gradient of x [N, K, s, s, C] in its dtype, if the first is ``wanted``; and of weight and bias.

    These, if the second is wanted, are [50, C] in the dtype of the arithmetic: 49 rows of weights, and the bias.
    """
    backend = _backend(x, grad, weight)
    if backend == "cpu":
        gradients = [cpu.depthwise_visible(grad.to(x.dtype), slots, weight, None, turned=True)] if wanted[0] else []
        return [*gradients, cpu.depthwise_visible_weights(x, grad.to(x.dtype), slots)] if wanted[1] else gradients
    if backend == "triton":
        from fastmae.kernels.depthwise_visible import depthwise_visible_triton, depthwise_visible_weights_triton

        ids, grad = _ids_of(slots, x.shape[1]), grad.to(x.dtype)
        gradients = [depthwise_visible_triton(grad, slots, ids, weight, None, turned=True)] if wanted[0] else []
        return [*gradients, depthwise_visible_weights_triton(x, grad, slots, ids)] if wanted[1] else gradients
    compute, K, C = _compute_dtype(x), x.shape[1], x.shape[-1]
    whole, of_out = whole_map(x.to(compute), slots), whole_map(grad.to(compute), slots)
    of_x, of_weight, of_bias = torch.ops.aten.convolution_backward(
        of_out, whole, weight.to(compute), [C], [1, 1], [KERNEL // 2] * 2, [1, 1], False, [0, 0], C,
        [wanted[0], wanted[1], wanted[1]],
    )  # fmt: skip
    gradients = [visible_cells(of_x, slots, K).to(x.dtype).contiguous()] if wanted[0] else []
    return [*gradients, torch.cat((of_weight.view(C, -1).T, of_bias[None]))] if wanted[1] else gradients


@_depthwise_visible_backward.register_fake
def _(grad: object, x: torch.Tensor, slots: object, weight: object, wanted: Sequence[bool]) -> list[torch.Tensor]:
    of_x = [x.new_empty(x.shape)] if wanted[0] else []
    sums = [x.new_empty(KERNEL**2 + 1, x.shape[-1], dtype=_compute_dtype(x))] if wanted[1] else []
    return [*of_x, *sums]


def _save(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    x, slots, weight, bias = inputs
    ctx.save_for_backward(x, slots, weight)
    ctx.bias_dtype = None if bias is None else bias.dtype


def _backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    x, slots, weight = ctx.saved_tensors
    of_x, _, of_weight, of_bias = ctx.needs_input_grad
    gradients = _depthwise_visible_backward(grad, x, slots, weight, [of_x, of_weight or of_bias])
    in_x = gradients.pop(0) if of_x else None
    if not gradients:
        return in_x, None, None, None
    (sums,) = gradients
    in_weight = sums[:-1].T.reshape(weight.shape).to(weight.dtype) if of_weight else None
    return in_x, None, in_weight, sums[-1].to(ctx.bias_dtype) if of_bias else None


_depthwise_visible.register_autograd(_backward, setup_context=_save)
