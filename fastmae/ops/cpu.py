"""The C++ ops of fastmae._C for tensors on the CPU; arguments are passed as NumPy views of any strides, without copies.

Results are allocated here and filled by the extension, on ``torch.get_num_threads()`` threads. The ``*_reference``
functions in this folder define the ops. The extension checks every argument and raises ValueError; it refuses float64.
NumPy has no bfloat16, so it is passed as uint16, which the extension reads as bfloat16; and uint16 as int16.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from fastmae import _C

log = logging.getLogger("fastmae")


def random_masking(draw_ids: torch.Tensor, seed: int, num_patches: int) -> torch.Tensor:
    """Returns ids_shuffle int32 [N, L] for draw_ids int64 [N] and a seed in [0, 2**64)."""
    ids_shuffle = _empty(torch.int32, draw_ids.numel(), num_patches)
    _C.random_masking(_array(draw_ids), seed, torch.get_num_threads(), _array(ids_shuffle))
    return ids_shuffle


def bernoulli_masking(draw_ids: torch.Tensor, seed: int, features: int, below: int) -> torch.Tensor:
    """Returns masks bool [N, D] for draw_ids int64 [N]: True where a random word in [0, 2**32) is below ``below``."""
    masked = _empty(torch.uint8, draw_ids.numel(), features)
    _C.bernoulli_masking(_array(draw_ids), seed, below, torch.get_num_threads(), _array(masked))
    return masked.view(torch.bool)


def gather_patches(
    images: torch.Tensor,
    ids: torch.Tensor,
    patch_size: Sequence[int],
    mean: torch.Tensor,
    std: torch.Tensor,
    dtype: torch.dtype,
    value_range: torch.Tensor | None = None,
    nodata: float | None = None,
) -> torch.Tensor:
    """Returns [N, K, P] of ``dtype`` for images [N, H, W, C], ids int32 or int64 [N, K], mean and std [C], a range."""
    ph, pw = patch_size
    patches = _empty(dtype, *ids.shape, ph * pw * mean.numel())
    scale = _array(mean), _array(std), _array_or_none(value_range), nodata
    _C.gather_patches(_array(images), _array(ids), (ph, pw), *scale, torch.get_num_threads(), _array(patches))
    return patches


def resize(
    image: npt.NDArray[Any], size: tuple[int, int], mirrored: bool, nodata: float | None, out_dtype: npt.DTypeLike
) -> npt.NDArray[Any]:
    """Resizes an image uint8, uint16 or float32 [H, W, C], antialiased bicubic in float32, on one thread.

    Args:
        image: with rows without gaps, which may themselves lie apart.
        size: (height, width) of the result.
        mirrored: whether left becomes right.
        nodata: the value of pixels that become NaN, as does all that their filters touch.
        out_dtype: the image's type, to which is rounded and clamped, or float32.
    """
    resized = np.empty((*size, image.shape[2]), out_dtype)
    _C.resize(_known(image), mirrored, nodata, _known(resized))
    return resized


def unshuffle(data: npt.NDArray[np.uint8], out: npt.NDArray[np.uint8]) -> None:
    """Transposes bytes: fills out uint8 [n, B] with data uint8 [B, n], both without gaps, on one thread."""
    _C.unshuffle(data, out)


def assemble_tokens(
    visible: torch.Tensor,
    mask_token: torch.Tensor,
    pos_embed: torch.Tensor,
    ids_shuffle: torch.Tensor,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Returns [N, L+1, D] for visible [N, K+1, D], mask_token [D], pos_embed [L+1, D] and ids_shuffle [N, L]."""
    tokens = _empty(dtype, visible.shape[0], *pos_embed.shape)
    _C.assemble_tokens(
        _array(visible),
        _array_of_weights(mask_token),
        _array_of_weights(pos_embed),
        _array(ids_shuffle),
        torch.get_num_threads(),
        _array(tokens),
    )
    return tokens


def assemble_tokens_backward(
    grad: torch.Tensor, visible_tokens: int, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Splits grad [N, L+1, D]: visible tokens [N, K+1, D] in ``dtype``, mask token float32 [D]."""
    grad_visible = _empty(dtype, grad.shape[0], visible_tokens, grad.shape[-1])
    grad_mask_token = _empty(torch.float32, grad.shape[-1])
    _C.assemble_tokens_backward(_array(grad), torch.get_num_threads(), _array(grad_visible), _array(grad_mask_token))
    return grad_visible, grad_mask_token


def masked_mse(
    pred: torch.Tensor,
    images: torch.Tensor,
    ids: torch.Tensor,
    patch_size: Sequence[int],
    mean: torch.Tensor,
    std: torch.Tensor,
    norm_pix: bool,
    value_range: torch.Tensor | None = None,
    nodata: float | None = None,
    *,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the loss and the number of targets, float32 [], of pred [N, M, P]; the rest as in ``gather_patches``."""
    ph, pw = patch_size
    loss, targets = _empty(torch.float32), _empty(torch.float32)
    scale = _array(mean), _array(std), _array_or_none(value_range), nodata
    _C.masked_mse(
        _array(pred),
        _array(images),
        _array(ids),
        (ph, pw),
        *scale,
        norm_pix,
        eps,
        torch.get_num_threads(),
        _array(loss),
        _array(targets),
    )
    return loss, targets


def masked_mse_backward(
    grad_loss: torch.Tensor,
    targets: torch.Tensor,
    pred: torch.Tensor,
    images: torch.Tensor,
    ids: torch.Tensor,
    patch_size: Sequence[int],
    mean: torch.Tensor,
    std: torch.Tensor,
    norm_pix: bool,
    value_range: torch.Tensor | None = None,
    nodata: float | None = None,
    *,
    eps: float,
) -> torch.Tensor:
    """Returns the gradient [N, M, P] of pred for that of the loss, float32 []; the rest as in ``masked_mse``."""
    ph, pw = patch_size
    gradient = _empty(pred.dtype, *pred.shape)
    scale = _array(mean), _array(std), _array_or_none(value_range), nodata
    _C.masked_mse_backward(
        _array(grad_loss),
        _array(targets),
        _array(pred),
        _array(images),
        _array(ids),
        (ph, pw),
        *scale,
        norm_pix,
        eps,
        torch.get_num_threads(),
        _array(gradient),
    )
    return gradient


def scatter_patches(
    patches: torch.Tensor,
    ids: torch.Tensor,
    grid_size: Sequence[int],
    patch_size: Sequence[int],
    mean: torch.Tensor,
    std: torch.Tensor,
    dtype: torch.dtype,
    value_range: torch.Tensor | None = None,
) -> torch.Tensor:
    """Returns images [N, gh·ph, gw·pw, C] of ``dtype`` for patches [N, M, P], ids [N, M], mean and std [C], a range."""
    (gh, gw), (ph, pw) = grid_size, patch_size
    images = _empty(dtype, patches.shape[0], gh * ph, gw * pw, mean.numel())
    _C.scatter_patches(
        _array(patches),
        _array(ids),
        (gh, gw),
        (ph, pw),
        _array(mean),
        _array(std),
        _array_or_none(value_range),
        torch.get_num_threads(),
        _array(images),
    )
    return images


def transpose_and_sum(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns a transposed copy [C, R] of a matrix float32 [R, C], and the sums of its columns [C]."""
    transposed, sums = _empty(torch.float32, *reversed(matrix.shape)), _empty(torch.float32, *matrix.shape[1:])
    _C.transpose_and_sum(_array(matrix), torch.get_num_threads(), _array(transposed), _array(sums))
    return transposed, sums


def gelu(h: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """Returns GELU(h + bias) in h's dtype, exact, for h [..., F] and bias [F] or None. The sum is not rounded."""
    out = _empty(h.dtype, *h.shape)
    _C.gelu(_rows(h), None if bias is None else _array_of_weights(bias), torch.get_num_threads(), _rows(out))
    return out


def gelu_backward(
    grad: torch.Tensor, h: torch.Tensor, bias: torch.Tensor | None, with_output: bool = False
) -> list[torch.Tensor]:
    """Returns the gradients of h [..., F], in its dtype, and of bias, float32 [F], if there is one.

    After them, ``with_output``, what ``gelu`` returned, with the same bits.
    """
    grad_h, out = _empty(h.dtype, *h.shape), _empty(h.dtype, *h.shape) if with_output else None
    grad_bias = None if bias is None else _empty(torch.float32, *h.shape[-1:])
    _C.gelu_backward(
        _rows(grad),
        _rows(h),
        None if bias is None else _array_of_weights(bias),
        torch.get_num_threads(),
        _rows(grad_h),
        None if grad_bias is None else _array(grad_bias),
        None if out is None else _rows(out),
    )
    return [result for result in (grad_h, grad_bias, out) if result is not None]


def add_layer_norm(
    x: torch.Tensor,
    branch: torch.Tensor,
    branch_bias: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor,
    eps: float,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Adds x [..., D] and branch [..., D] with its bias [D], if it has one, and normalises the rows of the sum.

    Returns:
        stream [..., D] = x + (branch + branch_bias) in x's dtype; normed [..., D] in ``dtype`` = LayerNorm(stream) with
        weight and bias [D]; mean and rstd, float32 [...], of the rows of the rounded stream.
    """
    stream, normed = _empty(x.dtype, *x.shape), _empty(dtype, *x.shape)
    mean, rstd = _empty(torch.float32, *x.shape[:-1]), _empty(torch.float32, *x.shape[:-1])
    _C.add_layer_norm(
        _rows(x),
        _rows(branch),
        None if branch_bias is None else _array_of_weights(branch_bias),
        _array_of_weights(weight),
        _array_of_weights(bias),
        eps,
        torch.get_num_threads(),
        _rows(stream),
        _rows(normed),
        _rows(mean, 3),
        _rows(rstd, 3),
    )
    return stream, normed, mean, rstd


def add_layer_norm_backward(
    grad_stream: torch.Tensor | None,
    grad_normed: torch.Tensor,
    stream: torch.Tensor,
    weight: torch.Tensor,
    mean: torch.Tensor,
    rstd: torch.Tensor,
    branch_dtype: torch.dtype,
    has_branch_bias: bool = False,
) -> list[torch.Tensor]:
    """Returns the gradients of x [..., D] in the dtype of stream, of branch if its dtype is another, and of the affine.

    The last is float32 [2 or 3, D]: of weight, of bias, of the branch's bias if it has one. ``grad_stream`` may be
    None: then nobody else used the stream.
    """
    grad_x = _empty(stream.dtype, *stream.shape)
    grad_affine = _empty(torch.float32, 3 if has_branch_bias else 2, *stream.shape[-1:])
    grad_branch = None if branch_dtype == stream.dtype else _empty(branch_dtype, *stream.shape)
    _C.add_layer_norm_backward(
        None if grad_stream is None else _rows(grad_stream),
        _rows(grad_normed),
        _rows(stream),
        _array_of_weights(weight),
        _rows(mean, 3),
        _rows(rstd, 3),
        torch.get_num_threads(),
        _rows(grad_x),
        None if grad_branch is None else _rows(grad_branch),
        _array(grad_affine),
    )
    return [grad_x, grad_affine] if grad_branch is None else [grad_x, grad_branch, grad_affine]


def sums_of_products(x: torch.Tensor, other: torch.Tensor | None = None) -> torch.Tensor:
    """Returns the sums over P of x·other and of other, float32 [2, N, D], for [N, P, D]; of x² [1, N, D] with None."""
    sums = _empty(torch.float32, 1 if other is None else 2, x.shape[0], x.shape[2])
    beside = _array_or_none(None if other is None else other.contiguous())
    _C.sums_of_products(_array(x.contiguous()), beside, torch.get_num_threads(), _array(sums))
    return sums


def scale_and_add(
    x: torch.Tensor, scale: torch.Tensor, added: torch.Tensor, other: torch.Tensor | None = None
) -> torch.Tensor:
    """Returns x·scale + other·added in x's dtype, for x and other [N, P, D], scale and added float32 [N, D].

    Without ``other`` it is x·scale + added. ``added`` may be [1, D], the same for all images.
    """
    out = _empty(x.dtype, *x.shape)
    beside = _array_or_none(None if other is None else other.contiguous())
    factors = _array(scale.contiguous()), beside, _array_of_weights(added.contiguous())
    _C.scale_and_add(_array(x.contiguous()), *factors, torch.get_num_threads(), _array(out))
    return out


def depthwise_visible(
    x: torch.Tensor, slots: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, turned: bool = False
) -> torch.Tensor:
    """Returns [N, K, s, s, C] of x's dtype for x [N, K, s, s, C], slots [N, gh, gw], weight [C, 1, 7, 7], bias [C].

    ``turned``: with each channel's weights turned around, which takes the gradient of the output to that of x. C is at
    least 16. Its bits depend on the instruction set.
    """
    x = x.contiguous()
    out = _empty(x.dtype, *x.shape)
    _C.depthwise_visible(
        _array(x.flatten(2, 3)),
        _array(slots),
        _array_of_weights(weight.flatten(1)),
        None if bias is None else _array_of_weights(bias),
        turned,
        torch.get_num_threads(),
        _array(out.flatten(2, 3)),
    )
    return out


def depthwise_visible_weights(x: torch.Tensor, grad: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
    """Returns the gradients of the 49 weights of each channel, and of its bias: float32 [50, C]."""
    sums = _empty(torch.float32, 50, x.shape[-1])
    inputs, slopes = (_array(tensor.contiguous().flatten(2, 3)) for tensor in (x, grad))
    _C.depthwise_visible_weights(inputs, slopes, _array(slots), torch.get_num_threads(), _array(sums))
    return sums


def attention(
    packed: torch.Tensor, queries: torch.Tensor | None, products: str = "float32"
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns out [N, T, H, D] and lse float32 [N, H, T] for packed [N, S, 3·H, D], float32 or bfloat16.

    With queries [N, T, H, D], packed is [N, S, 2·H, D]. Products are computed in float32; those of bfloat16 also
    by the others of ``_C.attention_products()``. Its bits, as those of ``gelu``, depend on the instruction set.
    """
    N, T, H, D = (*packed.shape[:2], packed.shape[2] // 3, packed.shape[3]) if queries is None else queries.shape
    out, lse = _empty(packed.dtype, N, T, H, D), _empty(torch.float32, N, H, T)
    _C.attention(
        _array(packed),
        None if queries is None else _array(queries),
        products,
        torch.get_num_threads(),
        _array(out),
        _array(lse),
    )
    return out, lse


def attention_backward(
    grad: torch.Tensor,
    packed: torch.Tensor,
    queries: torch.Tensor | None,
    lse: torch.Tensor,
    grad_packed: torch.Tensor,
    grad_queries: torch.Tensor | None,
    products: str = "float32",
) -> None:
    """Writes the gradients of ``attention`` into contiguous tensors of the shapes of its arguments."""
    _C.attention_backward(
        _array(grad),
        _array(packed),
        None if queries is None else _array(queries),
        _array(lse),
        products,
        torch.get_num_threads(),
        _array(grad_packed),
        None if grad_queries is None else _array(grad_queries),
    )


@cache
def agrees_with_float32(products: str) -> bool:
    """Tells whether attention by such products of bfloat16 gives on a small example what float32 arithmetic gives.

    It is asked once a process, before AMX is used, which no processor had run when it was written. A line says so if
    the answer is no. The example is made in NumPy: torch.compile may be tracing.
    """
    S, T, D = 35, 18, 48  # the last tiles are not whole

    def draw(*shape: int) -> npt.NDArray[Any]:
        numbers = np.sin(0.7 * np.arange(np.prod(shape)) ** 1.5).astype(np.float32)
        return (numbers.view(np.uint32) >> 16).astype(np.uint16).reshape(shape)

    def numbers(bits: npt.NDArray[Any]) -> npt.NDArray[Any]:
        return (bits.astype(np.uint32) << 16).view(np.float32)

    packed, queries, grad = draw(2, S, 2, D), draw(2, T, 1, D), draw(2, T, 1, D)[::-1]

    def results(by: str) -> list[npt.NDArray[Any]]:
        out, lse = np.empty_like(queries), np.empty((2, 1, T), np.float32)
        gradients = np.empty_like(packed), np.empty_like(queries)
        _C.attention(packed, queries, by, 1, out, lse)
        _C.attention_backward(grad, packed, queries, lse, by, 1, *gradients)
        return [numbers(x) for x in (out, *gradients)]

    # Rounded to bfloat16, the weights differ by 2⁻⁹ at most, and the results by as much again: 0.004 in any row.
    agrees = all(
        (np.linalg.norm(one - other, axis=-1) <= 0.01 * np.linalg.norm(other, axis=-1)).all()
        for one, other in zip(results(products), results("float32"), strict=True)
    )
    if not agrees:
        log.warning(
            "attention by %s gives wrong numbers on this machine, so it is not used: please report it", products
        )
    return agrees


def _empty(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    """Allocates a result. A negative size becomes 0: the extension then refuses the arguments that led to it."""
    return torch.empty([max(0, size) for size in shape], dtype=dtype)


def _array(tensor: torch.Tensor) -> npt.NDArray[Any]:
    """Returns a tensor as an array with the same memory and strides."""
    if tensor.dtype == torch.int16:
        raise ValueError("tensors of dtype int16 are not supported, got one")
    return _bits(tensor).numpy()


def _known(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Views uint16 as int16, which is what the extension takes for it."""
    return array.view(np.int16) if array.dtype == np.uint16 else array


def _array_or_none(tensor: torch.Tensor | None) -> npt.NDArray[Any] | None:
    return None if tensor is None else _array(tensor)


def _rows(tensor: torch.Tensor, axes: int = 4) -> npt.NDArray[Any]:
    """Returns an array of at most ``axes`` axes, which is what the extension takes: the first ones are made one."""
    return _array(tensor if tensor.ndim <= axes else tensor.flatten(0, tensor.ndim - axes))


def _array_of_weights(tensor: torch.Tensor) -> npt.NDArray[Any]:
    """Does what ``_array`` does, but leaves the storage resizable, as FSDP2 needs it; ``numpy()`` would not."""
    return np.from_dlpack(_bits(tensor))


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    """Views bfloat16 as uint16, which NumPy has, and so uint16 as int16."""
    bits, other = tensor.detach(), {torch.bfloat16: torch.uint16, torch.uint16: torch.int16}.get(tensor.dtype)
    return bits if other is None else bits.view(other)
