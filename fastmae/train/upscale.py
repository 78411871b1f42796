"""Upscaling: what ``fastmae upscale`` teaches a head on an encoder. The loop is in finetune.py."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing

import numpy as np
import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule

from fastmae.checkpoint.load import Opened
from fastmae.config import FIXED_IN_AN_UPSCALING, ResolvedUpscaleConfig, UpscaleConfig, pixel_facts, resolve_upscale
from fastmae.data.loader import Batch, View
from fastmae.data.plan import central_share
from fastmae.data.sources import Parts, Source, describe, train_and_val
from fastmae.errors import SettingError, UserError
from fastmae.evaluate.pictures import save_png
from fastmae.evaluate.upscale import peak_of, psnr_of, ssim_of, upscaled_grid
from fastmae.facts import ReadAs
from fastmae.model.classifier import stochastic_depth_mask
from fastmae.model.family import MaskedModel
from fastmae.model.mae import MaskedAutoencoderViT
from fastmae.model.upscaler import Upscaler, UpscalingLoss, resized_pixels, upscaler_of
from fastmae.train import parallel
from fastmae.train.finetune import Task, choose_weights, known_of, tune_encoder
from fastmae.train.given import NOTHING, Given
from fastmae.train.run import Run, load
from fastmae.train.settings import reading_of
from fastmae.train.step import MicroBatch

SCORES = (psnr_of, ssim_of)
PICTURES = 6
"""So many images of the val part are drawn with what the model makes of them."""


def upscale(config: UpscaleConfig, given: Given = NOTHING) -> int:
    """Runs or continues the training of an upscaler, as ``tune_encoder`` does, and returns its exit status."""
    return tune_encoder(UPSCALING, config, given)


# --- settings ---------------------------------------------------------------------------------------------------------


def _require(model: MaskedModel) -> None:
    if not isinstance(model, MaskedAutoencoderViT):
        raise UserError(
            f"an encoder of the family {model.family} gives no tokens that a head could look at; upscale with mae_vit_*"
        )


def _open_data(flags: UpscaleConfig, data: Parts | str | tuple[str, ...], reading: ReadAs) -> tuple[Source, Source]:
    return train_and_val(data, reading)


def _resolve(
    flags: UpscaleConfig, train: Source, val: Source, encoder: Opened, context: parallel.DistContext
) -> ResolvedUpscaleConfig:
    return resolve_upscale(flags, describe(train, read_as=encoder.model.read_as), **known_of(encoder, context))


def _notes(config: ResolvedUpscaleConfig, train: Source) -> list[str]:
    (height, width), (low, high) = config.input_size, config.crop_scale
    larger = f"{height * config.scale}×{width * config.scale}"
    return [f"crops           {low:g} to {high:g} of an image, {larger} pixels, made smaller to {height}×{width}"]


# --- the model --------------------------------------------------------------------------------------------------------


def _model_of(encoder: Opened, config: ResolvedUpscaleConfig) -> Upscaler:
    assert isinstance(encoder.model, MaskedAutoencoderViT)
    try:
        model = upscaler_of(encoder.model, config.scale, img_size=config.input_size)
    except ValueError as error:
        raise SettingError("input_size", config.input_size, f"{error}; choose another size or --model") from error
    choose_weights(model, config)
    return model


def _example(model: Upscaler, config: ResolvedUpscaleConfig, device: torch.device) -> MicroBatch:
    (height, width), images = config.input_size, config.batch_size
    pixels = torch.zeros(images, height, width, config.in_chans, device=device, dtype=getattr(torch, config.pixel_type))
    targets = torch.zeros(images, *_size_of_targets(config), config.in_chans, device=device, dtype=pixels.dtype)
    branches = torch.ones(len(model.blocks), 2, images, device=device)
    return (pixels, targets, branches) if config.drop_path else (pixels, targets)


# --- batches ----------------------------------------------------------------------------------------------------------


def _size_of_targets(config: ResolvedUpscaleConfig) -> tuple[int, int]:
    return config.input_size[0] * config.scale, config.input_size[1] * config.scale


def _view(config: ResolvedUpscaleConfig, seed: int) -> View:
    size = _size_of_targets(config)
    return View(size, reading_of(config), seed=seed, scale=config.crop_scale, flip=config.flip)


def _inputs(config: ResolvedUpscaleConfig, train: Source, model: Upscaler, seed: int) -> Callable[[Batch], MicroBatch]:
    def to_inputs(batch: Batch) -> MicroBatch:
        """Returns images made smaller and the images, and with --drop_path the branches that are kept."""
        pair = resized_pixels(batch.images, 1 / config.scale), batch.images
        if not config.drop_path:
            return pair
        branches = stochastic_depth_mask(seed, batch.draw_ids.numpy(), config.drop_path, len(model.blocks))
        return *pair, branches.to(batch.images.device)

    return to_inputs


# --- testing ----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def _test(
    run: Run[ResolvedUpscaleConfig], epoch: int, val: Source, loss_of: nn.Module, autocast: torch.autocast
) -> dict[str, float]:
    """Returns the peak signal-to-noise ratio (dB) and the structural similarity of the central regions of the val part,
    those of the model and those of bicubic interpolation.

    The ranks share the images, so all of them call it. After the last epoch the main rank also draws some images.
    """
    config, context = run.config, run.context
    size = _size_of_targets(config)
    view = View(size, reading_of(config), central_share=central_share(val.kind, size))
    # Every rank has as many batches, as sharded weights need all ranks; images that only fill up do not count.
    mine = np.arange(context.rank, -(-len(val) // context.size) * context.size, context.size)
    pieces = [mine[start : start + config.batch_size] for start in range(0, len(mine), config.batch_size)]
    sums = torch.zeros(5, device=context.device, dtype=torch.float64)
    drawn: list[tuple[np.ndarray, ...]] = []
    requests = ((piece % len(val), piece % len(val)) for piece in pieces)
    peak = peak_of(pixel_facts(config))
    with closing(load(run, val, requests, view)) as batches, torch.compiler.set_stance("force_eager"):
        for piece, batch in zip(pieces, batches, strict=True):
            given = resized_pixels(batch.images, 1 / config.scale)
            with autocast:
                found = loss_of(given)
            plain = resized_pixels(given, config.scale)
            counts = torch.from_numpy(piece < len(val)).to(context.device)
            scores = [score(one, batch.images, peak)[counts].sum() for one in (found, plain) for score in SCORES]
            sums += torch.stack([*scores, counts.sum().double()])
            if context.is_main and len(drawn) < PICTURES:
                drawn += zip(*(one.cpu().numpy() for one in (given, plain, found, batch.images)), strict=True)
            run.watchdog.beat()
    if isinstance(loss_of, FSDPModule):
        loss_of.reshard()
    *totals, count = (context.mean(sums) * context.size).tolist()
    psnr, ssim, plain_psnr, plain_ssim = (total / count for total in totals)
    run.say(
        f"epoch {epoch + 1:<9} PSNR {psnr:.2f} dB, SSIM {ssim:.4f}; bicubic {plain_psnr:.2f} dB, {plain_ssim:.4f}; "
        f"{len(val):,} images"
    )
    if epoch + 1 == config.epochs and context.is_main:
        path = run.folder / "upscaled.png"
        save_png(path, upscaled_grid(drawn[:PICTURES], config.scale))
        run.say(f"pictures        {path}")
    names = ("test_psnr", "test_ssim", "test_bicubic_psnr", "test_bicubic_ssim")
    return dict(zip(names, (psnr, ssim, plain_psnr, plain_ssim), strict=True))


UPSCALING = Task(
    built_in="shapes",
    fixed=FIXED_IN_AN_UPSCALING,
    require=_require,
    open_data=_open_data,
    resolve=_resolve,
    model_of=_model_of,
    loss_of=lambda model, config: UpscalingLoss(model),
    example=_example,
    learns=lambda config: f"×{config.scale}",
    notes=_notes,
    view=_view,
    inputs=_inputs,
    test=_test,
)
