"""masked_mse: the reconstruction loss, on masked patches only.

The backward pass makes each target again instead of scaling a stored gradient. With p bytes a number of the prediction
and i of the image, 3·p + 2·i bytes are moved instead of 4·p + i, and no gradient is kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from fastmae.ops import cpu
from fastmae.ops.backends import is_differentiable, ops_backend, refuse_second_gradient
from fastmae.ops.checks import (
    as_nodata,
    check_channels,
    check_devices,
    check_floating,
    check_ids,
    check_images,
    check_order,
    check_range,
    check_value_range,
    grid_patches,
)
from fastmae.ops.gather_patches import chosen_patches, gather_patches_reference, missing_patches, missing_pixels

VARIANCE_EPS = 1e-6


def masked_mse(
    pred: torch.Tensor,
    images: torch.Tensor,
    ids: torch.Tensor,
    patch_size: tuple[int, int],
    mean: torch.Tensor,
    std: torch.Tensor,
    norm_pix: bool,
    value_range: torch.Tensor | None = None,
    nodata: float | None = None,
) -> torch.Tensor:
    """Computes the mean squared error of the predicted pixels of the patches ``ids`` (paper, section 3).

    Args:
        pred: floating [N, M, P].
        images: uint8, uint16 or floating [N, H, W, C], normalised as in ``gather_patches``.
        ids: int32 or int64 [N, M], the masked patches.
        patch_size: (ph, pw) in pixels.
        mean, std: floating [C], in units of the range.
        norm_pix: normalise every target patch by its own mean and unbiased variance (divisor P − 1; 1e-6 is added to
            the variance inside the root).
        value_range, nodata: as in ``gather_patches``. A patch with a missing pixel is no target: its error and its
            gradient are 0, whatever it or its prediction holds, and the mean is that of the other patches.

    Returns:
        A float32 scalar (float64 when ``pred`` is float64): the mean over N, M and P; 0 if no patch is a target.
        Differentiable in ``pred``. Equivalent to ``masked_mse_reference``, which computes it for images that require a
        gradient and so move the target.

    Raises:
        ValueError: a dtype, shape or device is wrong, there are no images, an id is outside the grid, or a low is not
            below its high (on a GPU ids and ranges are checked only with ``check_ids``).
    """
    check_images(images, patch_size)
    check_ids("ids", ids, images.shape[0])
    check_channels(images.shape[3], mean, std)
    check_value_range(images.shape[3], value_range)
    nodata = as_nodata(nodata, images.dtype)
    check_floating("pred", pred.dtype)
    check_devices(pred=pred, images=images, ids=ids, mean=mean, std=std, value_range=value_range)
    expected = (*ids.shape, patch_size[0] * patch_size[1] * images.shape[3])
    if pred.shape != expected:
        raise ValueError(f"pred must have shape {list(expected)}, got {list(pred.shape)}")
    if ids.shape[0] == 0:
        raise ValueError("pred must hold at least one image: the mean of nothing is not a loss")
    if images.requires_grad or is_differentiable():
        check_range("ids", ids, grid_patches(images, patch_size))
        check_order(value_range)
        return masked_mse_reference(pred, images, ids, patch_size, mean, std, norm_pix, value_range, nodata)
    loss, _ = _masked_mse(pred, images, ids, patch_size, mean, std, norm_pix, value_range, nodata)
    return loss


def excluded_share(
    images: torch.Tensor, ids: torch.Tensor, patch_size: tuple[int, int], nodata: float | None
) -> torch.Tensor:
    """Returns which share of the patches ``ids`` [N, M] has a missing pixel, so that it is no target of ``masked_mse``.

    A float32 scalar on the device of the images; nobody waits for it until it is read. For reports, not for each step.
    """
    if nodata is None:
        return torch.zeros((), device=images.device)
    return missing_patches(images, patch_size, nodata).gather(1, ids.long()).float().mean()


def masked_mse_reference(
    pred: torch.Tensor,
    images: torch.Tensor,
    ids: torch.Tensor,
    patch_size: tuple[int, int],
    mean: torch.Tensor,
    std: torch.Tensor,
    norm_pix: bool,
    value_range: torch.Tensor | None = None,
    nodata: float | None = None,
) -> torch.Tensor:
    """Defines the op in PyTorch."""
    error, targets = _error(pred, images, ids, patch_size, mean, std, norm_pix, value_range, nodata)
    if targets is None:
        return error.square().mean()
    return error.square().sum() / (targets.sum() * error.shape[2]).clamp(min=1)


def patch_statistics(patches: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the mean and the root of (unbiased variance + 1e-6) of each patch [..., P], [..., 1] each."""
    variance, average = torch.var_mean(patches, dim=-1, keepdim=True, correction=1)
    return average, (variance + VARIANCE_EPS).sqrt()


def _error(
    pred: torch.Tensor,
    images: torch.Tensor,
    ids: torch.Tensor,
    patch_size: Sequence[int],
    mean: torch.Tensor,
    std: torch.Tensor,
    norm_pix: bool,
    value_range: torch.Tensor | None,
    nodata: float | None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Computes prediction minus target [N, M, P], 0 where there is no target, in the dtype of the arithmetic.

    Also tells which patches [N, M] are targets; None means all.
    """
    compute = torch.float64 if pred.dtype == torch.float64 else torch.float32
    target = gather_patches_reference(images, ids, patch_size, mean, std, compute, value_range, nodata)
    if norm_pix:
        average, deviation = patch_statistics(target)
        target = (target - average) / deviation
    error = pred.to(compute) - target
    if nodata is None:
        return error, None
    targets = _targets(images, ids, patch_size, nodata)
    return torch.where(targets[:, :, None], error, 0.0), targets


def _targets(images: torch.Tensor, ids: torch.Tensor, patch_size: Sequence[int], nodata: float) -> torch.Tensor:
    """Tells which of the patches ``ids`` [N, M] have no missing pixel."""
    return ~missing_pixels(chosen_patches(images, ids, patch_size), nodata).flatten(2).any(dim=2)


def _loss_and_targets(pred: torch.Tensor, *others: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Computes the loss and how many patches are targets."""
    error, targets = _error(pred, *others)
    N, M, P = error.shape
    if targets is None:
        return error.square().mean(), error.new_full((), N * M)
    count = targets.sum().to(error.dtype)
    return error.square().sum() / (count * P).clamp(min=1), count


def _gradient(grad_loss: torch.Tensor, count: torch.Tensor, pred: torch.Tensor, *others: Any) -> torch.Tensor:
    """Computes the gradient of ``pred`` from that of the loss and from how many patches are targets."""
    error, targets = _error(pred, *others)
    numbers = error.numel() if targets is None else (count * error.shape[2]).clamp(min=1)
    return (error * (grad_loss * (2 / numbers))).to(pred.dtype)


@torch.library.custom_op("fastmae::masked_mse", mutates_args=())
def _masked_mse(
    pred: torch.Tensor,
    images: torch.Tensor,
    ids: torch.Tensor,
    patch_size: Sequence[int],
    mean: torch.Tensor,
    std: torch.Tensor,
    norm_pix: bool,
    value_range: torch.Tensor | None = None,
    nodata: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the loss and how many patches are targets, which the backward pass needs."""
    arguments = pred, images, ids, patch_size, mean, std, norm_pix, value_range, nodata
    backend = ops_backend(pred.device, images.dtype, pred.dtype)
    if backend == "cpu":  # the extension checks the ids and the range
        return cpu.masked_mse(*arguments, eps=VARIANCE_EPS)
    check_range("ids", ids, grid_patches(images, patch_size))
    check_order(value_range)
    if backend == "reference":
        return _loss_and_targets(*arguments)
    from fastmae.kernels.masked_mse import masked_mse_triton

    return masked_mse_triton(*arguments, eps=VARIANCE_EPS)


@torch.library.custom_op("fastmae::masked_mse_backward", mutates_args=())
def _masked_mse_backward(
    grad_loss: torch.Tensor,
    targets: torch.Tensor,
    pred: torch.Tensor,
    images: torch.Tensor,
    ids: torch.Tensor,
    patch_size: Sequence[int],
    mean: torch.Tensor,
    std: torch.Tensor,
    norm_pix: bool,
    value_range: torch.Tensor | None = None,
    nodata: float | None = None,
) -> torch.Tensor:
    arguments = grad_loss, targets, pred, images, ids, patch_size, mean, std, norm_pix, value_range, nodata
    backend = ops_backend(pred.device, images.dtype, pred.dtype)
    if backend == "cpu":
        return cpu.masked_mse_backward(*arguments, eps=VARIANCE_EPS)
    if backend == "reference":
        return _gradient(*arguments)
    from fastmae.kernels.masked_mse import masked_mse_backward_triton

    return masked_mse_backward_triton(*arguments, eps=VARIANCE_EPS)


@_masked_mse.register_fake
def _(pred: torch.Tensor, *_: Any) -> tuple[torch.Tensor, torch.Tensor]:
    compute = torch.float64 if pred.dtype == torch.float64 else torch.float32
    return pred.new_empty((), dtype=compute), pred.new_empty((), dtype=compute)


@_masked_mse_backward.register_fake
def _(grad_loss: torch.Tensor, targets: torch.Tensor, pred: torch.Tensor, *_: Any) -> torch.Tensor:
    return torch.empty_like(pred, memory_format=torch.contiguous_format)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    pred, images, ids, ctx.patch_size, mean, std, ctx.norm_pix, value_range, ctx.nodata = inputs
    ctx.save_for_backward(output[1], pred, images, ids, mean, std, value_range)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad_loss: torch.Tensor | None, _: None) -> tuple[torch.Tensor | None, ...]:
    if grad_loss is None:
        return (None,) * 9
    refuse_second_gradient(grad_loss)
    targets, pred, images, ids, mean, std, value_range = ctx.saved_tensors
    gradient = _masked_mse_backward(
        grad_loss, targets, pred, images, ids, ctx.patch_size, mean, std, ctx.norm_pix, value_range, ctx.nodata
    )
    return gradient, *[None] * 8


_masked_mse.register_autograd(_backward, setup_context=_save)
