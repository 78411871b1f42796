"""The calls of linear layers, attention and their neighbours that a training step makes, for fastmae/ops/tuning.py."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from fastmae.model.classifier import Classifier
from fastmae.model.convnext_classifier import ConvNeXtClassifier
from fastmae.model.family import MaskedModel
from fastmae.model.flops import Product
from fastmae.ops.tuning import Call

# Products that are not ``ops.linear``'s.
OTHERS = ("decoder maps", "head")


def calls_of(
    model: MaskedModel | Classifier | ConvNeXtClassifier,
    batch_size: int,
    mask_ratio: float = 0.75,
    predict_ratio: float | None = None,
) -> tuple[Call, ...]:
    """Returns the calls of a step, with images of every size that the model takes (``allow_sizes``).

    Args:
        model: the model that is trained.
        batch_size: images of a forward pass, per rank.
        mask_ratio, predict_ratio: as in ``training_loss``; a classifier has none.
    """
    if isinstance(model, Classifier | ConvNeXtClassifier):
        return _calls([model.products()], batch_size)
    grids = {model.grid_of(size) for size in (model.img_size, *model.other_sizes)}
    numbers = sorted({rows * columns for rows, columns in grids})
    return _calls([model.products(mask_ratio, L, predict_ratio) for L in numbers], batch_size)


def _calls(of_sizes: Sequence[Sequence[Product]], batch_size: int) -> tuple[Call, ...]:
    """Returns the calls for the products of images of each size, as if a step had images of all of them."""
    counts: Counter[Call] = Counter()
    for products in of_sizes:
        blocks = {product.name: product.count for product in products}
        for product in products:
            part, _, name = product.name.rpartition(" ")
            rows = batch_size * product.m
            if name == "scores":  # of one head of one image; the product after it belongs to the same call
                shape, count = (product.n, product.m, product.k), blocks[f"{part} proj"]
                counts[Call("attention", shape, images=batch_size, heads=product.count // count)] += count
            elif product.kind == "linear" and product.name not in OTHERS:
                is_first = product.name == "patch embedding"
                counts[Call("linear", (rows, product.k, product.n), is_first=is_first)] += product.count
            if name == "fc1":
                counts[Call("gelu", (rows, product.n))] += product.count
            if name == "fc2":
                counts[Call("add_layer_norm", (rows, product.n))] += 2 * product.count
    return tuple(replace(call, count=count) for call, count in counts.items())
