"""How many images a second does each decoder decode, crop, resize and mirror?

    fastmae bench loader --output benchmarks/results                                # on a CPU: pool, dali-cpu
    fastmae bench loader --data_path ~/imagenet --batch_size 256 --device cuda      # on a GPU: dali-gpu as well

The files are read into memory before, so that no disk is timed. A sample starts when the loader's queue is full and
ends when as many more batches have come as were asked for, so that neither filling nor draining it counts. A decoder
whose images are not the pool's is not timed.
"""

from __future__ import annotations

import itertools
import os
import sys
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch

from fastmae.benchmarks.images import make_jpeg
from fastmae.benchmarks.timing import Samples, machine_name, quartiles, times_as_fast, write_result
from fastmae.config import BenchLoaderConfig, check_bench
from fastmae.data import dali
from fastmae.data.decode import plain_jpeg_shape
from fastmae.data.loader import PREFETCH, Batch, View, choose_decoder, default_workers, load_batches
from fastmae.data.sources import open_train
from fastmae.errors import UserError
from fastmae.train.parallel import choose_device

Load = Callable[..., Generator[Batch]]
PHOTOS = 48
BASE = "pool"
# Mean difference from the pool's images in grey levels, beyond which a decoder is wrong and not merely another one.
TOLERANCE = 1.5


@dataclass(frozen=True)
class _InMemory:
    """What the loader reads of a source, from files whose bytes are held."""

    files: tuple[bytes, ...]
    kind: str = "folder"

    def __len__(self) -> int:
        return len(self.files)

    def read(self, index: int) -> bytes:
        return self.files[index]

    def name(self, index: int) -> str:
        return f"file {index}"


def bench_loader(config: BenchLoaderConfig, command: Sequence[str]) -> int:
    """Prints images a second, writes what was asked for, and returns 1 if a decoder is wrong, otherwise 0.

    Raises:
        UserError: settings that cannot work.
    """
    check_bench(config)
    device = choose_device(config.device)
    source: Any = _InMemory(_files(config))
    size = config.input_size
    num_workers = config.num_workers or default_workers()
    load = partial(
        load_batches,
        source,
        view=View((size, size), 3, seed=0, scale=(0.2, 1.0), flip=True),
        device=device,
        num_workers=num_workers,
        pin_memory=device.type == "cuda",
    )

    timed, left_out, differences = [], {}, {}
    for name in dict.fromkeys((BASE, *config.decoders)):
        try:
            choose_decoder(name, device, source, 3)
            differences[name] = _difference(load, _requests(config, len(source)), name)
        except UserError as error:
            left_out[name] = str(error)
            continue
        if differences[name]["mean"] <= TOLERANCE:
            timed.append(name)
    samples: Samples = {name: [] for name in timed}
    for _ in range(config.rounds):
        for name in timed:
            seconds = _seconds(load(_requests(config, len(source)), decoder=name), config.batches, device)
            samples[name].append(seconds / (config.batches * config.batch_size))

    kilobytes = sum(map(len, source.files)) / len(source) / 1e3
    print(
        f"{len(source)} JPEGs of {kilobytes:.0f} KB on average to {size}×{size}, {num_workers} threads, batch "
        f"{config.batch_size}, {machine_name(device)}, median of {config.rounds}"
    )
    for name, seconds_each in samples.items():
        ratio, off = times_as_fast(samples, name, BASE), differences[name]
        print(
            f"  {name:10} {1 / quartiles(seconds_each)[1]:10.1f} images/s   {ratio:.2f} times {BASE}   "
            f"off by {off['mean']:.3f} grey levels on average, {off['largest']:.0f} at most"
        )
    for name, reason in left_out.items():
        print(f"  {name} cannot run: {reason}", file=sys.stderr)
    wrong = [name for name in differences if name not in timed]
    for name in wrong:
        mean = differences[name]["mean"]
        print(f"{name} is off by {mean:.3f} grey levels on average, so no time is reported for it", file=sys.stderr)
    if config.output is not None:
        measured = {
            "files": {"count": len(source), "kilobytes": kilobytes},
            "num_workers": num_workers,
            "load": os.getloadavg(),
            "differences": differences,
            "left_out": left_out,
            "seconds": samples,
        }
        file = f"loader-{machine_name(device)}-t{num_workers}-n{config.batch_size}"
        print(write_result(config.output, file, command=command, settings=config, measured=measured))
    return 1 if wrong else 0


def _files(config: BenchLoaderConfig) -> tuple[bytes, ...]:
    if config.data_path is None:
        return tuple(make_jpeg(0, index) for index in range(PHOTOS))
    source = open_train(config.data_path)
    files = []
    for index in range(len(source)):
        data = source.read(index)
        if isinstance(data, bytes) and plain_jpeg_shape(data, 3) is not None:
            files.append(data)
        if len(files) == config.files:
            break
    if not files:
        raise UserError(f"--data_path {config.data_path}: no plain JPEG in it; name a folder of them")
    return tuple(files)


def _requests(config: BenchLoaderConfig, length: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Without end; every batch has other crops."""
    for start in itertools.count(step=config.batch_size):
        draw_ids = np.arange(start, start + config.batch_size)
        yield draw_ids % length, draw_ids


def _difference(load: Load, requests: Iterable[tuple[np.ndarray, np.ndarray]], name: str) -> dict[str, float]:
    """How far a batch is from the pool's, in grey levels; a failure of DALI is a UserError."""
    request = next(iter(requests))
    theirs, pools = next(load([request], decoder=name)), next(load([request], decoder=BASE))
    if theirs.redone:
        raise UserError(theirs.redone)
    off = (theirs.images.int() - pools.images.int()).abs().float()
    return {"mean": off.mean().item(), "largest": off.max().item()}


def _seconds(batches: Generator[Batch], count: int, device: torch.device) -> float:
    """That ``count`` batches take once as many as the loader prefetches have come."""
    with closing(batches):
        for _ in range(PREFETCH + dali.AHEAD):
            next(batches)
        _wait_for(device)
        start = time.perf_counter()
        for _ in range(count):
            next(batches)
        _wait_for(device)
        return time.perf_counter() - start


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
