"""Features of a frozen encoder, a batch at a time."""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch

from fastmae.data.loader import View, load_batches
from fastmae.data.sources import Source
from fastmae.model.mae import MaskedAutoencoderViT

# Of image files the centre is looked at, as published: resized to 256, 224 cropped. Arrays are looked at whole.
FOLDER_SHARE = 224 / 256


def evaluation_view(model: MaskedAutoencoderViT, source: Source) -> View:
    """The central crop that suits a source's images."""
    share = FOLDER_SHARE if source.kind == "folder" else 1.0
    return View(model.img_size, model.in_chans, central_share=share)


@torch.no_grad()
def extract_features(
    model: MaskedAutoencoderViT, source: Source, *, pool: Literal["mean", "cls"], batch_size: int, num_workers: int
) -> torch.Tensor:
    """float32 [length, D] on the CPU: the mean of the patch tokens, or the class token, after the encoder's norm."""
    starts = range(0, len(source), batch_size)
    indices = (np.arange(start, min(start + batch_size, len(source))) for start in starts)
    device = model.cls_token.device
    view = evaluation_view(model, source)
    batches = load_batches(source, ((i, i) for i in indices), view, device=device, num_workers=num_workers)
    found = []
    for batch in batches:
        tokens = model.forward_features(batch.images)
        found.append((tokens[:, 0] if pool == "cls" else tokens[:, 1:].mean(dim=1)).float().cpu())
    return torch.cat(found)
