"""Opens a folder with transformers itself, and compares what it computes with the model that was exported."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from fastmae.checkpoint.load import Opened
from fastmae.export.encoder import linear_of
from fastmae.export.official import Part
from fastmae.model.convnext import ConvNeXtMAE
from fastmae.model.mae import as_vit

IMAGES = 3
TOLERANCE = 1e-5


def architecture_of(opened: Opened, part: Part) -> str:
    """Returns the name of the class of transformers that opens a folder."""
    if opened.model.family == "convnext":
        return "ConvNextV2ForImageClassification" if opened.head else "ConvNextV2Model"
    if opened.head:
        return "ViTForImageClassification"
    return "ViTMAEForPreTraining" if part == "full" else "ViTModel"


@torch.no_grad()
def difference(folder: Path, opened: Opened, part: Part) -> float:
    """Returns by how much the results of transformers' model differ, as a share of the largest of them.

    They are the tokens of the encoder, the predictions of all patches, or the logits of a classifier, for images of
    noise.

    Raises:
        ValueError: transformers does not take every tensor, or misses some; the message names them.
    """
    import transformers

    model, name = opened.model, architecture_of(opened, part)
    options: dict[str, Any] = {"add_pooling_layer": False} if name == "ViTModel" else {}
    with _silent(transformers):
        theirs, info = getattr(transformers, name).from_pretrained(
            folder, local_files_only=True, output_loading_info=True, **options
        )
    odd = [f"{kind} {sorted(map(str, keys))[:3]}" for kind, keys in info.items() if keys]
    if odd:
        raise ValueError("; ".join(odd))
    theirs.eval()
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(IMAGES, model.in_chans, *model.img_size, generator=generator)
    if isinstance(model, ConvNeXtMAE):
        ours, result = model.features(images), theirs(images)
        if opened.head:
            ours, result = linear_of(opened.head)(ours), result.logits
        else:
            result = result.pooler_output
        return float((result - ours).abs().max() / ours.abs().max())
    model = as_vit(model, "a folder of transformers")
    if name == "ViTMAEForPreTraining":
        noise = torch.rand(IMAGES, model.pos_embed.shape[1] - 1, generator=generator)
        ours = model(images, theirs.config.mask_ratio, ids_shuffle=noise.argsort(dim=1).int())[1]
        result = theirs(images, noise=noise).logits
    elif name == "ViTModel":
        ours, result = model.forward_features(images), theirs(images).last_hidden_state
    else:
        ours = linear_of(opened.head)(model.forward_features(images)[:, 0])
        result = theirs(images).logits
    return float((result - ours).abs().max() / ours.abs().max())


@contextlib.contextmanager
def _silent(transformers: Any) -> Iterator[None]:
    """Without the bars and remarks that transformers prints while it loads."""
    log = transformers.utils.logging
    before, had_bar = log.get_verbosity(), log.is_progress_bar_enabled()
    log.set_verbosity_error()
    log.disable_progress_bar()
    try:
        yield
    finally:
        log.set_verbosity(before)
        if had_bar:
            log.enable_progress_bar()
