"""CrossMAE (Fu et al. 2024, arXiv 2401.14391): the encoder of the masked autoencoder, a decoder with cross-attention.

docs/cross-attention.md gives the equations, and says where the paper leaves a choice and what is chosen here.
"""

from __future__ import annotations

import torch
from torch import nn

from fastmae.model.mae import DecoderAttention, MaskedAutoencoderViT
from fastmae.model.vit import CrossBlock, NormLayer, as_sum, call_block, normed
from fastmae.ops.backends import refusing_second_gradient


class CrossMAE(MaskedAutoencoderViT):
    """A masked autoencoder whose decoder predicts each patch by itself.

    Each block of the decoder reads a learnt sum of the encoder's feature maps. Masked patches do not attend to each
    other, so the loss can be computed from some of them (``predict_ratio`` of ``training_loss``). The arguments and the
    methods are those of ``MaskedAutoencoderViT``.
    """

    decoder_attention: DecoderAttention = "cross"

    def _add_decoder_blocks(
        self, width: int, depth: int, num_heads: int, mlp_ratio: float, norm_layer: NormLayer
    ) -> None:
        encoder_width, encoder_depth = self.cls_token.shape[2], len(self.blocks)
        self.decoder_map_weights = nn.Parameter(torch.zeros(depth, encoder_depth + 1))
        self.decoder_blocks = nn.ModuleList(
            CrossBlock(width, encoder_width, num_heads, mlp_ratio, norm_layer) for _ in range(depth)
        )

    def _initialise(self) -> None:
        super()._initialise()
        nn.init.xavier_uniform_(self.decoder_map_weights)

    def num_predicted(self, mask_ratio: float, predict_ratio: float | None, num_patches: int | None = None) -> int:
        """Returns M = int(L · ``predict_ratio``), how many masked patches the loss is computed from; None means all.

        Raises:
            ValueError: M is 0, or more patches than are masked.
        """
        masked = super().num_predicted(mask_ratio, None, num_patches)
        if predict_ratio is None:
            return masked
        L = self.num_patches if num_patches is None else num_patches
        M = int(L * predict_ratio)
        if not 1 <= M <= masked:
            raise ValueError(
                f"predict ratio {predict_ratio} is {M} of {L} patches; at least one can be predicted, and at most the "
                f"{masked} that are masked"
            )
        return M

    def about_decoder(self, mask_ratio: float, predict_ratio: float | None) -> str:
        """Returns its depth, and how many patches are predicted."""
        predicted, blocks = self.num_predicted(mask_ratio, predict_ratio), len(self.decoder_blocks)
        return f"cross-attention, {blocks} blocks, {predicted} of {self.num_patches} patches predicted"

    def attention_shapes(self, mask_ratio: float) -> dict[str, tuple[int, int]]:
        """Returns (number of keys S, width Dh of a head) of the encoder's and the decoder's attention in training."""
        visible = self.num_visible(mask_ratio)
        encoder, decoder = self.head_dims
        return {"encoder": (visible + self.prefix_tokens, encoder), "decoder": (visible + 1, decoder)}

    def _latent(self, embedded: torch.Tensor) -> torch.Tensor:
        """Returns what each of the decoder's B blocks reads, [B, N, 1+K, D], for what ``_embed`` makes.

        They are learnt sums of the encoder's feature maps: the input of its first block and the output of every block,
        the last one normalised, all without registers.
        """
        maps = [refusing_second_gradient(embedded)]
        for block in self.blocks:
            maps.append(block(maps[-1]))
        maps[-1] = self.norm(maps[-1])
        maps = [self._without_registers(tokens) for tokens in maps]
        return (self.decoder_map_weights @ torch.stack(maps).flatten(1)).unflatten(1, maps[-1].shape)

    def _decode(
        self, latent: torch.Tensor, pos_embed: torch.Tensor, ids_shuffle: torch.Tensor, start: int
    ) -> torch.Tensor:
        """Returns predictions of the shuffled tokens from ``start`` on, which is at least 1: no class token is decoded.

        ``ids_shuffle`` may end early, as no patch's prediction depends on another's.
        """
        x = as_sum(self._residual(self.mask_token + pos_embed[0, 1:][ids_shuffle[:, start - 1 :].long()]))
        for block, read in zip(self.decoder_blocks, latent, strict=True):
            x = call_block(block, x, read, kind=CrossBlock)
        return self.decoder_pred(normed(x, self.decoder_norm))
