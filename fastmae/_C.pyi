from typing import Any

import numpy.typing as npt

# NumPy has no bfloat16: uint16 means it, and int16 means uint16. Arrays have any strides, but those after `threads`,
# which are written to, must be contiguous. csrc/ops.h gives shapes.
_Array = npt.NDArray[Any]

sanitized: bool

def instruction_sets() -> list[str]: ...
def instruction_set() -> str: ...
def set_instruction_set(name: str) -> None: ...
def random_masking(draw_ids: _Array, seed: int, threads: int, ids_shuffle: _Array) -> None: ...
def bernoulli_masking(draw_ids: _Array, seed: int, below: int, threads: int, masked: _Array) -> None: ...
def gather_patches(
    images: _Array,
    ids: _Array,
    patch_size: tuple[int, int],
    mean: _Array,
    std: _Array,
    value_range: _Array | None,
    nodata: float | None,
    threads: int,
    patches: _Array,
) -> None: ...
def resize(image: _Array, mirrored: bool, nodata: float | None, resized: _Array) -> None: ...
def unshuffle(data: _Array, out: _Array) -> None: ...
def assemble_tokens(
    visible: _Array,
    mask_token: _Array,
    pos_embed: _Array,
    ids_shuffle: _Array,
    threads: int,
    tokens: _Array,
) -> None: ...
def assemble_tokens_backward(grad: _Array, threads: int, grad_visible: _Array, grad_mask_token: _Array) -> None: ...
def masked_mse(
    pred: _Array,
    images: _Array,
    ids: _Array,
    patch_size: tuple[int, int],
    mean: _Array,
    std: _Array,
    value_range: _Array | None,
    nodata: float | None,
    norm_pix: bool,
    eps: float,
    threads: int,
    loss: _Array,
    targets: _Array,
) -> None: ...
def masked_mse_backward(
    grad_loss: _Array,
    targets: _Array,
    pred: _Array,
    images: _Array,
    ids: _Array,
    patch_size: tuple[int, int],
    mean: _Array,
    std: _Array,
    value_range: _Array | None,
    nodata: float | None,
    norm_pix: bool,
    eps: float,
    threads: int,
    gradient: _Array,
) -> None: ...
def scatter_patches(
    patches: _Array,
    ids: _Array,
    grid_size: tuple[int, int],
    patch_size: tuple[int, int],
    mean: _Array,
    std: _Array,
    value_range: _Array | None,
    threads: int,
    images: _Array,
) -> None: ...
def transpose_and_sum(matrix: _Array, threads: int, transposed: _Array, sums: _Array) -> None: ...
def gelu(h: _Array, bias: _Array | None, threads: int, out: _Array) -> None: ...
def gelu_backward(
    grad: _Array,
    h: _Array,
    bias: _Array | None,
    threads: int,
    grad_h: _Array,
    grad_bias: _Array | None,
    out: _Array | None,
) -> None: ...
def add_layer_norm(
    x: _Array,
    branch: _Array,
    branch_bias: _Array | None,
    weight: _Array,
    bias: _Array,
    eps: float,
    threads: int,
    stream: _Array,
    normed: _Array,
    mean: _Array,
    rstd: _Array,
) -> None: ...
def add_layer_norm_backward(
    grad_stream: _Array | None,
    grad_normed: _Array,
    stream: _Array,
    weight: _Array,
    mean: _Array,
    rstd: _Array,
    threads: int,
    grad_x: _Array,
    grad_branch: _Array | None,
    grad_affine: _Array,
) -> None: ...
def attention_products() -> list[str]: ...
def sums_of_products(x: _Array, other: _Array | None, threads: int, sums: _Array) -> None: ...
def scale_and_add(x: _Array, scale: _Array, other: _Array | None, added: _Array, threads: int, out: _Array) -> None: ...
def depthwise_visible(
    x: _Array, slots: _Array, weight: _Array, bias: _Array | None, turned: bool, threads: int, out: _Array
) -> None: ...
def depthwise_visible_weights(x: _Array, grad: _Array, slots: _Array, threads: int, sums: _Array) -> None: ...
def attention(
    packed: _Array, queries: _Array | None, products: str, threads: int, out: _Array, lse: _Array
) -> None: ...
def attention_backward(
    grad: _Array,
    packed: _Array,
    queries: _Array | None,
    lse: _Array,
    products: str,
    threads: int,
    grad_packed: _Array,
    grad_queries: _Array | None,
) -> None: ...
