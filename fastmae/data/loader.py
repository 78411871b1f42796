"""The loader: batches decoded ahead of need by threads or by DALI, handed over on the model's device.

It keeps no position of its own. The caller asks for samples (fastmae/data/plan.py says which), so a resumed run simply
asks from a later batch on.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Generator, Mapping
from dataclasses import dataclass, field

import torch

from fastmae.data.decoders import dali
from fastmae.data.decoders.threads import PREFETCH, DecodedBatch, Requests, decode_by_threads
from fastmae.data.reading import Reading
from fastmae.data.sample import Skipped, View, load_sample
from fastmae.data.sources import Source
from fastmae.errors import SettingError, install_hint
from fastmae.facts import PixelType

__all__ = [
    "PREFETCH", "Batch", "LoadingStats", "Requests", "Skipped", "View", "choose_decoder", "default_workers",
    "describe_decoder", "load_batches", "load_sample",
]  # fmt: skip


@dataclass(frozen=True)
class Batch:
    """A batch as the model gets it."""

    images: torch.Tensor
    """[N, H, W, C] of the type of the data set, uint8, uint16 or float32, on the device."""
    draw_ids: torch.Tensor
    """int64 [N] on the CPU."""
    skipped: tuple[Skipped, ...]
    """Images that could not be used; each was replaced by the next usable one of the data set."""
    wait: float
    """Seconds that the caller was kept waiting."""
    ready: int
    """Batches behind this one that the threads were done with: at most ``PREFETCH`` - 1, with DALI more."""
    bytes_read: int
    """Bytes read from the source."""
    busy: float
    """Seconds that threads spent reading and decoding it, added up."""
    redone: str = ""
    """Why DALI failed on this batch, which the threads then decoded; empty if it did not."""
    changed: Mapping[str, list[tuple[int, str]]] = field(default_factory=dict)
    """The numbers and names of images that were changed, by the kind of the change, a key of ``CHANGES``. Of plain
    JPEGs that DALI decodes it is not known."""
    maps: torch.Tensor | None = None
    """uint8 [N, H, W] on the device: the label maps, if the view has them, with ``IGNORED`` where a pixel does not
    count."""


@dataclass
class LoadingStats:
    """The sums of many batches, from which one sees how far loading is from holding up a run."""

    batches: int = 0
    images: int = 0
    wait: float = 0.0
    ready: int = 0
    bytes_read: int = 0
    busy: float = 0.0

    def add(self, batch: Batch) -> None:
        """Adds a batch to the sums."""
        self.batches += 1
        self.images += len(batch.images)
        self.wait += batch.wait
        self.ready += batch.ready
        self.bytes_read += batch.bytes_read
        self.busy += batch.busy

    def summary(self, elapsed: float, num_workers: int) -> dict[str, float]:
        """Returns figures over ``elapsed`` seconds: the share of time spent waiting, the mean queue, rates per second.

        ``decode_capacity`` is how many images per second the threads would give if they never had to pause.
        """
        return {
            "data_wait": round(self.wait / elapsed, 4),
            "queue": round(self.ready / max(1, self.batches), 2),
            "decoded_per_second": round(self.images / elapsed, 1),
            "decode_capacity": round(self.images * num_workers / self.busy, 1) if self.busy else 0.0,
            "read_bytes_per_second": round(self.bytes_read / elapsed),
        }


def default_workers() -> int:
    """Returns the number of cores that this process may use, at most 10 (the default of the official code)."""
    return min(10, len(os.sched_getaffinity(0)))


def choose_decoder(asked: str, device: torch.device, source: Source | None, reading: Reading) -> tuple[str, str]:
    """Returns (`threads`, `dali-cpu` or `dali-gpu`, the reason) for what was asked for: one of these, or `auto`.

    `auto` gives the thread decoder: it is the fastest on a CPU, and DALI on a GPU has not been measured yet. `pool` is
    what version 0.1 called `threads`.

    Args:
        asked: the setting ``image_decoder``.
        device: where the model is.
        source: the data; None for image files in general.
        reading: how images become pixels.

    Raises:
        SettingError: this decoder cannot run here, or not on these data.
    """
    if asked == "auto":
        return "threads", "DALI on a GPU is not measured yet" if device.type == "cuda" else "the fastest on a CPU"
    if _is_threads(asked):
        return "threads", "asked for"
    problem, threads = "", "use --image_decoder=threads"
    if asked == "dali-gpu" and device.type != "cuda":
        problem = f"the device is {device}; use --device=cuda, or --image_decoder=dali-cpu"
    elif reading.in_chans not in (1, 3):
        problem = f"DALI decodes to 1 or 3 channels, not {reading.in_chans}; {threads}"
    elif reading.dtype != "uint8" or reading.read_as.bands:
        problem = f"DALI decodes 8 bits of all bands, not {reading.dtype}; {threads}"
    elif source is not None and source.kind != "folder":
        problem = f"the data are arrays, which need no decoding; {threads}"
    elif missing := dali.why_not_installed():
        problem = f"nvidia-dali {missing}; {install_hint('dali')}, or {threads}"
    if problem:
        raise SettingError("image_decoder", asked, problem)
    return asked, "asked for"


def _is_threads(decoder: str) -> bool:
    return decoder in ("threads", "pool")


def describe_decoder(name: str, reason: str, dtype: PixelType = "uint8") -> str:
    """Returns a line about a decoder for people and for the run folder; ``choose_decoder`` gives the first two."""
    if name == "threads" and dtype != "uint8":
        what = f"all formats as stored, in {dtype}, resized in C++"
    elif name == "threads":
        what = "simplejpeg for JPEG, Pillow for other formats, resized by torch"
    else:
        where = "GPU" if name == "dali-gpu" else "CPU"
        what = f"NVIDIA DALI {dali.version()} on the {where} for plain JPEGs, threads for all else"
    return f"{name} ({reason}): {what}"


def load_batches(
    source: Source,
    requests: Requests,
    view: View,
    *,
    device: torch.device,
    num_workers: int,
    pin_memory: bool = False,
    decoder: str = "threads",
) -> Generator[Batch]:
    """Yields the requested batches in order, and decodes a few of them ahead.

    Args:
        source: the data set.
        requests: (indices, draw_ids) per batch, int64 [N] each, none larger than the first; as ``EpochPlan.batch``
            returns them.
        view: how a sample becomes an image.
        device: where the images go.
        num_workers: the number of decoding threads, at least 1; they end with the iterator, however it ends.
        pin_memory: copy to a GPU from page-locked memory, without waiting.
        decoder: of plain JPEGs, as ``choose_decoder`` names it. The threads decode all else, and what DALI fails on.

    Raises:
        UserError: no usable image within reach, or DALI cannot start.
    """
    if _is_threads(decoder):
        decoded = decode_by_threads(source, requests, view, num_workers, pin_memory)
    else:
        on = device if decoder == "dali-gpu" else torch.device("cpu")
        decoded = dali.decode_by_dali(source, requests, view, num_workers, pin_memory, device=on)
    stream = torch.cuda.Stream(device) if device.type == "cuda" else None
    with contextlib.closing(decoded):
        while True:
            started = time.perf_counter()
            batch = next(decoded, None)
            if batch is None:
                return
            images = _to_device(batch, device, stream)
            yield Batch(
                images,
                batch.draw_ids,
                skipped=batch.skipped,
                changed=batch.changed,
                wait=time.perf_counter() - started,
                ready=batch.ready,
                bytes_read=batch.bytes_read,
                busy=batch.busy,
                redone=batch.redone,
                maps=None if batch.maps is None else batch.maps.to(device, non_blocking=pin_memory),
            )


def _to_device(batch: DecodedBatch, device: torch.device, stream: torch.cuda.Stream | None) -> torch.Tensor:
    """Returns the images on the device: DALI's as they are, those of the threads copied on ``stream``, or both."""
    rows, by_dali = batch.by_dali or ([], None)
    if by_dali is not None and len(rows) == len(batch.images):
        return by_dali.to(device)
    if stream is None:
        images = batch.images.to(device)
    else:  # beside the training that is queued on the current stream
        with torch.cuda.stream(stream):
            images = batch.images.to(device, non_blocking=True)
        torch.cuda.current_stream(device).wait_stream(stream)
        images.record_stream(torch.cuda.current_stream(device))
    if by_dali is not None:
        images[torch.tensor(rows, device=device)] = by_dali.to(device)
    return images
