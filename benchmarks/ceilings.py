"""How fast can this machine be at all? Copies, matrix products large and small, and JPEG decoding.

The model's own products are narrower than the large square one and reach less of what the processor can do. A step
that took no longer than they do alone would compute nothing else, so they are the nearer ceiling.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple

import simplejpeg
import torch

from fastmae.benchmarks.timing import Stopwatch, interleave, measure_ceilings
from fastmae.model.mae import MaskedAutoencoderViT


class Product(NamedTuple):
    """A linear layer: [N · tokens, inputs] times [inputs, outputs], where N is the batch."""

    tokens: int
    inputs: int
    outputs: int

    @property
    def flops(self) -> int:
        """Of an image's forward pass; backward takes twice as many, for the inputs' gradient and for the weights'."""
        return 2 * self.tokens * self.inputs * self.outputs

    def moved(self, N: int, itemsize: int) -> int:
        """Bytes, if each of its three products reads its factors and writes its result once."""
        rows = N * self.tokens
        return 3 * itemsize * (rows * self.inputs + self.inputs * self.outputs + rows * self.outputs)


@dataclass(frozen=True)
class AllCeilings:
    """Rates; of several samples the best."""

    copy_bytes: float
    """Bytes a second, read and written ones added up, of a copy far larger than the caches."""
    matmul_flops: dict[str, float]
    """Operations a second of a large square product, by dtype."""
    products_flops: float
    """Of the model's own products, one after another, in the dtype of the benchmark."""
    decoded: dict[str, float]
    """Whole JPEGs a second, by number of threads."""


def products_of(model: MaskedAutoencoderViT, mask_ratio: float) -> Counter[Product]:
    """The linear layers of a step, and how often each is there; only what the loss needs."""
    K, L = model.num_visible(mask_ratio), model.num_patches
    M = L - K
    width, narrow, pixels = model.cls_token.shape[2], model.mask_token.shape[2], model.decoder_pred.out_features
    encoder: Any = model.blocks[0]
    decoder: Any = model.decoder_blocks[0]
    found = Counter({Product(K, pixels, width): 1})

    def add_blocks(number: int, D: int, hidden: int, tokens: int, queries: int) -> None:
        """Whose keys and values are of ``tokens`` and whose output is for ``queries``."""
        if tokens == queries:
            found[Product(tokens, D, 3 * D)] += number
        else:
            found[Product(tokens, D, 2 * D)] += number
            found[Product(queries, D, D)] += number
        found[Product(queries, D, D)] += number
        found[Product(queries, D, hidden)] += number
        found[Product(queries, hidden, D)] += number

    add_blocks(len(model.blocks), width, encoder.mlp.fc1.out_features, K + 1, K + 1)
    found[Product(K + 1, width, narrow)] += 1
    add_blocks(len(model.decoder_blocks) - 1, narrow, decoder.mlp.fc1.out_features, L + 1, L + 1)
    add_blocks(1, narrow, decoder.mlp.fc1.out_features, L + 1, M)
    found[Product(M, narrow, pixels)] += 1
    return +found


# AdamW reads weight, gradient and two moments, and writes three of them, in float32.
MOVED_BY_OPTIMIZER = 7 * 4


def step_bytes(model: MaskedAutoencoderViT, mask_ratio: float, N: int, itemsize: int) -> int:
    """The fewest bytes of a step that computes one product after another, and nothing that it could compute on the way:
    each product's factors and result once, in so many bytes a number, and what the optimiser reads and writes."""
    products = sum(times * product.moved(N, itemsize) for product, times in products_of(model, mask_ratio).items())
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    return products + MOVED_BY_OPTIMIZER * trained


def measure_all_ceilings(
    model: MaskedAutoencoderViT,
    mask_ratio: float,
    N: int,
    dtype: torch.dtype,
    jpegs: Sequence[bytes],
    threads: int,
    device: torch.device,
    rounds: int,
) -> AllCeilings:
    """Measures with a batch of ``N`` images in ``dtype``, and decodes ``jpegs``."""
    watch = Stopwatch(device=device, rounds=rounds)
    machine = measure_ceilings(device, rounds=rounds)
    decoded = {str(number): _decoded(jpegs, number, rounds) for number in dict.fromkeys((1, threads))}
    products = products_of(model, mask_ratio)
    return AllCeilings(machine.copy_bytes, machine.matmul_flops, products_flops(products, N, dtype, watch), decoded)


def products_flops(products: Counter[Product], N: int, dtype: torch.dtype, watch: Stopwatch) -> float:
    """Operations a second of all products of a step with ``N`` images, forward and backward, each in its best time."""
    seconds, flops = 0.0, 0
    for product, times in products.items():
        rows = N * product.tokens
        x, weight, gradient = (
            torch.randn(*shape, device=watch.device).to(dtype)
            for shape in ((rows, product.inputs), (product.outputs, product.inputs), (rows, product.outputs))
        )
        samples = interleave(
            {
                "forward": lambda _, x=x, weight=weight: x @ weight.T,
                "to the inputs": lambda _, gradient=gradient, weight=weight: gradient @ weight,
                "to the weights": lambda _, gradient=gradient, x=x: gradient.T @ x,
            },
            watch,
        )
        seconds += times * sum(map(min, samples.values()))
        flops += times * 3 * N * product.flops
    return flops / seconds


def _decoded(jpegs: Sequence[bytes], threads: int, rounds: int) -> float:
    def decode(data: bytes) -> None:
        simplejpeg.decode_jpeg(data, colorspace="RGB")

    watch = Stopwatch(device=torch.device("cpu"), rounds=rounds)
    with ThreadPoolExecutor(threads) as pool:
        return len(jpegs) / min(interleave({"it": lambda _: list(pool.map(decode, jpegs))}, watch)["it"])
