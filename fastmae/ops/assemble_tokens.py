"""assemble_tokens: the decoder's input, visible tokens and mask tokens with their positions, in shuffled order."""

from __future__ import annotations

import torch

from fastmae.ops.checks import check_ids, check_range


def assemble_tokens(
    visible: torch.Tensor, mask_token: torch.Tensor, pos_embed: torch.Tensor, ids_shuffle: torch.Tensor
) -> torch.Tensor:
    """Appends M mask tokens to the visible ones and adds every token's position.

    The order stays the shuffled one: attention does not mind the order, positions are added by index, and the masked
    tokens form a contiguous suffix (paper, section 3, "Simple implementation", without the unshuffle).

    Args:
        visible: floating [N, K+1, D], the class token first.
        mask_token: [D].
        pos_embed: [L+1, D], the class token's row first.
        ids_shuffle: int32 or int64 [N, L], a permutation a row whose first K entries are the visible patches.

    Returns:
        [N, L+1, D] in the dtype of ``visible``. Differentiable in ``visible``, ``mask_token`` and ``pos_embed``.
        Equivalent to ``assemble_tokens_reference``.

    Raises:
        TypeError, ValueError: a wrong dtype or shape. IndexError: an id outside [0, L) (looked at on the CPU only).
    """
    if visible.ndim != 3:
        raise ValueError(f"visible must have shape [N, K+1, D], got {list(visible.shape)}")
    N, visible_tokens, D = visible.shape
    check_ids("ids_shuffle", ids_shuffle, N)
    L = ids_shuffle.shape[1]
    check_range("ids_shuffle", ids_shuffle, L)
    if not 1 <= visible_tokens <= L + 1:
        raise ValueError(f"visible must hold 1 to {L + 1} tokens an image, got {visible_tokens}")
    if mask_token.shape != (D,):
        raise ValueError(f"mask_token must have shape [{D}], got {list(mask_token.shape)}")
    if pos_embed.shape != (L + 1, D):
        raise ValueError(f"pos_embed must have shape [{L + 1}, {D}], got {list(pos_embed.shape)}")
    return assemble_tokens_reference(visible, mask_token, pos_embed, ids_shuffle)


def assemble_tokens_reference(
    visible: torch.Tensor, mask_token: torch.Tensor, pos_embed: torch.Tensor, ids_shuffle: torch.Tensor
) -> torch.Tensor:
    """The definition, in PyTorch: concatenate, then add the positions picked by index."""
    N, visible_tokens, D = visible.shape
    masked = ids_shuffle.shape[1] + 1 - visible_tokens
    tokens = torch.cat([visible, mask_token.to(visible.dtype).expand(N, masked, D)], dim=1)
    positions = torch.cat([pos_embed[:1].expand(N, 1, D), pos_embed[1:][ids_shuffle.long()]], dim=1)
    return tokens + positions.to(visible.dtype)
