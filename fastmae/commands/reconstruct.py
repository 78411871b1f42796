"""Draws originals, masked images and reconstructions, and prints where the picture is."""

from __future__ import annotations

from pathlib import Path

import torch

from fastmae.commands.shared import open_model
from fastmae.config import ReconstructConfig, chosen_masking, chosen_ratio
from fastmae.data.masks import choose_masks, open_masks, shuffled_ids
from fastmae.data.sources import open_train
from fastmae.data.stock import count_of
from fastmae.errors import UserError
from fastmae.evaluate.reconstruct import (
    about_targets,
    caption,
    central_crops,
    fixed_indices,
    masks_of_pictures,
    reconstruct,
    reconstruct_complete,
    reconstruct_each,
    save_reconstructions,
)
from fastmae.screen import say


def run_reconstruct(config: ReconstructConfig) -> int:
    """Draws reconstructions and prints the path of the picture."""
    file = open_masks(config.masks, config.mask_ratio)
    model, data_path = open_model(config, needs_decoder=True)
    if not model.has_pictures:
        problem = "predicts single numbers of rows, so that there is no picture of patches; fastmae impute fills cells"
        raise UserError(f"{config.checkpoint}: {problem}")
    source = open_train(data_path, model.read_as)
    indices = fixed_indices(source, config.count)
    pictures = []
    if config.mask_image:
        masked = masks_of_pictures(config.mask_image, model, source, indices)
        images = central_crops(model, source, indices)
        rows = reconstruct_each(model, images, masked, paste_visible=config.paste_visible)
        pictures.append((f"masked as {' '.join(config.mask_image)}{about_targets(model)}", rows))
    else:
        images = central_crops(model, source, indices)
        flag = "--sweep" if config.sweep else "--mask_ratio"
        asked = chosen_ratio(config, model.usual_ratio) if file is None else file.facts.mask_ratio
        for ratio in config.sweep or (asked,):
            try:
                visible = model.num_visible(ratio)
            except ValueError as error:
                raise UserError(f"{flag} {ratio}: {error}; choose another ratio") from error
            if config.complete:
                draws, rounds = torch.arange(len(images)), config.complete
                rows = reconstruct_complete(model, images, draws, mask_ratio=ratio, rounds=rounds, seed=config.seed)
                what = f"all patches predicted, {count_of(config.complete, 'rounds')}, each "
                pictures.append((what + caption(model, ratio), rows))
                continue
            masks = choose_masks(chosen_masking(config), file, model.grid_size, visible, config.seed)
            ids_shuffle = shuffled_ids(torch.arange(len(images)), masks, images.device)
            rows = reconstruct(model, images, ids_shuffle, mask_ratio=ratio, paste_visible=config.paste_visible)
            pictures.append((caption(model, ratio), rows))
    save_reconstructions(Path(config.output), pictures, errors=config.errors)
    say(config.output)
    return 0
