"""Filling the holes of pictures of any size with what a model predicts there."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import numpy as np
import torch

from fastmae.errors import UserError
from fastmae.evaluate.segment import window_starts
from fastmae.facts import exact_ratio
from fastmae.model.family import MaskedModel
from fastmae.model.pixels import pixels_of, range_ends
from fastmae.ops import gather_patches, scatter_patches
from fastmae.ops.masked_mse import VARIANCE_EPS

LEAST_KNOWN = 0.25
"""Of so many known pixels the mean and the deviation of a patch are taken, otherwise of its neighbours."""
SMOOTHINGS = 100


@dataclasses.dataclass(frozen=True)
class Inpainting:
    """How holes are filled."""

    mask_ratio: float
    """The share of hidden patches of a tile, where holes touch fewer."""
    rounds: int = 8
    """Predictions that are averaged."""
    overlap: float = 0.5
    """The share of a tile that the next one covers as well."""
    seed: int = 0


@torch.no_grad()
def inpaint_picture(model: MaskedModel, pixels: np.ndarray, hole: np.ndarray, how: Inpainting) -> np.ndarray:
    """Returns a copy of a picture with its holes filled.

    Tiles of the model's size slide over the picture; those that touch no hole are passed over. In every round a tile
    hides all patches that a hole touches, and random others, so that the model sees as many as in training. Predictions
    are averaged over rounds, and over tiles with weights that fall towards the edges of a tile. A model of
    norm_pix_loss predicts patches without mean and deviation: they are those of the known pixels of the patch, or,
    where fewer than a quarter are known, they go on smoothly from the patches around. Beside the picture and its copy
    the memory grows with the pixels in holes alone.

    Args:
        model: in evaluation mode, on its device.
        pixels: [H, W, C] of the model's type. A picture smaller than a tile is mirrored at its edges.
        hole: bool [H, W], true where a pixel is filled. What the picture has there is not looked at.
        how: the rounds, the overlap, the mask ratio and the seed.

    Raises:
        UserError: a hole leaves no patch of a tile visible.
    """
    rows, columns = model.img_size
    height, width = hole.shape
    beyond = (0, max(0, rows - height)), (0, max(0, columns - width))
    filled = pixels.copy()
    if any(more for _, more in beyond):
        pixels, hole = np.pad(pixels, (*beyond, (0, 0)), "symmetric"), np.pad(hole, beyond, "symmetric")
    places = np.flatnonzero(hole)  # rising: the pixels of a tile are found by bisection
    total = np.zeros((len(places), pixels.shape[2]), np.float64)
    weights = np.zeros((len(places), 1), np.float64)
    window = window_of(rows, columns)
    for number, (top, left) in enumerate(_tiles(hole, (rows, columns), how.overlap)):
        place = np.s_[top : top + rows, left : left + columns]
        tile = _predicted(model, pixels[place], hole[place], how, number, (top, left))
        y, x = np.nonzero(hole[place])
        found = np.searchsorted(places, (y + top) * hole.shape[1] + x + left)
        total[found] += window[y, x, None] * tile[y, x]
        weights[found] += window[y, x, None]
    y, x = np.divmod(places, hole.shape[1])
    inside = (y < height) & (x < width)
    values = total[inside] / weights[inside]
    if filled.dtype != np.float32:
        values = values.round().clip(0, np.iinfo(filled.dtype).max)
    filled[y[inside], x[inside]] = values.astype(filled.dtype)
    return filled


def count_tiles(hole: np.ndarray, size: tuple[int, int], overlap: float = Inpainting.overlap) -> int:
    """Returns how many tiles of a model's size are computed for holes bool [H, W], in each round."""
    return sum(1 for _ in _tiles(hole, size, overlap))


def _tiles(hole: np.ndarray, size: tuple[int, int], overlap: float) -> Iterator[tuple[int, int]]:
    """Yields the top and the left of the tiles that touch a hole."""
    for top in window_starts(hole.shape[0], size[0], overlap):
        for left in window_starts(hole.shape[1], size[1], overlap):
            if hole[top : top + size[0], left : left + size[1]].any():
                yield top, left


def window_of(rows: int, columns: int) -> np.ndarray:
    """Returns the weights of a tile [rows, columns]: 1 in the middle, small but positive at the edges."""
    one, other = (np.sin(np.pi * (np.arange(side) + 0.5) / side) ** 2 for side in (rows, columns))
    return one[:, None] * other[None]


def _predicted(
    model: MaskedModel, pixels: np.ndarray, hole: np.ndarray, how: Inpainting, number: int, corner: tuple[int, int]
) -> np.ndarray:
    """Returns the mean prediction of a tile [rows, columns, C], in the values of pixels."""
    gh, gw = model.grid_size
    ph, pw = model.patch_size
    touched = hole.reshape(gh, ph, gw, pw).any(axis=(1, 3)).reshape(-1)
    K = min(model.num_visible(how.mask_ratio), int((~touched).sum()))
    if K == 0:
        raise UserError(
            f"the hole leaves nothing visible of the {hole.shape[0]}×{hole.shape[1]} tile at row {corner[0]}, column "
            f"{corner[1]}; make the picture smaller, or use a model of larger images"
        )
    chance = np.random.default_rng((how.seed, number)).random((how.rounds, gh * gw)) + touched
    ids = torch.from_numpy(chance.argsort(axis=1).astype(np.int32)).to(model.device)
    whole = pixels.copy()
    known = pixels[~hole]
    whole[hole] = known[np.isfinite(known).all(axis=1)][:1] if np.isfinite(known).all(axis=1).any() else 0
    images = torch.from_numpy(whole).to(model.device)[None].expand(how.rounds, -1, -1, -1).contiguous()
    pred = model.predict(images, ids, exact_ratio(K, gh * gw)).float()
    in_order = torch.arange(gh * gw, dtype=torch.int32, device=model.device)[None]
    if model.norm_pix_loss:
        one, mean, std, value_range, nodata = pixels_of(model, images[:1])
        target = gather_patches(one, in_order, model.patch_size, mean, std, torch.float32, value_range, nodata)
        shown = ~hole.reshape(gh, ph, gw, pw).transpose(0, 2, 1, 3).reshape(gh * gw, ph * pw)
        average, deviation = _statistics(target[0].cpu().numpy(), shown, (gh, gw))
        pred = pred * torch.from_numpy(deviation).to(pred) + torch.from_numpy(average).to(pred)
    ends = torch.stack(range_ends(model)).to(model.device)
    mean_pred = pred.mean(dim=0, keepdim=True)
    found = scatter_patches(
        mean_pred, in_order, model.grid_size, model.patch_size, model.mean, model.std, torch.float32, ends
    )
    return found[0].cpu().numpy()


def _statistics(patches: np.ndarray, shown: np.ndarray, grid: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Returns the mean and the deviation of patches [L, P], float32 [L, 1] each, from their known pixels [L, ph·pw]."""
    L, P = patches.shape
    values = patches.reshape(L, shown.shape[1], -1)
    count = shown.sum(axis=1) * values.shape[2]
    average = (values * shown[..., None]).sum(axis=(1, 2)) / np.maximum(count, 1)
    squares = ((values - average[:, None, None]) ** 2 * shown[..., None]).sum(axis=(1, 2))
    deviation = np.sqrt(squares / np.maximum(count - 1, 1) + VARIANCE_EPS)
    enough = (count >= max(2, LEAST_KNOWN * P)).reshape(grid)
    both = [_continued(values.reshape(grid), enough).reshape(L, 1) for values in (average, deviation)]
    return both[0].astype(np.float32), both[1].astype(np.float32)


def _continued(values: np.ndarray, known: np.ndarray) -> np.ndarray:
    """Returns values [rows, columns] with those that are not known continued smoothly from their neighbours."""
    found = np.where(known, values, values[known].mean() if known.any() else values.mean())
    for _ in range(SMOOTHINGS):
        around = np.pad(found, 1, "edge")
        mean = (around[:-2, 1:-1] + around[2:, 1:-1] + around[1:-1, :-2] + around[1:-1, 2:]) / 4
        found = np.where(known, values, mean)
    return found
