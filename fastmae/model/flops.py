"""The one count of arithmetic: the matrix products that a step's loss needs, from plain sizes. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from fastmae.model.sizes import Sizes


@dataclass(frozen=True)
class Product:
    """``count`` products of an image's forward pass, each of a matrix [m, k] with one [k, n].

    The rows of all images of a batch are multiplied at once by a ``linear`` layer's weights, which are k·n numbers; an
    ``attention`` product belongs to one head of one image.
    """

    name: str
    m: int
    n: int
    k: int
    count: int
    kind: Literal["linear", "attention", "convolution"] = "linear"

    @property
    def flops(self) -> int:
        """Floating-point operations of all ``count``, a multiply-add being two; backward takes twice as many."""
        return 2 * self.m * self.n * self.k * self.count


def of_convolution(name: str, layer: Any, places: int) -> Product:
    """Returns the product of a ``torch.nn.Conv2d`` that is computed at so many places."""
    numbers = layer.in_channels // layer.groups * layer.kernel_size[0] * layer.kernel_size[1]
    return Product(name, places, layer.out_channels, numbers, 1, "convolution")


class HasProducts(Protocol):
    """A model of any family, which knows its products."""

    def products(
        self, mask_ratio: float, num_patches: int | None = None, predict_ratio: float | None = None
    ) -> tuple[Product, ...]: ...


def products_of(
    sizes: HasProducts | Sizes,
    mask_ratio: float,
    num_patches: int | None = None,
    predict_ratio: float | None = None,
) -> tuple[Product, ...]:
    """Returns the matrix products of an image's forward pass that the loss depends on.

    No masked patch is in the encoder and no visible one follows the decoder's last keys and values. What is computed
    again under activation checkpointing is not counted. ``num_patches``: L, by default of ``img_size``.
    ``predict_ratio``: as in ``training_loss``.
    """
    if not isinstance(sizes, Sizes):
        return sizes.products(mask_ratio, num_patches, predict_ratio)
    L = sizes.num_patches if num_patches is None else num_patches
    K = int(L * (1 - mask_ratio))
    M = L - K if predict_ratio is None else int(L * predict_ratio)
    S, D, E, P = K + 1, sizes.width, sizes.decoder_width, sizes.patch_numbers
    inside = S + sizes.registers  # tokens of the encoder; the decoder sees no registers
    encoder = (D, D, sizes.hidden, sizes.heads)
    decoder = (E, D if sizes.crosses else E, sizes.decoder_hidden, sizes.decoder_heads)
    products = [
        Product("patch embedding", K, D, P, 1),
        *block_products("encoder", sizes.depth, *encoder, inside, inside),
    ]
    if sizes.crosses:
        products.append(Product("decoder maps", S * D, sizes.decoder_depth, sizes.depth + 1, 1))
        products += block_products("decoder", sizes.decoder_depth, *decoder, S, M)
    else:
        products.append(Product("decoder embedding", S, E, D, 1))
        products += block_products("decoder", sizes.decoder_depth - 1, *decoder, L + 1, L + 1)
        products += block_products("decoder, last", 1, *decoder, L + 1, M)
    products.append(Product("prediction", M, P, E, 1))
    return tuple(product for product in products if product.count)


def block_products(
    part: str,
    count: int,
    width: int,
    read_width: int,
    hidden: int,
    heads: int,
    tokens: int,
    queries: int,
    inner: int | None = None,
) -> Iterator[Product]:
    """Products of blocks whose keys and values come from ``tokens`` and whose output is for ``queries``.

    ``inner`` is the width of all heads together: by default that of a token, less where heads were pruned.
    """
    inner = width if inner is None else inner
    if tokens == queries and width == read_width:
        yield Product(f"{part} qkv", tokens, 3 * inner, width, count)
    else:
        yield Product(f"{part} q", queries, inner, width, count)
        yield Product(f"{part} kv", tokens, 2 * inner, read_width, count)
    yield Product(f"{part} scores", queries, tokens, inner // heads, count * heads, "attention")
    yield Product(f"{part} mixing", queries, inner // heads, tokens, count * heads, "attention")
    yield Product(f"{part} proj", queries, width, inner, count)
    yield Product(f"{part} fc1", queries, hidden, width, count)
    yield Product(f"{part} fc2", queries, width, hidden, count)


def flops_per_image(
    model: HasProducts | Sizes,
    mask_ratio: float,
    num_patches: int | None = None,
    predict_ratio: float | None = None,
) -> int:
    """Floating-point operations of an image's forward pass, by which MFU is measured; a training step takes 3 times it.

    Matrix products alone: norms, GELU and softmax are a few percent and use other units.
    """
    return sum(product.flops for product in products_of(model, mask_ratio, num_patches, predict_ratio))
