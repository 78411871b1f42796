"""Export of a segmenter to a folder that transformers (5 and later) opens as ``UperNetForSemanticSegmentation``.

The encoder becomes a ``BeitBackbone`` with absolute positions, whose factors of branches (LayerScale) are 1. BEiT has
no bias of keys: with it a query would see the same number added to all of its products, which softmax does not change,
so leaving it out changes nothing.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save as safetensors_bytes

from fastmae.checkpoint.huggingface import CONFIG, EPS, PREPROCESSOR, WEIGHTS
from fastmae.errors import SettingError
from fastmae.export.atomic import written_aside
from fastmae.export.hf import processor_of
from fastmae.model.segmenter import AUXILIARY_WEIGHT, IGNORED, Segmenter
from fastmae.model.upernet import AUXILIARY_CHANNELS, CHANNELS, POOLS

NAMES = {
    "norm1": "layernorm_before",
    "norm2": "layernorm_after",
    "attn.proj": "attention.o_proj",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}
"""The parts of a block by their official names, and what a layer of BEiT calls them."""
NECK = {
    "fpn1.0": "fpn1.conv_transpose1",
    "fpn1.1": "fpn1.normalization",
    "fpn1.3": "fpn1.conv_transpose2",
    "fpn2.0": "fpn2",
}


def save_upernet(folder: Path, model: Segmenter, class_names: Sequence[str] = ()) -> None:
    """Writes the weights, ``config.json`` and a processor.

    Args:
        folder: a new or an empty folder.
        model: a segmenter with the head ``upernet``.
        class_names: the names of its classes; by default their numbers.

    Raises:
        SettingError: transformers has no class for the model, or the file system refused.
    """
    problem = ""
    if model.segmenter_head != "upernet":
        problem = f"transformers has no {model.segmenter_head} head; use --to=onnx, or train with --head=upernet"
    elif model.reg_token is not None:
        problem = "transformers' BEiT has no registers, which this model has; use --to=onnx"
    elif len(set(model.taps)) < len(model.taps):
        problem = f"transformers takes four different blocks, and this encoder has {len(model.blocks)}; use --to=onnx"
    elif model.patch_size[0] != model.patch_size[1]:
        problem = "transformers' BEiT takes square patches, not {}×{}; use --to=onnx".format(*model.patch_size)
    if problem:
        raise SettingError("to", "hf", problem)
    block: Any = model.blocks[0]
    names = class_names or [str(number) for number in range(model.num_classes)]
    backbone = {
        "model_type": "beit",
        "hidden_size": model.cls_token.shape[2],
        "num_hidden_layers": len(model.blocks),
        "num_attention_heads": block.attn.num_heads,
        "intermediate_size": block.mlp.fc1.out_features,
        "hidden_act": "gelu",
        "layer_norm_eps": EPS,
        "image_size": list(model.img_size),
        "patch_size": model.patch_size[0],
        "num_channels": model.in_chans,
        "use_absolute_position_embeddings": True,
        "use_mean_pooling": True,
        "layer_scale_init_value": 1.0,
        "drop_path_rate": 0.0,
        "add_fpn": True,
        "reshape_hidden_states": True,
        "out_features": [f"stage{tap + 1}" for tap in model.taps],
    }
    config = {
        "model_type": "upernet",
        "architectures": ["UperNetForSemanticSegmentation"],
        "backbone_config": backbone,
        "hidden_size": CHANNELS,
        "pool_scales": list(POOLS),
        "use_auxiliary_head": True,
        "auxiliary_loss_weight": AUXILIARY_WEIGHT,
        "auxiliary_channels": AUXILIARY_CHANNELS,
        "auxiliary_num_convs": 1,
        "auxiliary_concat_input": False,
        "loss_ignore_index": IGNORED,
        "id2label": {str(number): name for number, name in enumerate(names)},
        "label2id": {name: number for number, name in enumerate(names)},
    }
    weights = {name: tensor.contiguous() for name, tensor in upernet_weights(model).items()}
    with written_aside(folder) as aside:
        aside.mkdir()
        (aside / WEIGHTS[0]).write_bytes(safetensors_bytes(weights, {"format": "pt"}))
        (aside / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
        (aside / PREPROCESSOR).write_text(json.dumps(processor_of(model), indent=2) + "\n")


def upernet_weights(model: Segmenter) -> dict[str, torch.Tensor]:
    """Returns the weights of a segmenter under the names of transformers."""
    own, weights = model.state_dict(), dict[str, torch.Tensor]()
    embeddings = "backbone.beit.embeddings"
    weights[f"{embeddings}.cls_token"] = own["cls_token"]
    weights[f"{embeddings}.position_embeddings"] = own["pos_embed"]
    for kind in ("weight", "bias"):
        weights[f"{embeddings}.patch_embeddings.projection.{kind}"] = own[f"patch_embed.proj.{kind}"]
    for number in range(len(model.blocks)):
        block, layer = f"blocks.{number}", f"backbone.beit.layers.{number}"
        for kind in ("weight", "bias"):
            for name, other in NAMES.items():
                weights[f"{layer}.{other}.{kind}"] = own[f"{block}.{name}.{kind}"]
            for name, part in zip("qkv", own[f"{block}.attn.qkv.{kind}"].chunk(3), strict=True):
                if (name, kind) != ("k", "bias"):
                    weights[f"{layer}.attention.{name}_proj.{kind}"] = part
        for name in ("lambda_1", "lambda_2"):
            weights[f"{layer}.{name}"] = torch.ones_like(own["cls_token"][0, 0])
    for name, tensor in own.items():
        if name.startswith("head.fpn."):
            part, kind = name.removeprefix("head.fpn.").rsplit(".", 1)
            weights[f"backbone.fpn.{NECK[part]}.{kind}"] = tensor
        elif name.startswith("head.auxiliary_head."):
            weights[name.removeprefix("head.")] = tensor
        elif name.startswith("head."):
            weights[f"decode_head.{name.removeprefix('head.')}"] = tensor
    return weights
