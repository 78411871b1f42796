"""The loader: batches decoded ahead of need by a pool of threads, handed over on the device.

It keeps no position of its own. Which samples come is asked for by the caller (fastmae/data/plan.py says which), so
resuming is starting to ask further on.
"""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch

from fastmae.data.decode import BadImageError, crop_and_resize, decode
from fastmae.data.plan import central_box, crop_draws, is_flipped, random_box
from fastmae.data.sources import Source
from fastmae.errors import UserError

PREFETCH = 3
MAX_REPLACEMENTS = 1000


@dataclass(frozen=True)
class View:
    """How a sample becomes an image of the model's size: cropped at random for training, centrally otherwise."""

    size: tuple[int, int]
    """(height, width) in pixels."""
    in_chans: int
    seed: int | None = None
    """Of crops and flips; None for the central region."""
    scale: tuple[float, float] = (1.0, 1.0)
    """Smallest and largest share of the area that a random crop takes."""
    flip: bool = False
    central_share: float = 1.0
    """Of the height and width that a central crop could have."""


@dataclass(frozen=True)
class Skipped:
    """An image that could not be used, and why."""

    index: int
    name: str
    reason: str


@dataclass(frozen=True)
class Batch:
    """What the model gets."""

    images: torch.Tensor
    """uint8 [N, H, W, C] on the device."""
    draw_ids: torch.Tensor
    """int64 [N] on the CPU."""
    skipped: tuple[Skipped, ...]
    """Unusable images, replaced by the next usable one of the data set."""
    wait: float
    """Seconds that the caller was kept waiting."""


def default_workers() -> int:
    """The cores that this process may use, at most 10 (the published number of workers)."""
    return min(10, len(os.sched_getaffinity(0)))


def load_sample(source: Source, index: int, view: View, draws: np.ndarray | None, out: np.ndarray) -> list[Skipped]:
    """Writes sample ``index`` into ``out`` uint8 [H, W, C]; an unusable image gives way to the next usable one."""
    skipped: list[Skipped] = []
    for attempt in range(min(len(source), MAX_REPLACEMENTS)):
        candidate = (index + attempt) % len(source)
        try:
            pixels = decode(source.read(candidate), view.in_chans)
        except (BadImageError, OSError) as error:
            skipped.append(Skipped(candidate, source.name(candidate), str(error)))
            continue
        height, width = pixels.shape[:2]
        if draws is None:
            box = central_box(height, width, view.size, view.central_share)
        else:
            box = random_box(draws, height, width, view.scale)
        flip = view.flip and draws is not None and is_flipped(draws)
        out[:] = crop_and_resize(pixels, box, flip, view.size)
        return skipped
    first = skipped[0]
    raise UserError(f"{len(skipped)} images in a row cannot be used, from {first.name} ({first.reason}); mend the data")


def load_batches(
    source: Source,
    requests: Iterable[tuple[np.ndarray, np.ndarray]],
    view: View,
    *,
    device: torch.device,
    num_workers: int,
    pin_memory: bool = False,
) -> Generator[Batch]:
    """Decodes the requested batches in order, up to ``PREFETCH`` of them ahead.

    Args:
        source: the data set.
        requests: (indices, draw_ids), int64 [N] each, a batch; as from ``EpochPlan.batch``.
        view: how a sample becomes an image.
        device: where the images go.
        num_workers: decoding threads, at least 1; they end with the iterator, however it ends.
        pin_memory: copy to a GPU from page-locked memory, without waiting.

    Raises:
        UserError: no usable image within reach.
    """
    pool = ThreadPoolExecutor(num_workers, thread_name_prefix="fastmae-decode")

    def submit(indices: np.ndarray, draw_ids: np.ndarray) -> _Pending:
        images = torch.empty(len(indices), *view.size, view.in_chans, dtype=torch.uint8, pin_memory=pin_memory)
        slots = images.numpy()
        draws = None if view.seed is None else crop_draws(view.seed, draw_ids)
        futures = [
            pool.submit(load_sample, source, index, view, None if draws is None else draws[i], slots[i])
            for i, index in enumerate(indices.tolist())
        ]
        return _Pending(images, torch.from_numpy(draw_ids.copy()), futures)

    try:
        ahead: deque[_Pending] = deque()
        waiting = iter(requests)
        while True:
            started = time.perf_counter()
            while len(ahead) < PREFETCH and (request := next(waiting, None)) is not None:
                ahead.append(submit(*request))
            if not ahead:
                return
            pending = ahead.popleft()
            skipped = tuple(bad for future in pending.futures for bad in future.result())
            images = pending.images.to(device, non_blocking=True)
            yield Batch(images, pending.draw_ids, skipped, time.perf_counter() - started)
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


@dataclass(frozen=True)
class _Pending:
    images: torch.Tensor
    draw_ids: torch.Tensor
    futures: list[Future[list[Skipped]]]
