"""Export to folders that transformers opens as ``VitDetBackbone``: a plain encoder for detection.

ViTDet (Li et al. 2022, arXiv 2203.16527) keeps the pretrained blocks and changes what they attend to: most see windows
of patches alone, four evenly spaced ones see all of them. There is no class token and no last norm. Relative positions
are new and start at zero, so that they change nothing at first.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save as safetensors_bytes

from fastmae.checkpoint.huggingface import CONFIG, EPS, PREPROCESSOR, WEIGHTS
from fastmae.errors import SettingError
from fastmae.export.atomic import written_aside
from fastmae.export.hf import processor_of
from fastmae.export.official import weights_of
from fastmae.model.mae import MaskedAutoencoderViT
from fastmae.model.segmenter import taps_of

GLOBAL_BLOCKS = 4


def save_vitdet(
    folder: Path, model: MaskedAutoencoderViT, *, window: int, image_size: tuple[int, int], relative: bool
) -> str:
    """Writes weights, ``config.json`` and a processor. Returns what the backbone attends to, for people.

    Args:
        folder: a new or an empty folder.
        model: a vision transformer whose images and patches are squares; its decoder is left out.
        window: side of a window in patches; 0 lets all blocks see all patches.
        image_size: (height, width) of the images to detect in, on which the number of relative positions depends.
        relative: whether there are relative positions.

    Raises:
        SettingError: ViTDet of transformers cannot hold the model, or the file system refused.
    """
    block: Any = model.blocks[0]
    (rows, columns), width = model.grid_size, model.cls_token.shape[2]
    ratio = block.mlp.fc1.out_features / width
    problem = ""
    if model.reg_token is not None:
        problem = "ViTDet has no registers, which this model has"
    elif model.fc_norm is not None:
        problem = "is for pretrained encoders, and this is the encoder of a classifier"
    elif rows != columns:
        problem = f"ViTDet takes positions of a square of patches, not of {rows}×{columns}"
    elif ratio != int(ratio):
        problem = f"ViTDet takes a whole mlp_ratio, not {ratio:g}"
    if problem:
        raise SettingError("to", "vitdet", f"{problem}; use --to=timm or --to=official")
    if any(side % patch for side, patch in zip(image_size, model.patch_size, strict=True)):
        patches = "{}×{}".format(*model.patch_size)
        raise SettingError("image_size", image_size, f"must be a multiple of the patches of {patches} pixels")
    depth = len(model.blocks)
    everywhere = sorted({*taps_of(depth, GLOBAL_BLOCKS)}) if window else list(range(depth))
    windowed = [number for number in range(depth) if number not in everywhere]
    weights = {_name(name): tensor for name, tensor in weights_of(model, "encoder").items() if _name(name)}
    if relative:
        grid = tuple(side // patch for side, patch in zip(image_size, model.patch_size, strict=True))
        for number in range(depth):
            seen = (window, window) if number in windowed else grid
            for axis, side in zip("hw", seen, strict=True):
                name = f"encoder.layer.{number}.attention.rel_pos_{axis}"
                weights[name] = torch.zeros(2 * side - 1, width // block.attn.num_heads)
    config = {
        "model_type": "vitdet",
        "architectures": ["VitDetBackbone"],
        "hidden_size": width,
        "num_hidden_layers": depth,
        "num_attention_heads": block.attn.num_heads,
        "mlp_ratio": int(ratio),
        "hidden_act": "gelu",
        "layer_norm_eps": EPS,
        "qkv_bias": True,
        "num_channels": model.in_chans,
        "patch_size": list(model.patch_size),
        "pretrain_image_size": list(model.img_size),
        "image_size": list(image_size),
        "use_absolute_position_embeddings": True,
        "use_relative_position_embeddings": relative,
        "window_size": window,
        "window_block_indices": windowed,
        "out_features": [f"stage{depth}"],
    }
    processor = processor_of(model) | {"size": {"height": image_size[0], "width": image_size[1]}}
    with written_aside(folder) as aside:
        aside.mkdir()
        contiguous = {name: tensor.contiguous() for name, tensor in weights.items()}
        (aside / WEIGHTS[0]).write_bytes(safetensors_bytes(contiguous, {"format": "pt"}))
        (aside / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
        (aside / PREPROCESSOR).write_text(json.dumps(processor, indent=2) + "\n")
    where = f"blocks {' '.join(map(str, everywhere))} see all patches, the others windows of {window}×{window}"
    positions = ", relative positions start at zero" if relative else ""
    return f"{where if windowed else 'all blocks see all patches'}{positions}; without class token and last norm"


def _name(official: str) -> str:
    """Returns the name of a weight in VitDetBackbone; empty for what it does not have."""
    if official == "pos_embed":
        return "embeddings.position_embeddings"
    if official.startswith("patch_embed.proj."):
        return official.replace("patch_embed.proj.", "embeddings.projection.")
    if official.startswith("blocks."):
        return f"encoder.layer.{official.removeprefix('blocks.').replace('.attn.', '.attention.')}"
    return ""
