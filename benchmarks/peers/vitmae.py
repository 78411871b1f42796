"""transformers' ViTMAE with the weights of a fastmae model."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from fastmae.model.mae import MaskedAutoencoderViT


def vitmae_like(model: MaskedAutoencoderViT, mask_ratio: float = 0.75) -> torch.nn.Module:
    """A ViTMAEForPreTraining of the same sizes and weights; square images only, it takes no others.

    Raises:
        ImportError: transformers is not installed.
    """
    from transformers import ViTMAEConfig, ViTMAEForPreTraining

    encoder: Any = model.blocks[0]
    decoder: Any = model.decoder_blocks[0]
    config = ViTMAEConfig(
        image_size=model.img_size[0],
        patch_size=model.patch_size[0],
        num_channels=model.in_chans,
        hidden_size=model.cls_token.shape[-1],
        num_hidden_layers=len(model.blocks),
        num_attention_heads=encoder.attn.num_heads,
        intermediate_size=encoder.mlp.fc1.out_features,
        decoder_hidden_size=model.mask_token.shape[-1],
        decoder_num_hidden_layers=len(model.decoder_blocks),
        decoder_num_attention_heads=decoder.attn.num_heads,
        decoder_intermediate_size=decoder.mlp.fc1.out_features,
        layer_norm_eps=1e-6,
        norm_pix_loss=model.norm_pix_loss,
        mask_ratio=mask_ratio,
    )
    peer = ViTMAEForPreTraining(config)
    peer.load_state_dict(as_transformers(model.state_dict(), peer.state_dict().keys()), strict=True)
    return peer


def as_transformers(state: dict[str, torch.Tensor], expected: Iterable[str]) -> dict[str, torch.Tensor]:
    """Published names as those of transformers 5 (or 4, if those are ``expected``); qkv in three."""
    old = any(".encoder.layer." in key for key in expected)
    names = {
        "attn.q": "attention.attention.query" if old else "attention.q_proj",
        "attn.k": "attention.attention.key" if old else "attention.k_proj",
        "attn.v": "attention.attention.value" if old else "attention.v_proj",
        "attn.proj": "attention.output.dense" if old else "attention.o_proj",
        "mlp.fc1": "intermediate.dense" if old else "mlp.fc1",
        "mlp.fc2": "output.dense" if old else "mlp.fc2",
        "norm1": "layernorm_before",
        "norm2": "layernorm_after",
    }
    outside = {
        "cls_token": "vit.embeddings.cls_token",
        "pos_embed": "vit.embeddings.position_embeddings",
        "patch_embed.proj": "vit.embeddings.patch_embeddings.projection",
        "norm": "vit.layernorm",
    }
    outside |= {f"decoder_{name}": f"decoder.decoder_{name}" for name in ("pos_embed", "embed", "norm", "pred")}
    outside["mask_token"] = "decoder.mask_token"
    found = {}
    for key, tensor in state.items():
        module, _, leaf = key.rpartition(".")
        if key in outside:
            found[outside[key]] = tensor
        elif module in outside:
            found[f"{outside[module]}.{leaf}"] = tensor
        else:
            stack, number, part = module.split(".", 2)
            encoder = "vit.encoder.layer" if old else "vit.layers"
            prefix = f"{encoder if stack == 'blocks' else 'decoder.decoder_layers'}.{number}"
            if part == "attn.qkv":
                for name, third in zip("qkv", tensor.chunk(3), strict=True):
                    found[f"{prefix}.{names['attn.' + name]}.{leaf}"] = third
            else:
                found[f"{prefix}.{names[part]}.{leaf}"] = tensor
    return found
