"""Export to folders that transformers opens offline: ``ViTMAEForPreTraining``, or ``ViTModel`` for the encoder."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save as safetensors_bytes
from torch import nn

from fastmae.checkpoint.huggingface import CONFIG, EPS, PIXELS, PREPROCESSOR, WEIGHTS, to_huggingface
from fastmae.config import pixel_settings
from fastmae.errors import SettingError
from fastmae.export.atomic import written_aside
from fastmae.export.official import Part, numbers, weights_of
from fastmae.facts import UINT8
from fastmae.model.classifier import Classifier
from fastmae.model.family import MaskedModel
from fastmae.model.mae import MaskedAutoencoderViT
from fastmae.model.pixels import range_ends

BICUBIC = 3


def save_huggingface(
    folder: Path,
    model: MaskedAutoencoderViT,
    mask_ratio: float,
    part: Part,
    head: dict[str, torch.Tensor] | None = None,
    class_names: Sequence[str] = (),
) -> None:
    """Writes the weights, ``config.json`` and the processor that resizes and normalises as the model was trained.

    Args:
        folder: a new or an empty folder.
        model: for ``full``, a model whose decoder has self-attention.
        mask_ratio: the ratio for ``ViTMAEForPreTraining``, which draws its own masks.
        part: ``full`` for a ``ViTMAEForPreTraining``, ``encoder`` for a ``ViTModel``.
        head: of a classifier of the class token, for a ``ViTForImageClassification`` with these ``class_names``.

    Raises:
        SettingError: transformers has no class for the model, or the file system refused.
    """
    (height, width), (ph, pw) = model.img_size, model.patch_size
    remedy = "export the encoder with --part=encoder"
    if part == "full" and model.decoder_attention == "cross":
        raise SettingError("part", part, f"ViTMAE has no decoder with cross-attention; {remedy}")
    if part == "full" and (height != width or ph != pw):
        size = f"images of {height}×{width} and patches of {ph}×{pw} pixels"
        raise SettingError("part", part, f"ViTMAE takes only squares, not {size}; {remedy}")
    if model.reg_token is not None:
        raise SettingError(
            "to", "hf", "transformers' ViT and ViTMAE have no registers, which this model has; use --to=timm"
        )
    if model.fc_norm is not None:
        problem = "transformers' ViT has no norm after the mean of the tokens, which this classifier has; use --to=timm"
        raise SettingError("to", "hf", problem)
    weights = {name: tensor.contiguous() for name, tensor in to_huggingface(weights_of(model, part)).items()}
    if head:
        weights |= {name.replace("head.", "classifier."): tensor.contiguous() for name, tensor in head.items()}
    elif part == "encoder":
        weights = {name.removeprefix("vit."): tensor for name, tensor in weights.items()}
    config = _config(model, mask_ratio, part)
    if head:
        names = class_names or [str(number) for number in range(head["head.weight"].shape[0])]
        config["architectures"] = ["ViTForImageClassification"]
        config["id2label"] = {str(number): name for number, name in enumerate(names)}
        config["label2id"] = {name: number for number, name in enumerate(names)}
    with written_aside(folder) as aside:
        aside.mkdir()
        (aside / WEIGHTS[0]).write_bytes(safetensors_bytes(weights, {"format": "pt"}))
        (aside / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
        (aside / PREPROCESSOR).write_text(json.dumps(processor_of(model), indent=2) + "\n")


def processor_of(model: MaskedModel | Classifier) -> dict[str, Any]:
    """Returns the content of preprocessor_config.json: a processor that resizes and normalises as in training."""
    height, width = model.img_size
    return {
        "image_processor_type": "ViTImageProcessor",
        "do_resize": model.pixels.dtype == "uint8",  # it resizes in 8 bits
        "size": {"height": height, "width": width},
        "resample": BICUBIC,
        "do_rescale": True,
        "do_normalize": True,
        **_normalisation(model),
    }


def _normalisation(model: MaskedModel | Classifier) -> dict[str, Any]:
    """Returns what the processor computes as ``(pixels * rescale_factor - image_mean) / image_std``.

    A value range is folded into the three. That and what they cannot say are kept under a name of our own.
    """
    if model.pixels == UINT8:
        return {"rescale_factor": 1 / 255, "image_mean": numbers(model.mean), "image_std": numbers(model.std)}
    low, high = range_ends(model, torch.float64)
    width = high - low
    factor = 1 / float(width.max())
    return {
        "rescale_factor": factor,
        "image_mean": ((low + model.mean.double() * width) * factor).tolist(),
        "image_std": (model.std.double() * width * factor).tolist(),
        PIXELS: {"mean": numbers(model.mean), "std": numbers(model.std), **pixel_settings(model.pixels)},
    }


def _config(model: MaskedAutoencoderViT, mask_ratio: float, part: Part) -> dict[str, Any]:
    """Returns the content of config.json."""
    config: dict[str, Any] = {
        "model_type": "vit" if part == "encoder" else "vit_mae",
        "architectures": ["ViTModel" if part == "encoder" else "ViTMAEForPreTraining"],
        "image_size": _plain(model.img_size),
        "patch_size": _plain(model.patch_size),
        "num_channels": model.in_chans,
        **_stack(model.blocks, ""),
        "hidden_act": "gelu",
        "qkv_bias": True,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "layer_norm_eps": EPS,
    }
    if part == "full":
        config |= _stack(model.decoder_blocks, "decoder_")
        config |= {"norm_pix_loss": model.norm_pix_loss, "mask_ratio": mask_ratio}
    return config


def _stack(blocks: nn.ModuleList, prefix: str) -> dict[str, int]:
    """Returns the sizes of a stack of blocks under transformers' names."""
    first: Any = blocks[0]
    return {
        f"{prefix}hidden_size": first.mlp.fc1.in_features,
        f"{prefix}num_hidden_layers": len(blocks),
        f"{prefix}num_attention_heads": first.attn.num_heads,
        f"{prefix}intermediate_size": first.mlp.fc1.out_features,
    }


def _plain(size: tuple[int, int]) -> int | list[int]:
    """Returns a size as one number if it is square, as transformers writes it."""
    return size[0] if size[0] == size[1] else list(size)
