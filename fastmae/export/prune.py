"""Pruning: an encoder without some of its blocks or attention heads, those whose absence costs the least accuracy.

Nothing is trained. A search goes step by step: it tries the encoder without each block, or each head, that is left, and
removes the one without which k-NN on frozen features loses the least.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from fastmae.config.export import LEAST_IMAGES, Prune
from fastmae.data.sources import Source, Subset, without_held_out
from fastmae.errors import SettingError, UserError
from fastmae.evaluate.features import usable_batches
from fastmae.evaluate.knn import knn_predictions
from fastmae.export.encoder import VitTokens
from fastmae.export.measure import BATCH, NEIGHBOURS, Encode, EncoderFigures, as_taken, measure
from fastmae.export.official import weights_of
from fastmae.export.onnx import check_packages, opened_onnx, save_onnx
from fastmae.messages import logger
from fastmae.model.flops import Product, block_products
from fastmae.model.mae import MaskedAutoencoderViT

QUERY_SHARE = 0.2
"""Of the images that the search sees, how many are queries; the others are the neighbours."""

Kept = Mapping[int, tuple[int, ...]]
"""The blocks that are left, and the heads that are left in each, by their numbers in the whole encoder from 0."""


# --- smaller encoders -------------------------------------------------------------------------------------------------


def all_of(model: MaskedAutoencoderViT) -> Kept:
    """Returns what an encoder has before anything is removed."""
    blocks: Any = model.blocks
    return {number: tuple(range(block.attn.num_heads)) for number, block in enumerate(blocks)}


def with_heads(block: Any, heads: Sequence[int]) -> Any:
    """Returns a block whose attention has only some of its heads, by number; everything else is shared with ``block``.

    The rows of ``qkv`` and the columns of ``proj`` that belong to the others are gone: [3·H'·Dh, D] and [D, H'·Dh] for
    H' heads of Dh numbers. The sum that is left is what attention would give if the others gave zeros.
    """
    attn = block.attn
    if len(heads) == attn.num_heads:
        return block
    numbers = torch.arange(attn.qkv.out_features).view(3, attn.num_heads, -1)[:, list(heads)]
    smaller = _with_modules(block, attn=_with_modules(attn))
    smaller.attn.num_heads = len(heads)
    smaller.attn.qkv = _linear(attn.qkv, numbers.flatten(), slice(None))
    smaller.attn.proj = _linear(attn.proj, slice(None), numbers[0].flatten())
    return smaller


def pruned(model: MaskedAutoencoderViT, kept: Kept) -> MaskedAutoencoderViT:
    """Returns a model whose encoder has what is kept and whose decoder is of no use; it shares the weights."""
    blocks: Any = model.blocks
    smaller: MaskedAutoencoderViT = _with_modules(
        model, blocks=nn.ModuleList(with_heads(blocks[number], heads) for number, heads in kept.items())
    )
    return smaller


def _with_modules(module: Any, **others: nn.Module) -> Any:
    """Returns a shallow copy of a module in which some of its modules are others."""
    result = copy.copy(module)
    result._modules = dict(module._modules) | others
    return result


def _linear(layer: nn.Linear, rows: Any, columns: Any) -> nn.Linear:
    """Returns a linear layer with some of the outputs (``rows``) and inputs (``columns``) of another one."""
    weight = layer.weight.detach()[rows][:, columns]
    bias = None if layer.bias is None else layer.bias.detach()[rows]
    result = type(layer)(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    tensors = {"weight": weight.contiguous()} | ({} if bias is None else {"bias": bias.contiguous()})
    result.load_state_dict(tensors, assign=True)
    return result.eval()


# --- what an encoder costs --------------------------------------------------------------------------------------------


def parameters_of(model: MaskedAutoencoderViT) -> int:
    """Returns how many numbers an exported encoder has, fixed positions included."""
    return sum(tensor.numel() for tensor in weights_of(model, "encoder").values())


def flops_of(model: MaskedAutoencoderViT) -> int:
    """Returns the floating-point operations of an image's pass through an encoder, nothing masked.

    Matrix products alone, a multiply-add being two. Blocks may have different numbers of heads.
    """
    width, tokens = model.cls_token.shape[2], model.prefix_tokens + model.num_patches
    P = model.patch_size[0] * model.patch_size[1] * model.in_chans
    products = [Product("patch embedding", model.num_patches, width, P, 1)]
    blocks: Any = model.blocks
    for block in blocks:
        sizes = width, width, block.mlp.fc1.out_features, block.attn.num_heads, tokens, tokens
        products += block_products("encoder", 1, *sizes, block.attn.proj.in_features)
    return sum(product.flops for product in products)


# --- the search -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Step:
    """A step of the search."""

    removed: str
    """What it removed, such as ``block 3`` or ``head 0 of block 2``."""
    kept: Kept
    """What is left after it."""
    knn: float
    """The accuracy of k-NN in percent after it, on the queries of the search."""
    whole_knn: float
    """That of the whole encoder."""


@dataclass(frozen=True)
class Labelled:
    """Images and their classes."""

    batches: tuple[torch.Tensor, ...]
    """Pixels [n, H, W, C] each."""
    labels: torch.Tensor
    """int64 [N] of all of them."""


def some_drawn(source: Source, count: int) -> Source:
    """Returns the source, or ``count`` samples of it that are drawn with a fixed seed if it has more."""
    if len(source) <= count:
        return source
    return Subset(source, np.sort(np.random.default_rng(0).permutation(len(source))[:count]))


def read_for_search(model: MaskedAutoencoderViT, train: Source, num_workers: int) -> tuple[Labelled, Labelled]:
    """Reads the images that the search sees, all of the train part: neighbours, and queries drawn with a fixed seed.

    Raises:
        SettingError: they are too few.
    """
    if len(train) < LEAST_IMAGES:
        problem = f"has {len(train)} images to choose by; give data with {LEAST_IMAGES} or more"
        raise SettingError("data_path", problem=problem)
    parts = []
    for source in without_held_out(train, QUERY_SHARE, 0):
        batches, numbers = [], []
        for indices, pixels, _ in usable_batches(model, source, batch_size=BATCH, num_workers=num_workers):
            if len(indices):
                batches.append(pixels)
                numbers.append(indices)
        if not numbers:
            raise SettingError("data_path", problem="has too few images that can be used; give other data")
        labels = np.asarray(source.labels)[np.concatenate(numbers)]
        parts.append(Labelled(tuple(batches), torch.from_numpy(labels.astype(np.int64))))
    return parts[0], parts[1]


def check_count(model: MaskedAutoencoderViT, what: Prune, count: int) -> None:
    """Refuses to remove more than can be removed: one block, and one head of each block, stays.

    Raises:
        SettingError: naming how many there are.
    """
    kept = all_of(model)
    numbers = sum(map(len, kept.values()))
    most, has, stays = {
        "blocks": (len(kept) - 1, f"{len(kept)} blocks", ""),
        "heads": (numbers - len(kept), f"{numbers} heads in {len(kept)} blocks", " in each block"),
    }[what]
    if count > most:
        problem = f"must be at most {most}, as the encoder has {has}, and one{stays} must stay"
        raise SettingError("prune_count", count, problem)


def search(model: MaskedAutoencoderViT, what: Prune, count: int, bank: Labelled, queries: Labelled) -> Iterator[Step]:
    """Removes ``count`` blocks or heads, one at a time, and yields each step.

    Of all that can be removed, that one goes without which the accuracy of k-NN is lowest below that of the whole
    encoder by the least. Accuracies above it count as equal, as a few queries more are chance. Among equals that one
    goes without which the features of the queries, each divided by its length, have moved the least (mean squared
    distance from the whole encoder's); then the first. One block, and one head of each block, stays.

    Args:
        model: the whole encoder, on the CPU and in evaluation mode.
        what: what is removed.
        bank, queries: the neighbours of k-NN, and the images whose classes it predicts.

    Raises:
        SettingError: there are not so many.
    """
    check_count(model, what, count)
    kept, encoder = all_of(model), VitTokens(model).eval()
    whole = features_of(model, encoder, kept, queries)
    accuracy = _accuracy(features_of(model, encoder, kept, bank), bank, whole, queries)
    for _ in range(count):
        choices = one_less(kept, what)
        neighbours, asked = (features_of_each(model, encoder, kept, choices, images) for images in (bank, queries))
        costs = []
        for place, name in enumerate(choices):
            knn = _accuracy(neighbours[name], bank, asked[name], queries)
            costs.append((max(0.0, accuracy - knn), _moved(asked[name], whole), place, name, knn))
        *_, name, knn = min(costs)
        kept = choices[name]
        yield Step(name, kept, knn, accuracy)


def one_less(kept: Kept, what: Prune) -> dict[str, Kept]:
    """Returns what is left if one block, or one head, more is removed, by the name of what was removed."""
    if what == "blocks":
        return {f"block {gone}": {n: heads for n, heads in kept.items() if n != gone} for gone in kept}
    return {
        f"head {head} of block {number}": {**kept, number: tuple(other for other in heads if other != head)}
        for number, heads in kept.items()
        for head in heads
        if len(heads) > 1
    }


@torch.no_grad()
def features_of(model: MaskedAutoencoderViT, encoder: VitTokens, kept: Kept, images: Labelled) -> torch.Tensor:
    """Computes the mean-pooled features [N, D] of images with an encoder of what is kept.

    Args:
        encoder: the whole encoder of ``model``, as programs have it.
    """
    blocks, found = [with_heads(encoder.blocks[number], heads) for number, heads in kept.items()], []
    for pixels in images.batches:
        x = encoder.embedded(as_taken(model, pixels, raw=False))
        for block in blocks:
            x = block(x)
        found.append(model.pool_tokens(encoder.norm(x)))
    return torch.cat(found)


@torch.no_grad()
def features_of_each(
    model: MaskedAutoencoderViT, encoder: VitTokens, kept: Kept, choices: Mapping[str, Kept], images: Labelled
) -> dict[str, torch.Tensor]:
    """Computes the same for several encoders, each of which lacks something in one block of what is kept.

    The blocks before that one are computed once for all of them.
    """
    blocks = {number: with_heads(encoder.blocks[number], heads) for number, heads in kept.items()}
    found: dict[str, list[torch.Tensor]] = {name: [] for name in choices}
    for pixels in images.batches:
        x = encoder.embedded(as_taken(model, pixels, raw=False))
        for number, block in blocks.items():
            for name, choice in choices.items():
                heads = choice.get(number)
                if heads == kept[number]:
                    continue
                y = x if heads is None else with_heads(encoder.blocks[number], heads)(x)
                for later, other in blocks.items():
                    y = other(y) if later > number else y
                found[name].append(model.pool_tokens(encoder.norm(y)))
            x = block(x)
    return {name: torch.cat(parts) for name, parts in found.items()}


def _moved(features: torch.Tensor, whole: torch.Tensor) -> float:
    """Returns the mean squared distance of features [N, D] from others, each divided by its length."""
    return float((F.normalize(features, dim=1) - F.normalize(whole, dim=1)).double().square().sum(dim=1).mean())


def _accuracy(neighbours: torch.Tensor, bank: Labelled, asked: torch.Tensor, queries: Labelled) -> float:
    """Returns the accuracy of k-NN in percent."""
    predictions = knn_predictions(neighbours, bank.labels, asked, (NEIGHBOURS,))[NEIGHBOURS]
    return 100 * float((predictions == queries.labels).double().mean())


# --- the comparison ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PrunedFigures:
    """The figures of an encoder in the comparison."""

    figures: EncoderFigures
    parameters: int
    flops: int
    megabytes: float
    """Of its weights in float32, or of the file of a program."""


def compare(
    model: MaskedAutoencoderViT, steps: Sequence[Step], train: Source, test: Source, num_workers: int
) -> dict[str, PrunedFigures]:
    """Measures the whole encoder, the one after each step, and in onnxruntime the whole and the last one, also as int8.

    Without the packages of onnx, a warning says that those in onnxruntime are left out.

    Args:
        train, test: the images that classifiers are fitted on, and those that they are scored on.
    """
    smallest = pruned(model, steps[-1].kept)
    models = {"whole": model} | {f"– {step.removed}": pruned(model, step.kept) for step in steps}
    encoders: dict[str, Encode] = {name: one.forward_features for name, one in models.items()}
    megabytes = {name: 4 * parameters_of(one) / 1e6 for name, one in models.items()}
    with tempfile.TemporaryDirectory() as folder:
        try:
            check_packages()
            programs = [(variant, whole) for variant in ("fp32", "int8") for whole in (True, False)]
        except UserError as error:
            logger.warning("int8 is left out of the comparison: %s", error)
            programs = []
        for variant, whole in programs:
            name = f"{'whole' if whole else 'pruned'}, ONNX {variant}"
            models[name], path = model if whole else smallest, Path(folder) / f"{name}.onnx"
            save_onnx(path, models[name], variant, raw=False)
            encoders[name] = opened_onnx(path)
            megabytes[name] = sum(file.stat().st_size for file in path.parent.glob(f"{path.name}*")) / 1e6
        found = measure(model, encoders, train, test, raw=False, num_workers=num_workers)
    return {
        name: PrunedFigures(figures, parameters_of(models[name]), flops_of(models[name]), megabytes[name])
        for name, figures in found.items()
    }
