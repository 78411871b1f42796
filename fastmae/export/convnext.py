"""Export of the encoder of a ConvNeXt V2, or of a classifier with it, for timm and for transformers."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save as safetensors_bytes

from fastmae.checkpoint.convnext_names import to_timm, to_transformers
from fastmae.checkpoint.huggingface import CONFIG, PREPROCESSOR, WEIGHTS
from fastmae.export.atomic import written_aside
from fastmae.export.hf import processor_of
from fastmae.export.timm import save_weights
from fastmae.model.convnext import EPS, STEM, ConvNeXtMAE
from fastmae.model.sizes import CONVNEXT_SIZES

SMALL = ("atto", "femto", "pico", "nano")
"""The models of timm whose MLPs are 1×1 convolutions."""


def encoder_weights(model: ConvNeXtMAE, head: dict[str, torch.Tensor] | None = None) -> dict[str, torch.Tensor]:
    """Returns the weights of the encoder, and of a classifier's ``head``. Its last norm is that of ``features``."""
    weights = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    weights = {name: t for name, t in weights.items() if not name.startswith(("decoder_", "mask_token"))}
    if model.fc_norm is None:
        weights["fc_norm.weight"] = torch.ones(model.dims[-1])
        weights["fc_norm.bias"] = torch.zeros(model.dims[-1])
    return weights | (head or {})


def save_timm_convnext(path: Path, model: ConvNeXtMAE, head: dict[str, torch.Tensor] | None = None) -> None:
    """Writes a .pth or a .safetensors that the model of ``as_timm_convnext`` loads strictly.

    Raises:
        UserError: the file system refused.
    """
    save_weights(path, to_timm(encoder_weights(model, head), _size_of(model) in SMALL))


def as_timm_convnext(model: ConvNeXtMAE, classes: int = 0) -> str:
    """Returns the call that makes the model for the file in timm."""
    channels = "" if model.in_chans == 3 else f", in_chans={model.in_chans}"
    size = _size_of(model)
    if size is not None:
        return f"timm.create_model('convnextv2_{size}', num_classes={classes}{channels})"
    sizes = f"depths={model.depths}, dims={model.dims}"
    return f"timm.models.ConvNeXt({sizes}, use_grn=True, ls_init_value=None, num_classes={classes}{channels})"


def _size_of(model: ConvNeXtMAE) -> str | None:
    """Returns the published name of a model's size, such as atto; None if it has none."""
    sizes = {"depths": model.depths, "dims": model.dims}
    return next((name.rpartition("_")[2] for name, known in CONVNEXT_SIZES.items() if known == sizes), None)


def save_transformers_convnext(
    folder: Path,
    model: ConvNeXtMAE,
    head: dict[str, torch.Tensor] | None = None,
    class_names: Sequence[str] = (),
) -> None:
    """Writes a folder for ``ConvNextV2Model``, or for ``ConvNextV2ForImageClassification`` with a ``head``.

    Raises:
        UserError: the file system refused.
    """
    config: dict[str, Any] = {
        "model_type": "convnextv2",
        "architectures": ["ConvNextV2ForImageClassification" if head else "ConvNextV2Model"],
        "image_size": model.img_size[0] if model.img_size[0] == model.img_size[1] else list(model.img_size),
        "patch_size": STEM,
        "num_channels": model.in_chans,
        "num_stages": len(model.depths),
        "depths": list(model.depths),
        "hidden_sizes": list(model.dims),
        "hidden_act": "gelu",
        "layer_norm_eps": EPS,
    }
    if head:
        names = class_names or [str(number) for number in range(head["head.weight"].shape[0])]
        config["id2label"] = {str(number): name for number, name in enumerate(names)}
        config["label2id"] = {name: number for number, name in enumerate(names)}
    with written_aside(folder) as aside:
        aside.mkdir()
        weights = to_transformers(encoder_weights(model, head))
        (aside / WEIGHTS[0]).write_bytes(safetensors_bytes(weights, {"format": "pt"}))
        (aside / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
        (aside / PREPROCESSOR).write_text(json.dumps(processor_of(model), indent=2) + "\n")
