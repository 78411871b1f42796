"""The parts of a vision transformer: patch embedding, fixed positions, attention, MLP, blocks; no masks."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from fastmae.config.shape import hidden_width
from fastmae.ops.add_layer_norm import add_layer_norm
from fastmae.ops.attention import attention
from fastmae.ops.backends import autocast_dtype, uses_fused
from fastmae.ops.gelu import gelu
from fastmae.ops.gelu_linear import gelu_linear, keeps_less
from fastmae.ops.linear import Linear, linear
from fastmae.ops.linear_bf16 import Copies
from fastmae.torch_compat import aten_ops

NormLayer = Callable[[int], nn.Module]
Checkpointing = Literal["none", "gelu", "selective", "full"]

# Matrix products, convolutions, and attention however it is computed: what costs most to compute again.
# One that this torch calls otherwise is computed again: the same bits, in more time.
EXPENSIVE = [
    *aten_ops(
        "mm",
        "addmm",
        "bmm",
        "_scaled_mm",  # float8
        "convolution",
        "_scaled_dot_product_flash_attention",
        "_scaled_dot_product_flash_attention_for_cpu",
        "_scaled_dot_product_efficient_attention",
        "_scaled_dot_product_cudnn_attention",
    ),
    torch.ops.fastmae.attention.default,
    torch.ops.fastmae.linear.default,
]


def patch_grid(img_size: tuple[int, int], patch_size: tuple[int, int]) -> tuple[int, int]:
    """Returns the (rows, columns) of patches of an image; both sizes are (height, width) in pixels.

    Raises:
        ValueError: the image is not a multiple of the patch.
    """
    (height, width), (ph, pw) = img_size, patch_size
    if min(ph, pw) < 1 or min(height, width) < 1 or height % ph or width % pw:
        raise ValueError(f"an image of {height}×{width} pixels is not a multiple of a patch of {ph}×{pw}")
    return height // ph, width // pw


def sincos_positions(dim: int, grid_size: tuple[int, int], full_grid: tuple[int, int] | None = None) -> torch.Tensor:
    """Computes fixed 2-D sine-cosine positions, with a zero row for the class token: float32 [1 + gh·gw, dim].

    The first half of the channels encodes the column, the second the row; each half is sines, then cosines, of
    frequencies 10000^(-2i/(dim/2)) (Vaswani et al. 2017, section 3.5, once per axis).

    On each axis patches are counted from 0. With ``full_grid``, patch i of n gets the coordinate of its centre on the
    axis of N patches of that grid, (i + 1/2) · N/n − 1/2, so that one spot of an image has the same position in both.
    """
    if dim % 4:
        raise ValueError(f"the width of a token must be a multiple of 4 for 2-D sine-cosine positions, got {dim}")
    frequency = 10000.0 ** -(torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    lengths = zip(grid_size, full_grid or grid_size, strict=True)
    coordinates = [(torch.arange(n, dtype=torch.float64) + 0.5) * (full / n) - 0.5 for n, full in lengths]
    row, column = torch.meshgrid(*coordinates, indexing="ij")
    angles = [axis.reshape(-1, 1) * frequency for axis in (column, row)]
    table = torch.cat([f(angle) for angle in angles for f in (torch.sin, torch.cos)], dim=1)
    return torch.cat([torch.zeros(1, dim, dtype=torch.float64), table]).float()


def has_hooks(layer: nn.Module) -> bool:
    """Whether somebody has put hooks on a module itself."""
    return bool(layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks or layer._backward_pre_hooks)


def product_and_bias(layer: nn.Module, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Computes a linear map for somebody who adds its bias in a pass of his own: the product [..., O], the bias [O].

    A layer that is no plain ``Linear`` has added it, and None takes its place.
    """
    if not is_plain(layer, Linear):
        return layer(x), None
    assert isinstance(layer, Linear)
    return layer.without_bias(x), layer.bias


def is_plain(layer: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether a layer is one of its kind and no more, so that its weights can be used without calling it.

    It is not if it is wrapped (adapters), parametrised, or somebody has put hooks on it or given it another forward.
    """
    return type(layer) is kind and not has_hooks(layer) and "forward" not in vars(layer)


class PatchEmbed(nn.Module):
    """A linear map from a patch's P numbers to D. Its weight has the official shape, [D, C, ph, pw]."""

    copies: Copies | None = None
    """bfloat16 copies of its weight and bias, while ``WeightCopies`` lends them."""

    def __init__(self, patch_size: tuple[int, int], in_chans: int, embed_dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_chans, embed_dim, kernel_size=patch_size, stride=patch_size)
        self.patch_size, self.patch_shape = patch_size, (*patch_size, in_chans)

    def forward(self, patches: torch.Tensor) -> torch.Tensor:
        """Maps patches [N, K, P] in (row, column, channel) order to tokens [N, K, D].

        Whole normalised images [N, C, H, W], which the official code of subclasses gives it, become [N, L, D].
        """
        if patches.ndim == 4:
            return self.proj(patches).flatten(2).mT
        if not is_plain(self.proj, nn.Conv2d):
            images = patches.flatten(0, 1).unflatten(1, self.patch_shape).permute(0, 3, 1, 2)
            return self.proj(images).flatten(1).unflatten(0, patches.shape[:2])
        copies = self.copies and (_in_order_of_patches(self.copies[0]), self.copies[1])
        return linear(patches, _in_order_of_patches(self.proj.weight), self.proj.bias, copies)


def _in_order_of_patches(weight: torch.Tensor) -> torch.Tensor:
    """Turns a convolution's weight [D, C, ph, pw] into a matrix [D, P], P in (row, column, channel) order."""
    # For one channel permuting would move nothing, and give the gradient strides that DDP warns about.
    return weight.flatten(1) if weight.shape[1] == 1 else weight.permute(0, 2, 3, 1).flatten(1)


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
        """Computes the attention output [N, S − start, D] of the tokens from ``start`` on, for tokens [N, S, D].

        Keys and values come from every token; the queries before ``start`` are never computed.
        """
        return self.proj(self._mixed(x, start))

    def and_bias(self, x: torch.Tensor, start: int = 0) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Computes the same in two parts, as ``product_and_bias`` does."""
        return product_and_bias(self.proj, self._mixed(x, start))

    def _mixed(self, x: torch.Tensor, start: int) -> torch.Tensor:
        N, S, _ = x.shape
        if start == 0 or not is_plain(self.qkv, Linear):
            out = attention(self.qkv(x).view(N, S, 3, self.num_heads, -1))[:, start:]
        else:
            width = self.qkv.out_features // 3  # of all heads: that of a token, unless heads were pruned
            queries = self.qkv.some(x[:, start:], slice(0, width)).view(N, S - start, self.num_heads, -1)
            out = attention(self.qkv.some(x, slice(width, 3 * width)).view(N, S, 2, self.num_heads, -1), queries)
        return out.flatten(2)


class CrossAttention(nn.Module):
    """Multi-head attention of one set of tokens to another one, which may have another width."""

    def __init__(self, dim: int, read_dim: int, num_heads: int) -> None:
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"the width of a token, {dim}, must be a multiple of the number of heads, {num_heads}")
        self.num_heads = num_heads
        self.q = Linear(dim, dim)
        self.kv = Linear(read_dim, 2 * dim)
        self.proj = Linear(dim, dim)

    def forward(self, x: torch.Tensor, read: torch.Tensor) -> torch.Tensor:
        """Computes [N, T, D]: queries from tokens [N, T, D], keys and values from ``read`` [N, S, read_dim]."""
        return self.proj(self._mixed(x, read))

    def and_bias(self, x: torch.Tensor, read: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Computes the same in two parts, as ``product_and_bias`` does."""
        return product_and_bias(self.proj, self._mixed(x, read))

    def _mixed(self, x: torch.Tensor, read: torch.Tensor) -> torch.Tensor:
        (N, T, D), S = x.shape, read.shape[1]
        keys_and_values = self.kv(read).view(N, S, 2, self.num_heads, -1)
        return attention(keys_and_values, self.q(x).view(N, T, self.num_heads, -1)).reshape(N, T, D)


GeluAgain = Literal["no", "in one pass", "on a CPU", "always"]
"""``in one pass``: on a CPU, where the pass that computes its gradient gives GELU as well, so that it costs no time."""


class Mlp(nn.Module):
    """Two linear maps with an exact (erf) GELU between them."""

    gelu_again: GeluAgain = "no"
    """Where the backward pass computes GELU again, instead of keeping it, if it can (``keeps_less``)."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = Linear(dim, hidden)
        self.fc2 = Linear(hidden, dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out, bias = self._output(x, apart=False)
        assert bias is None
        return out

    def and_bias(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Computes the same in two parts, as ``product_and_bias`` does."""
        return self._output(x, apart=True)

    def _output(self, x: torch.Tensor, apart: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
        bias = None
        if not is_plain(self.fc1, Linear):
            h = self.fc1(x)
            fused = uses_fused("gelu", h, h.dtype)
        elif fused := uses_fused("gelu", x, autocast_dtype(x.device) or x.dtype, self.fc1.out_features):
            h, bias = self.fc1.without_bias(x), self.fc1.bias
        else:
            h = self.fc1(x)
        fc2 = self.fc2
        if self._computes_again(h, fused) and is_plain(fc2, Linear) and keeps_less(h, fc2.weight):
            if apart:
                copies = fc2.copies and (fc2.copies[0], None)
                return gelu_linear(h, bias, fc2.weight, None, copies, fused), fc2.bias
            return gelu_linear(h, bias, fc2.weight, fc2.bias, fc2.copies, fused), None
        activated = gelu(h, bias) if fused else F.gelu(h)
        return product_and_bias(fc2, activated) if apart else (fc2(activated), None)

    def _computes_again(self, h: torch.Tensor, fused: bool) -> bool:
        if self.gelu_again in ("no", "always"):
            return self.gelu_again == "always"
        # A compiled function has its own ways to keep less.
        on_cpu = h.device.type == "cpu" and not torch.compiler.is_compiling()
        return on_cpu and (fused or self.gelu_again == "on a CPU")


class Sum(NamedTuple):
    """Tokens [N, S, D] as summands, which the next LayerNorm adds in its own pass: stream + (branch + bias).

    Blocks that are called one after another pass them on, so that the addition at the end of a block and the first norm
    of the next block read and write the tokens once. A block that is called with tokens returns tokens.
    """

    stream: torch.Tensor
    branch: torch.Tensor
    bias: torch.Tensor | None = None
    """[D], what the product that ends the branch has left to be added. The norm's backward pass has its gradient."""


Tokens = torch.Tensor | Sum


def as_sum(x: torch.Tensor, biased: bool = True) -> Tokens:
    """Prepares tokens for ``call_block``: where additions need no pass of their own, the branch is zero at first.

    So all blocks of a stack get the same kind of input, and are compiled once. If ``biased`` they leave a bias to add.
    """
    dtype = autocast_dtype(x.device) or x.dtype
    if not uses_fused("add_layer_norm", x, dtype):
        return x
    branch = x.new_zeros(x.shape, dtype=dtype)
    bias = x.new_zeros(x.shape[-1:], dtype=torch.float32) if biased else None
    if not torch.compiler.is_compiling():  # to be like what other blocks give; the gradients are written anyway
        branch.requires_grad_(x.requires_grad)
        bias = None if bias is None else nn.Parameter(bias, requires_grad=x.requires_grad)
    return Sum(x, branch, bias)


def call_block(block: nn.Module, x: Tokens, *inputs: Any, kind: type[nn.Module]) -> Tokens:
    """Calls a block with a sum if it is plainly of its ``kind``; any other gets tokens, and returns them.

    If a block keeps nothing but its input for the backward pass, that input is tokens, which are one tensor.
    """
    plain = is_plain(block, kind) and block.checkpointing != "full"
    return block(x if plain else added(x), *inputs)


def added(x: Tokens) -> torch.Tensor:
    """Returns tokens as one tensor."""
    return _added(*x) if isinstance(x, Sum) else x


def _added(stream: torch.Tensor, branch: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return stream + (branch if bias is None else branch + bias.to(branch.dtype))


def normed(x: Tokens, norm: nn.Module) -> torch.Tensor:
    """Returns the norm of tokens."""
    return add_norm(norm, *x)[1] if isinstance(x, Sum) else norm(x)


def add_norm(
    norm: nn.Module, x: torch.Tensor, branch: torch.Tensor, bias: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the tokens x + (branch + bias) and their norm, in one pass if ``fuses``."""
    if not fuses(norm, branch, branch.dtype):
        x = _added(x, branch, bias)
        return x, norm(x)
    dtype = autocast_dtype(x.device) or x.dtype
    assert isinstance(norm, nn.LayerNorm)
    return add_layer_norm(x, branch, norm.weight, norm.bias, norm.eps, dtype, bias)


def fuses(norm: nn.Module, tokens: torch.Tensor, dtype: torch.dtype) -> bool:
    """Whether an addition is made in one pass with a norm: a plain LayerNorm, and there is such an op.

    ``tokens`` has the shape of the branch that is added, ``dtype`` is its dtype.
    """
    plain = isinstance(norm, nn.LayerNorm) and is_plain(norm, nn.LayerNorm) and norm.bias is not None
    return plain and uses_fused("add_layer_norm", tokens, dtype)


class Block(nn.Module):
    """A pre-norm transformer block.

    ``checkpointing`` says what is kept for the backward pass: everything (``none``); the results of ``EXPENSIVE``
    operations (``selective``); only the input (``full``). The rest is computed again, with the same bits.
    """

    checkpointing: Checkpointing = "none"

    def __init__(self, dim: int, num_heads: int, mlp_ratio: float, norm_layer: NormLayer) -> None:
        super().__init__()
        self.norm1 = norm_layer(dim)
        self.attn = Attention(dim, num_heads)
        self.norm2 = norm_layer(dim)
        self.mlp = Mlp(dim, hidden_width(dim, mlp_ratio))

    def forward(self, x: Tokens, start: int = 0) -> Tokens:
        """Computes the block's output [N, S − start, D] for the tokens from ``start`` on, for tokens [N, S, D].

        The output of a ``Sum`` is a ``Sum``.
        """
        return block_output(self, x, start)

    def branches(self, x: torch.Tensor, normed: torch.Tensor, start: int, *, apart: bool) -> Sum:
        """Adds the attention to tokens whose norm is ``normed``; returns the sum, and what the MLP adds to it.

        That is a product and a bias if ``apart``, where that is possible.
        """
        return _branches(self, Attention, x[:, start:], normed, start, apart=apart)


class CrossBlock(nn.Module):
    """A pre-norm block whose tokens attend to other tokens and not to each other (Fu et al. 2024).

    ``checkpointing`` has the same meaning as in ``Block``.
    """

    checkpointing: Checkpointing = "none"

    def __init__(self, dim: int, read_dim: int, num_heads: int, mlp_ratio: float, norm_layer: NormLayer) -> None:
        super().__init__()
        self.norm1 = norm_layer(dim)
        self.norm_kv = norm_layer(read_dim)
        self.attn = CrossAttention(dim, read_dim, num_heads)
        self.norm2 = norm_layer(dim)
        self.mlp = Mlp(dim, hidden_width(dim, mlp_ratio))

    def forward(self, x: Tokens, read: torch.Tensor) -> Tokens:
        """Computes the block's output [N, T, D] for tokens [N, T, D] that attend to ``read`` [N, S, read_dim].

        The output of a ``Sum`` is a ``Sum``.
        """
        return block_output(self, x, read)

    def branches(self, x: torch.Tensor, normed: torch.Tensor, read: torch.Tensor, *, apart: bool) -> Sum:
        """Adds the attention to tokens whose norm is ``normed``; returns the sum, and what the MLP adds to it.

        That is a product and a bias if ``apart``, where that is possible.
        """
        return _branches(self, CrossAttention, x, normed, self.norm_kv(read), apart=apart)


def _branches(
    block: Any, kind: type[nn.Module], x: torch.Tensor, normed: torch.Tensor, *inputs: Any, apart: bool
) -> Sum:
    """Computes ``branches``; an attention that is plainly of its ``kind`` leaves its bias to ``norm2``'s addition."""
    bias = None
    if is_plain(block.attn, kind) and fuses(block.norm2, x, autocast_dtype(x.device) or normed.dtype):
        out, bias = block.attn.and_bias(normed, *inputs)
    else:
        out = block.attn(normed, *inputs)
    x, normed = add_norm(block.norm2, x, out, bias)
    if apart and is_plain(block.mlp, Mlp):
        return Sum(x, *block.mlp.and_bias(normed))
    return Sum(x, block.mlp(normed))


def block_output(block: Any, x: Tokens, *inputs: Any) -> Tokens:
    """Computes the output of a block with the parts ``norm1`` and ``branches``, of the kind of ``x``."""

    def of_sum(stream: torch.Tensor, branch: torch.Tensor, bias: torch.Tensor | None, *inputs: Any) -> Sum:
        return block.branches(*add_norm(block.norm1, stream, branch, bias), *inputs, apart=True)

    def of_tokens(x: torch.Tensor, *inputs: Any) -> torch.Tensor:
        return added(block.branches(x, block.norm1(x), *inputs, apart=False))

    if isinstance(x, Sum):
        return Sum(*checkpointed(of_sum, *x, *inputs, keeps=block.checkpointing))
    return checkpointed(of_tokens, x, *inputs, keeps=block.checkpointing)


def checkpointed(output: Callable[..., Any], *inputs: torch.Tensor | int | None, keeps: Checkpointing) -> Any:
    """Computes ``output(*inputs)``; ``keeps`` says how much of it is kept for the backward pass."""
    if keeps in ("none", "gelu"):
        return output(*inputs)
    recomputed = partial(checkpoint, output, *inputs, use_reentrant=False, preserve_rng_state=False)
    if keeps == "full":
        return recomputed()
    return recomputed(context_fn=partial(create_selective_checkpoint_contexts, EXPENSIVE))
