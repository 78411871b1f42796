"""masked_mse: the reconstruction loss, on masked patches only."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from fastmae.ops import cpu
from fastmae.ops.backends import ops_backend
from fastmae.ops.checks import (
    check_channels,
    check_devices,
    check_floating,
    check_ids,
    check_images,
    check_range,
    grid_patches,
)
from fastmae.ops.gather_patches import gather_patches_reference

VARIANCE_EPS = 1e-6


def masked_mse(
    pred: torch.Tensor,
    images: torch.Tensor,
    ids: torch.Tensor,
    patch_size: tuple[int, int],
    mean: torch.Tensor,
    std: torch.Tensor,
    norm_pix: bool,
) -> torch.Tensor:
    """Computes the mean squared error of the predicted pixels of the patches ``ids`` (paper, section 3).

    Args:
        pred: floating [N, M, P].
        images: uint8 or floating [N, H, W, C], normalised as in ``gather_patches``.
        ids: int32 or int64 [N, M], the masked patches.
        patch_size: (ph, pw) in pixels.
        mean, std: floating [C], in units of [0, 1].
        norm_pix: normalise every target patch by its own mean and unbiased variance (divisor P − 1; 1e-6 is added to
            the variance inside the root).

    Returns:
        A float32 scalar (float64 when ``pred`` is float64): the mean over N, M and P. Differentiable in ``pred``.
        Equivalent to ``masked_mse_reference``.

    Raises:
        ValueError: a dtype, shape or device is wrong, there are no images, or an id is outside the grid (on a GPU ids
            are checked only with ``check_ids``).
    """
    check_images(images, patch_size)
    check_ids("ids", ids, images.shape[0])
    check_channels(images.shape[3], mean, std)
    check_floating("pred", pred.dtype)
    check_devices(pred=pred, images=images, ids=ids, mean=mean, std=std)
    expected = (*ids.shape, patch_size[0] * patch_size[1] * images.shape[3])
    if pred.shape != expected:
        raise ValueError(f"pred must have shape {list(expected)}, got {list(pred.shape)}")
    if ids.shape[0] == 0:
        raise ValueError("pred must hold at least one image: the mean of nothing is not a loss")
    loss, _ = _masked_mse(pred, images, ids, patch_size, mean, std, norm_pix)
    return loss


def masked_mse_reference(
    pred: torch.Tensor,
    images: torch.Tensor,
    ids: torch.Tensor,
    patch_size: tuple[int, int],
    mean: torch.Tensor,
    std: torch.Tensor,
    norm_pix: bool,
) -> torch.Tensor:
    """Defines the op in PyTorch."""
    return _error(pred, images, ids, patch_size, mean, std, norm_pix).square().mean()


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
) -> torch.Tensor:
    """Computes prediction minus target [N, M, P] in the dtype of the arithmetic."""
    compute = torch.float64 if pred.dtype == torch.float64 else torch.float32
    target = gather_patches_reference(images, ids, patch_size, mean, std, compute)
    if norm_pix:
        average, deviation = patch_statistics(target)
        target = (target - average) / deviation
    return pred.to(compute) - target


def _loss_and_gradient(
    pred: torch.Tensor,
    images: torch.Tensor,
    ids: torch.Tensor,
    patch_size: Sequence[int],
    mean: torch.Tensor,
    std: torch.Tensor,
    norm_pix: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Computes the loss and its gradient with respect to ``pred`` together, as both need the error."""
    error = _error(pred, images, ids, patch_size, mean, std, norm_pix)
    return error.square().mean(), (error * (2 / error.numel())).to(pred.dtype)


@torch.library.custom_op("fastmae::masked_mse", mutates_args=())
def _masked_mse(
    pred: torch.Tensor,
    images: torch.Tensor,
    ids: torch.Tensor,
    patch_size: Sequence[int],
    mean: torch.Tensor,
    std: torch.Tensor,
    norm_pix: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    arguments = pred, images, ids, patch_size, mean, std, norm_pix
    backend = ops_backend(pred.device, images.dtype, pred.dtype)
    if backend == "cpu":  # the extension checks the ids
        return cpu.masked_mse(*arguments, VARIANCE_EPS)
    check_range("ids", ids, grid_patches(images, patch_size))
    if backend == "reference":
        return _loss_and_gradient(*arguments)
    from fastmae.kernels.masked_mse import masked_mse_triton

    return masked_mse_triton(*arguments, VARIANCE_EPS)


@_masked_mse.register_fake
def _(pred: torch.Tensor, *_: Any) -> tuple[torch.Tensor, torch.Tensor]:
    compute = torch.float64 if pred.dtype == torch.float64 else torch.float32
    return pred.new_empty((), dtype=compute), torch.empty_like(pred, memory_format=torch.contiguous_format)


def _save_gradient(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    ctx.save_for_backward(output[1])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad_loss: torch.Tensor | None, _: None) -> tuple[torch.Tensor | None, ...]:
    (gradient,) = ctx.saved_tensors
    return None if grad_loss is None else gradient * grad_loss, None, None, None, None, None, None


_masked_mse.register_autograd(_backward, setup_context=_save_gradient)
