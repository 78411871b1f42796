"""Masks as booleans, turned into the order of patches that the model and the ops take."""

from __future__ import annotations

import torch


def ids_from_mask(mask: torch.Tensor) -> torch.Tensor:
    """Turns masks into the order of the patches that ``training_loss``, ``forward`` and the ops take.

    Rows are compared, so a mask on a GPU is waited for, once a call. A mask on the CPU makes nobody wait: make it
    there, and move the result with ``.to(device, non_blocking=True)``. torch.compile cannot trace this; call it outside
    of what is compiled.

    Args:
        mask: bool [N, L], or [N, rows, columns] of the grid of patches; True where a patch is masked. Every image has
            the same number of masked patches, at least one and not all.

    Returns:
        ids_shuffle int32 [N, L] on the device of ``mask``: of each image the visible patches, then the masked ones,
        each by rising number. With K visible ones, ``mask_ratio`` is 1 − K/L; ``forward`` and ``training_loss`` find
        it themselves if they get ``mask`` in place of ``ids_shuffle``.

    Raises:
        ValueError: the mask is not bool, has another shape, or its rows differ in the number of masked patches.
    """
    return _order(mask)[0]


def order_of(mask: torch.Tensor, images: int, grid: tuple[int, int]) -> tuple[torch.Tensor, int]:
    """Returns ids_shuffle int32 [N, L] and K for masks of a number of images with a grid of (rows, columns) patches.

    Raises:
        ValueError: the mask has another shape, or ``ids_from_mask`` refuses it.
    """
    L = grid[0] * grid[1]
    if tuple(mask.shape) not in ((images, L), (images, *grid)):
        raise ValueError(
            f"mask must have shape [{images}, {L}] or [{images}, {grid[0]}, {grid[1]}], one entry per patch, "
            f"got {list(mask.shape)}"
        )
    return _order(mask)


def _order(mask: torch.Tensor) -> tuple[torch.Tensor, int]:
    if mask.dtype != torch.bool:
        raise ValueError(f"mask must be bool, True where a patch is masked, got {mask.dtype}; use mask.bool()")
    if mask.ndim not in (2, 3) or 0 in mask.shape:
        raise ValueError(f"mask must have shape [N, L] or [N, rows, columns], got {list(mask.shape)}")
    rows = mask.flatten(1)
    low, high = (int(count) for count in rows.sum(dim=1).aminmax())
    if low != high:
        raise ValueError(f"mask must mask as many patches in every image, got {low} to {high}")
    if not 1 <= low < rows.shape[1]:
        raise ValueError(
            f"mask leaves {rows.shape[1] - low} of {rows.shape[1]} patches visible; at least one must be visible and "
            "one masked"
        )
    return rows.to(torch.uint8).argsort(dim=1, stable=True).to(torch.int32), rows.shape[1] - low
