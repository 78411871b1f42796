"""What transformers calls the tensors of a masked autoencoder, both ways, and what it writes beside them.

Its versions 4 and 5 have different modules, and both read files with the names of version 4, so these are written;
files with either are read. Needs nothing of transformers itself.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch

from fastmae.errors import UserError

CONFIG, PREPROCESSOR = "config.json", "preprocessor_config.json"
PIXELS = "fastmae"
"""In the latter, the mean, the deviation and the range of pixels as checkpoints have them, if they are not uint8."""
# The first is what is written.
WEIGHTS = ("model.safetensors", "pytorch_model.bin")
EPS = 1e-6
READ = ("vit_mae", "vit", "dinov2", "dinov2_with_registers", "convnextv2")
"""The values of model_type whose encoder is one of a masked autoencoder."""

_OUTSIDE = {
    "cls_token": "vit.embeddings.cls_token",
    "reg_token": "vit.embeddings.register_tokens",  # of a DINOv2 with registers; ViT and ViTMAE have none
    "pos_embed": "vit.embeddings.position_embeddings",
    "patch_embed.proj": "vit.embeddings.patch_embeddings.projection",
    "norm": "vit.layernorm",
    "mask_token": "decoder.mask_token",
    "decoder_pos_embed": "decoder.decoder_pos_embed",
    "decoder_embed": "decoder.decoder_embed",
    "decoder_norm": "decoder.decoder_norm",
    "decoder_pred": "decoder.decoder_pred",
}
_STACKS = {"blocks": "vit.encoder.layer", "decoder_blocks": "decoder.decoder_layers"}
# Read as well: of version 5's modules, and of what its save_pretrained was seen to make of a ViTMAE's decoder (5.23).
_OTHER_STACKS = {"vit.layers": "blocks", "decoder.decoder_encoder.layer": "decoder_blocks"}
_IN_A_BLOCK = {
    "norm1": "layernorm_before",
    "attn.proj": "attention.output.dense",
    "norm2": "layernorm_after",
    "mlp.fc1": "intermediate.dense",
    "mlp.fc2": "output.dense",
}
_THIRDS = [f"attention.attention.{name}" for name in ("query", "key", "value")]  # of attn.qkv
_OF_VERSION_5 = {
    "attention.q_proj": _THIRDS[0],
    "attention.k_proj": _THIRDS[1],
    "attention.v_proj": _THIRDS[2],
    "attention.o_proj": "attention.output.dense",
    "mlp.fc1": "intermediate.dense",
    "mlp.fc2": "output.dense",
}
_IN_VERSION_5 = {old: new for new, old in _OF_VERSION_5.items()}
# Read as well: what a Dinov2Model calls its parts, where that is another name; those of either version.
_OF_DINOV2 = {"norm1": "layernorm_before", "norm2": "layernorm_after"}
_SCALES = {"layer_scale1.lambda1": "ls1.gamma", "layer_scale2.lambda1": "ls2.gamma"}
_BLOCK = re.compile(rf"({'|'.join(map(re.escape, _STACKS.values()))})\.(\d+)\.(.+)\.(\w+)")
# What an encoder has for another purpose; it is left out, and that is said.
_UNUSED = ("vit.pooler.", "pooler.", "vit.embeddings.mask_token")


def weights_file(folder: Path) -> Path | None:
    """The weights in a folder as ``save_pretrained`` writes it; None for any other folder."""
    if not (folder / CONFIG).is_file():
        return None
    return next((folder / name for name in WEIGHTS if (folder / name).is_file()), None)


def to_huggingface(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Tensors under their published names as those of a ``ViTMAEForPreTraining``; qkv in three."""
    renamed = {}
    for key, tensor in weights.items():
        module, _, leaf = key.rpartition(".")
        if key in _OUTSIDE:
            renamed[_OUTSIDE[key]] = tensor
        elif module in _OUTSIDE:
            renamed[f"{_OUTSIDE[module]}.{leaf}"] = tensor
        else:
            stack, number, part = module.split(".", 2)
            prefix = f"{_STACKS[stack]}.{number}"
            if part == "attn.qkv":
                for name, third in zip(_THIRDS, tensor.chunk(3), strict=True):
                    renamed[f"{prefix}.{name}.{leaf}"] = third
            else:
                renamed[f"{prefix}.{_IN_A_BLOCK[part]}.{leaf}"] = tensor
    return renamed


def in_version_5(name: str) -> str:
    """What the modules of version 5 call a tensor that ``to_huggingface`` has named."""
    in_a_block = _BLOCK.fullmatch(name)
    if in_a_block is None:
        return name
    stack, number, part, leaf = in_a_block.groups()
    return ".".join([stack.replace("vit.encoder.layer", "vit.layers"), number, _IN_VERSION_5.get(part, part), leaf])


def from_huggingface(tensors: dict[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], list[str]]:
    """Tensors under their published names, and the names of those that no masked autoencoder has a use for.

    What is not known at all keeps its name, so that an account of the keys finds it.
    """
    modules = {theirs: ours for ours, theirs in _OUTSIDE.items()}
    parts = {theirs: ours for ours, theirs in _IN_A_BLOCK.items()}
    stacks = {theirs: ours for ours, theirs in _STACKS.items()} | _OTHER_STACKS
    renamed: dict[str, torch.Tensor] = {}
    unused: list[str] = []
    thirds: dict[str, dict[int, tuple[str, torch.Tensor]]] = {}
    for key, tensor in tensors.items():
        name = key if key.startswith(("vit.", "decoder.")) else f"vit.{key}"
        module, _, leaf = name.rpartition(".")
        inside = re.fullmatch(r"(.+?)\.(\d+)\.(.+)", module)
        inside = inside if inside and inside[1] in stacks else None
        part = {**_OF_VERSION_5, **_OF_DINOV2}.get(inside[3], inside[3]) if inside else ""
        prefix = f"{stacks[inside[1]]}.{inside[2]}" if inside else ""
        if name.startswith(_UNUSED):
            unused.append(key)
        elif name in modules:
            renamed[modules[name]] = tensor
        elif module in modules:
            renamed[f"{modules[module]}.{leaf}"] = tensor
        elif part in parts:
            renamed[f"{prefix}.{parts[part]}.{leaf}"] = tensor
        elif f"{part}.{leaf}" in _SCALES:
            renamed[f"{prefix}.{_SCALES[f'{part}.{leaf}']}"] = tensor
        elif part in _THIRDS:
            thirds.setdefault(f"{prefix}.attn.qkv.{leaf}", {})[_THIRDS.index(part)] = key, tensor
        else:
            renamed[key] = tensor
    for packed, of_one in thirds.items():
        pieces = [of_one[i] for i in sorted(of_one)]
        if len({tensor.shape for _, tensor in pieces}) == 1 and len(pieces) == 3:
            renamed[packed] = torch.cat([tensor for _, tensor in pieces])
        else:
            renamed |= dict(pieces)
    return renamed, unused


def read_config(folder: Path) -> tuple[dict[str, Any], tuple[int, int | None] | None, list[str]]:
    """What ``config.json`` and ``preprocessor_config.json`` say, if they are there.

    Returns:
        settings under the names that checkpoints have; heads of the encoder and of the decoder, None where that is not
        said; remarks.

    Raises:
        UserError: not such files, or of another architecture.
    """
    config, preprocessor = _json(folder / CONFIG), _json(folder / PREPROCESSOR)
    if not config:
        return {}, None, []
    path, kind = folder / CONFIG, config.get("model_type")
    if kind not in READ:
        raise UserError(f"{path}: model_type {kind} is another architecture; give a folder of {', '.join(READ)}")
    if config.get("use_swiglu_ffn", False):
        raise UserError(f"{path}: use_swiglu_ffn is another architecture; a MAE has MLPs with GELU (DINOv2 S, B and L)")
    if config.get("hidden_act", "gelu") != "gelu":
        raise UserError(f"{path}: hidden_act {config['hidden_act']} is another architecture; a MAE has gelu")
    settings: dict[str, Any] = {"input_size": config.get("image_size", 224)}
    if kind == "vit_mae":
        settings["norm_pix_loss"] = config.get("norm_pix_loss", False)
        settings["mask_ratio"] = config.get("mask_ratio", 0.75)
    for ours, theirs in (("mean", "image_mean"), ("std", "image_std")):
        if theirs in preprocessor:
            settings[ours] = preprocessor[theirs]
    if isinstance(preprocessor.get(PIXELS), dict):
        settings |= preprocessor[PIXELS]
    heads = None if kind == "convnextv2" else config.get("num_attention_heads", 12)
    decoder_heads = config.get("decoder_num_attention_heads", 16) if kind == "vit_mae" else None
    # The released folders say 1e-12, though their weights were trained with the published 1e-6.
    eps = config.get("layer_norm_eps", 1e-12)
    remarks = [] if eps == EPS else [f"layer_norm_eps {eps} is taken as {EPS}, as published"]
    return settings, None if heads is None else (heads, decoder_heads), remarks


def _json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: not readable as JSON ({error}); give an intact folder") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: holds no settings; give an intact folder")
    return content
