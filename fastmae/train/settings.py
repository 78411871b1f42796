"""The settings of a run once nothing is left open, and the backends that follow from them."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import torch

from fastmae.config import PretrainConfig, ResolvedConfig, ResolvedFinetuneConfig, resolve
from fastmae.data.decode import FOLDER_CHANNELS
from fastmae.data.loader import default_workers
from fastmae.data.masks import MaskFile
from fastmae.data.sources import Source
from fastmae.data.statistics import channel_statistics
from fastmae.errors import SettingError, UserError
from fastmae.facts import DataFacts
from fastmae.model.mae import IMAGENET_MEAN, IMAGENET_STD
from fastmae.ops.attention import attention_backend
from fastmae.ops.backends import asked_backends, describe_ops
from fastmae.ops.linear import describe_linear
from fastmae.train.precision import Precision


def resolve_settings(
    config: PretrainConfig, source: Source, facts: DataFacts, ranks: int, mask_file: MaskFile | None
) -> ResolvedConfig:
    """Fills in every default of a pretraining from its data, its masks and the machine.

    Raises:
        UserError: image files cannot give the channels that were asked for.
    """
    in_chans = config.in_chans or facts.channels
    if facts.kind == "folder" and in_chans not in FOLDER_CHANNELS:
        raise SettingError("in_chans", in_chans, "image files give 1, 3 or 4 channels; use an array for others")
    mean, std = config.mean, config.std
    if mean is None or std is None:
        is_like_imagenet = facts.kind == "folder" and in_chans == 3
        measured = (IMAGENET_MEAN, IMAGENET_STD) if is_like_imagenet else channel_statistics(source, in_chans)
        mean, std = mean or measured[0], std or measured[1]
    masks = None if mask_file is None else mask_file.facts
    return resolve(config, facts, mean=mean, std=std, ranks=ranks, num_workers=default_workers(), masks=masks)


def as_json(config: ResolvedConfig | ResolvedFinetuneConfig) -> dict[str, Any]:
    """Returns the settings as they are after a round trip through JSON."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def describe_backends(
    device: torch.device, precision: Precision, attention_shapes: dict[str, tuple[int, int]], decoding: str
) -> dict[str, str]:
    """Returns which implementation of each part a run on ``device`` uses, and why.

    Args:
        device: the device of the model.
        precision: the number format of the step.
        attention_shapes: (tokens S, width Dh of a head) of the encoder and of the decoder.
        decoding: the text of ``describe_decoder``.

    Raises:
        UserError: a backend that was asked for cannot run there.
    """
    backends = {"device": str(device), "precision": f"{precision.name} ({precision.reason})"}
    try:
        backends["ops"] = describe_ops(device)
        dtype = precision.autocast or torch.float32
        attention = {part: attention_backend(device, dtype, *shape) for part, shape in attention_shapes.items()}
        backends["products"] = describe_linear(device, dtype)
        backends["attention"] = "; ".join(f"{part}: {name} ({reason})" for part, (name, reason) in attention.items())
    except ValueError as error:
        raise UserError(f"--ops {asked_backends().ops} --attention {asked_backends().attention}: {error}") from error
    backends["optimizer"] = "fused AdamW"
    backends["decoding"] = decoding
    return backends
