"""The loader: batches decoded ahead of need by a pool of threads or by DALI, handed over on the device.

It keeps no position of its own. Which samples come is asked for by the caller (fastmae/data/plan.py says which), so
resuming is starting to ask further on.
"""

from __future__ import annotations

import itertools
import os
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch

from fastmae.data.augment import RandAugment
from fastmae.data.decode import BadImageError, crop_and_resize, decode, plain_jpeg_shape
from fastmae.data.decoders import dali
from fastmae.data.decoders.dali import DaliDecoder, DaliError, Encoded
from fastmae.data.plan import Box, central_box, crop_draws, is_flipped, random_box
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
    augment: RandAugment | None = None
    """Changes pixels once they are cropped. Known to the pool alone."""


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
    ready: int
    """Batches behind this one that the threads were done with, of at most ``PREFETCH`` and DALI's."""
    bytes_read: int
    """From the source."""
    busy: float
    """Seconds that threads spent reading and decoding it, added up."""
    redone: str = ""
    """Why DALI failed on this batch, which the pool then decoded; empty if it did not."""


@dataclass
class LoadingStats:
    """Batches added up, to say how far loading is from being what a run waits for."""

    batches: int = 0
    images: int = 0
    wait: float = 0.0
    ready: int = 0
    bytes_read: int = 0
    busy: float = 0.0

    def add(self, batch: Batch) -> None:
        self.batches += 1
        self.images += len(batch.images)
        self.wait += batch.wait
        self.ready += batch.ready
        self.bytes_read += batch.bytes_read
        self.busy += batch.busy

    def summary(self, elapsed: float, num_workers: int) -> dict[str, float]:
        """Over ``elapsed`` seconds: the share of time that was waited, the mean queue, and rates a second.

        ``decode_capacity`` is the images a second that the threads would give if they never had to wait for room.
        """
        return {
            "data_wait": round(self.wait / elapsed, 4),
            "queue": round(self.ready / max(1, self.batches), 2),
            "decoded_per_second": round(self.images / elapsed, 1),
            "decode_capacity": round(self.images * num_workers / self.busy, 1) if self.busy else 0.0,
            "read_bytes_per_second": round(self.bytes_read / elapsed),
        }


def default_workers() -> int:
    """The cores that this process may use, at most 10 (the published number of workers)."""
    return min(10, len(os.sched_getaffinity(0)))


def choose_decoder(asked: str, device: torch.device, source: Source | None, in_chans: int) -> tuple[str, str]:
    """(`pool`, `dali-cpu` or `dali-gpu`, why), for what was asked for: one of them, or `auto`.

    `auto` is the pool: on a CPU it is the fastest, and on a GPU DALI has not been measured yet.

    Args:
        source: the data; None for image files in general.

    Raises:
        UserError: it cannot run here.
    """
    if asked == "auto":
        return "pool", "DALI on a GPU is not measured yet" if device.type == "cuda" else "the fastest on a CPU"
    if asked == "pool":
        return asked, "asked for"
    if asked == "dali-gpu" and device.type != "cuda":
        raise UserError(f"--decoder dali-gpu: the device is {device}; use --device cuda, or --decoder dali-cpu")
    unsuited = ""
    if in_chans not in (1, 3):
        unsuited = f"DALI decodes to 1 or 3 channels, not {in_chans}"
    elif source is not None and source.kind != "folder":
        unsuited = "the data are arrays, which need no decoding"
    if unsuited:
        raise UserError(f"--decoder {asked}: {unsuited}; use --decoder pool")
    missing = dali.why_not_installed()
    if missing:
        raise UserError(f"--decoder {asked}: nvidia-dali {missing}; pip install 'fastmae[dali]', or use --decoder pool")
    return asked, "asked for"


def describe_decoder(name: str, reason: str) -> str:
    """A line for people and for the run folder."""
    if name == "pool":
        what = "simplejpeg for JPEG, Pillow for other formats, resized by torch"
    else:
        place = "GPU" if name == "dali-gpu" else "CPU"
        what = f"NVIDIA DALI {dali.version()} on the {place} for plain JPEGs, the pool for all else"
    return f"{name} ({reason}): {what}"


@dataclass(frozen=True)
class Loaded:
    """What became of a sample."""

    skipped: tuple[Skipped, ...]
    encoded: Encoded | None
    """A plain JPEG that was read for DALI and not decoded."""
    bytes_read: int
    busy: float
    """Seconds."""


def load_sample(
    source: Source,
    index: int,
    view: View,
    draws: np.ndarray | None,
    out: np.ndarray,
    for_dali: bool = False,
    changes: np.ndarray | None = None,
) -> Loaded:
    """Writes sample ``index`` into ``out`` uint8 [H, W, C]; an unusable image gives way to the next usable one.

    With ``for_dali`` a plain JPEG is only read. ``changes`` are the draws of the view's ``augment``, if it has one.
    """
    started, bytes_read = time.perf_counter(), 0
    skipped: list[Skipped] = []
    for attempt in range(min(len(source), MAX_REPLACEMENTS)):
        candidate = (index + attempt) % len(source)
        encoded = None
        try:
            data = source.read(candidate)
            bytes_read += len(data) if isinstance(data, bytes) else data.nbytes
            if for_dali and isinstance(data, bytes) and (shape := plain_jpeg_shape(data, view.in_chans)):
                encoded = Encoded(data, *_crop(view, draws, *shape))
            else:
                pixels = decode(data, view.in_chans)
        except (BadImageError, OSError) as error:
            skipped.append(Skipped(candidate, source.name(candidate), str(error)))
            continue
        if encoded is None:
            out[:] = crop_and_resize(pixels, *_crop(view, draws, *pixels.shape[:2]), view.size)
            if view.augment is not None and changes is not None:
                out[:] = view.augment(out, changes)
        return Loaded(tuple(skipped), encoded, bytes_read, time.perf_counter() - started)
    first = skipped[0]
    raise UserError(f"{len(skipped)} images in a row cannot be used, from {first.name} ({first.reason}); mend the data")


def _crop(view: View, draws: np.ndarray | None, height: int, width: int) -> tuple[Box, bool]:
    """The region of an image, and whether it is mirrored."""
    if draws is None:
        return central_box(height, width, view.size, view.central_share), False
    return random_box(draws, height, width, view.scale), view.flip and is_flipped(draws)


def load_batches(
    source: Source,
    requests: Iterable[tuple[np.ndarray, np.ndarray]],
    view: View,
    *,
    device: torch.device,
    num_workers: int,
    pin_memory: bool = False,
    decoder: str = "pool",
) -> Generator[Batch]:
    """Decodes the requested batches in order, a few of them ahead.

    Args:
        source: the data set.
        requests: (indices, draw_ids), int64 [N] each, a batch, none larger than the first; as from ``EpochPlan.batch``.
        view: how a sample becomes an image.
        device: where the images go.
        num_workers: decoding threads, at least 1; they end with the iterator, however it ends.
        pin_memory: copy to a GPU from page-locked memory, without waiting.
        decoder: of plain JPEGs, as ``choose_decoder`` names it; the pool takes all else, and what DALI fails on.

    Raises:
        UserError: no usable image within reach, or DALI cannot start.
    """
    pool = ThreadPoolExecutor(num_workers, thread_name_prefix="fastmae-decode")
    uses_dali = decoder != "pool"
    by_dali: DaliDecoder | None = None
    side = torch.cuda.Stream(device) if device.type == "cuda" else None

    def submit(indices: np.ndarray, draw_ids: np.ndarray) -> _Pending:
        images = torch.empty(len(indices), *view.size, view.in_chans, dtype=torch.uint8, pin_memory=pin_memory)
        slots = images.numpy()
        draws = None if view.seed is None else crop_draws(view.seed, draw_ids)
        changes = None if view.augment is None else view.augment.draws(draw_ids)

        def load(i: int, for_dali: bool) -> Future[Loaded]:
            row = None if draws is None else draws[i]
            change = None if changes is None else changes[i]
            return pool.submit(load_sample, source, int(indices[i]), view, row, slots[i], for_dali, change)

        return _Pending(
            images, torch.from_numpy(draw_ids.copy()), load, [load(i, uses_dali) for i in range(len(slots))]
        )

    try:
        ahead: deque[_Pending] = deque()
        waiting = iter(requests)
        while True:
            started = time.perf_counter()
            while len(ahead) < PREFETCH + uses_dali * dali.AHEAD and (request := next(waiting, None)) is not None:
                ahead.append(submit(*request))
            if not ahead:
                return
            if uses_dali:
                by_dali = by_dali or _dali_decoder(decoder, view, len(ahead[0].draw_ids), num_workers, device)
                _give(by_dali, ahead)
            pending = ahead.popleft()
            decoded, redone = _collect(by_dali, pending)
            loaded = [future.result() for future in pending.futures]
            images = _assemble(pending, decoded, device, side)
            yield Batch(
                images,
                pending.draw_ids,
                skipped=tuple(bad for sample in loaded for bad in sample.skipped),
                wait=time.perf_counter() - started,
                ready=sum(all(future.done() for future in later.futures) for later in ahead),
                bytes_read=sum(sample.bytes_read for sample in loaded),
                busy=sum(sample.busy for sample in loaded),
                redone=redone,
            )
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
        if by_dali is not None:
            by_dali.close()


@dataclass
class _Pending:
    """A batch on its way."""

    images: torch.Tensor
    """On the host: where the pool writes."""
    draw_ids: torch.Tensor
    load: Callable[[int, bool], Future[Loaded]]
    """Starts to load the image of a place; for DALI, or not."""
    futures: list[Future[Loaded]]
    for_dali: dict[int, Encoded] | None = None
    """By place, once they were given to it."""


def _dali_decoder(name: str, view: View, batch_size: int, num_threads: int, device: torch.device) -> DaliDecoder:
    where = device if name == "dali-gpu" else torch.device("cpu")
    return DaliDecoder(view.size, view.in_chans, batch_size=batch_size, num_threads=num_threads, device=where)


def _give(by_dali: DaliDecoder, ahead: deque[_Pending]) -> None:
    """Gives DALI the batches whose turn it is. Only the first of all is worth waiting for."""
    for place, pending in enumerate(itertools.islice(ahead, dali.AHEAD)):
        if pending.for_dali is not None:
            continue
        if place > 0 and not all(future.done() for future in pending.futures):
            return
        encoded = [future.result().encoded for future in pending.futures]
        pending.for_dali = {i: one for i, one in enumerate(encoded) if one is not None}
        if pending.for_dali:
            by_dali.schedule(list(pending.for_dali.values()))


def _collect(by_dali: DaliDecoder | None, pending: _Pending) -> tuple[torch.Tensor | None, str]:
    """What DALI made of a batch, and why it failed; then the pool is decoding the batch."""
    if by_dali is None or not pending.for_dali:
        return None, ""
    try:
        return by_dali.collect(), ""
    except DaliError as error:
        for i in pending.for_dali:
            pending.futures[i] = pending.load(i, False)
        return None, str(error)


def _assemble(
    pending: _Pending, decoded: torch.Tensor | None, device: torch.device, side: torch.cuda.Stream | None
) -> torch.Tensor:
    """The images of a batch on the device: DALI's as they are, the pool's copied, or both."""
    places = list(pending.for_dali or ()) if decoded is not None else []
    if decoded is not None and len(places) == len(pending.images):
        return decoded.to(device)
    if side is None:
        images = pending.images.to(device)
    else:  # beside the training that is queued on the current stream
        with torch.cuda.stream(side):
            images = pending.images.to(device, non_blocking=True)
        torch.cuda.current_stream(device).wait_stream(side)
        images.record_stream(torch.cuda.current_stream(device))
    if decoded is not None:
        images[torch.tensor(places, device=device)] = decoded.to(device)
    return images
