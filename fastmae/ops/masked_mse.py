"""masked_mse: the reconstruction loss, on masked patches only."""

from __future__ import annotations

import torch

from fastmae.ops.checks import check_channels, check_ids, check_images, check_range
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
    """Mean squared error between the predicted and the true pixels of the patches ``ids`` (paper, section 3).

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
        TypeError, ValueError: a wrong dtype or shape. IndexError: an id outside the grid (looked at on the CPU only).
    """
    gh, gw = check_images(images, patch_size)
    check_ids("ids", ids, images.shape[0])
    check_range("ids", ids, gh * gw)
    check_channels(images.shape[3], mean, std)
    if not pred.dtype.is_floating_point:
        raise TypeError(f"pred must be floating point, got {pred.dtype}")
    expected = (*ids.shape, patch_size[0] * patch_size[1] * images.shape[3])
    if pred.shape != expected:
        raise ValueError(f"pred must have shape {list(expected)}, got {list(pred.shape)}")
    return masked_mse_reference(pred, images, ids, patch_size, mean, std, norm_pix)


def masked_mse_reference(
    pred: torch.Tensor,
    images: torch.Tensor,
    ids: torch.Tensor,
    patch_size: tuple[int, int],
    mean: torch.Tensor,
    std: torch.Tensor,
    norm_pix: bool,
) -> torch.Tensor:
    """The definition, in PyTorch."""
    compute = torch.float64 if pred.dtype == torch.float64 else torch.float32
    with torch.no_grad():
        target = gather_patches_reference(images, ids, patch_size, mean, std, compute)
        if norm_pix:
            average, deviation = patch_statistics(target)
            target = (target - average) / deviation
    return (pred.to(compute) - target).square().mean()


def patch_statistics(patches: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and root of (unbiased variance + 1e-6) of each patch: [..., P] gives two of [..., 1]."""
    variance, average = torch.var_mean(patches, dim=-1, keepdim=True, correction=1)
    return average, (variance + VARIANCE_EPS).sqrt()
