"""The vision transformer's parts: patch embedding, fixed positions, attention, MLP, block. Knows nothing of masks."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from fastmae.ops.attention import attention
from fastmae.ops.linear import Linear, linear
from fastmae.torch_compat import aten_ops

NormLayer = Callable[[int], nn.Module]
Checkpointing = Literal["none", "selective", "full"]

# Matrix products, and attention however it is computed: what costs most to compute again.
# One that this torch calls otherwise is computed again: the same bits, in more time.
EXPENSIVE = [
    *aten_ops(
        "mm",
        "addmm",
        "bmm",
        "_scaled_mm",  # float8
        "_scaled_dot_product_flash_attention",
        "_scaled_dot_product_flash_attention_for_cpu",
        "_scaled_dot_product_efficient_attention",
        "_scaled_dot_product_cudnn_attention",
    ),
    torch.ops.fastmae.attention.default,
    torch.ops.fastmae.linear.default,
]


def patch_grid(img_size: tuple[int, int], patch_size: tuple[int, int]) -> tuple[int, int]:
    """The (rows, columns) of patches of an image; both sizes are (height, width) in pixels.

    Raises:
        ValueError: the image is not a multiple of the patch.
    """
    (height, width), (ph, pw) = img_size, patch_size
    if min(ph, pw) < 1 or min(height, width) < 1 or height % ph or width % pw:
        raise ValueError(f"an image of {height}×{width} pixels is not a multiple of a patch of {ph}×{pw}")
    return height // ph, width // pw


def sincos_positions(dim: int, grid_size: tuple[int, int], full_grid: tuple[int, int] | None = None) -> torch.Tensor:
    """Fixed 2-D sine-cosine positions with a zero row for the class token: float32 [1 + gh·gw, dim].

    The first half of the channels encodes the column, the second the row; each half is sines, then cosines, of
    frequencies 10000^(-2i/(dim/2)) (Vaswani et al. 2017, section 3.5, once an axis).

    Patches are counted from 0, an axis. With ``full_grid``, patch i of n is where its centre would be counted on the
    axis of N patches of that grid, (i + 1/2) · N/n − 1/2, so that the same place of an image has the same position.
    """
    if dim % 4:
        raise ValueError(f"the width of a token must be a multiple of 4 for 2-D sine-cosine positions, got {dim}")
    frequency = 10000.0 ** -(torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    counted = zip(grid_size, full_grid or grid_size, strict=True)
    places = [(torch.arange(n, dtype=torch.float64) + 0.5) * (full / n) - 0.5 for n, full in counted]
    row, column = torch.meshgrid(*places, indexing="ij")
    angles = [axis.reshape(-1, 1) * frequency for axis in (column, row)]
    table = torch.cat([f(angle) for angle in angles for f in (torch.sin, torch.cos)], dim=1)
    return torch.cat([torch.zeros(1, dim, dtype=torch.float64), table]).float()


class PatchEmbed(nn.Module):
    """A linear map from a patch's P pixels to D. Its weight has the published shape, [D, C, ph, pw]."""

    def __init__(self, patch_size: tuple[int, int], in_chans: int, embed_dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_chans, embed_dim, kernel_size=patch_size, stride=patch_size)

    def forward(self, patches: torch.Tensor) -> torch.Tensor:
        """Patches [N, K, P] in (row, column, channel) order give tokens [N, K, D]."""
        weight = self.proj.weight
        # Of one channel permuting moves nothing, but its gradient gets strides that DDP warns about.
        rows = weight.flatten(1) if weight.shape[1] == 1 else weight.permute(0, 2, 3, 1).flatten(1)
        return linear(patches, rows, self.proj.bias)


class Attention(nn.Module):
    """Multi-head self-attention with one packed projection for queries, keys and values."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"the width of a token, {dim}, must be a multiple of the number of heads, {num_heads}")
        self.num_heads = num_heads
        self.qkv = Linear(dim, 3 * dim)
        self.proj = Linear(dim, dim)

    def forward(self, x: torch.Tensor, start: int = 0) -> torch.Tensor:
        """Tokens [N, S, D] give the attention output of the tokens from ``start`` on, [N, S − start, D].

        Keys and values come from every token; the queries before ``start`` are never computed.
        """
        N, S, D = x.shape
        if start == 0:
            out = attention(self.qkv(x).view(N, S, 3, self.num_heads, -1))
        else:
            weight, bias = self.qkv.weight, self.qkv.bias
            queries = linear(x[:, start:], weight[:D], bias[:D]).view(N, S - start, self.num_heads, -1)
            out = attention(linear(x, weight[D:], bias[D:]).view(N, S, 2, self.num_heads, -1), queries)
        return self.proj(out.reshape(N, S - start, D))


class CrossAttention(nn.Module):
    """Multi-head attention of one set of tokens to another, of another width."""

    def __init__(self, dim: int, read_dim: int, num_heads: int) -> None:
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"the width of a token, {dim}, must be a multiple of the number of heads, {num_heads}")
        self.num_heads = num_heads
        self.q = Linear(dim, dim)
        self.kv = Linear(read_dim, 2 * dim)
        self.proj = Linear(dim, dim)

    def forward(self, x: torch.Tensor, read: torch.Tensor) -> torch.Tensor:
        """Queries of tokens [N, T, D], keys and values of ``read`` [N, S, read_dim]; gives [N, T, D]."""
        (N, T, D), S = x.shape, read.shape[1]
        keys_and_values = self.kv(read).view(N, S, 2, self.num_heads, -1)
        out = attention(keys_and_values, self.q(x).view(N, T, self.num_heads, -1))
        return self.proj(out.reshape(N, T, D))


class Mlp(nn.Module):
    """Two linear maps with an exact (erf) GELU between them."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = Linear(dim, hidden)
        self.fc2 = Linear(hidden, dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """A pre-norm transformer block.

    ``checkpointing`` says what it keeps for the backward pass: all; the results of ``EXPENSIVE`` operations
    (``selective``); its input alone (``full``). The rest is computed again, with the same bits.
    """

    checkpointing: Checkpointing = "none"

    def __init__(self, dim: int, num_heads: int, mlp_ratio: float, norm_layer: NormLayer) -> None:
        super().__init__()
        self.norm1 = norm_layer(dim)
        self.attn = Attention(dim, num_heads)
        self.norm2 = norm_layer(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))

    def forward(self, x: torch.Tensor, start: int = 0) -> torch.Tensor:
        """Tokens [N, S, D] give the block's output for the tokens from ``start`` on, [N, S − start, D]."""
        return checkpointed(self._output, x, start, keeps=self.checkpointing)

    def _output(self, x: torch.Tensor, start: int) -> torch.Tensor:
        x = x[:, start:] + self.attn(self.norm1(x), start)
        return x + self.mlp(self.norm2(x))


class CrossBlock(nn.Module):
    """A pre-norm block whose tokens read other tokens and know nothing of each other (Fu et al. 2024).

    ``checkpointing`` as in ``Block``.
    """

    checkpointing: Checkpointing = "none"

    def __init__(self, dim: int, read_dim: int, num_heads: int, mlp_ratio: float, norm_layer: NormLayer) -> None:
        super().__init__()
        self.norm1 = norm_layer(dim)
        self.norm_kv = norm_layer(read_dim)
        self.attn = CrossAttention(dim, read_dim, num_heads)
        self.norm2 = norm_layer(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))

    def forward(self, x: torch.Tensor, read: torch.Tensor) -> torch.Tensor:
        """Tokens [N, T, D] that read [N, S, read_dim] give the block's output for each, [N, T, D]."""
        return checkpointed(self._output, x, read, keeps=self.checkpointing)

    def _output(self, x: torch.Tensor, read: torch.Tensor) -> torch.Tensor:
        x = x + self.attn(self.norm1(x), self.norm_kv(read))
        return x + self.mlp(self.norm2(x))


# What is checkpointed, compiled and sharded as a unit.
BLOCKS = (Block, CrossBlock)


def checkpointed(
    output: Callable[..., torch.Tensor], *inputs: torch.Tensor | int, keeps: Checkpointing
) -> torch.Tensor:
    """``output(*inputs)``, of which as much is computed again for the backward pass as ``keeps`` says."""
    if keeps == "none":
        return output(*inputs)
    again = partial(checkpoint, output, *inputs, use_reentrant=False, preserve_rng_state=False)
    if keeps == "full":
        return again()
    return again(context_fn=partial(create_selective_checkpoint_contexts, EXPENSIVE))
