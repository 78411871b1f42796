"""The arithmetic that the loss needs, counted from the model's shapes; what MFU is measured by."""

from __future__ import annotations

from fastmae.model.mae import MaskedAutoencoderViT
from fastmae.model.vit import Block


def flops_per_image(model: MaskedAutoencoderViT, mask_ratio: float) -> int:
    """Floating-point operations of an image's forward pass, a multiply-add being two; a training step takes 3 times it.

    Matrix products alone (norms, GELU and softmax are a few percent and use other units), and only those that the loss
    depends on: no masked patch in the encoder, no visible one after the decoder's last keys and values. What is
    computed again under activation checkpointing is not counted.
    """
    K, L = model.num_visible(mask_ratio), model.num_patches
    width, decoder_width = model.decoder_embed.in_features, model.decoder_embed.out_features
    pixels = model.decoder_pred.out_features
    encoder = sum(_block(block, K + 1, K + 1) for block in model.blocks if isinstance(block, Block))
    decoder = [block for block in model.decoder_blocks if isinstance(block, Block)]
    decoding = sum(_block(block, L + 1, L + 1) for block in decoder[:-1]) + _block(decoder[-1], L + 1, L - K)
    patches = 2 * K * pixels * width
    between = 2 * (K + 1) * width * decoder_width
    head = 2 * (L - K) * decoder_width * pixels
    return patches + encoder + between + decoding + head


def _block(block: Block, tokens: int, queries: int) -> int:
    """A block whose keys and values come from ``tokens`` and whose output is for ``queries`` of them."""
    width, hidden = block.mlp.fc1.in_features, block.mlp.fc1.out_features
    projections = 2 * width * width * (2 * tokens + 2 * queries)
    attention = 2 * 2 * queries * tokens * width
    return projections + attention + 2 * 2 * queries * width * hidden
