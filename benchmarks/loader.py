"""How many images a second does a loader give, beside the official pipeline, and how much of that is decoding?

    fastmae bench loader --output benchmarks/results                                     # on a CPU: threads, dali-cpu
    fastmae bench loader --data_path ~/imagenet ~/imagenet-tars --device cuda            # on a GPU: dali-gpu as well

All load in the order of a training run, from files to crops on the device. The official pipeline is torch's
DataLoader with worker processes and Pillow (baselines/official_pipeline.py); ours are the decoders, each from a folder,
from tar shards and from Parquet files. Decoding alone, of bytes in memory, is what no loader with that decoder can
surpass. An implementation that makes other images than the thread decoder does is not timed.

What is compared is code, not disks: a turn's files are read right before it, so they lie in the page cache. All take
turns (``window``). Worker processes are started once, threads and DALI in each turn, both before the clock. torch has
one thread, as in worker processes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import io
import itertools
import os
import sys
import tempfile
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import simplejpeg
import torch
from PIL import Image
from rich.table import Table

from fastmae.benchmarks import harness
from fastmae.benchmarks.baselines.official_pipeline import OfficialPipeline, Requests, grey_levels
from fastmae.benchmarks.harness import Samples
from fastmae.benchmarks.images import ImagesConfig, make_jpegs, write_images
from fastmae.config import BenchLoaderConfig, check_bench
from fastmae.data.decode import BadImageError, decode, plain_jpeg_shape
from fastmae.data.decoders import dali
from fastmae.data.loader import PREFETCH, View, choose_decoder, default_workers, load_batches
from fastmae.data.parquet import ParquetSource
from fastmae.data.plan import EpochPlan, crop_draws, is_flipped, plan_epoch, random_box
from fastmae.data.reading import Reading
from fastmae.data.resize import crop_and_resize
from fastmae.data.sources import FolderSource, Source, open_train
from fastmae.errors import UserError
from fastmae.screen import printable
from fastmae.train.parallel import choose_device

FILES, SHARD, SEED = 1000, 500, 0
BASE, OFFICIAL = "threads", "official"
TOLERANCE = 1.5  # mean difference from the thread decoder's images in grey levels, beyond which images are wrong
ALONE = 128  # images that are decoded alone, by both libraries
LIBRARIES: dict[str, Callable[[bytes], object]] = {
    "simplejpeg": lambda data: simplejpeg.decode_jpeg(data, colorspace="RGB"),
    "Pillow": lambda data: Image.open(io.BytesIO(data)).convert("RGB"),
}


@dataclass(frozen=True)
class _Loader:
    """An implementation of loading from one source."""

    name: str
    source: Source
    start: Callable[[Requests], Generator[torch.Tensor]]
    """Gives the batches of some requests: uint8 pixels, or normalised floats."""
    ahead: int
    """Batches that it works on before they are asked for."""


@dataclass(frozen=True)
class _Setting:
    """What all implementations share."""

    sources: dict[str, Source]
    view: View
    batch_size: int
    num_workers: int
    device: torch.device
    skipped: dict[str, str]
    """Why an implementation cannot run; filled in as it shows."""


def bench_loader(config: BenchLoaderConfig, command: Sequence[str]) -> int:
    """Prints images a second, writes what was asked for, and returns 1 if an implementation is wrong, otherwise 0.

    Raises:
        UserError: settings that cannot work.
    """
    check_bench(config)
    with ExitStack() as stack:
        stack.callback(torch.set_num_threads, torch.get_num_threads())
        torch.set_num_threads(1)
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="fastmae-bench-"))
        setting = _setting(config, Path(folder))
        implementations = list(_implementations(setting, config.image_decoders, stack))
        # Images that were made are the same from all sources, so all are compared with those of the first.
        reference = next(iter(setting.sources.values())) if config.data_path is None else None
        differences = _differences(setting, implementations, reference)
        wrong = {name: off["mean"] for name, off in differences.items() if not off["mean"] <= TOLERANCE}
        timed = [one for one in implementations if one.name in differences and one.name not in wrong]
        # Each process of the official pipeline makes whole batches, so a sample has as many of each.
        batches = -(-config.batches // setting.num_workers) * setting.num_workers
        step = batches + 2 * max((one.ahead for one in timed), default=0)
        samplers = {one.name: partial(_sample, setting, one, itertools.count(0, step), batches) for one in timed}
        files = _plain_jpegs(setting)
        samples: Samples = harness.take_turns(samplers | _decoders_alone(setting, files), config.rounds)
        one_thread: dict[str, Samples] = {}
        for name, source in setting.sources.items():
            turns = [_one_thread(setting, source, turn * step, batches) for turn in range(config.rounds)]
            one_thread[name] = {part: [seconds[part] for seconds in turns] for part in turns[0]}

    machine, kilobytes = harness.machine_name(setting.device), sum(map(len, files)) / max(1, len(files)) / 1e3
    screen = harness.console()
    for name, source in setting.sources.items():
        screen.print(printable(f"{name}: {len(source):,} images {source.location}"))
    screen.print(
        f"{kilobytes:.0f} KB on average, to {config.input_size}×{config.input_size}, batch {config.batch_size}, "
        f"{setting.num_workers} threads or processes, {machine}, files in the page cache, median of {config.rounds}"
    )
    screen.print(_speeds(samples, differences), _thread_times(one_thread), sep="\n")
    for name, reason in setting.skipped.items():
        print(f"{name} cannot run: {reason}", file=sys.stderr)
    for name, mean in wrong.items():
        harness.refuse(f"{name} is off by {mean:.3f} grey levels on average")
    if config.output is not None:
        measured = {
            "images": {name: len(source) for name, source in setting.sources.items()},
            "kilobytes": kilobytes,
            "num_workers": setting.num_workers,
            "batches": batches,
            "load": os.getloadavg(),
            "differences": differences,
            "skipped": setting.skipped,
            "seconds": samples,
            "one_thread": one_thread,
        }
        name = f"loader-{machine}-t{setting.num_workers}-n{config.batch_size}"
        print(harness.write_result(config.output, name, command=command, settings=config, measured=measured))
    return 1 if wrong else 0


def _setting(config: BenchLoaderConfig, folder: Path) -> _Setting:
    """Opens the data, or makes them in ``folder``."""
    device = choose_device(config.device)
    sources = {path: open_train(path) for path in config.data_path or ()}
    skipped: dict[str, str] = {}
    if config.data_path is None:
        count = config.files or FILES
        jpegs = list(make_jpegs(ImagesConfig(folder=folder, count=count)))
        for kind in dict.fromkeys(config.kinds or ("folder", "tar", "parquet")):
            try:
                write_images(ImagesConfig(folder=folder / kind, count=count, kind=kind, shard=SHARD), made=jpegs)
                sources[kind] = open_train(str(folder / kind))
            except UserError as error:
                skipped[kind] = error.as_on_the_command_line()
        if not sources:
            raise UserError("; ".join(skipped.values()))
    for name, source in sources.items():
        if source.kind != "folder":
            raise UserError(f"--data_path {name}: arrays need no decoding; name image files, tar or Parquet shards")
        if len(source) < config.batch_size:
            raise UserError(f"--batch_size {config.batch_size}: more than the {len(source)} images of {name}")
    view = View((config.input_size, config.input_size), Reading(3), seed=SEED, scale=(0.2, 1.0), flip=True)
    return _Setting(sources, view, config.batch_size, config.num_workers or default_workers(), device, skipped)


def holding_little(source: Source) -> Source:
    """The source with row groups of its own, of which it keeps only those in use: each is read anew in every epoch, as
    in a run on data that do not fit into memory."""
    return dataclasses.replace(source, held=1) if isinstance(source, ParquetSource) else source


# --- implementations ------------------------------------------------------------------------------------------------


def _implementations(setting: _Setting, decoders: Sequence[str], stack: ExitStack) -> Iterator[_Loader]:
    """The official pipeline from the first folder, whose processes end with the ``stack``, and each decoder that can
    run, from each source."""
    folders = [(name, source) for name, source in setting.sources.items() if isinstance(source, FolderSource)]
    for name, folder in folders[:1]:
        size, scale, workers = setting.view.size[0], setting.view.scale, setting.num_workers
        pipeline = OfficialPipeline(
            folder.paths, size=size, scale=scale, seed=SEED, num_workers=workers, device=setting.device
        )
        stack.callback(pipeline.close)
        yield _Loader(f"{OFFICIAL}, {name}", folder, pipeline.batches, pipeline.ahead)
    if not folders:
        setting.skipped[OFFICIAL] = "it reads folders of image files; add one to --kinds or --data_path"
    for decoder in dict.fromkeys((BASE, *decoders)):
        try:
            choose_decoder(decoder, setting.device, None, Reading(3))
        except UserError as error:
            setting.skipped[decoder] = error.as_on_the_command_line()
            continue
        for name, source in setting.sources.items():
            own = holding_little(source)
            ahead = PREFETCH + (decoder != BASE) * dali.AHEAD
            yield _Loader(f"{decoder}, {name}", own, partial(_batches, setting, decoder, own), ahead)


def _batches(setting: _Setting, decoder: str, source: Source, requests: Requests) -> Generator[torch.Tensor]:
    device, workers = setting.device, setting.num_workers
    pin_memory = device.type == "cuda"
    batches = load_batches(
        source, requests, setting.view, device=device, num_workers=workers, pin_memory=pin_memory, decoder=decoder
    )
    with closing(batches):
        for batch in batches:
            if batch.redone:
                why = f"{decoder} fails on an image ({batch.redone})"
                raise UserError(f"{why}; leave {decoder} out of --image_decoders")
            yield batch.images


def _differences(
    setting: _Setting, implementations: Sequence[_Loader], reference: Source | None
) -> dict[str, dict[str, float]]:
    """How far each first batch is from the thread decoder's, in grey levels. An implementation that fails is skipped.

    The thread decoder loads from ``reference``; None: from the implementation's own source.
    """
    differences = {}
    for one in implementations:
        source = reference or one.source
        requests = requests_of(source, setting.batch_size, 0, 1)
        (expected,) = _batches(setting, BASE, source, requests)
        try:
            (images,) = one.start(requests)
        except UserError as error:
            setting.skipped[one.name] = error.as_on_the_command_line()
            continue
        pixels = grey_levels(images) if images.is_floating_point() else images.float()
        off = (pixels - expected.float()).abs()
        differences[one.name] = {"mean": off.mean().item(), "largest": off.max().item()}
    return differences


# --- samples -------------------------------------------------------------------------------------------------------


def requests_of(source: Source, batch_size: int, start: int, count: int) -> Requests:
    """``count`` batches of a training run, which has come to batch ``start``."""

    @functools.lru_cache(1)
    def plan(epoch: int) -> EpochPlan:
        return plan_epoch(SEED, epoch, len(source), batch_size, shards=source.shards)

    per_epoch = len(source) // batch_size
    return [plan(step // per_epoch).batch(step % per_epoch) for step in range(start, start + count)]


def _sample(setting: _Setting, one: _Loader, starts: Iterator[int], batches: int) -> float:
    """Seconds per image in a turn of an implementation."""
    requests = requests_of(one.source, setting.batch_size, next(starts), batches + 2 * one.ahead)
    into_the_page_cache(one.source, requests)
    with closing(one.start(requests)) as loaded:
        return window(loaded, lambda _: None, one.ahead, batches, setting.device) / setting.batch_size


def window(batches: Iterator[Any], use: Callable[[Any], object], ahead: int, count: int, device: torch.device) -> float:
    """Seconds per batch of ``count`` batches in the middle of a stream whose loader works ``ahead`` of what is asked.

    ``ahead`` batches before the clock starts fill its queues, and as many after it stops keep its workers busy until
    then; they are waited for, so that no implementation decodes in another's turn.
    """
    for _ in range(ahead):
        use(next(batches))
    harness.wait_for(device)
    begin = time.perf_counter()
    for _ in range(count):
        use(next(batches))
    harness.wait_for(device)
    seconds = time.perf_counter() - begin
    for _ in batches:
        pass
    return seconds / count


def into_the_page_cache(source: Source, requests: Requests) -> None:
    # From a copy, so that the caller's source holds none of it.
    _read(holding_little(source), np.unique(np.concatenate([indices for indices, _ in requests])))


def _read(source: Source, indices: np.ndarray) -> list[bytes | np.ndarray]:
    """The images that can be read; the implementation that meets another names it."""
    images = []
    for index in indices.tolist():
        with contextlib.suppress(OSError):
            images.append(source.read(index))
    return images


def _one_thread(setting: _Setting, source: Source, start: int, batches: int) -> dict[str, float]:
    """Seconds per image that one thread of the thread decoder spends on each part of its work.

    Reading is timed on all batches, as some images pay for a row group and most do not; the rest on the first.
    """
    requests = requests_of(source, setting.batch_size, start, batches)
    into_the_page_cache(source, requests)
    source = holding_little(source)
    begin = time.perf_counter()
    files = [_read(source, indices) for indices, _ in requests]
    read = (time.perf_counter() - begin) / max(1, sum(map(len, files)))
    spent = {"read": read, "decode": 0.0, "crop and resize": 0.0}
    out = np.empty((*setting.view.size, 3), np.uint8)
    for data, draws in zip(files[0], crop_draws(SEED, requests[0][1]), strict=False):  # fewer, if some cannot be read
        begin = time.perf_counter()
        try:
            pixels = decode(data, Reading(3))
        except BadImageError:
            continue
        decoded = time.perf_counter()
        box = random_box(draws, pixels.shape[0], pixels.shape[1], setting.view.scale)
        out[:] = crop_and_resize(pixels, box, is_flipped(draws), setting.view.size)
        spent["crop and resize"] += (time.perf_counter() - decoded) / len(files[0])
        spent["decode"] += (decoded - begin) / len(files[0])
    return spent


# --- decoding alone ------------------------------------------------------------------------------------------------


def _plain_jpegs(setting: _Setting) -> list[bytes]:
    """The first images of the first source that are plain JPEGs, which every decoder takes."""
    source = holding_little(next(iter(setting.sources.values())))
    requests = requests_of(source, setting.batch_size, 0, -(-ALONE // setting.batch_size))
    jpegs = []
    for data in _read(source, np.concatenate([indices for indices, _ in requests])[:ALONE]):
        with contextlib.suppress(BadImageError):
            if isinstance(data, bytes) and plain_jpeg_shape(data, Reading(3)) is not None:
                jpegs.append(data)
    return jpegs


def _decoders_alone(setting: _Setting, files: list[bytes]) -> dict[str, Callable[[], float]]:
    """Functions that decode whole ``files`` and give the seconds per image, with one thread and with all."""
    if not files:
        setting.skipped["decoding alone"] = "there is no plain JPEG among the first images"
        return {}

    def seconds(decode_one: Callable[[bytes], object], threads: int) -> float:
        waiting = iter(files)  # shared, so that no thread is done long before the others

        def work(_: int) -> None:
            for data in waiting:
                decode_one(data)  # pixels are not kept, as memory for all of them would take time too

        with ThreadPoolExecutor(threads) as pool:
            begin = time.perf_counter()
            list(pool.map(work, range(threads)))
            return (time.perf_counter() - begin) / len(files)

    samplers: dict[str, Callable[[], float]] = {}
    for threads in dict.fromkeys((1, setting.num_workers)):
        for name, decode_one in LIBRARIES.items():
            samplers[f"{name} alone, {threads} thread{'s' if threads > 1 else ''}"] = partial(
                seconds, decode_one, threads
            )
    return samplers


# --- tables --------------------------------------------------------------------------------------------------------


def _speeds(samples: Samples, differences: Mapping[str, Mapping[str, float]]) -> Table:
    base = next((name for name in samples if name.startswith(OFFICIAL)), None)
    rows = []
    for name, seconds in samples.items():
        slow, median, fast = harness.rates(seconds)
        off = differences.get(name)
        over_base = f"{harness.speed_up(samples, name, base):.2f}" if base else ""
        far = (f"{off['mean']:.3f}", f"{off['largest']:.1f}") if off else ("", "")
        rows.append((name, f"{median:.0f}", f"{slow:.0f} – {fast:.0f}", over_base, *far))
    columns = ("implementation", "images/s", "quartiles", f"speed-up over {OFFICIAL}", "grey levels off", "at most")
    return harness.table(None, columns, rows)


def _thread_times(one_thread: Mapping[str, Samples]) -> Table:
    parts = list(next(iter(one_thread.values())))
    rows = [
        (name, *(f"{1e6 * harness.quartiles(times[part])[1]:.0f}" for part in parts))
        for name, times in one_thread.items()
    ]
    return harness.table(None, ("one decoding thread, from", *(f"{part}, µs" for part in parts)), rows)
