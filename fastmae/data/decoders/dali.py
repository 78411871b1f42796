"""NVIDIA DALI: whole batches of JPEGs decoded, cropped, resized and mirrored, on the CPU or on the GPU.

It is fed our crops and flips and draws nothing itself, so it has no state that a restart could lose. It gets plain
JPEGs alone (``decode.plain_jpeg_shape``) and judges none: what it fails on is the pool's to decode or to refuse. Damage
in the middle of a file, which the pool refuses, DALI does not notice.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from fastmae.data.plan import Box
from fastmae.errors import UserError

AHEAD = 2
"""Batches that a pipeline is given before the first is asked for."""
CROP_WHILE_DECODING = {"cpu": True, "mixed": False}
"""Decode no more than the crop needs. On a GPU nvImageCodec 0.9 was reported to crash (its issue 55)."""


class DaliError(RuntimeError):
    """A batch that DALI could not decode; the message says why, in one line."""


@dataclass(frozen=True)
class Encoded:
    """A plain JPEG, and what is wanted of it."""

    data: bytes
    box: Box
    flip: bool


def why_not_installed() -> str:
    """Empty, or why DALI cannot be used: ``is not installed``, or does not load."""
    try:
        import nvidia.dali.fn  # noqa: F401
    except ModuleNotFoundError:
        return "is not installed"
    except (ImportError, OSError) as error:
        return f"does not load ({error})"
    return ""


def version() -> str:
    """DALI's, such as 2.0.0."""
    import nvidia.dali

    return str(nvidia.dali.__version__)


class DaliDecoder:
    """Decodes batches in the order in which they were given: ``schedule`` does not wait, ``collect`` does.

    Args:
        size: (height, width) of the results.
        in_chans: 1 or 3.
        batch_size: the largest batch.
        num_threads: of the CPU's part.
        device: where decoding, resizing and the results are.

    Raises:
        UserError: DALI cannot start here; from the methods as well, which start it again after it failed.
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
        """Gives DALI a batch of at least one."""
        self._given.append(batch)
        if self._failure is None:
            try:
                _feed(self._pipeline, batch)
            except Exception as error:  # those of DALI's C++ arrive as any of Python's; ``collect`` reports it
                self._failure = error

    def collect(self) -> torch.Tensor:
        """The oldest batch that was scheduled: uint8 [N, H, W, C] on the device, in DALI's memory.

        Raises:
            DaliError: it failed and is forgotten. An error ends a pipeline: those behind it are given to a new one.
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
        with torch.cuda.device(self._device):  # ordered after DALI's work on torch's stream; nobody waits
            (images,) = self._pipeline.outputs(cuda_stream=torch.cuda.current_stream())
            return torch.from_dlpack(images.as_tensor())

    def close(self) -> None:
        """Ends DALI's threads."""
        self._pipeline = None
        self._given.clear()


def _build(size: tuple[int, int], in_chans: int, batch_size: int, num_threads: int, device: torch.device) -> Any:
    """The pipeline, ready to be fed."""
    where = "mixed" if device.type == "cuda" else "cpu"
    device_id = None
    if device.type == "cuda":
        device_id = torch.cuda.current_device() if device.index is None else device.index
    try:
        pipeline = graph(size, in_chans, batch_size, num_threads, where, device_id)
        pipeline.build()
    except Exception as error:
        flag = "dali-gpu" if where == "mixed" else "dali-cpu"
        raise UserError(f"--decoder {flag}: DALI cannot start ({_in_one_line(error)}); use --decoder pool") from error
    return pipeline


def graph(
    size: tuple[int, int], in_chans: int, batch_size: int, num_threads: int, where: str, device_id: int | None
) -> Any:
    """A pipeline that is not built yet, so that no GPU is needed: the same for all but for where its operators run.

    Args:
        where: of the decoder, ``cpu`` or ``mixed``; what follows runs where its results are.
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
    pipeline.feed_input("encoded", [np.frombuffer(one.data, np.uint8) for one in batch])
    pipeline.feed_input("start", [np.array([one.box.top, one.box.left]) for one in batch])
    pipeline.feed_input("shape", [np.array([one.box.height, one.box.width]) for one in batch])
    pipeline.feed_input("flip", [np.array(one.flip, np.int32) for one in batch])
    pipeline.schedule_run()


def _in_one_line(error: Exception) -> str:
    """DALI's message without the traceback of the pipeline's definition that it holds."""
    lines = [line.strip(" :.") for line in str(error).splitlines()]
    lines = lines[lines.index("encountered") + 1 :] if "encountered" in lines else lines
    told = [line for line in lines if line and "pipeline object is no longer valid" not in line]
    return "; ".join(told) or type(error).__name__
