"""The arithmetic that the loss needs, counted from the model's shapes; what MFU is measured by."""

from __future__ import annotations

from fastmae.model.cross import CrossMAE
from fastmae.model.mae import MaskedAutoencoderViT
from fastmae.model.vit import Block, CrossBlock


def flops_per_image(
    model: MaskedAutoencoderViT,
    mask_ratio: float,
    num_patches: int | None = None,
    predict_ratio: float | None = None,
) -> int:
    """Floating-point operations of an image's forward pass, a multiply-add being two; a training step takes 3 times it.

    Matrix products alone (norms, GELU and softmax are a few percent and use other units), and only those that the loss
    depends on: no masked patch in the encoder, no visible one after the decoder's last keys and values. What is
    computed again under activation checkpointing is not counted. ``num_patches``: L, by default of ``img_size``.
    ``predict_ratio``: as in ``training_loss``.
    """
    L = model.num_patches if num_patches is None else num_patches
    K = model.num_visible(mask_ratio, L)
    M = model.num_predicted(mask_ratio, predict_ratio, L)
    width, decoder_width = model.cls_token.shape[2], model.mask_token.shape[2]
    pixels = model.decoder_pred.out_features
    encoder = sum(_block(block, K + 1, K + 1) for block in model.blocks if isinstance(block, Block))
    patches = 2 * K * pixels * width
    head = 2 * M * decoder_width * pixels
    if isinstance(model, CrossMAE):
        between = 2 * model.decoder_map_weights.numel() * (K + 1) * width
        decoding = sum(_block(block, K + 1, M) for block in model.decoder_blocks if isinstance(block, CrossBlock))
    else:
        between = 2 * (K + 1) * width * decoder_width
        decoder = [block for block in model.decoder_blocks if isinstance(block, Block)]
        decoding = sum(_block(block, L + 1, L + 1) for block in decoder[:-1]) + _block(decoder[-1], L + 1, M)
    return patches + encoder + between + decoding + head


def _block(block: Block | CrossBlock, tokens: int, queries: int) -> int:
    """A block whose keys and values come from ``tokens`` and whose output is for ``queries``."""
    width, hidden = block.mlp.fc1.in_features, block.mlp.fc1.out_features
    read_width = block.attn.kv.in_features if isinstance(block, CrossBlock) else width
    projections = 2 * width * (2 * tokens * read_width + 2 * queries * width)
    attention = 2 * 2 * queries * tokens * width
    return projections + attention + 2 * 2 * queries * width * hidden
