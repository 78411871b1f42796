"""Which patches are masked: at random, in blocks, by a grid, or as a file says; and which single features of rows.

A mask of patches is a row of ``ids_shuffle``: a permutation of the L patches of which the first K are visible. K is the
same for all rows, so that shapes are static. A mask of features is a row of truth values. Either is a pure function of
(seed, draw_id), for any batch, rank or restart.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from fastmae.config import Masking
from fastmae.data.arrays import StoredArray
from fastmae.errors import SettingError, in_one_line
from fastmae.facts import MaskFacts, exact_ratio
from fastmae.ops.bernoulli_masking import bernoulli_masking
from fastmae.ops.gather_patches import missing_pixels
from fastmae.ops.masked_mse import excluded_share
from fastmae.ops.random_masking import random_masking
from fastmae.philox import STREAM_BLOCKS, STREAM_MASK_FILE, uniforms_numpy, words_numpy

Grid = tuple[int, int]

# The share of the grid that the smallest rectangle has: 16 patches of a grid of 14×14.
SMALLEST_BLOCK = 16 / 196
# The range of height over width, whose log is uniform.
BLOCK_RATIO = (0.3, 1 / 0.3)
# The last rectangle is as large as the grid, so that every mask is completed. Of 14×14 patches at 75 % one mask in 2000
# needs more than 40 rectangles; at 90 % one in 100 needs the last.
MAX_BLOCKS = 64
CHECKED_AT_ONCE = 2**24


@dataclass(frozen=True)
class MaskFile:
    """The masks in a file of the user's."""

    path: str
    masked: np.ndarray
    """uint8 [B, rows, columns], 1 where masked; in memory, so that the file may change during a run."""
    count: int
    """How many patches each mask masks."""
    digest: str
    """The start of a SHA-256 of what the masks are, whatever their dtype in the file."""

    @property
    def facts(self) -> MaskFacts:
        """What the settings of a run depend on."""
        number, rows, columns = self.masked.shape
        kind = f"{number} {'mask' if number == 1 else 'masks'} of {rows}×{columns}"
        description = f"{kind}, {self.count} masked ({self.digest})"
        return MaskFacts(mask_ratio=exact_ratio(rows * columns - self.count, rows * columns), description=description)


@dataclass(frozen=True)
class Masks:
    """How the masks of a run are drawn."""

    masking: Masking
    seed: int
    grid: Grid
    """(rows, columns) of patches, L in all."""
    visible: int
    """K, the number of visible patches."""
    file: MaskFile | None = None
    chance: float | None = None
    """With which each feature of a row is masked, independently of the others; None for patches."""

    def __str__(self) -> str:
        L = math.prod(self.grid)
        if self.chance is not None:
            return f"each of {L} features with a chance of {self.chance:g}"
        share = f"{L - self.visible} of {L} patches"
        match self.masking:
            case "random":
                return f"{share} at random"
            case "block":
                return f"{share} in rectangles"
            case "grid":
                return f"{share}, all but the top left of every 2×2"
            case "file":
                assert self.file is not None
                return f"{share}, {self.file.path}: {self.file.facts.description}"


def choose_masks(masking: Masking, file: MaskFile | None, grid: Grid, visible: int, seed: int) -> Masks:
    """Returns the masks of a run, once it is checked that the patches of a model can be masked so.

    Args:
        file: the masks of the user, if ``masking`` is "file".
        grid: (rows, columns) of the model's patches.
        visible: K, the number of visible patches.

    Raises:
        SettingError: the grid has an odd side, or is not that of the file.
    """
    needed = "×".join(map(str, grid))
    if masking == "grid" and (grid[0] % 2 or grid[1] % 2):
        problem = f"the model has {needed} patches, not even numbers; choose another image size"
        raise SettingError("masking", masking, problem)
    if file is not None and file.masked.shape[1:] != grid:
        given = "×".join(map(str, file.masked.shape[1:]))
        problem = f"for {given} patches, the model has {needed}; give masks of its size"
        raise SettingError("masks", file.path, problem)
    return Masks(masking, seed, grid, visible, file)


def shuffled_ids(draw_ids: torch.Tensor, masks: Masks, device: torch.device) -> torch.Tensor:
    """Returns ids_shuffle int32 [N, L] on ``device``: one permutation per row, whose first K entries are visible. Of
    features it returns bool [N, L], true where masked.

    Random masks are computed on the device and list patches in the order of their keys. The other masks are computed on
    the CPU and list first the visible and then the masked patches, each in rising order. Attention does not depend on
    the order of its tokens, so this changes no more than rounding.

    Args:
        draw_ids: int64 [N] on the CPU; training uses ``epoch · len(dataset) + index``.
    """
    if masks.chance is not None:
        ids = draw_ids.to(device, non_blocking=True)
        return bernoulli_masking(ids, masks.seed, math.prod(masks.grid), masks.chance)
    if masks.masking == "random":
        return random_masking(draw_ids.to(device, non_blocking=True), masks.seed, math.prod(masks.grid))
    ids = torch.from_numpy(visible_first(masked_patches(draw_ids.numpy(), masks)))
    if device.type == "cuda":  # from pageable memory a copy would wait
        ids = ids.pin_memory()
    return ids.to(device, non_blocking=True)


def excluded(images: torch.Tensor, order: torch.Tensor, masks: Masks, nodata: float | None) -> torch.Tensor:
    """Returns which share of what is masked is no target, as pixels are missing; nobody waits for it.

    Args:
        images: [N, H, W, C].
        order: of ``shuffled_ids``.
        nodata: the value of missing pixels, as the ops have it.
    """
    if nodata is None:
        return torch.zeros((), device=images.device)
    if masks.chance is not None:
        return (order & missing_pixels(images, nodata).flatten(1)).sum() / order.sum()
    patch_size = images.shape[1] // masks.grid[0], images.shape[2] // masks.grid[1]
    return excluded_share(images, order[:, masks.visible :], patch_size, nodata)


def masked_patches(draw_ids: np.ndarray, masks: Masks) -> np.ndarray:
    """Returns which patches are masked, for all ways of masking but random: bool [N, rows, columns]."""
    if masks.file is not None:
        number = len(masks.file.masked)
        words = words_numpy(masks.seed, STREAM_MASK_FILE, draw_ids, 1)[:, 0].astype(np.uint64)
        return masks.file.masked[(words * np.uint64(number)) >> np.uint64(32)].astype(bool)
    if masks.masking == "grid":
        return np.broadcast_to(grid_mask(masks.grid), (len(draw_ids), *masks.grid))
    return block_masks(draw_ids, masks.seed, masks.grid, math.prod(masks.grid) - masks.visible)


def visible_first(masked: np.ndarray) -> np.ndarray:
    """Turns masks bool [N, rows, columns] into permutations int32 [N, L]: visible, then masked patches, each rising."""
    return np.argsort(masked.reshape(len(masked), -1), axis=1, kind="stable").astype(np.int32)


def grid_mask(grid: Grid) -> np.ndarray:
    """Masks all but the top left of every 2×2 patches (paper, table 1f): bool [rows, columns], both of them even."""
    masked = np.ones(grid, dtype=bool)
    masked[::2, ::2] = False
    return masked


def block_masks(draw_ids: np.ndarray, seed: int, grid: Grid, count: int) -> np.ndarray:
    """Masks random rectangles until ``count`` patches are masked (paper, table 1f; Bao et al. 2021, algorithm 1).

    The area of a rectangle is uniform between ``SMALLEST_BLOCK`` of the grid and the number of patches still missing.
    The log of its aspect ratio is uniform in ``BLOCK_RATIO``. Its sides are rounded, and cut to those of the grid.
    Algorithm 1 may mask more than ``count`` patches; here it is exactly that many. A rectangle that would mask too many
    is filled line by line from one of its corners until the number is reached. The corner, and whether lines are rows
    or columns, are drawn at random, so that no side is preferred.

    Returns:
        bool [N, rows, columns]. Row n depends on seed and ``draw_ids[n]`` alone.
    """
    rows, columns = grid
    L, N = rows * columns, len(draw_ids)
    smallest = max(1.0, SMALLEST_BLOCK * L)
    low, high = np.log(BLOCK_RATIO)
    # Four draws per rectangle; four before them, of which one says how the last rectangle is filled.
    draws = uniforms_numpy(seed, STREAM_BLOCKS, draw_ids, 4 * (MAX_BLOCKS + 1)).reshape(N, MAX_BLOCKS + 1, 4)
    scan_number = (draws[:, 0, 0] * 8).astype(np.int64)
    elongation = np.exp((low + (high - low) * draws[..., 1]) / 2)  # the root of height over width
    # All N masks grow together, by one rectangle per round. A row of patches is kept as bits of 64-bit words (the patch
    # of column c is bit c % 64 of word c // 64), because bits are faster than bools. A rectangle has the same words in
    # each of its rows: the bits below its right end without those below its left, for left 2 and width 3 these are
    # 0b11111 & ~0b00011 = 0b11100. ``new`` is what of them is not masked yet; its bits are counted byte by byte. A mask
    # that needs more than that takes it and goes on; otherwise it stays in ``last``, for ``_first`` to take a part of.
    row_numbers, word_starts = np.arange(rows), np.arange(0, columns, 64)
    masked = np.zeros((N, rows, len(word_starts)), dtype="<u8")
    last = np.zeros_like(masked)
    missing = np.full(N, count)
    growing = np.arange(N)  # the masks that are not complete
    for number in range(1, MAX_BLOCKS + 1):
        wanted = missing[growing]
        area, _, top, left = draws[growing, number].T
        side = np.sqrt(smallest + np.maximum(wanted - smallest, 0) * area)
        height = np.minimum(np.rint(side * elongation[growing, number]), rows)
        width = np.minimum(np.rint(side / elongation[growing, number]), columns)
        if number == MAX_BLOCKS:
            height[:], width[:] = rows, columns
        top, left = np.floor(top * (rows - height + 1)), np.floor(left * (columns - width + 1))
        inside = (row_numbers >= top[:, None]) & (row_numbers < (top + height)[:, None])
        row_words = _first_bits((left + width)[:, None] - word_starts) & ~_first_bits(left[:, None] - word_starts)
        new = np.where(inside[:, :, None], row_words[:, None, :], np.uint64(0)) & ~masked[growing]
        added = _SET_BITS[new.view(np.uint8)].sum(axis=(1, 2), dtype=np.int64)
        fits = added < wanted
        last[growing] = new
        growing = growing[fits]
        masked[growing] |= new[fits]
        missing[growing] -= added[fits]
        if not len(growing):
            break
    completed = _patches(masked, columns) | _first(_patches(last, columns), missing, _scans(grid)[scan_number])
    return completed.reshape(N, rows, columns)


_ONES = np.array([2**n - 1 for n in range(65)], dtype="<u8")
_SET_BITS = np.array([n.bit_count() for n in range(256)], dtype=np.uint8)


def _first_bits(n: np.ndarray) -> np.ndarray:
    """Returns words with their first ``n`` bits set: no bit for n below 0, all 64 for n above 64."""
    return _ONES[np.minimum(np.maximum(n, 0), 64).astype(np.int64)]


def _patches(words: np.ndarray, columns: int) -> np.ndarray:
    """Unpacks rows of bits [n, rows, words] to bool [n, L]."""
    bits = np.unpackbits(words.view(np.uint8), axis=2, count=columns, bitorder="little")
    return bits.reshape(len(words), -1).astype(bool)


def _scans(grid: Grid) -> np.ndarray:
    """Returns the eight ways through a grid line by line, from each corner along rows or columns: int64 [8, L]."""
    patches = np.arange(math.prod(grid)).reshape(grid)
    corners = [patches[::down, ::right] for down in (1, -1) for right in (1, -1)]
    return np.stack([view.reshape(-1) for corner in corners for view in (corner, corner.T)])


def _first(new: np.ndarray, count: np.ndarray, scan: np.ndarray) -> np.ndarray:
    """Returns the first ``count`` [n] of the patches ``new`` (bool [n, L]) in the order of ``scan`` [n, L]."""
    scanned = np.take_along_axis(new, scan, axis=1)
    scanned &= np.cumsum(scanned, axis=1) <= count[:, None]
    chosen = np.zeros_like(new)
    np.put_along_axis(chosen, scan, scanned, axis=1)
    return chosen


# --- files ------------------------------------------------------------------------------------------------------------


def open_masks(path: str, asked_ratio: float | None) -> MaskFile | None:
    """Opens a .npy file of masks, bool or uint8 [B, rows, columns] with 1 where masked, and reads it once to check it.

    Returns None without a ``path``. The file decides how many patches are masked, so ``asked_ratio`` must agree with
    it, unless it is None, as no ratio was asked for.

    Raises:
        SettingError: not such a file, its masks mask different numbers of patches, or ``asked_ratio`` differs.
    """
    if not path:
        return None
    try:
        masked, count, digest = _checked(Path(path).expanduser())
    except (OSError, ValueError) as error:
        reason = in_one_line(" ".join(str(error).split()))
        problem = f"{reason}; give a .npy file of bool or uint8 [B, rows, columns], 1 where masked"
        raise SettingError("masks", path, problem) from error
    L = masked.shape[1] * masked.shape[2]
    if asked_ratio is not None and int(L * (1 - asked_ratio)) != L - count:
        problem = f"--masks={path} masks {count} of {L} patches; leave --mask_ratio out"
        raise SettingError("mask_ratio", asked_ratio, problem)
    return MaskFile(path, masked, count, digest)


def _checked(path: Path) -> tuple[np.ndarray, int, str]:
    """Returns the masks, the number of patches that each masks, and a digest of them that no dtype changes."""
    if not path.is_file():
        raise ValueError("not a file" if path.exists() else "no such file")
    stored = StoredArray.npy(path)
    if stored.dtype not in (np.bool_, np.uint8):
        raise ValueError(f"holds {stored.dtype}")
    if len(stored.shape) != 3 or min(stored.shape) < 1:
        raise ValueError(f"has shape {list(stored.shape)}")
    if stored.notes:
        raise ValueError(stored.notes[0])
    masked = stored.whole().view(np.uint8)  # a bool in a file may be any byte
    L = masked.shape[1] * masked.shape[2]
    count, digest = int(np.count_nonzero(masked[0])), hashlib.sha256(repr(masked.shape).encode())
    if not 0 < count < L:
        raise ValueError(f"its first mask masks {count} of {L} patches, at least one must be masked and one visible")
    step = max(1, CHECKED_AT_ONCE // L)
    for start in range(0, len(masked), step):
        part = np.ascontiguousarray(masked[start : start + step]).reshape(-1, L)
        if part.max() > 1:
            wrong = int(np.argmax(part.max(axis=1) > 1))
            raise ValueError(f"mask {start + wrong} holds {part[wrong].max()} where 0 (visible) or 1 (masked) must be")
        counts = np.count_nonzero(part, axis=1)
        if (counts != count).any():
            wrong = int(np.argmax(counts != count))
            raise ValueError(
                f"mask {start + wrong} masks {counts[wrong]} of {L} patches and mask 0 {count}, all must mask as many"
            )
        digest.update(part.data)
    return masked, count, digest.hexdigest()[:12]
