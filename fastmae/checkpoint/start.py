"""Beginning a pretraining with the encoder of a file: what it decides of the settings, and its weights in a model.

Only the encoder is taken. The decoder, and what the file lacks, stay as they were drawn from the seed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch

from fastmae.checkpoint.load import Opened, open_checkpoint
from fastmae.checkpoint.positions import for_grid, read_table
from fastmae.config import PretrainConfig
from fastmae.config.shape import ENCODER_SHAPE
from fastmae.config.shared import ReadingConfig
from fastmae.errors import SettingError
from fastmae.facts import DataFacts
from fastmae.model.family import MaskedModel
from fastmae.model.mae import MaskedAutoencoderViT

SHAPE = ("model", "input_size", "patch_size", *ENCODER_SHAPE)
"""The settings that an encoder decides, where they are not given."""


def open_start(flags: PretrainConfig) -> tuple[PretrainConfig, Opened]:
    """Opens the encoder that ``flags.init`` names. Returns the settings with the shape that it has, and the encoder.

    Raises:
        UserError: there is no such file, or its encoder is none of a masked autoencoder.
    """
    given = ReadingConfig(model=flags.model, input_size=flags.input_size, num_heads=flags.num_heads)
    start = open_checkpoint(flags.init, given, resize=False, weights_alone=True)
    return dataclasses.replace(flags, **shape_of(flags, start.settings)), start


def shape_of(flags: PretrainConfig, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Returns what ``settings`` say of the shape of an encoder, as far as ``flags`` leave it open."""
    return {name: settings[name] for name in SHAPE if getattr(flags, name) is None and settings.get(name) is not None}


def normalised_alike(flags: PretrainConfig, start: Opened, facts: DataFacts) -> PretrainConfig:
    """Returns the settings with the mean and std that the file says, if its images have as many channels."""
    said: dict[str, Any] = {name: start.settings.get(name) for name in ("mean", "std")}
    channels = flags.in_chans or facts.channels
    if channels != start.model.in_chans or any(getattr(flags, name) or not value for name, value in said.items()):
        return flags
    return dataclasses.replace(flags, **said)


def begin_with(model: MaskedModel, start: Opened, path: str, *, fixed_positions: bool) -> list[str]:
    """Copies the encoder of ``start`` into ``model``, in place. Returns an account of it, for people.

    Positions are those of the model's grid: computed if they are fixed ones, otherwise interpolated.

    Args:
        model: a fresh one.
        path: of the file, for messages.
        fixed_positions: whether the run needs positions that can be computed for other sizes.

    Raises:
        SettingError: the encoder has another shape than the model.
    """
    if model.family not in ("vit", "convnext"):
        raise SettingError("init", path, "is for vision transformers and ConvNeXt V2; leave it out")
    if start.model.family != model.family:
        raise SettingError("init", path, f"is {start.what}, and the model has {model.sizes}; leave --model out")
    its, own = _encoder(start.model), _encoder(model)
    notes: list[str] = []
    if start.model.patch_size != model.patch_size:
        sizes = ["{}×{}".format(*one.patch_size) for one in (start.model, model)]
        raise SettingError("init", path, f"its patches have {sizes[0]} pixels, not {sizes[1]}; leave --patch_size out")
    if "pos_embed" in its:
        own_positions = read_table(its["pos_embed"], "pos_embed", start.model.grid_size)
        positions = for_grid(own_positions, model.grid_size)
        if fixed_positions and not read_table(positions.table, "pos_embed", model.grid_size).is_fixed:
            why = "are of another size" if own_positions.is_fixed else "were learnt"
            problem = f"its positions {why}, which growing crops cannot take; leave start_size out"
            raise SettingError("init", path, problem)
        its["pos_embed"] = positions.table
        notes += positions.notes
    weight = "patch_embed.proj.weight" if model.family == "vit" else "stem.0.weight"
    if its[weight].shape[1] != model.in_chans:
        notes.append(f"the patch projection made of {its[weight].shape[1]} channels one of {model.in_chans}")
        its[weight] = for_channels(its[weight], model.in_chans)
    differing = [name for name in ("mean", "std") if not _alike(start.settings.get(name), getattr(model, name))]
    if differing:
        notes.append(f"trained with {' and '.join(differing)} other than this run's; give its own to keep them")
    lacking = sorted(own.keys() - its.keys())
    other = sorted(its.keys() - own.keys())
    shapes = sorted(name for name in own.keys() & its.keys() if own[name].shape != its[name].shape)
    beyond = [name for name in other if not name.startswith("fc_norm.")]  # such as the blocks of a deeper encoder
    if beyond:
        problem = f"its {beyond[0]} has no place in the model; leave the model's sizes out"
        raise SettingError("init", path, problem)
    if shapes or set(lacking) - {"norm.weight", "norm.bias"}:
        first = (shapes or lacking)[0]
        found = list(its[first].shape) if first in its else "missing"
        problem = f"its {first} is {found}, and the model has {list(own[first].shape)}; leave the model's sizes out"
        raise SettingError("init", path, problem)
    vits = [one for one in (start.model, model) if isinstance(one, MaskedAutoencoderViT)]
    if len({one.head_dims[0] for one in vits}) > 1:
        heads = [one.cls_token.shape[2] // one.head_dims[0] for one in vits]
        raise SettingError("init", path, f"its encoder has {heads[0]} heads, not {heads[1]}; leave --num_heads out")
    with torch.no_grad():
        for name in own.keys() & its.keys():
            own[name].copy_(its[name])
    if lacking:
        notes.append(f"{' and '.join(lacking)} fresh, as the encoder of a classifier has none")
    if other:
        notes.append(f"not used: {', '.join(other)}")
    decoder = len(model.state_dict()) - len(own)
    taken = f"{len(own) - len(lacking)} tensors of its encoder, and {decoder} of a fresh decoder"
    return [f"start           {path}: {taken}", *(f"start           {note}" for note in notes)]


def _alike(said: Any, own: torch.Tensor) -> bool:
    """Whether a mean or std that a file says, if it does, is that of a model."""
    return not said or (len(said) == len(own) and torch.allclose(torch.tensor(said, dtype=own.dtype), own.cpu()))


def _encoder(model: MaskedModel) -> dict[str, torch.Tensor]:
    weights = model.state_dict()
    return {name: tensor for name, tensor in weights.items() if not name.startswith(("decoder_", "mask_token"))}


def for_channels(weight: torch.Tensor, channels: int) -> torch.Tensor:
    """Returns a projection [D, channels, ph, pw] made of one of other channels [D, C, ph, pw].

    Channels come in turn: too many are added up, too few are shared out. An image that is the same on all channels
    gives the same tokens with both.
    """
    C = weight.shape[1]
    if channels < C:
        turns = torch.arange(C) % channels
        return weight.new_zeros(weight.shape[0], channels, *weight.shape[2:]).index_add(1, turns, weight)
    turns = torch.arange(channels) % C
    shares = torch.bincount(turns)[turns]
    return weight[:, turns] / shares[:, None, None]
