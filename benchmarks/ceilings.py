"""What a machine can do for a step of one model: its products one after another, decoding, and the fewest bytes."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import simplejpeg
import torch

from fastmae.benchmarks.harness import Stopwatch, interleave, measure_ceilings
from fastmae.model.flops import Product, products_of
from fastmae.model.mae import MaskedAutoencoderViT

# AdamW reads weight, gradient and two moments, and writes three of them, in float32.
MOVED_BY_OPTIMIZER = 7 * 4


@dataclass(frozen=True)
class AllCeilings:
    """Rates; of several samples the best."""

    copy_bytes: float
    """Bytes a second, read and written ones added up, of a copy far larger than the caches."""
    matmul_flops: dict[str, float]
    """Operations a second of a large square product, by dtype."""
    products_flops: float
    """Of the model's own linear layers, one after another, in the dtype of the benchmark."""
    decoded: dict[str, float]
    """Whole JPEGs a second, by number of threads."""


def linear_layers(model: MaskedAutoencoderViT, mask_ratio: float) -> list[Product]:
    return [product for product in products_of(model, mask_ratio) if product.kind == "linear"]


def step_bytes(model: MaskedAutoencoderViT, mask_ratio: float, N: int, itemsize: int) -> int:
    """The fewest bytes of a step that computes one product after another, and nothing that it could compute on the way.

    Each of a layer's three products reads its factors and writes its result once, and the optimiser reads and writes
    its own.
    """
    numbers = sum(
        layer.count * (N * layer.m * (layer.k + layer.n) + layer.k * layer.n)
        for layer in linear_layers(model, mask_ratio)
    )
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    return 3 * itemsize * numbers + MOVED_BY_OPTIMIZER * trained


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
    products = products_flops(linear_layers(model, mask_ratio), N, dtype, watch)
    return AllCeilings(machine.copy_bytes, machine.matmul_flops, products, decoded)


def products_flops(layers: Sequence[Product], N: int, dtype: torch.dtype, watch: Stopwatch) -> float:
    """Operations a second of all layers of a step with ``N`` images, forward and backward, each in its best time."""
    seconds, flops = 0.0, 0
    for layer in layers:
        shapes = (N * layer.m, layer.k), (layer.n, layer.k), (N * layer.m, layer.n)
        x, weight, gradient = (torch.randn(*shape, device=watch.device).to(dtype) for shape in shapes)
        samples = interleave(
            {
                "forward": lambda _, x=x, weight=weight: x @ weight.T,
                "to the inputs": lambda _, gradient=gradient, weight=weight: gradient @ weight,
                "to the weights": lambda _, gradient=gradient, x=x: gradient.T @ x,
            },
            watch,
        )
        seconds += layer.count * sum(map(min, samples.values()))
        flops += 3 * N * layer.flops
    return flops / seconds


def _decoded(jpegs: Sequence[bytes], threads: int, rounds: int) -> float:
    def decode(data: bytes) -> None:
        simplejpeg.decode_jpeg(data, colorspace="RGB")

    watch = Stopwatch(device=torch.device("cpu"), rounds=rounds)
    with ThreadPoolExecutor(threads) as pool:
        return len(jpegs) / min(interleave({"it": lambda _: list(pool.map(decode, jpegs))}, watch)["it"])
