"""How many images a second are trained on, from JPEG files to new weights, and how much of the time does loading cost?

    fastmae bench end-to-end --output benchmarks/results                                                # on a CPU
    fastmae bench end-to-end --model mae_vit_large_patch16 --compile block --decoder dali-gpu           # on a GPU

Our loader feeds our step, as in a run. Beside it: our step on a batch that lies ready on the device, which no loader
can surpass; and the official loop, fed by the official pipeline (baselines/official_pipeline.py). No time is reported
unless our losses on files are those of the same images decoded beforehand, one after another, and the official loop's
are those but for another build of libjpeg and another resize.

Turns are windows of steps (``window`` of loader.py). On a CPU decoding and the step share the cores, which is how it is
there. The files lie in the page cache.
"""

from __future__ import annotations

import itertools
import os
import sys
import tempfile
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from rich.table import Table

from fastmae.benchmarks.baselines.official_pipeline import OfficialPipeline, Requests
from fastmae.benchmarks.harness import (
    Samples,
    agree,
    console,
    machine_name,
    rates,
    refuse,
    speed_up,
    table,
    take_turns,
    write_result,
)
from fastmae.benchmarks.images import ImagesConfig, make_jpegs, write_images
from fastmae.benchmarks.loader import holding_little, into_the_page_cache, requests_of, window
from fastmae.benchmarks.step import LOSS_TOLERANCE, MASK_RATIO, STEP, Implementation, Inputs, Switches, ours, theirs
from fastmae.config import BenchEndToEndConfig, check_bench
from fastmae.data.decoders import dali
from fastmae.data.loader import PREFETCH, View, choose_decoder, default_workers, load_batches, load_sample
from fastmae.data.plan import crop_draws
from fastmae.data.sources import FolderSource, Source, open_train
from fastmae.errors import UserError
from fastmae.model.flops import flops_per_image
from fastmae.model.mae import MaskedAutoencoderViT
from fastmae.model.presets import PRESETS
from fastmae.ops.random_masking import random_masking
from fastmae.train import parallel
from fastmae.train.precision import choose_precision

SEED = 0
SCALE = (0.2, 1.0)
FILES, BATCHES_OF_FILES = 256, 4
CPU_BATCH, GPU_BATCH = 8, 256
CPU_STEPS, GPU_STEPS = 4, 50
STEPS_COMPARED = 2
FROM_FILES, CACHED, OFFICIAL = "fastmae, from files", "fastmae, a batch on the device", "official loop, from files"
# Of our losses, relative: the same pixels in the same step, but for the order in which some GPU kernels add up.
SAME_STEP = {"fp32": 1e-5, "bf16": 1e-3}
# Of losses on images of another decoder or resize, which are some tenths of a grey level away on average.
OTHER_PIXELS = 1e-3

Fed = tuple[torch.Tensor, torch.Tensor]
"""What a step takes: images and an order of patches, as its model wants them."""


@dataclass(frozen=True)
class _Runner:
    """An implementation of training: a step and the loader that feeds it."""

    step: Implementation
    start: Callable[[Requests], Generator[Fed]]
    """Gives what the step takes for each of some requests, and ends with them."""
    ahead: int
    """Batches that its loader works on before they are asked for."""
    tolerance: float
    """Of its losses, relative to those on images that were decoded beforehand."""

    def train(self, fed: Fed) -> torch.Tensor:
        """The loss, detached."""
        return replace(self.step, batch=fed).go(STEP)


@dataclass(frozen=True)
class _Setting:
    """The settings that all share."""

    source: Source
    view: View
    patches: int
    batch_size: int
    num_workers: int
    device: torch.device
    decoder: str

    def masks(self, draw_ids: torch.Tensor) -> torch.Tensor:
        """int32 [N, L] on the device, as in a run."""
        return random_masking(draw_ids.to(self.device, non_blocking=True), SEED, self.patches)


def bench_end_to_end(config: BenchEndToEndConfig, command: Sequence[str]) -> int:
    """Prints images a second, writes what was asked for, and returns 1 if losses disagree, otherwise 0.

    Raises:
        UserError: settings that cannot work.
    """
    check_bench(config)
    if config.model not in PRESETS:
        raise UserError(f"--model {config.model}: unknown; one of {', '.join(PRESETS)}")
    torch.manual_seed(SEED)
    model = PRESETS[config.model]()
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="fastmae-bench-"))
        setting = _setting(config, model, Path(folder))
        precision = choose_precision(config.precision, setting.device).name
        skipped: dict[str, str] = {}
        runners = _runners(config, model, setting, precision, skipped, stack)
        losses = _losses(setting, runners, skipped)
        expected = losses[CACHED]
        if wrong := [name for name in losses if not agree(losses[name], expected, runners[name].tolerance)]:
            return refuse(f"the losses of {' and '.join(wrong)} differ ({losses})")
        # Each process of the official pipeline makes whole batches, so a window has as many of each.
        steps = config.steps or (GPU_STEPS if setting.device.type == "cuda" else CPU_STEPS)
        steps = -(-steps // setting.num_workers) * setting.num_workers
        samplers = {name: partial(_turn, setting, runners[name], steps, itertools.count(0, steps)) for name in losses}
        samples: Samples = take_turns(samplers, config.rounds)

    machine = machine_name(setting.device)
    screen = console()
    screen.print(
        f"{config.model}, {precision}, {len(setting.source):,} images {setting.source.location}, batch "
        f"{setting.batch_size}, {setting.num_workers} threads or processes, {machine}, windows of {steps} steps, "
        f"files in the page cache, median of {config.rounds}"
    )
    screen.print(_speeds(samples))
    for name, reason in skipped.items():
        print(f"{name} cannot run: {reason}", file=sys.stderr)
    if config.output is not None:
        measured = {
            "images": len(setting.source),
            "batch_size": setting.batch_size,
            "num_workers": setting.num_workers,
            "steps": steps,
            "precision": precision,
            "load": os.getloadavg(),
            "losses": losses,
            "skipped": skipped,
            "useful_flops": 3 * flops_per_image(model, MASK_RATIO),
            "seconds": samples,
        }
        file = f"end-to-end-{config.model}-{machine}-t{setting.num_workers}-n{setting.batch_size}-{precision}"
        print(write_result(config.output, file, command=command, settings=config, measured=measured))
    return 0


# --- implementations -----------------------------------------------------------------------------------------------


def _setting(config: BenchEndToEndConfig, model: MaskedAutoencoderViT, folder: Path) -> _Setting:
    """Opens the data, or makes them in ``folder``."""
    device = parallel.choose_device(config.device)
    N = config.batch_size or (GPU_BATCH if device.type == "cuda" else CPU_BATCH)
    path = config.data_path
    decoder, _ = choose_decoder(config.image_decoder, device, None, model.in_chans)
    if path is None:
        images = ImagesConfig(folder=folder / "images", count=config.files or max(FILES, BATCHES_OF_FILES * N))
        write_images(images, make_jpegs(images))
        path = str(images.folder)
    source = open_train(path)
    if source.kind != "folder":
        raise UserError(f"--data_path {path}: arrays need no decoding; name image files, tar or Parquet shards")
    if len(source) < N:
        raise UserError(f"--batch_size {N}: more than the {len(source)} images of {config.data_path or 'the files'}")
    view = View(model.img_size, model.in_chans, seed=SEED, scale=SCALE, flip=True)
    return _Setting(
        holding_little(source), view, model.num_patches, N, config.num_workers or default_workers(), device, decoder
    )


def _runners(
    config: BenchEndToEndConfig,
    model: MaskedAutoencoderViT,
    setting: _Setting,
    precision: str,
    skipped: dict[str, str],
    stack: ExitStack,
) -> dict[str, _Runner]:
    """Each with weights of its own, all the same; processes end with the ``stack``."""
    context = parallel.DistContext(0, 1, setting.device)
    images, ids_shuffle = _decoded(setting, requests_of(setting.source, setting.batch_size, 0, 1)[0])
    pixels = (images / 255 - model.mean.to(images.device)) / model.std.to(images.device)
    inputs = Inputs(images, pixels.permute(0, 3, 1, 2).contiguous(), ids_shuffle, model.state_dict())
    switches = Switches(precision=precision, compile=config.compile)
    tolerance = SAME_STEP[precision]

    def from_files(requests: Requests) -> Generator[Fed]:
        loaded = load_batches(
            setting.source,
            requests,
            setting.view,
            device=setting.device,
            num_workers=setting.num_workers,
            pin_memory=setting.device.type == "cuda",
            decoder=setting.decoder,
        )
        with closing(loaded):
            for batch in loaded:
                yield batch.images, setting.masks(batch.draw_ids)

    def on_device(requests: Requests) -> Generator[Fed]:
        for _ in requests:
            yield images, ids_shuffle

    is_threads = setting.decoder in ("threads", "threads")
    ahead = PREFETCH + (not is_threads) * dali.AHEAD
    of_pixels = tolerance if is_threads else max(tolerance, OTHER_PIXELS)
    runners = {
        FROM_FILES: _Runner(ours(config.model, switches, inputs, context), from_files, ahead, of_pixels),
        # One step, as after another's turn the processor's caches are cold.
        CACHED: _Runner(ours(config.model, switches, inputs, context), on_device, 1, tolerance),
    }
    if not isinstance(setting.source, FolderSource) or model.in_chans != 3:
        skipped[OFFICIAL] = "it reads folders of image files in colour"
        return runners
    pipeline = OfficialPipeline(
        setting.source.paths,
        size=model.img_size[0],
        scale=SCALE,
        seed=SEED,
        num_workers=setting.num_workers,
        device=setting.device,
    )
    stack.callback(pipeline.close)

    def official(requests: Requests) -> Generator[Fed]:
        with closing(pipeline.batches(requests)) as loaded:
            for (_, draw_ids), batch in zip(requests, loaded, strict=True):
                yield batch, setting.masks(torch.from_numpy(draw_ids)).long()

    loop = theirs("official", config.model, precision, inputs, context)
    return runners | {OFFICIAL: _Runner(loop, official, pipeline.ahead, max(LOSS_TOLERANCE[precision], OTHER_PIXELS))}


def _decoded(setting: _Setting, request: tuple[np.ndarray, np.ndarray]) -> Fed:
    """A batch of a run, decoded here and now, by no loader."""
    indices, draw_ids = request
    images = torch.empty(len(indices), *setting.view.size, setting.view.in_chans, dtype=torch.uint8)
    for index, draws, out in zip(indices.tolist(), crop_draws(SEED, draw_ids), images.numpy(), strict=True):
        load_sample(setting.source, index, setting.view, draws, out)
    return images.to(setting.device), setting.masks(torch.from_numpy(draw_ids))


def _losses(setting: _Setting, runners: dict[str, _Runner], skipped: dict[str, str]) -> dict[str, list[float]]:
    """The losses of the first steps on the same images. An implementation that fails is skipped."""
    requests = requests_of(setting.source, setting.batch_size, 0, STEPS_COMPARED)
    losses = {CACHED: [runners[CACHED].train(_decoded(setting, request)).item() for request in requests]}
    for name, runner in runners.items():
        if name == CACHED:
            continue
        try:
            with closing(runner.start(requests)) as batches:
                losses[name] = [runner.train(fed).item() for fed in batches]
        except UserError as error:
            if name == FROM_FILES:
                raise
            skipped[name] = error.as_on_the_command_line()
    return {name: losses[name] for name in runners if name in losses}


# --- samples ----------------------------------------------------------------------------------------------------------


def _turn(setting: _Setting, one: _Runner, steps: int, starts: Iterator[int]) -> float:
    """Seconds per image in a turn of one implementation."""
    requests = requests_of(setting.source, setting.batch_size, next(starts), steps + 2 * one.ahead)
    into_the_page_cache(setting.source, requests)
    with closing(one.start(requests)) as batches:
        return window(batches, one.train, one.ahead, steps, setting.device) / setting.batch_size


def _speeds(samples: Samples) -> Table:
    rows = []
    for name, seconds in samples.items():
        slow, median, fast = rates(seconds)
        share = f"{speed_up(samples, name, CACHED):.1%}"
        over = f"{speed_up(samples, name, OFFICIAL):.2f}" if OFFICIAL in samples else "–"
        rows.append((name, f"{median:.2f}", f"{slow:.2f} – {fast:.2f}", share, over))
    columns = ("training", "images/s", "quartiles", "of a batch on the device", "speed-up over the official loop")
    return table(None, columns, rows)
