"""The official formulation of the masked autoencoder, written plainly: the oracle of tests, a baseline of benchmarks.

Nothing is optimised. All patches are embedded and three quarters of them dropped, attention is a matrix product, a
softmax and another product, the decoder unshuffles its tokens, and the loss is computed everywhere and masked
afterwards. It shares no code with ``mae.py``, but both load each other's state dict. It is written from the paper
(He et al. 2021, section 3 and appendix A). Keep it plain: everything else is compared with it.
"""

from __future__ import annotations

import torch
from torch import nn


class ReferenceBlock(nn.Module):
    """A block with norms before attention and MLP, for tokens [N, S, D]; attention is written out."""

    def __init__(self, dim: int, num_heads: int, mlp_ratio: float) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = nn.ModuleDict({"qkv": nn.Linear(dim, 3 * dim), "proj": nn.Linear(dim, dim)})
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        hidden = int(dim * mlp_ratio)
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(dim, hidden), "fc2": nn.Linear(hidden, dim)})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        N, S, D = x.shape
        q, k, v = self.attn["qkv"](self.norm1(x)).reshape(N, S, 3, self.num_heads, D // self.num_heads).unbind(2)
        scores = torch.einsum("nshd,nthd->nhst", q, k) * (D // self.num_heads) ** -0.5
        mixed = torch.einsum("nhst,nthd->nshd", scores.softmax(dim=-1), v)
        x = x + self.attn["proj"](mixed.reshape(N, S, D))
        return x + self.mlp["fc2"](nn.functional.gelu(self.mlp["fc1"](self.norm2(x))))


class ReferenceMAE(nn.Module):
    """The masked autoencoder. Arguments are those of ``MaskedAutoencoderViT``, but sizes are (height, width) pairs.

    LayerNorm's eps is 1e-6.
    """

    def __init__(
        self,
        img_size: tuple[int, int],
        patch_size: tuple[int, int],
        in_chans: int,
        embed_dim: int,
        depth: int,
        num_heads: int,
        decoder_embed_dim: int,
        decoder_depth: int,
        decoder_num_heads: int,
        mlp_ratio: float = 4.0,
        norm_pix_loss: bool = False,
        registers: int = 0,
    ) -> None:
        super().__init__()
        self.patch_size, self.norm_pix_loss = patch_size, norm_pix_loss
        L = (img_size[0] // patch_size[0]) * (img_size[1] // patch_size[1])
        P = patch_size[0] * patch_size[1] * in_chans
        projection = nn.Conv2d(in_chans, embed_dim, kernel_size=patch_size, stride=patch_size)
        self.patch_embed = nn.ModuleDict({"proj": projection})
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.reg_token = nn.Parameter(torch.zeros(1, registers, embed_dim)) if registers else None
        # Positions are constants that come with the state dict; this file does not compute them.
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + L, embed_dim), requires_grad=False)
        self.blocks = nn.ModuleList(ReferenceBlock(embed_dim, num_heads, mlp_ratio) for _ in range(depth))
        self.norm = nn.LayerNorm(embed_dim, eps=1e-6)
        self.decoder_embed = nn.Linear(embed_dim, decoder_embed_dim)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, decoder_embed_dim))
        self.decoder_pos_embed = nn.Parameter(torch.zeros(1, 1 + L, decoder_embed_dim), requires_grad=False)
        self.decoder_blocks = nn.ModuleList(
            ReferenceBlock(decoder_embed_dim, decoder_num_heads, mlp_ratio) for _ in range(decoder_depth)
        )
        self.decoder_norm = nn.LayerNorm(decoder_embed_dim, eps=1e-6)
        self.decoder_pred = nn.Linear(decoder_embed_dim, P)

    def patchify(self, imgs: torch.Tensor) -> torch.Tensor:
        """Cuts images [N, C, H, W] into patches [N, L, P], P in (row, column, channel) order, one patch at a time."""
        ph, pw = self.patch_size
        rows, columns = range(0, imgs.shape[2], ph), range(0, imgs.shape[3], pw)
        cut = [imgs[:, :, y : y + ph, x : x + pw].permute(0, 2, 3, 1).flatten(1) for y in rows for x in columns]
        return torch.stack(cut, dim=1)

    def forward(
        self, imgs: torch.Tensor, ids_shuffle: torch.Tensor, mask_ratio: float = 0.75
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Returns loss, pred [N, L, P] and mask [N, L] for normalised float imgs [N, C, H, W], ids_shuffle [N, L]."""
        N, L = ids_shuffle.shape
        K = int(L * (1 - mask_ratio))
        ids_restore = ids_shuffle.argsort(dim=1)
        mask = torch.ones(N, L, dtype=imgs.dtype, device=imgs.device)
        mask[:, :K] = 0
        mask = mask.gather(1, ids_restore)

        x = self.patch_embed["proj"](imgs).flatten(2).transpose(1, 2) + self.pos_embed[:, 1:]
        x = x.gather(1, ids_shuffle[:, :K, None].expand(-1, -1, x.shape[2]))
        x = torch.cat([(self.cls_token + self.pos_embed[:, :1]).expand(N, -1, -1), x], dim=1)
        registers = 0
        if self.reg_token is not None:  # Darcet et al. 2024: they take part in the encoder and are then dropped
            registers = self.reg_token.shape[1]
            x = torch.cat([self.reg_token.expand(N, -1, -1), x], dim=1)
        for block in self.blocks:
            x = block(x)
        x = self.decoder_embed(self.norm(x[:, registers:]))

        patches = torch.cat([x[:, 1:], self.mask_token.expand(N, L - K, -1)], dim=1)
        patches = patches.gather(1, ids_restore[:, :, None].expand(-1, -1, x.shape[2]))
        x = torch.cat([x[:, :1], patches], dim=1) + self.decoder_pos_embed
        for block in self.decoder_blocks:
            x = block(x)
        pred = self.decoder_pred(self.decoder_norm(x))[:, 1:]

        target = self.patchify(imgs)
        if self.norm_pix_loss:
            target = (target - target.mean(dim=-1, keepdim=True)) / (target.var(dim=-1, keepdim=True) + 1e-6).sqrt()
        error = (pred - target).square().mean(dim=-1)
        return (error * mask).sum() / mask.sum(), pred, mask
