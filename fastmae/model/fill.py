"""What stands in the place of what is masked, for the models that compute with whole images: zero, the mean or noise.

Noise is no state: it is computed from the image and its mask by Philox, so that a run that goes on, and any number of
ranks, have the noise that they would have had.
"""

from __future__ import annotations

import math

import torch

from fastmae.philox import STREAM_FILL, words_torch


def normal_noise(given: tuple[torch.Tensor, ...], count: int) -> torch.Tensor:
    """Draws ``count`` standard normal numbers for each sample, float32 [N, count], as a function of ``given`` alone.

    Args:
        given: tensors [N, ...] on one device, such as images and their masks; their bits are what counts.
        count: numbers of a sample.
    """
    digests = [_digest(tensor, number) for number, tensor in enumerate(given)]
    words = words_torch(0, STREAM_FILL, torch.stack(digests).sum(dim=0), count)
    uniform = (words.to(torch.float64) + 0.5) / 2.0**32  # neither 0 nor 1, whose noise would be infinite
    return (torch.erfinv(2 * uniform - 1) * math.sqrt(2)).float()


def _digest(tensor: torch.Tensor, number: int) -> torch.Tensor:
    """Returns what the bits of each sample [N, ...] of a tensor add up to with random odd weights, int64 [N].

    Integers wrap around, so that no order of the additions counts.
    """
    if tensor.is_floating_point():
        tensor = tensor.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()])
    numbers = tensor.flatten(1).to(torch.int64)
    which = torch.full((1,), number, device=tensor.device)
    low, high = words_torch(0, STREAM_FILL, which, 2 * numbers.shape[1]).view(-1, 2).T
    return (numbers * (high << 32 | low | 1)).sum(dim=1)
