"""Pictures of what the model makes of masked images: original, masked, reconstructed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from fastmae.data.loader import load_batches
from fastmae.data.sources import Source
from fastmae.errors import UserError
from fastmae.evaluate.features import evaluation_view
from fastmae.files import write_whole
from fastmae.model.mae import MaskedAutoencoderViT
from fastmae.ops import gather_patches, scatter_patches
from fastmae.ops.masked_mse import patch_statistics

GRAY = 0.5
CELL = 96
MARGIN = 6
TEXT = 14


def fixed_images(model: MaskedAutoencoderViT, source: Source, count: int) -> torch.Tensor:
    """Evenly spaced images of a source, central crops: uint8 [count, H, W, C] on the model's device."""
    indices = np.unique(np.linspace(0, len(source) - 1, min(count, len(source))).astype(np.int64))
    view = evaluation_view(model, source)
    batches = load_batches(source, [(indices, indices)], view, device=model.cls_token.device, num_workers=1)
    return torch.cat([batch.images for batch in batches])


@torch.no_grad()
def reconstruct(
    model: MaskedAutoencoderViT, images: torch.Tensor, ids_shuffle: torch.Tensor, *, mask_ratio: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(original, masked, reconstructed), each uint8 [N, H, W, C], masked by ``ids_shuffle`` int32 [N, L].

    The reconstruction shows the visible patches as they are and predictions in the masked ones, the only place where
    the loss asks for any. With norm_pix_loss a prediction is a patch without its mean and contrast, so those of the
    target are put back: detail is the model's, brightness is not.
    """
    K = model.num_visible(mask_ratio)
    visible, masked = ids_shuffle[:, :K], ids_shuffle[:, K:]
    latent, _, ids_restore = model.forward_encoder(images, mask_ratio, ids_shuffle=ids_shuffle)
    pred = model.forward_decoder(latent, ids_restore).float()
    pred = pred.gather(1, masked.long()[:, :, None].expand(-1, -1, pred.shape[2]))

    def cut(chosen: torch.Tensor) -> torch.Tensor:
        return gather_patches(images, chosen, model.patch_size, model.mean, model.std, torch.float32)

    if model.norm_pix_loss:
        average, deviation = patch_statistics(cut(masked))
        pred = pred * deviation + average
    grayed = ((GRAY - model.mean) / model.std).repeat(pred.shape[2] // model.in_chans).expand_as(pred)

    def place(patches: torch.Tensor) -> torch.Tensor:
        both = torch.cat([cut(visible), patches], dim=1)
        return scatter_patches(both, ids_shuffle, model.grid_size, model.patch_size, model.mean, model.std, torch.uint8)

    return images, place(grayed), place(pred)


def caption(model: MaskedAutoencoderViT, mask_ratio: float) -> str:
    """What a picture shows, in words."""
    text = f"{mask_ratio:.0%} of the patches masked"
    return text + (", norm_pix: mean and contrast of masked patches are the target's" if model.norm_pix_loss else "")


def save_grid(path: Path, rows: tuple[torch.Tensor, torch.Tensor, torch.Tensor], title: str) -> None:
    """Draws originals, masked images and reconstructions as three rows with a title, and writes a PNG.

    Raises:
        UserError: the file cannot be written.
    """
    N, height, width, _ = rows[0].shape
    zoom = max(1, round(CELL / max(height, width)))
    cell_height, cell_width = height * zoom + MARGIN, width * zoom + MARGIN
    font = ImageFont.load_default(TEXT)
    names = ("original", "masked", "reconstructed")
    gutter = max(round(font.getlength(name)) for name in names) + 2 * MARGIN
    total = max(gutter + N * cell_width, round(font.getlength(title)) + 2 * MARGIN)
    top = TEXT + 2 * MARGIN
    picture = Image.new("RGB", (total, top + len(rows) * cell_height), "white")
    draw = ImageDraw.Draw(picture)
    draw.text((MARGIN, MARGIN // 2), title, fill="black", font=font)
    for r, (name, images) in enumerate(zip(names, rows, strict=True)):
        y = top + r * cell_height
        draw.text((MARGIN, y + (height * zoom - TEXT) // 2), name, fill="black", font=font)
        for n, image in enumerate(images):
            tile = Image.fromarray(_as_rgb(image.cpu().numpy())).resize(
                (width * zoom, height * zoom), Image.Resampling.NEAREST
            )
            picture.paste(tile, (gutter + n * cell_width, y))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, lambda file: picture.save(file, format="PNG"))
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error}); free space or name another place") from error


def _as_rgb(image: np.ndarray) -> np.ndarray:
    """Pixels [H, W, C] for a screen: gray repeated, of more than three channels the first three."""
    return np.ascontiguousarray(image[..., :3] if image.shape[2] >= 3 else np.repeat(image[..., :1], 3, axis=2))
