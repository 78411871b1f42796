"""Reconstructions of masked images, and pictures of them: original, masked, reconstructed, error."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from fastmae.data.decode import BadImageError, decode
from fastmae.data.loader import View, load_batches
from fastmae.data.masks import visible_first
from fastmae.data.plan import central_box
from fastmae.data.sources import Source
from fastmae.data.statistics import shown_range
from fastmae.errors import SettingError, UserError
from fastmae.evaluate.features import evaluation_view
from fastmae.evaluate.pictures import coloured, grid_picture, save_gif, save_png
from fastmae.facts import UINT8, exact_ratio
from fastmae.model.family import MaskedModel
from fastmae.model.pixels import normalised, pixels_of
from fastmae.ops import gather_patches, random_masking, scatter_patches
from fastmae.ops.masked_mse import patch_statistics

GRAY = 0.5
WHITE = 128
SECONDS_PER_FRAME = 1.0
NAMES = ("original", "masked", "reconstructed", "error")
Rows = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def fixed_indices(source: Source, count: int) -> np.ndarray:
    """Returns the numbers of evenly spaced samples of a source, at most ``count``: int64, rising."""
    return np.unique(np.linspace(0, len(source) - 1, min(count, len(source))).astype(np.int64))


def fixed_images(model: MaskedModel, source: Source, count: int) -> torch.Tensor:
    """Reads evenly spaced images of a source, as central crops: pixels [count, H, W, C] on the model's device."""
    return central_crops(model, source, fixed_indices(source, count))


def central_crops(model: MaskedModel, source: Source, indices: np.ndarray) -> torch.Tensor:
    """Reads the central crops of some samples: pixels [N, H, W, C] on the model's device."""
    view = evaluation_view(model, source)
    batches = load_batches(source, [(indices, indices)], view, device=model.device, num_workers=1)
    return torch.cat([batch.images for batch in batches])


def drawn(model: MaskedModel, images: torch.Tensor) -> torch.Tensor:
    """Returns pixels [N, H, W, C] as they are drawn: uint8, 0 at the low end of the value range, 255 at the high end.

    What lies beyond is drawn as the end, and missing pixels as the mean. uint8 pixels of the usual range stay.
    """
    if model.pixels == UINT8:
        return images
    shares = normalised(model, images) * model.std[:, None, None] + model.mean[:, None, None]
    return (shares * 255).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1)


@torch.no_grad()
def reconstruct(
    model: MaskedModel,
    images: torch.Tensor,
    ids_shuffle: torch.Tensor,
    *,
    mask_ratio: float,
    paste_visible: bool = True,
) -> Rows:
    """Returns (original, masked, reconstructed), each uint8 [N, H, W, C], masked by ``ids_shuffle`` int32 [N, L].

    The reconstruction has the predictions at masked patches, where the loss trains them. Visible patches are shown as
    they are, or also as predicted if ``paste_visible`` is false. With norm_pix_loss a prediction is a patch without its
    mean and contrast, so those of the target are added: the detail comes from the model, the brightness does not.
    Wider pixels than 8 bits are drawn as ``drawn`` says.
    """
    K = model.num_visible(mask_ratio)
    pred = model.predict(images, ids_shuffle, mask_ratio).float()
    pred = pred.gather(1, ids_shuffle.long()[:, :, None].expand(-1, -1, pred.shape[2]))
    pixels, mean, std, value_range, nodata = pixels_of(model, images)
    target = gather_patches(pixels, ids_shuffle, model.patch_size, mean, std, torch.float32, value_range, nodata)
    if model.norm_pix_loss:
        average, deviation = patch_statistics(target)
        pred = pred * deviation + average
    grayed = ((GRAY - model.mean) / model.std).repeat(pred.shape[2] // model.in_chans).expand_as(pred[:, K:])

    def assembled(visible: torch.Tensor, masked: torch.Tensor) -> torch.Tensor:
        both = torch.cat([visible, masked], dim=1)  # in units of the range, of which uint8 is the picture
        return scatter_patches(both, ids_shuffle, model.grid_size, model.patch_size, model.mean, model.std, torch.uint8)

    seen = target[:, :K]
    return drawn(model, images), assembled(seen, grayed), assembled(seen if paste_visible else pred[:, :K], pred[:, K:])


def reconstruct_each(
    model: MaskedModel, images: torch.Tensor, masked: np.ndarray, *, paste_visible: bool = True
) -> Rows:
    """Calls ``reconstruct`` for each image; ``masked`` bool [N, rows, columns] may mask different numbers."""
    parts = []
    for n, mask in enumerate(masked):
        ids_shuffle = torch.from_numpy(visible_first(mask[None])).to(images.device)
        ratio = exact_ratio(int((~mask).sum()), mask.size)
        parts.append(reconstruct(model, images[n : n + 1], ids_shuffle, mask_ratio=ratio, paste_visible=paste_visible))
    original, grayed, reconstructed = (torch.cat(row) for row in zip(*parts, strict=True))
    return original, grayed, reconstructed


def covering_ids(
    draw_ids: torch.Tensor, rounds: int, seed: int, patches: int, visible: int, device: torch.device
) -> Iterator[torch.Tensor]:
    """Yields masks, ``ids_shuffle`` int32 [N, L], that in every round hide each patch at least once.

    A round goes through a random order of the patches in groups of the size of a mask.
    """
    for number in range(rounds):
        order = random_masking((draw_ids * rounds + number).to(device), seed, patches)
        for group in range(math.ceil(patches / (patches - visible))):
            yield order.roll(visible - group * (patches - visible), dims=1)


@torch.no_grad()
def reconstruct_complete(
    model: MaskedModel, images: torch.Tensor, draw_ids: torch.Tensor, *, mask_ratio: float, rounds: int, seed: int
) -> Rows:
    """Returns (original, masked, reconstructed), each uint8 [N, H, W, C], where every patch is predicted.

    A patch is the mean of its predictions in all masks of ``rounds`` rounds that hide it, so nothing of the result was
    seen, but for means and contrasts of patches with norm_pix_loss. The second row has the first of the masks.

    Args:
        images: pixels [N, H, W, C].
        draw_ids: int64 [N] on the CPU; together with ``seed`` they determine the masks.
    """
    L, K, first = model.num_patches, model.num_visible(mask_ratio), None
    in_order = torch.arange(L, dtype=torch.int32, device=images.device).expand(len(images), -1).contiguous()
    pixels, mean, std, value_range, nodata = pixels_of(model, images)
    target = gather_patches(pixels, in_order, model.patch_size, mean, std, torch.float32, value_range, nodata)
    total, count = torch.zeros_like(target), torch.zeros(*in_order.shape, 1, device=images.device)
    for ids_shuffle in covering_ids(draw_ids, rounds, seed, L, K, images.device):
        first = ids_shuffle if first is None else first
        masked = ids_shuffle[:, K:, None].long()
        pred = model.predict(images, ids_shuffle, mask_ratio).float()
        total.scatter_add_(1, masked.expand(-1, -1, total.shape[2]), pred.gather(1, masked.expand_as(pred[:, K:])))
        count.scatter_add_(1, masked, torch.ones(masked.shape, device=images.device))
    whole = total / count
    if model.norm_pix_loss:
        average, deviation = patch_statistics(target)
        whole = whole * deviation + average
    assert first is not None
    original, grayed, _ = reconstruct(model, images, first, mask_ratio=mask_ratio)
    shape = model.grid_size, model.patch_size, model.mean, model.std, torch.uint8
    return original, grayed, scatter_patches(whole, in_order, *shape)


def masks_of_pictures(paths: Sequence[str], model: MaskedModel, source: Source, indices: np.ndarray) -> np.ndarray:
    """Reads masks from pictures: bool [N, rows, columns], true for the patches that white touches.

    Args:
        paths: one picture for all samples, or one per sample, each of the size of its image.

    Raises:
        UserError: the number or the size of the pictures is wrong, a file is not a picture, or a mask leaves nothing
            masked or nothing visible.
    """
    if len(paths) not in (1, len(indices)):
        problem = f"{len(paths)} masks for {len(indices)} images; give one for all, or one per image"
        raise SettingError("paths", problem=problem, flag="--mask_image")
    view = evaluation_view(model, source)
    white = [_white(path) for path in paths]
    masks = []
    for n, index in enumerate(indices.tolist()):
        row = n % len(paths)
        try:
            size = decode(source.read(index), model.reading).shape[:2]
        except (BadImageError, OSError) as error:
            raise UserError(f"{source.name(index)} cannot be used ({error}); give images without it") from error
        if white[row].shape != size:
            held, needed = ("×".join(map(str, shape)) for shape in (white[row].shape, size))
            problem = f"{held} pixels (height × width) for {source.name(index)} of {needed}; give one of its size"
            raise SettingError("paths", paths[row], problem, flag="--mask_image")
        mask = touched(white[row], view, model.grid_size)
        if mask.all() or not mask.any():
            share = f"masks {int(mask.sum())} of the {mask.size} patches that the model sees"
            problem = f"{share}; at least one must be masked and one visible"
            raise SettingError("paths", paths[row], problem, flag="--mask_image")
        masks.append(mask)
    return np.stack(masks)


def _white(path: str) -> np.ndarray:
    """Reads a picture as bool [height, width]: true where it is nearer to white than to black."""
    try:
        with Image.open(Path(path).expanduser()) as picture:
            return np.asarray(picture.convert("L")) >= WHITE
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        reason = " ".join(str(error).split())
        problem = f"cannot be read ({reason}); give a picture, white where masked"
        raise SettingError("paths", path, problem, flag="--mask_image") from error


def touched(white: np.ndarray, view: View, grid: tuple[int, int]) -> np.ndarray:
    """Tells which patches of the central crop of an image hold a white pixel: bool [rows, columns]."""
    height, width = white.shape
    box = central_box(height, width, view.size, view.central_share)
    inside = white[box.top : box.top + box.height, box.left : box.left + box.width]
    # The edge of two patches may lie inside a pixel, which then belongs to both.
    ends = [
        [(i * side // n, -(-(i + 1) * side // n)) for i in range(n)] for side, n in zip(inside.shape, grid, strict=True)
    ]
    return np.array([[inside[top:bottom, left:right].any() for left, right in ends[1]] for top, bottom in ends[0]])


def error_row(rows: Rows) -> tuple[torch.Tensor, int]:
    """Colours the differences of reconstructions from originals, uint8 [N, H, W, 3]; also returns what white means.

    White means the largest difference in all images, in grey levels, averaged over channels.
    """
    difference = (rows[0].float() - rows[2].float()).abs().mean(dim=3)
    largest = max(1, math.ceil(float(difference.max())))
    return torch.from_numpy(coloured((difference / largest).cpu().numpy())), largest


def caption(model: MaskedModel, mask_ratio: float) -> str:
    """Describes a picture in words."""
    return f"{mask_ratio:.0%} of the patches masked" + about_targets(model)


def about_targets(model: MaskedModel) -> str:
    """Describes which part of a reconstruction comes from the target instead of the model, and how pixels are drawn."""
    said = ", norm_pix: mean and contrast of masked patches are the target's" if model.norm_pix_loss else ""
    return said + about_pixels(model)


def about_pixels(model: MaskedModel) -> str:
    """Describes how pixels that are no 8-bit gray or colour are drawn; empty for those that are."""
    C = model.in_chans
    shown = "" if C in (1, 3) else f", channel{'s 1 to 3' if C > 3 else ' 1'} of {C}"
    return shown if model.pixels == UINT8 else f"{shown}, drawn from {shown_range(model.pixels)}"


def save_grid(path: Path, rows: Sequence[torch.Tensor], title: str, names: Sequence[str] = NAMES) -> None:
    """Draws originals, masked images and reconstructions as rows with a title, and writes a PNG.

    Raises:
        UserError: the file cannot be written.
    """
    save_png(path, _grid(rows, title, names))


def _grid(rows: Sequence[torch.Tensor], title: str, names: Sequence[str]) -> Image.Image:
    return grid_picture([list(row.cpu().numpy()) for row in rows], title, names[: len(rows)])


def save_reconstructions(path: Path, reconstructions: Sequence[tuple[str, Rows]], *, errors: bool) -> None:
    """Draws one or several reconstructions of the same images, each with a title, and writes them.

    Several become a film if the path ends in .gif, otherwise rows under each other. With ``errors`` each one also gets
    a row of errors.

    Raises:
        UserError: the file cannot be written.
    """
    titled: list[tuple[str, tuple[torch.Tensor, ...]]] = []
    for title, rows in reconstructions:
        if errors:
            row, largest = error_row(rows)
            titled.append((f"{title}; error: white is {largest} grey levels", (*rows, row)))
        else:
            titled.append((title, rows))
    if len(titled) == 1:
        save_grid(path, titled[0][1], titled[0][0])
    elif path.suffix.lower() == ".gif":
        save_gif(path, [_grid(rows, title, NAMES) for title, rows in titled], SECONDS_PER_FRAME)
    else:
        below = [row for _, rows in titled for row in rows[1:]]
        names = [NAMES[0], *[name for _, rows in titled for name in NAMES[1 : len(rows)]]]
        save_grid(path, [reconstructions[0][1][0], *below], " · ".join(title for title, _ in titled), names)
