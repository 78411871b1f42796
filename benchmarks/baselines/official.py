"""The official formulation with the weights of a fastmae model, and with whatever blocks somebody wants it to have."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from fastmae.model.mae import MaskedAutoencoderViT
from fastmae.model.reference import ReferenceBlock, ReferenceMAE

MakeBlock = Callable[[int, int, float], nn.Module]
"""(width, heads, MLP ratio) to a block whose state dict has the official names."""


class _OfficialMAE(ReferenceMAE):
    """The reference, but for cutting images up: one copy, where the reference spells out a slice a patch."""

    def patchify(self, imgs: torch.Tensor) -> torch.Tensor:
        ph, pw = self.patch_size
        rows_columns = imgs.unflatten(3, (-1, pw)).unflatten(2, (-1, ph))  # [N, C, gh, ph, gw, pw]
        return rows_columns.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)


def official_like(model: MaskedAutoencoderViT, make_block: MakeBlock = ReferenceBlock) -> nn.Module:
    """``ReferenceMAE`` of the same sizes and weights: (float images, ids_shuffle int64) to (loss, pred, mask)."""
    encoder: Any = model.blocks[0]
    decoder: Any = model.decoder_blocks[0]
    width, decoder_width = model.cls_token.shape[-1], model.mask_token.shape[-1]
    ratio = encoder.mlp.fc1.out_features / width
    peer = _OfficialMAE(
        model.img_size,
        model.patch_size,
        model.in_chans,
        embed_dim=width,
        depth=0,
        num_heads=encoder.attn.num_heads,
        decoder_embed_dim=decoder_width,
        decoder_depth=0,
        decoder_num_heads=decoder.attn.num_heads,
        norm_pix_loss=model.norm_pix_loss,
    )
    peer.blocks.extend(make_block(width, encoder.attn.num_heads, ratio) for _ in model.blocks)
    peer.decoder_blocks.extend(make_block(decoder_width, decoder.attn.num_heads, ratio) for _ in model.decoder_blocks)
    peer.load_state_dict(model.state_dict(), strict=True)
    return peer
