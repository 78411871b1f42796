"""The thread decoder: reads and decodes whole batches with a pool of threads, one image per thread at a time.

It knows nothing of devices; its images lie in the memory of the host.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np
import torch

from fastmae.data.cache import CachedSource
from fastmae.data.plan import crop_draws
from fastmae.data.remote import is_remote
from fastmae.data.sample import LoadedSample, Skipped, View, load_sample
from fastmae.data.sources import Source
from fastmae.data.together import ReadRows, load_together, reads_together

PREFETCH = 3
"""Batches that the threads work on at the same time: the one that is waited for and those behind it."""

READ_THREADS = 32
"""Threads that wait for images behind addresses, besides those that decode."""

Requests = Iterable[tuple[np.ndarray, np.ndarray]]
"""(indices, draw_ids) of each batch, int64 [N] each."""


@dataclass(frozen=True)
class DecodedBatch:
    """A batch as a decoder hands it over, not yet on the model's device."""

    images: torch.Tensor
    """[N, H, W, C] of the type of the data set on the host; the rows of ``by_dali`` have no meaning here."""
    draw_ids: torch.Tensor
    """int64 [N] on the CPU."""
    skipped: tuple[Skipped, ...]
    changed: Mapping[str, list[tuple[int, str]]]
    """The numbers and names of images that were changed, by the kind of the change, a key of ``CHANGES``."""
    bytes_read: int
    busy: float
    """Seconds that threads spent on it, added up."""
    ready: int
    """How many of the batches behind this one are complete."""
    by_dali: tuple[list[int], torch.Tensor] | None = None
    """The rows that DALI decoded, and their images uint8 [rows, H, W, C] on DALI's device."""
    redone: str = ""
    """Why DALI failed on this batch; empty if it did not."""
    maps: torch.Tensor | None = None
    """uint8 [N, H, W]: the label maps, if the view has them."""


@dataclass
class PendingBatch:
    """A batch that the threads work on."""

    images: torch.Tensor
    """[N, H, W, C] of the type of the data set, which the threads write into."""
    draw_ids: torch.Tensor
    load: Callable[[int, bool], Future[LoadedSample]]
    """Starts to load the image of a row; with True, to read it for DALI."""
    samples: list[Future[LoadedSample]]
    together: Future[list[LoadedSample]] | None = None
    """Samples that are read at once, in place of ``samples``."""
    maps: torch.Tensor | None = None
    """uint8 [N, H, W]: the label maps, which the threads write as well."""

    def is_done(self) -> bool:
        """Tells whether ``finish`` would not wait."""
        return all(sample.done() for sample in self.samples) and (self.together is None or self.together.done())

    def finish(
        self,
        behind: Iterable[PendingBatch],
        by_dali: tuple[list[int], torch.Tensor] | None = None,
        redone: str = "",
    ) -> DecodedBatch:
        """Waits until the threads are done with this batch, then counts those ``behind`` it that are complete.

        Raises:
            UserError: no usable image within reach, as ``load_sample``.
        """
        samples = [sample.result() for sample in self.samples] if self.together is None else self.together.result()
        return DecodedBatch(
            self.images,
            self.draw_ids,
            skipped=tuple(bad for sample in samples for bad in sample.skipped),
            changed=_by_kind(samples),
            bytes_read=sum(sample.bytes_read for sample in samples),
            busy=sum(sample.busy for sample in samples),
            ready=sum(batch.is_done() for batch in behind),
            by_dali=by_dali,
            redone=redone,
            maps=self.maps,
        )


def _by_kind(samples: Iterable[LoadedSample]) -> dict[str, list[tuple[int, str]]]:
    """Returns which images were changed, by the kind of the change."""
    changed: dict[str, list[tuple[int, str]]] = {}
    for sample in samples:
        for kind in sample.changes:
            changed.setdefault(kind, []).append(sample.image)
    return changed


class AskedAhead:
    """A source behind addresses, whose images are asked for many at a time, before they are decoded.

    An answer takes a while, however small the image is; threads that wait for one take no core.
    """

    def __init__(self, source: Source) -> None:
        self._source = source
        self._pool = ThreadPoolExecutor(READ_THREADS, thread_name_prefix="fastmae-read")
        self._asked: dict[int, list[Future[bytes | np.ndarray]]] = {}
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._source)

    def ask(self, indices: Iterable[int]) -> None:
        """Starts to read images, each of which is then read once by ``read``."""
        with self._lock:
            for index in indices:
                self._asked.setdefault(index, []).append(self._pool.submit(self._source.read, index))

    def read(self, index: int) -> bytes | np.ndarray:
        """As the source's, from what was asked for before, if it was."""
        with self._lock:
            asked = self._asked.get(index)
            answer = asked.pop() if asked else None
            if not asked:
                self._asked.pop(index, None)
        return self._source.read(index) if answer is None else answer.result()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._source, name)

    def close(self) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)


def lies_behind_addresses(source: Any) -> bool:
    """Tells whether reading an image of a source asks a server, as far as its first and last files tell."""
    if isinstance(source, CachedSource) and source.form == "decoded":  # which decodes as it reads
        return False
    inside = getattr(source, "parts", None) or [part for part in [getattr(source, "source", None)] if part is not None]
    if inside:
        return any(map(lies_behind_addresses, inside))
    files = getattr(source, "paths", None) or getattr(source, "files", ())
    ends = [files[0], files[len(files) - 1]] if isinstance(files, Sequence) and len(files) else []
    return any(map(is_remote, ends))


class DecodeThreads:
    """A pool of threads that load samples of ``source`` as ``view`` says. ``close`` ends them.

    Args:
        pin_memory: keep images in page-locked memory, from which they are copied to a GPU without waiting.
    """

    def __init__(self, source: Source, view: View, num_workers: int, pin_memory: bool) -> None:
        self._ahead = AskedAhead(source) if lies_behind_addresses(source) else None
        self._source: Source = source if self._ahead is None else cast(Source, self._ahead)
        self._view, self._pin_memory = view, pin_memory
        self._read_rows = reads_together(source, view)
        self._pool = ThreadPoolExecutor(num_workers, thread_name_prefix="fastmae-decode")

    def start(self, indices: np.ndarray, draw_ids: np.ndarray, for_dali: bool = False) -> PendingBatch:
        """Starts to load a batch, and returns at once.

        Args:
            indices, draw_ids: int64 [N] each, as from ``EpochPlan.batch``.
            for_dali: only read plain JPEGs, as ``load_sample`` has it.
        """
        view = self._view
        if self._ahead is not None:
            self._ahead.ask(indices.tolist())
        dtype = getattr(torch, view.reading.dtype)
        images = torch.empty(len(indices), *view.size, view.in_chans, dtype=dtype, pin_memory=self._pin_memory)
        rows = images.numpy()
        if self._read_rows is not None and not for_dali:
            return self._start_together(self._read_rows, indices, draw_ids, images)
        crops = None if view.seed is None else crop_draws(view.seed, draw_ids)
        changes = None if view.augment is None else view.augment.draws(draw_ids)
        maps = None
        if view.maps is not None:
            maps = torch.empty(len(indices), *view.size, dtype=torch.uint8, pin_memory=self._pin_memory)
        of_maps = None if maps is None else maps.numpy()

        def load(row: int, for_dali: bool) -> Future[LoadedSample]:
            crop = None if crops is None else crops[row]
            change = None if changes is None else changes[row]
            out_map = None if of_maps is None else of_maps[row]
            return self._pool.submit(
                load_sample, self._source, int(indices[row]), view, crop, rows[row], for_dali, change, out_map
            )

        samples = [load(row, for_dali) for row in range(len(indices))]
        return PendingBatch(images, torch.from_numpy(draw_ids.copy()), load, samples, maps=maps)

    def _start_together(
        self, read: ReadRows, indices: np.ndarray, draw_ids: np.ndarray, images: torch.Tensor
    ) -> PendingBatch:
        """Starts to load a batch of samples that are read at once, by one thread. No crop is drawn, as none changes
        anything.
        """
        rows, whole = images.numpy(), replace(self._view, seed=None)

        def one(row: int) -> LoadedSample:
            return load_sample(self._source, int(indices[row]), whole, None, rows[row])

        def load(row: int, for_dali: bool) -> Future[LoadedSample]:
            return self._pool.submit(one, row)

        together = self._pool.submit(load_together, read, indices, rows, one)
        return PendingBatch(images, torch.from_numpy(draw_ids.copy()), load, [], together)

    def close(self) -> None:
        """Ends the threads, once each has finished its image."""
        self._pool.shutdown(wait=True, cancel_futures=True)
        if self._ahead is not None:
            self._ahead.close()


def decode_by_threads(
    source: Source, requests: Requests, view: View, num_workers: int, pin_memory: bool
) -> Generator[DecodedBatch]:
    """Yields the requested batches in order, and works on ``PREFETCH`` of them at the same time.

    Arguments and errors are those of ``loader.load_batches``. The threads end with the iterator, however it ends.
    """
    threads = DecodeThreads(source, view, num_workers, pin_memory)
    ahead: deque[PendingBatch] = deque()
    waiting = iter(requests)
    try:
        while True:
            while len(ahead) < PREFETCH and (request := next(waiting, None)) is not None:
                ahead.append(threads.start(*request))
            if not ahead:
                return
            yield ahead.popleft().finish(behind=ahead)
    finally:
        threads.close()
