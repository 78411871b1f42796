"""transformers' ViTMAE with the weights of a fastmae model."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from fastmae.checkpoint.huggingface import in_version_5, to_huggingface
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
    """Official names as those of transformers 5 (or 4, if those are ``expected``); qkv in three."""
    named = to_huggingface(state)
    if any(".encoder.layer." in key for key in expected):
        return named
    return {in_version_5(name): tensor for name, tensor in named.items()}
