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

from fastmae.benchmarks.baselines.official_pipeline import OfficialPipeline, Requests, grey_levels
from fastmae.benchmarks.harness import (
    Samples,
    console,
    machine_name,
    quartiles,
    rates,
    refuse,
    speed_up,
    table,
    take_turns,
    wait_for,
    write_result,
)
from fastmae.benchmarks.images import ImagesConfig, make_jpegs, write_images
from fastmae.config import BenchLoaderConfig, check_bench
from fastmae.data.decode import BadImageError, crop_and_resize, decode, plain_jpeg_shape
from fastmae.data.decoders import dali
from fastmae.data.loader import PREFETCH, View, choose_decoder, default_workers, load_batches
from fastmae.data.parquet import ParquetSource
from fastmae.data.plan import EpochPlan, crop_draws, is_flipped, plan_epoch, random_box
from fastmae.data.sources import FolderSource, Source, open_train
from fastmae.errors import UserError
from fastmae.train.parallel import choose_device

FILES = 1000
SHARD = 500
SEED = 0
BASE, OFFICIAL = "threads", "official"
# Mean difference from the thread decoder's images in grey levels, beyond which an implementation is wrong, not merely
# another one.
TOLERANCE = 1.5
# So many images are decoded alone.
ALONE = 128


@dataclass(frozen=True)
class _Loader:
    """An implementation of loading, with the source that it loads from."""

    name: str
    source: Source
    start: Callable[[Source, Requests], Generator[torch.Tensor]]
    """Gives the batches of some requests, and ends with them."""
    ahead: int
    """Batches that it works on before they are asked for."""
    pixels: Callable[[torch.Tensor], torch.Tensor]
    """Of a batch, float32 from 0 to 255: [N, H, W, C]."""


@dataclass(frozen=True)
class _Setting:
    """The settings that all share."""

    sources: dict[str, Source]
    are_same: bool
    """Whether image i is the same in all of them."""
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
        stack.enter_context(_one_torch_thread())
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="fastmae-bench-"))
        setting = _setting(config, Path(folder))
        implementations = [*_official(setting, stack), *_fastmae(setting, config.image_decoders)]
        differences = _differences(setting, implementations)
        timed = [
            one for one in implementations if one.name in differences and differences[one.name]["mean"] <= TOLERANCE
        ]
        files = _some_files(setting)
        # Each process of the official pipeline makes whole batches, so a sample has as many of each.
        batches = -(-config.batches // setting.num_workers) * setting.num_workers
        step = batches + 2 * max((one.ahead for one in timed), default=0)
        samplers = {one.name: partial(_sample, setting, one, itertools.count(0, step), batches) for one in timed}
        samples: Samples = take_turns(samplers | _decoders_alone(setting, files), config.rounds)
        parts: dict[str, Samples] = {}
        for name, source in setting.sources.items():
            spent = [_parts(setting, holding_little(source), turn * step, batches) for turn in range(config.rounds)]
            parts[name] = {part: [seconds[part] for seconds in spent] for part in spent[0]}

    machine, kilobytes = machine_name(setting.device), sum(map(len, files)) / max(1, len(files)) / 1e3
    screen = console()
    for name, source in setting.sources.items():
        screen.print(f"{name}: {len(source):,} images {source.location}")
    screen.print(
        f"{kilobytes:.0f} KB on average, to {config.input_size}×{config.input_size}, batch {config.batch_size}, "
        f"{setting.num_workers} threads or processes, {machine}, files in the page cache, median of {config.rounds}"
    )
    screen.print(_speeds(samples, differences), _thread_times(parts), sep="\n")
    for name, reason in setting.skipped.items():
        print(f"{name} cannot run: {reason}", file=sys.stderr)
    wrong = [name for name, off in differences.items() if not off["mean"] <= TOLERANCE]
    for name in wrong:
        mean = differences[name]["mean"]
        refuse(f"{name} is off by {mean:.3f} grey levels on average")
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
            "one_thread": parts,
        }
        file = f"loader-{machine}-t{setting.num_workers}-n{config.batch_size}"
        print(write_result(config.output, file, command=command, settings=config, measured=measured))
    return 1 if wrong else 0


@contextlib.contextmanager
def _one_torch_thread() -> Iterator[None]:
    """As in the processes of a DataLoader, so that no resizing has more threads than were asked for."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


# --- implementations ------------------------------------------------------------------------------------------------


def _setting(config: BenchLoaderConfig, folder: Path) -> _Setting:
    """Opens the data, or makes them in ``folder``."""
    device = choose_device(config.device)
    sources: dict[str, Source] = {}
    skipped: dict[str, str] = {}
    if config.data_path is not None:
        sources = {path: open_train(path) for path in config.data_path}
    else:
        count = config.files or FILES
        jpegs = list(make_jpegs(ImagesConfig(folder=folder, count=count)))
        for kind in dict.fromkeys(config.kinds or ("folder", "tar", "parquet")):
            images = ImagesConfig(folder=folder / kind, count=count, kind=kind, shard=SHARD)
            try:
                write_images(images, made=jpegs)
                sources[kind] = open_train(str(images.folder))
            except UserError as error:
                skipped[kind] = error.as_on_the_command_line()
        if not sources:
            raise UserError("; ".join(skipped.values()))
    for name, source in sources.items():
        if source.kind != "folder":
            raise UserError(f"--data_path {name}: arrays need no decoding; name image files, tar or Parquet shards")
        if len(source) < config.batch_size:
            raise UserError(f"--batch_size {config.batch_size}: more than the {len(source)} images of {name}")
    return _Setting(
        sources=sources,
        are_same=config.data_path is None,
        view=View((config.input_size, config.input_size), 3, seed=SEED, scale=(0.2, 1.0), flip=True),
        batch_size=config.batch_size,
        num_workers=config.num_workers or default_workers(),
        device=device,
        skipped=skipped,
    )


def _official(setting: _Setting, stack: ExitStack) -> Iterator[_Loader]:
    """From the first folder, as it reads nothing else. Its processes end with the ``stack``."""
    for name, source in setting.sources.items():
        if isinstance(source, FolderSource):
            pipeline = OfficialPipeline(
                source.paths,
                size=setting.view.size[0],
                scale=setting.view.scale,
                seed=SEED,
                num_workers=setting.num_workers,
                device=setting.device,
            )
            stack.callback(pipeline.close)
            start = lambda _, requests, pipeline=pipeline: pipeline.batches(requests)  # noqa: E731
            yield _Loader(f"{OFFICIAL}, {name}", source, start, pipeline.ahead, grey_levels)
            return
    setting.skipped[OFFICIAL] = "it reads folders of image files; add one to --kinds or --data_path"


def _fastmae(setting: _Setting, decoders: Sequence[str]) -> Iterator[_Loader]:
    """Each decoder that can run, from each source."""
    for decoder in dict.fromkeys((BASE, *decoders)):
        try:
            choose_decoder(decoder, setting.device, None, 3)
        except UserError as error:
            setting.skipped[decoder] = error.as_on_the_command_line()
            continue
        for name, source in setting.sources.items():
            start = partial(_batches, setting, decoder)
            ahead = PREFETCH + (decoder != BASE) * dali.AHEAD
            yield _Loader(f"{decoder}, {name}", holding_little(source), start, ahead, torch.Tensor.float)


def holding_little(source: Source) -> Source:
    """Its own row groups, of which those few that are in use are kept: each is read anew in every epoch, as in a run on
    data that do not fit into memory."""
    return dataclasses.replace(source, held=1) if isinstance(source, ParquetSource) else source


def _batches(setting: _Setting, decoder: str, source: Source, requests: Requests) -> Generator[torch.Tensor]:
    batches = load_batches(
        source,
        requests,
        setting.view,
        device=setting.device,
        num_workers=setting.num_workers,
        pin_memory=setting.device.type == "cuda",
        decoder=decoder,
    )
    with closing(batches):
        for batch in batches:
            if batch.redone:
                raise UserError(
                    f"{decoder} fails on an image ({batch.redone}); leave {decoder} out of --image_decoders"
                )
            yield batch.images


def _differences(setting: _Setting, implementations: Sequence[_Loader]) -> dict[str, dict[str, float]]:
    """How far each first batch is from the thread decoder's, in grey levels. An implementation that fails is skipped.

    Images that were made are the same from all sources, so the reference is of the first of them.
    """

    def first(batches: Generator[torch.Tensor], pixels: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        with closing(batches):
            return pixels(next(batches))

    found = {}
    for one in implementations:
        reference = next(iter(setting.sources.values())) if setting.are_same else one.source
        requests = requests_of(reference, setting.batch_size, 0, 1)
        expected = first(_batches(setting, BASE, reference, requests), torch.Tensor.float)
        try:
            off = (first(one.start(one.source, requests), one.pixels) - expected).abs()
        except UserError as error:
            setting.skipped[one.name] = error.as_on_the_command_line()
            continue
        found[one.name] = {"mean": off.mean().item(), "largest": off.max().item()}
    return found


# --- samples -------------------------------------------------------------------------------------------------------


def requests_of(source: Source, batch_size: int, start: int, count: int) -> Requests:
    """So many batches of a training run, which has come to batch ``start``."""

    @functools.lru_cache(1)
    def plan(epoch: int) -> EpochPlan:
        return plan_epoch(SEED, epoch, len(source), batch_size, shards=source.shards)

    per_epoch = len(source) // batch_size
    return [plan(step // per_epoch).batch(step % per_epoch) for step in range(start, start + count)]


def _sample(setting: _Setting, one: _Loader, starts: Iterator[int], batches: int) -> float:
    """Seconds per image in a turn of an implementation."""
    requests = requests_of(one.source, setting.batch_size, next(starts), batches + 2 * one.ahead)
    into_the_page_cache(one.source, requests)
    with closing(one.start(one.source, requests)) as loaded:
        return window(loaded, lambda _: None, one.ahead, batches, setting.device) / setting.batch_size


def window(batches: Iterator[Any], use: Callable[[Any], object], ahead: int, count: int, device: torch.device) -> float:
    """Seconds per batch of ``count`` batches in the middle of a stream whose loader works ``ahead`` of what is asked.

    So many batches before the clock starts fill its queues, and as many after it stops keep its workers busy until
    then; they are waited for, so that no implementation decodes in another's turn.
    """
    for _ in range(ahead):
        use(next(batches))
    wait_for(device)
    begin = time.perf_counter()
    for _ in range(count):
        use(next(batches))
    wait_for(device)
    seconds = time.perf_counter() - begin
    for _ in batches:
        pass
    return seconds / count


def into_the_page_cache(source: Source, requests: Requests) -> None:
    source = holding_little(source)  # so that the caller's holds none of it
    for index in np.unique(np.concatenate([indices for indices, _ in requests])).tolist():
        with contextlib.suppress(OSError):  # whose turn it is will say so
            source.read(index)


def _parts(setting: _Setting, source: Source, start: int, batches: int) -> dict[str, float]:
    """Seconds per image that one thread of the thread decoder spends on each part of its work.

    Reading is timed on all batches, as some images pay for a row group and most do not; the rest on the first.
    """
    requests = requests_of(source, setting.batch_size, start, batches)
    into_the_page_cache(source, requests)
    begin = time.perf_counter()
    files = [_read(source, indices) for indices, _ in requests]
    read = (time.perf_counter() - begin) / max(1, sum(map(len, files)))
    spent = {"read": read, "decode": 0.0, "crop and resize": 0.0}
    out = np.empty((*setting.view.size, 3), np.uint8)
    draws = crop_draws(SEED, requests[0][1])
    for data, row in zip(files[0], draws, strict=False):  # fewer, if some cannot be read
        begin = time.perf_counter()
        try:
            pixels = decode(data, 3)
        except BadImageError:
            continue
        decoded = time.perf_counter()
        box = random_box(row, pixels.shape[0], pixels.shape[1], setting.view.scale)
        out[:] = crop_and_resize(pixels, box, is_flipped(row), setting.view.size)
        spent["crop and resize"] += (time.perf_counter() - decoded) / len(files[0])
        spent["decode"] += (decoded - begin) / len(files[0])
    return spent


def _read(source: Source, indices: np.ndarray) -> list[bytes | np.ndarray]:
    """Those that can be read."""
    found = []
    for index in indices.tolist():
        with contextlib.suppress(OSError):
            found.append(source.read(index))
    return found


# --- decoding alone ------------------------------------------------------------------------------------------------


def _some_files(setting: _Setting) -> list[bytes]:
    """Plain JPEGs of the first source, which every decoder takes."""
    source = holding_little(next(iter(setting.sources.values())))
    count = -(-ALONE // setting.batch_size)
    files = [
        data for indices, _ in requests_of(source, setting.batch_size, 0, count) for data in _read(source, indices)
    ]
    return [data for data in files[:ALONE] if isinstance(data, bytes) and _is_plain(data)]


def _is_plain(data: bytes) -> bool:
    try:
        return plain_jpeg_shape(data, 3) is not None
    except BadImageError:
        return False


def _decoders_alone(setting: _Setting, files: list[bytes]) -> dict[str, Callable[[], float]]:
    """Functions that decode whole ``files`` and give the seconds per image, with one thread and with all."""
    if not files:
        setting.skipped["decoding alone"] = "there is no plain JPEG among the first images"
        return {}
    found: dict[str, Callable[[], float]] = {}
    for threads in dict.fromkeys((1, setting.num_workers)):
        who = f"alone, {threads} thread{'s' if threads > 1 else ''}"
        found[f"simplejpeg {who}"] = partial(_decode_in_threads, _by_simplejpeg, files, threads)
        found[f"Pillow {who}"] = partial(_decode_in_threads, _by_pillow, files, threads)
    return found


def _by_simplejpeg(data: bytes) -> None:
    simplejpeg.decode_jpeg(data, colorspace="RGB")


def _by_pillow(data: bytes) -> None:
    Image.open(io.BytesIO(data)).convert("RGB")


def _decode_in_threads(decode_one: Callable[[bytes], None], files: list[bytes], threads: int) -> float:
    waiting = iter(files)  # shared, so that no thread is done long before the others

    def work(_: int) -> None:
        for data in waiting:
            decode_one(data)

    with ThreadPoolExecutor(threads) as pool:
        start = time.perf_counter()
        list(pool.map(work, range(threads)))
        return (time.perf_counter() - start) / len(files)


# --- tables --------------------------------------------------------------------------------------------------------


def _speeds(samples: Samples, differences: Mapping[str, Mapping[str, float]]) -> Table:
    base = next((name for name in samples if name.startswith(OFFICIAL)), None)
    rows = []
    for name, seconds in samples.items():
        slow, median, fast = rates(seconds)
        off = differences.get(name)
        over_base = f"{speed_up(samples, name, base):.2f}" if base else ""
        far = (f"{off['mean']:.3f}", f"{off['largest']:.1f}") if off else ("", "")
        rows.append((name, f"{median:.0f}", f"{slow:.0f} – {fast:.0f}", over_base, *far))
    columns = ("implementation", "images/s", "quartiles", f"speed-up over {OFFICIAL}", "grey levels off", "at most")
    return table(None, columns, rows)


def _thread_times(parts: Mapping[str, Samples]) -> Table:
    names = list(next(iter(parts.values())))
    rows = [(source, *(f"{1e6 * quartiles(times[name])[1]:.0f}" for name in names)) for source, times in parts.items()]
    return table(None, ("one decoding thread, from", *(f"{name}, µs" for name in names)), rows)
