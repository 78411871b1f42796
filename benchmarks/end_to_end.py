"""How many images a second are trained on, from JPEG files to new weights, and how much of the time does loading cost?

    fastmae bench end-to-end --output benchmarks/results                                                # on a CPU
    fastmae bench end-to-end --model mae_vit_large_patch16 --compile block --image_decoder dali-gpu     # on a GPU

Our loader feeds our step, as in a run. Beside it: our step on batches that lie ready on the device, which no loader
can surpass; and the official loop, fed by the official pipeline. No time is reported unless our losses on files are
those of the same images decoded beforehand, and the official loop's are those but for another libjpeg and resize.
A turn is a window of steps on files in the page cache. On a CPU decoding and the step share the cores.
"""

from __future__ import annotations

import itertools
import os
import tempfile
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastmae.benchmarks import harness
from fastmae.benchmarks.baselines.official_pipeline import OfficialPipeline, Requests
from fastmae.benchmarks.harness import rates, speed_up
from fastmae.benchmarks.images import ImagesConfig, make_jpegs, write_images
from fastmae.benchmarks.loader import SEED, holding_little, into_the_page_cache, requests_of, window
from fastmae.benchmarks.step import LOSS_TOLERANCE, MASK_RATIO, STEP, Implementation, Inputs, ours, theirs
from fastmae.config import BenchEndToEndConfig, PretrainConfig, check_bench
from fastmae.data.decoders import dali
from fastmae.data.loader import PREFETCH, View, choose_decoder, default_workers, load_batches, load_sample
from fastmae.data.plan import crop_draws
from fastmae.data.reading import Reading
from fastmae.data.sources import FolderSource, Source, open_train
from fastmae.errors import UserError
from fastmae.model.flops import flops_per_image
from fastmae.model.mae import MaskedAutoencoderViT
from fastmae.model.presets import PRESETS
from fastmae.ops.random_masking import random_masking
from fastmae.train import parallel
from fastmae.train.precision import choose_precision

SCALE = (0.2, 1.0)
FILES, BATCHES_OF_FILES = 256, 4
CPU_BATCH, CPU_STEPS, GPU_BATCH, GPU_STEPS = 8, 4, 256, 50
STEPS_COMPARED = 2
FROM_FILES, CACHED, OFFICIAL = "fastmae, from files", "fastmae, a batch on the device", "official loop, from files"
# Of our losses, relative: the same pixels in the same step, but for the order in which some GPU kernels add up.
SAME_STEP = {"fp32": 1e-5, "bf16": 1e-3}
# Of losses on images of another decoder or resize, which are some tenths of a grey level away on average.
OTHER_PIXELS = 1e-3

Fed = tuple[torch.Tensor, torch.Tensor]  # what a step takes: images and an order of patches, as its model wants them


@dataclass(frozen=True)
class _Setting:
    """What all implementations share."""

    source: Source
    view: View
    model: MaskedAutoencoderViT
    batch_size: int
    num_workers: int
    device: torch.device

    def masks(self, draw_ids: torch.Tensor) -> torch.Tensor:
        """Returns a run's orders of patches, int32 [N, L] on the device."""
        return random_masking(draw_ids.to(self.device, non_blocking=True), SEED, self.model.num_patches)


@dataclass(frozen=True)
class _Runner:
    """An implementation of training: a step and the loader that feeds it."""

    step: Implementation
    start: Callable[[Requests], Generator[Fed]]  # gives what the step takes for each request, and ends with them
    ahead: int  # batches that its loader works on before they are asked for
    tolerance: float  # of its losses, relative to those on images that were decoded beforehand

    def train(self, fed: Fed) -> torch.Tensor:
        """Does a step and returns the loss, detached."""
        return replace(self.step, batch=fed).go(STEP)


def bench_end_to_end(config: BenchEndToEndConfig, command: Sequence[str]) -> int:
    """Prints images a second, writes what was asked for, and returns 1 if losses disagree, otherwise 0.

    Raises:
        UserError: settings that cannot work.
    """
    check_bench(config)
    harness.require_preset(config.model)
    device, workers = parallel.choose_device(config.device), config.num_workers or default_workers()
    is_gpu, precision = device.type == "cuda", choose_precision(config.precision, device).name
    N = config.batch_size or (GPU_BATCH if is_gpu else CPU_BATCH)
    # Each process of the official pipeline makes whole batches, so a window has as many of each.
    steps = -(-(config.steps or (GPU_STEPS if is_gpu else CPU_STEPS)) // workers) * workers
    torch.manual_seed(SEED)
    model = PRESETS[config.model]()
    choose_decoder(config.image_decoder, device, None, Reading(model.in_chans))  # refuses what cannot decode here
    with ExitStack() as stack:
        source = _source(config, N, Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="fastmae-bench-"))))
        view = View(model.img_size, Reading(model.in_chans), seed=SEED, scale=SCALE, flip=True)
        setting = _Setting(source, view, model, N, workers, device)
        runners = _runners(config, setting, precision, stack)
        losses = {}
        skipped = {} if OFFICIAL in runners else {OFFICIAL: "it reads folders of image files in colour"}
        for name, runner in runners.items():
            try:
                with closing(runner.start(requests_of(source, N, 0, STEPS_COMPARED))) as batches:
                    losses[name] = [runner.train(fed).item() for fed in batches]
            except UserError as error:
                if name != OFFICIAL:
                    raise
                skipped[name] = error.as_on_the_command_line()
        expected = losses[CACHED]
        if wrong := [name for name in losses if not harness.agree(losses[name], expected, runners[name].tolerance)]:
            return harness.refuse(f"the losses of {' and '.join(wrong)} differ ({losses})")
        samplers = {name: partial(_turn, setting, runners[name], steps, itertools.count(0, steps)) for name in losses}
        samples = harness.take_turns(samplers, config.rounds)

    machine = harness.machine_name(device)
    title = (
        f"{config.model}, {precision}, {len(source):,} images {source.location}, batch {N}, {workers} threads or "
        f"processes, {machine}, windows of {steps} steps, files in the page cache, median of {config.rounds}"
    )
    rows = []
    for name, seconds in samples.items():
        slow, median, fast = rates(seconds)
        share = f"{speed_up(samples, name, CACHED):.1%}"
        over = f"{speed_up(samples, name, OFFICIAL):.2f}" if OFFICIAL in samples else "–"
        rows.append((name, f"{median:.2f}", f"{slow:.2f} – {fast:.2f}", share, over))
    columns = ("training", "images/s", "quartiles", "of a batch on the device", "speed-up over the official loop")
    measured = {
        "images": len(source),
        "batch_size": N,
        "num_workers": workers,
        "steps": steps,
        "precision": precision,
        "load": os.getloadavg(),
        "losses": losses,
        "skipped": skipped,
        "useful_flops": 3 * flops_per_image(model, MASK_RATIO),
        "seconds": samples,
    }
    file = f"end-to-end-{config.model}-{machine}-t{workers}-n{N}-{precision}"
    shown = [title, harness.table(None, columns, rows)]
    harness.report(shown, file, command=command, settings=config, measured=measured)
    return 0


def _source(config: BenchEndToEndConfig, N: int, folder: Path) -> Source:
    """Opens the images, or makes them in ``folder``."""
    if (path := config.data_path) is None:
        images = ImagesConfig(folder=folder / "images", count=config.files or max(FILES, BATCHES_OF_FILES * N))
        write_images(images, make_jpegs(images))
        path = str(images.folder)
    source = open_train(path)
    if source.kind != "folder":
        raise UserError(f"--data_path {path}: arrays need no decoding; name image files, tar or Parquet shards")
    if len(source) < N:
        raise UserError(f"--batch_size {N}: more than the {len(source)} images of {config.data_path or 'the files'}")
    return holding_little(source)


def _runners(config: BenchEndToEndConfig, setting: _Setting, precision: str, stack: ExitStack) -> dict[str, _Runner]:
    """Returns all that can read the data, each with weights of its own; their processes end with the ``stack``."""
    context, source, model = parallel.DistContext(0, 1, setting.device), setting.source, setting.model
    ready = [_decoded(setting, request) for request in requests_of(source, setting.batch_size, 0, STEPS_COMPARED)]
    flags: dict[str, Any] = {"precision": precision, "compile": config.compile}
    inputs, switches = Inputs(*ready[0], model), PretrainConfig(**flags)
    where: dict[str, Any] = {"num_workers": setting.num_workers, "device": setting.device}
    pin, decoder = setting.device.type == "cuda", config.image_decoder

    def on_device(requests: Requests) -> Generator[Fed]:
        yield from itertools.islice(itertools.cycle(ready), len(requests))

    def from_files(requests: Requests) -> Generator[Fed]:
        with closing(load_batches(source, requests, setting.view, **where, pin_memory=pin, decoder=decoder)) as loaded:
            for batch in loaded:
                yield batch.images, setting.masks(batch.draw_ids)

    tolerance, ahead, of_pixels = SAME_STEP[precision], PREFETCH, SAME_STEP[precision]
    if config.image_decoder != "threads":
        ahead, of_pixels = ahead + dali.AHEAD, max(tolerance, OTHER_PIXELS)
    runners = {
        FROM_FILES: _Runner(ours(config.model, switches, inputs, context), from_files, ahead, of_pixels),
        # One step ahead, as after another's turn the processor's caches are cold.
        CACHED: _Runner(ours(config.model, switches, inputs, context), on_device, 1, tolerance),
    }
    if not isinstance(source, FolderSource) or model.in_chans != 3:
        return runners
    pipeline = OfficialPipeline(source.paths, size=model.img_size[0], scale=SCALE, seed=SEED, **where)
    stack.callback(pipeline.close)

    def official(requests: Requests) -> Generator[Fed]:
        with closing(pipeline.batches(requests)) as loaded:
            for (_, draw_ids), batch in zip(requests, loaded, strict=True):
                yield batch, setting.masks(torch.from_numpy(draw_ids)).long()

    loop = theirs("official", precision, inputs, context)
    return runners | {OFFICIAL: _Runner(loop, official, pipeline.ahead, max(LOSS_TOLERANCE[precision], OTHER_PIXELS))}


def _decoded(setting: _Setting, request: tuple[np.ndarray, np.ndarray]) -> Fed:
    """Returns a batch of a run, decoded here and now, by no loader."""
    indices, draw_ids = request
    images = torch.empty(len(indices), *setting.view.size, setting.view.in_chans, dtype=torch.uint8)
    for index, draws, out in zip(indices.tolist(), crop_draws(SEED, draw_ids), images.numpy(), strict=True):
        load_sample(setting.source, index, setting.view, draws, out)
    return images.to(setting.device), setting.masks(torch.from_numpy(draw_ids))


def _turn(setting: _Setting, one: _Runner, steps: int, starts: Iterator[int]) -> float:
    """Returns the seconds per image in a turn of one implementation."""
    requests = requests_of(setting.source, setting.batch_size, next(starts), steps + 2 * one.ahead)
    into_the_page_cache(setting.source, requests)
    with closing(one.start(requests)) as batches:
        return window(batches, one.train, one.ahead, steps, setting.device) / setting.batch_size
