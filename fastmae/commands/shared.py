"""What the commands of a frozen model share: opening it, and making the folder of what they write."""

from __future__ import annotations

import logging
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

import torch

from fastmae.checkpoint.load import Opened, lacks_decoder, open_checkpoint, own_data
from fastmae.checkpoint.official import report
from fastmae.config import (
    AnomalyConfig,
    FeaturesConfig,
    ImputeConfig,
    ProbeConfig,
    ReconstructConfig,
    SearchConfig,
    must_measure,
)
from fastmae.data.loader import default_workers
from fastmae.data.sources import Source, open_train
from fastmae.data.stock import RUN_LINES, joined
from fastmae.errors import UserError
from fastmae.evaluate.pixels import measure_for
from fastmae.evaluate.sharing import Share
from fastmae.model.family import MaskedModel
from fastmae.train import parallel
from fastmae.train.parallel import choose_device

logger = logging.getLogger(__name__)


def open_model(
    config: ProbeConfig | ReconstructConfig | FeaturesConfig | SearchConfig | AnomalyConfig | ImputeConfig,
    *,
    needs_decoder: bool = False,
    device: torch.device | None = None,
) -> tuple[MaskedModel, str | tuple[str, ...]]:
    """Opens the frozen model of a command, on its device, once the settings are checked.

    Args:
        needs_decoder: whether a checkpoint without one is refused.
        device: that of this rank. By default it follows from the settings.

    Returns:
        the model, and the data: those that were given, or those of the model's own run.
    """
    device = device or choose_device(config.device)
    opened, data = open_frozen(config, needs_decoder=needs_decoder)
    return opened.model.to(device), data


def open_frozen(
    config: ProbeConfig | ReconstructConfig | FeaturesConfig | SearchConfig | AnomalyConfig | ImputeConfig,
    *,
    needs_decoder: bool = False,
) -> tuple[Opened, str | tuple[str, ...]]:
    """Does the same, and returns what else the checkpoint says beside its model, which is on the CPU."""
    opened = open_checkpoint(config.checkpoint, config)
    if needs_decoder and not opened.has_decoder:
        raise UserError(lacks_decoder(config.checkpoint, opened))
    name = "images" if isinstance(config, ReconstructConfig) else "data_path"
    data = getattr(config, name)
    data = own_data(config.checkpoint, opened.settings, name) if data is None else data
    if must_measure(config, opened.settings):
        report(config.checkpoint, measure_for(opened, config, open_train(data, opened.model.read_as)))
    return opened, data


@contextmanager
def ranks_that_share(device: str | None) -> Generator[tuple[parallel.DistContext, Share]]:
    """Joins the ranks that a launcher started, if it did; they leave each other at the end."""
    context = parallel.start(device)
    try:
        yield context, Share(context.rank, context.size)
    finally:
        parallel.stop(context)


def choose_workers(config: ProbeConfig | FeaturesConfig | SearchConfig | AnomalyConfig) -> int:
    """Returns the number of decoding threads: the one that was asked for, or the default."""
    return config.num_workers or default_workers()


def report_stock(*sources: Source) -> None:
    """Says what of the data is not used as their owner may expect, a warning per line."""
    for line in joined(source.stock for source in sources).lines(RUN_LINES):
        logger.warning("%s", line)


def make_folder(folder: Path, flag: str = "output") -> None:
    """Makes the folder of what a command will write, so that a wrong name is reported before the work, not after it.

    Raises:
        UserError: the folder cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--{flag}: {folder} cannot be written ({error}); name another folder") from error
