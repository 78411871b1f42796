"""NVIDIA DALI: whole batches of JPEGs decoded, cropped, resized and mirrored, on the CPU or on the GPU.

It is fed our crops and flips and draws nothing itself, so it has no state that a restart could lose. It gets plain
JPEGs alone (``decode.plain_jpeg_shape``). The threads read all files, decode everything else, and decode a batch that
DALI fails on, so which images are usable is decided by them. DALI does not notice damage in the middle of a file, which
the threads refuse.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from fastmae.data.decoders.threads import PREFETCH, DecodedBatch, DecodeThreads, PendingBatch, Requests
from fastmae.data.sample import Encoded, View
from fastmae.data.sources import Source
from fastmae.errors import SettingError

AHEAD = 2
"""Batches that a pipeline is given before the first is asked for."""
CROP_WHILE_DECODING = {"cpu": True, "mixed": False}
"""Decode no more than the crop needs. On a GPU nvImageCodec 0.9 was reported to crash (its issue 55)."""


class DaliError(RuntimeError):
    """A batch that DALI could not decode; the message says why, in one line."""


def why_not_installed() -> str:
    """Returns why DALI cannot be used (``is not installed``, ``does not load …``), or an empty text if it can."""
    try:
        import nvidia.dali.fn  # noqa: F401
    except ModuleNotFoundError:
        return "is not installed"
    except (ImportError, OSError) as error:
        return f"does not load ({error})"
    return ""


def version() -> str:
    """Returns the version of DALI, such as 2.0.0."""
    import nvidia.dali

    return str(nvidia.dali.__version__)


# --- batches ----------------------------------------------------------------------------------------------------------


def decode_by_dali(
    source: Source, requests: Requests, view: View, num_workers: int, pin_memory: bool, *, device: torch.device
) -> Generator[DecodedBatch]:
    """Yields the requested batches in order: plain JPEGs decoded by DALI, all else by threads.

    Other arguments and errors are those of ``loader.load_batches``. All threads end with the iterator, however it ends.

    Args:
        device: where DALI decodes.
    """
    threads = DecodeThreads(source, view, num_workers, pin_memory)
    decoder: DaliDecoder | None = None
    ahead: deque[_Pending] = deque()
    waiting = iter(requests)
    try:
        while True:
            while len(ahead) < PREFETCH + AHEAD and (request := next(waiting, None)) is not None:
                ahead.append(_Pending(threads.start(*request, for_dali=True)))
            if not ahead:
                return
            if decoder is None:
                batch_size = len(ahead[0].by_threads.samples)
                decoder = DaliDecoder(
                    view.size, view.in_chans, batch_size=batch_size, num_threads=num_workers, device=device
                )
            _schedule(decoder, ahead)
            oldest = ahead.popleft()
            by_dali, failure = _collect(decoder, oldest)
            yield oldest.by_threads.finish((batch.by_threads for batch in ahead), by_dali, failure)
    finally:
        threads.close()
        if decoder is not None:
            decoder.close()


@dataclass
class _Pending:
    """A batch that the threads read, and DALI decodes as far as it can."""

    by_threads: PendingBatch
    encoded: dict[int, Encoded] | None = None
    """DALI's part, by row; None as long as DALI does not have it."""


def _schedule(decoder: DaliDecoder, ahead: deque[_Pending]) -> None:
    """Gives DALI its part of the oldest ``AHEAD`` batches, and waits for the files of the very oldest alone."""
    for number, batch in enumerate(itertools.islice(ahead, AHEAD)):
        if batch.encoded is not None:
            continue
        if number > 0 and not batch.by_threads.is_done():
            return
        samples = [sample.result() for sample in batch.by_threads.samples]
        batch.encoded = {row: sample.encoded for row, sample in enumerate(samples) if sample.encoded is not None}
        if batch.encoded:
            decoder.schedule(list(batch.encoded.values()))


def _collect(decoder: DaliDecoder, batch: _Pending) -> tuple[tuple[list[int], torch.Tensor] | None, str]:
    """Returns the rows and images of a batch that DALI decoded, or why it failed; then the threads decode its part."""
    if not batch.encoded:
        return None, ""
    try:
        return (list(batch.encoded), decoder.collect()), ""
    except DaliError as error:
        for row in batch.encoded:
            batch.by_threads.samples[row] = batch.by_threads.load(row, False)
        return None, str(error)


# --- DALI itself ------------------------------------------------------------------------------------------------------


class DaliDecoder:
    """Decodes batches in the order in which they were given: ``schedule`` does not wait, ``collect`` does.

    Args:
        size: (height, width) of the results.
        in_chans: 1 or 3.
        batch_size: the number of images in the largest batch.
        num_threads: threads for DALI's work on the CPU.
        device: where the images are decoded and resized, and where the results are.

    Raises:
        SettingError: DALI cannot start here. The methods raise it as well, as they start DALI again after it failed.
    """

    def __init__(
        self, size: tuple[int, int], in_chans: int, *, batch_size: int, num_threads: int, device: torch.device
    ) -> None:
        self._device = device
        self._start = lambda: _build(size, in_chans, batch_size, num_threads, device)
        self._pipeline = self._start()
        self._given: deque[Sequence[Encoded]] = deque()
        self._failure: Exception | None = None

    def schedule(self, batch: Sequence[Encoded]) -> None:
        """Gives DALI a batch of at least one image."""
        self._given.append(batch)
        if self._failure is None:
            try:
                _feed(self._pipeline, batch)
            except Exception as error:  # those of DALI's C++ arrive as any of Python's; ``collect`` reports it
                self._failure = error

    def collect(self) -> torch.Tensor:
        """Waits for the oldest batch that was scheduled: uint8 [N, H, W, C] on the device, in DALI's memory.

        Raises:
            DaliError: DALI failed on this batch and forgets it. An error ends a pipeline, so the batches behind it are
                given to a new one.
        """
        self._given.popleft()
        if self._failure is None:
            try:
                return self._outputs()
            except Exception as error:
                self._failure = error
        message = _in_one_line(self._failure)
        self._pipeline, self._failure = self._start(), None
        later, self._given = self._given, deque()
        for batch in later:
            self.schedule(batch)
        raise DaliError(message)

    def _outputs(self) -> torch.Tensor:
        if self._device.type != "cuda":
            (images,) = self._pipeline.outputs()
            return torch.from_dlpack(images.as_tensor())
        with torch.cuda.device(self._device):  # ordered after DALI's work on torch's stream, without waiting
            (images,) = self._pipeline.outputs(cuda_stream=torch.cuda.current_stream())
            return torch.from_dlpack(images.as_tensor())

    def close(self) -> None:
        """Ends DALI's threads."""
        self._pipeline = None
        self._given.clear()


def _build(size: tuple[int, int], in_chans: int, batch_size: int, num_threads: int, device: torch.device) -> Any:
    """Returns a pipeline that is ready to be fed."""
    where = "mixed" if device.type == "cuda" else "cpu"
    device_id = None
    if device.type == "cuda":
        device_id = torch.cuda.current_device() if device.index is None else device.index
    try:
        pipeline = graph(size, in_chans, batch_size, num_threads, where, device_id)
        pipeline.build()
    except Exception as error:
        decoder, reason = "dali-gpu" if where == "mixed" else "dali-cpu", _in_one_line(error)
        problem = f"DALI cannot start ({reason}); use --image_decoder=threads"
        raise SettingError("image_decoder", decoder, problem) from error
    return pipeline


def graph(
    size: tuple[int, int], in_chans: int, batch_size: int, num_threads: int, where: str, device_id: int | None
) -> Any:
    """Returns a pipeline that is not built yet, so that even one for a GPU can be made without a GPU.

    Args:
        where: where the JPEG decoder runs: ``cpu``, or ``mixed`` for a GPU that the CPU helps. The operators behind it
            run where its results are.
    """
    from nvidia.dali import Pipeline, fn, types

    # A depth of 1 stops DALI from demanding several batches before the first; it takes AHEAD of them all the same.
    pipeline = Pipeline(batch_size, num_threads, device_id, prefetch_queue_depth=1, exec_dynamic=True)
    with pipeline:
        encoded = fn.external_source(name="encoded", dtype=types.UINT8, ndim=1)
        start = fn.external_source(name="start", dtype=types.INT64, ndim=1)
        shape = fn.external_source(name="shape", dtype=types.INT64, ndim=1)
        flip = fn.external_source(name="flip", dtype=types.INT32, ndim=0)
        options = {
            "device": where,
            "output_type": types.GRAY if in_chans == 1 else types.RGB,
            "adjust_orientation": False,  # EXIF rotation is not applied, as published
            "jpeg_fancy_upsampling": True,  # of chroma, as libjpeg-turbo does
        }
        if CROP_WHILE_DECODING[where]:
            region = fn.decoders.image_slice(encoded, start, shape, axes=[0, 1], **options)
        else:
            region = fn.slice(fn.decoders.image(encoded, **options), start, shape, axes=[0, 1])
        resized = fn.resize(region, size=list(size), interp_type=types.INTERP_CUBIC, antialias=True)
        pipeline.set_outputs(fn.flip(resized, horizontal=flip))
    return pipeline


def _feed(pipeline: Any, batch: Sequence[Encoded]) -> None:
    pipeline.feed_input("encoded", [np.frombuffer(image.data, np.uint8) for image in batch])
    pipeline.feed_input("start", [np.array([image.box.top, image.box.left]) for image in batch])
    pipeline.feed_input("shape", [np.array([image.box.height, image.box.width]) for image in batch])
    pipeline.feed_input("flip", [np.array(image.flip, np.int32) for image in batch])
    pipeline.schedule_run()


def _in_one_line(error: Exception) -> str:
    """Returns DALI's message without the traceback of the pipeline's definition that it holds."""
    lines = [line.strip(" :.") for line in str(error).splitlines()]
    lines = lines[lines.index("encountered") + 1 :] if "encountered" in lines else lines
    reasons = [line for line in lines if line and "pipeline object is no longer valid" not in line]
    return "; ".join(reasons) or type(error).__name__
