"""The settings of a run once nothing is left open, and the backends that follow from them."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import nn

from fastmae.checkpoint.manifest import peek
from fastmae.checkpoint.start import shape_of
from fastmae.config import (
    LEFT_OPEN,
    OF_ADVERSARY,
    OFFICIAL_FINETUNING_WARMUP,
    OFFICIAL_WARMUP,
    PER_RANK,
    TOLD_IF_CHANGED,
    AnyResolved,
    ImagesConfig,
    PretrainConfig,
    Resolved,
    ResolvedConfig,
    ResolvedSegmentConfig,
    ResolvedUpscaleConfig,
    TrainingConfig,
    images_given,
    read_as,
    resolve,
)
from fastmae.config.family import family_of
from fastmae.data.decode import FOLDER_CHANNELS
from fastmae.data.fingerprint import difference, fingerprint
from fastmae.data.formats.sound import AUDIOSET_MEAN, AUDIOSET_STD
from fastmae.data.loader import default_workers
from fastmae.data.masks import MaskFile
from fastmae.data.reading import Reading
from fastmae.data.sources import Source, table_values
from fastmae.data.statistics import Measured, measure
from fastmae.environment import versions
from fastmae.errors import SettingError, UserError
from fastmae.facts import UINT8, DataFacts
from fastmae.messages import logger
from fastmae.model.family import IMAGENET_MEAN, IMAGENET_STD
from fastmae.ops.attention import attention_backend
from fastmae.ops.backends import asked_backends, describe_ops
from fastmae.ops.linear import describe_linear
from fastmae.train.precision import Precision, choose_precision

WORTH_SAYING = 1.05
KINDS = ("given", "settings")
NAMED_RANKS = 4
NUMBERS = 64

Flags = TypeVar("Flags", bound=TrainingConfig)


def as_begun(flags: Flags) -> Flags:
    """Returns the settings with what a run that goes on has from its checkpoint: how images are read and normalised.

    So nothing is measured again, and nothing that was given before has to be given again.
    """
    before = peek(flags.resume, Path(flags.output_dir)).get("settings", {})
    kept = images_given(flags, before)
    if flags.other_types is None:
        kept["other_types"] = images_given(ImagesConfig(), before)["other_types"]
    if isinstance(flags, PretrainConfig):
        kept |= _held_out_as_before(flags, before)
    if isinstance(flags, PretrainConfig) and flags.in_chans in (None, before.get("in_chans")):
        kept |= {name: before.get(name) for name in ("mean", "std") if getattr(flags, name) is None}
    if isinstance(flags, PretrainConfig) and before.get("init"):
        kept |= {"init": flags.init or before["init"], **shape_of(flags, before)}
    return dataclasses.replace(flags, **kept)


def _held_out_as_before(flags: PretrainConfig, before: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the share that is held out, as the checkpoint has it if no flag gives it.

    Raises:
        SettingError: the share or the seed is another one, so that images which were held out would be trained on.
    """
    share = before.get("held_out")
    if before and flags.held_out not in (None, share):
        began = "held no images out" if share is None else f"began with {share}"
        raise SettingError("held_out", flags.held_out, f"is another share than the run, which {began}; leave it out")
    if share is not None and flags.seed != before.get("seed"):
        raise SettingError("seed", flags.seed, f"would hold out other images than the run's {before.get('seed')}")
    return {"held_out": share if flags.held_out is None else flags.held_out}


def measure_pixels(flags: PretrainConfig, source: Source, facts: DataFacts) -> Measured:
    """Measures what was not given of the range, the mean and the deviation of the pixels.

    Raises:
        UserError: image files cannot give the channels that were asked for, or the settings do not suit the data.
    """
    if not facts.length:
        raise SettingError("data_path", problem="holds no image; give other data")
    in_chans = flags.in_chans or facts.channels
    if facts.kind == "folder" and in_chans not in (*FOLDER_CHANNELS, facts.channels):
        raise SettingError(
            "in_chans", in_chans, "image files give 1, 3 or 4 channels; choose bands, or use an array for others"
        )
    reading = Reading(in_chans, dtype=facts.pixels.dtype, nodata=facts.pixels.nodata, read_as=read_as(flags))
    values = table_values(source) if flags.loss == "bce" else None
    if values is not None and not (np.nanmin(values) >= 0 and np.nanmax(values) <= 1):
        found = f"those of the table go from {np.nanmin(values):g} to {np.nanmax(values):g}"
        raise SettingError("loss", "bce", f"is for numbers from 0 to 1, and {found}; use mse, or scale the columns")
    mean, std, value_range = flags.mean, flags.std, flags.value_range
    is_plain = facts.pixels == UINT8 and value_range in (None, ("dtype",))
    if flags.spectrogram is not None and value_range is None:
        # AudioMAE's numbers are those of the logarithms themselves.
        value_range, mean, std = (0.0, 1.0), mean or (AUDIOSET_MEAN,), std or (AUDIOSET_STD,)
    if facts.kind == "folder" and in_chans == 3 and is_plain:
        mean, std = mean or IMAGENET_MEAN, std or IMAGENET_STD
    goes_on = bool(flags.resume) and "pixel_type" in peek(flags.resume, Path(flags.output_dir)).get("settings", {})
    return measure(source, reading, value_range, mean, std, "as before" if goes_on else "given")


def resolve_settings(
    config: PretrainConfig,
    measured: Measured,
    facts: DataFacts,
    ranks: int,
    mask_file: MaskFile | None,
    on_gpu: bool = False,
) -> ResolvedConfig:
    """Fills in every default of a pretraining from its data, its masks and the machine."""
    return resolve(
        config,
        facts,
        pixels=measured.pixels,
        mean=measured.mean,
        std=measured.std,
        ranks=ranks,
        num_workers=default_workers(),
        masks=None if mask_file is None else mask_file.facts,
        on_gpu=on_gpu,
    )


def reading_of(config: AnyResolved) -> Reading:
    """Returns how a run turns files into the pixels of its batches."""
    return Reading(config.in_chans, dtype=config.pixel_type, nodata=config.nodata, read_as=read_as(config))


def resolve_as_before(flags: Flags, resolve: Callable[[Flags], Resolved]) -> tuple[Resolved, list[str]]:
    """Fills in every default with ``resolve``. A run that goes on has from its checkpoint what is left open.

    Returns:
        The settings, and lines about those that a user may not expect.
    """
    before = peek(flags.resume, Path(flags.output_dir)).get("settings", {})
    by_default = resolve(flags)
    kept = _left_open(flags, as_json(by_default), before)
    config = resolve(dataclasses.replace(flags, **kept)) if kept else by_default
    now, fresh = as_json(config), as_json(by_default)
    kept = {name: value for name, value in kept.items() if value != fresh[name]}
    changed = [name for name in TOLD_IF_CHANGED if name in now and name in before and now[name] != before[name]]
    lines = []
    if kept:
        shown = ", ".join(f"{name} {_shown(value)}" for name, value in kept.items())
        lines.append(f"as before       {shown} (from the checkpoint, as no flag gives another)")
    if changed:
        shown = ", ".join(f"{name} {_shown(now[name])} instead of {_shown(before[name])}" for name in changed)
        lines.append(f"changed         {shown}, from this step on")
    return config, lines + _warm_up(flags, config, bool(before))


def _left_open(flags: TrainingConfig, now: Mapping[str, Any], before: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the settings that nobody gives, as the checkpoint has them."""
    left_open = {name for name in LEFT_OPEN if name in now and getattr(flags, name) in (None, "auto")}
    if flags.blr is not None:
        left_open.discard("lr")  # it follows from what is given
    if getattr(flags, "start_size", None) is None:
        left_open.discard("grow_epochs")
    # Without the term, or with another regulariser, the run is refused for that, and not for what goes with it.
    left_open -= {name for name in OF_ADVERSARY if now.get(name) is None}
    return {name: before[name] for name in LEFT_OPEN if name in left_open and before.get(name) is not None}


def _warm_up(flags: TrainingConfig, config: AnyResolved, goes_on: bool) -> list[str]:
    """Returns a line if the warm-up is not what the official script has, or if the learning rate never gets up."""
    warm_up, epochs = config.warmup_epochs, config.epochs
    if warm_up >= epochs:
        return [
            f"note            the warm-up of {warm_up:g} epochs leaves none of {epochs} at --lr; lower --warmup_epochs"
        ]
    pretrains = isinstance(config, ResolvedConfig)
    official = OFFICIAL_WARMUP if pretrains else OFFICIAL_FINETUNING_WARMUP
    official = 0.0 if isinstance(config, ResolvedSegmentConfig | ResolvedUpscaleConfig) else official
    small = flags.data_path in ("digits", ("digits",)) or family_of(config.model) == "mlp"
    is_default = flags.warmup_epochs is None and not (pretrains and small)
    if is_default and not goes_on and warm_up < official:
        return [
            f"warm-up         shortened to {warm_up:g} of {epochs} epochs, as the official {official:g} are for longer "
            "runs (--warmup_epochs)"
        ]
    return []


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return " ".join(map(_shown, value))
    return "empty" if value == "" else "none" if value is None else str(value)


def as_json(config: TrainingConfig) -> dict[str, Any]:
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
    faster = asked_backends().choices.bf16_speedup or 1.0
    if device.type == "cpu" and precision == choose_precision("auto", device) and faster > WORTH_SAYING:
        backends["precision"] += f"; bf16 would be {faster:.1f} times as fast here"
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


# --- the same on every rank, and as before ----------------------------------------------------------------------------


def identity(
    flags: TrainingConfig,
    config: AnyResolved,
    data: dict[str, Source],
    start: nn.Module | None = None,
) -> dict[str, Any]:
    """Returns what must be the same on every rank, as ``disagreement`` takes it, in JSON.

    Args:
        flags: the settings that were given.
        config: the resolved settings.
        data: the sources by the part of the data: "train", "val".
        start: the weights that a training begins with, if they were given.
    """
    return {
        "given": as_json(flags),
        "settings": as_json(config),
        "data": {part: fingerprint(source) for part, source in data.items()},
        "start": "" if start is None else _hash_of_weights(start),
        "versions": versions(),
    }


def _hash_of_weights(module: nn.Module) -> str:
    """Returns a short hash of some numbers of each tensor, evenly spaced."""
    digest = hashlib.sha256()
    for name, tensor in module.state_dict().items():
        numbers = tensor.detach().reshape(-1)
        numbers = numbers[:: max(1, len(numbers) // NUMBERS)].to("cpu", torch.float64)
        digest.update(f"{name} {list(tensor.shape)} {numbers.tolist()}".encode())
    return digest.hexdigest()[:16]


def disagreement(ranks: Sequence[Mapping[str, Any]]) -> UserError | None:
    """Returns what differs between ranks, and which ranks differ; None if they are about the same run.

    Args:
        ranks: the ``identity`` of each.
    """
    first = ranks[0]
    for name in ("fastmae", "torch"):
        found = [rank["versions"][name].split("+")[0] for rank in ranks]
        if len(set(found)) > 1:
            return UserError(f"{name} is {_by_rank(found)}; install the same version for every rank")
    for number, rank in enumerate(ranks):
        for part, data in rank["data"].items():
            differs = difference(data, first["data"][part])
            if differs:
                which = f"rank {number} reads other {part} data than rank 0"
                return SettingError("data_path", problem=f"{which}: it has {differs}; give every rank the same data")
    differing = {kind: [one for one in map(partial(_differing, ranks, kind), first[kind]) if one] for kind in KINDS}
    if differing["settings"]:
        name, values = (differing["given"] or differing["settings"])[0]  # others follow from what was given
        shown = _by_rank([_shown(value) for value in values])
        return SettingError(name, problem=f"is {shown}; start every rank with the same settings")
    if len({rank.get("start") for rank in ranks}) > 1:
        which = _by_rank([rank.get("start") or "none" for rank in ranks])
        name = _name_of_start(first)
        return SettingError(name, problem=f"holds other weights from rank to rank ({which}); give all the same")
    return None


def _name_of_start(identity: Mapping[str, Any]) -> str:
    """Returns which setting gives the weights that a training begins with."""
    settings = identity["settings"]
    return "finetune" if "mask_ratio" not in settings else "init" if settings.get("init") else "model"


def _differing(ranks: Sequence[Mapping[str, Any]], kind: str, name: str) -> tuple[str, list[Any]] | None:
    """Returns a setting with its values by rank, if they differ and may not."""
    values = [rank[kind].get(name) for rank in ranks]
    return (name, values) if name not in PER_RANK and any(value != values[0] for value in values) else None


def torch_builds(ranks: Sequence[Mapping[str, Any]]) -> str | None:
    """Returns a line if ranks have builds of torch that differ in more than nothing; None otherwise."""
    found = [rank["versions"]["torch"] for rank in ranks]
    return f"torch is {_by_rank(found)}: results may depend on the build" if len(set(found)) > 1 else None


def _by_rank(values: Sequence[str]) -> str:
    """Returns ``1 on rank 0 and 2 on ranks 1, 2 and 3``; of many ranks the first ones and their number."""
    ranks: dict[str, list[int]] = {}
    for rank, value in enumerate(values):
        ranks.setdefault(value, []).append(rank)
    words = []
    for value, which in ranks.items():
        shown = [str(rank) for rank in which[:NAMED_RANKS]]
        more = len(which) - len(shown)
        listed = f"{', '.join(shown)} and {more} more" if more else " and ".join([", ".join(shown[:-1]), shown[-1]])
        words.append(f"{value} on rank{'s' if len(which) > 1 else ''} {listed.removeprefix(' and ')}")
    more = len(words) - NAMED_RANKS
    return f"{', '.join(words[:NAMED_RANKS])} and {more} others" if more > 0 else " and ".join(words)


def require_same_data(resume: str, manifest: Mapping[str, Any], now: Mapping[str, Any], remedy: str) -> None:
    """Refuses to go on with other data than a checkpoint was made with, and says what cannot be compared.

    Args:
        resume: what is resumed, for people.
        manifest: that of the checkpoint; empty if there is none.
        now: the ``identity`` of this start.
        remedy: how a run begins from weights.

    Raises:
        SettingError: naming the first file that differs.
    """
    for part, before in manifest.get("data", {}).items():
        differs = difference(now["data"][part], before) if part in now["data"] else None
        if differs:
            problem = f"was made with other {part} data: --data_path now has {differs}; give the same data, or {remedy}"
            raise SettingError("resume", resume, problem)
    if manifest and "data" not in manifest:
        logger.warning("%s does not say which data it was made with (version 0.1), so they are not compared", resume)
    if now["start"] and manifest.get("start", now["start"]) != now["start"]:
        text = "--%s holds other weights than %s began with; they are not used, as the run goes on with its own"
        logger.warning(text, _name_of_start(now), resume)
