"""The published checkpoint file: {'model', 'optimizer', 'epoch', 'scaler', 'args'} in a .pth, read and written; and its
weights alone as .safetensors, under the same names. Read are also a folder of transformers, and files with its names.

Written .pth files load with ``weights_only=True``. Read ones may carry the published ``argparse.Namespace``, the one
class that is let through; anything else that a pickle could hold is refused by torch.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, Literal

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as safetensors_bytes

from fastmae.checkpoint.huggingface import from_huggingface, is_huggingface, read_config, weights_file
from fastmae.config.model import ModelSpec
from fastmae.errors import SettingError, UserError
from fastmae.files import write_whole
from fastmae.messages import logger
from fastmae.model.build import build_model
from fastmae.model.mae import MaskedAutoencoderViT
from fastmae.model.presets import PRESETS
from fastmae.model.sharding import laid_out_like

# The state of a fresh gradient scaler. bf16 and fp32 need none, but the published loader asks for one.
_SCALER = {"scale": 65536.0, "growth_factor": 2.0, "backoff_factor": 0.5, "growth_interval": 2000, "_growth_tracker": 0}
_PRESET_OF_WIDTH = {
    (128, 4): "mae_vit_tiny_patch4",
    (192, 16): "mae_vit_tiny_patch16",
    (384, 16): "mae_vit_small_patch16",
    (768, 16): "mae_vit_base_patch16",
    (1024, 16): "mae_vit_large_patch16",
    (1280, 14): "mae_vit_huge_patch14",
}


SHOWN_KEYS = 8


@dataclasses.dataclass(frozen=True)
class OfficialFile:
    """What a .pth, a .safetensors or a folder of transformers holds, under the published names."""

    path: Path
    model: dict[str, torch.Tensor]
    optimizer: dict[str, Any] | None
    epoch: int | None
    args: dict[str, Any]
    heads: tuple[int, int | None] | None = None
    """Of the encoder and of the decoder, where that is said; the tensors do not tell."""
    remarks: tuple[str, ...] = ()
    """What was left out or taken otherwise than it says, for people."""

    @property
    def has_decoder(self) -> bool:
        return "decoder_pred.weight" in self.model

    @property
    def decoder_attention(self) -> Literal["self", "cross"]:
        """By the names of its tensors, which a file with weights alone has too."""
        return "cross" if "decoder_map_weights" in self.model else "self"

    @property
    def decoder_depth(self) -> int | None:
        """How many blocks the decoder has; None for the encoder alone."""
        return len({key.split(".")[1] for key in self.model if key.startswith("decoder_blocks.")}) or None


def write_training_file(
    path: Path, weights: dict[str, torch.Tensor], moments: dict[str, Any], epoch: int, args: dict[str, Any]
) -> None:
    """Writes the published training file whole or not at all.

    Args:
        path: of the .pth.
        weights, moments: state dicts of the model and the optimiser, in one piece.
        epoch: the one that is done.
        args: plain numbers, strings and lists.

    Raises:
        UserError: the file system refused.
    """
    content = {
        "model": weights,
        "optimizer": moments,
        "epoch": epoch,
        "scaler": _SCALER,
        "args": args,
    }
    _save(path, lambda file: torch.save(content, file))


def write_weights_file(path: Path, weights: dict[str, torch.Tensor], epoch: int, args: dict[str, Any]) -> None:
    """Writes the weights alone as .safetensors, whole or not at all; ``epoch`` and ``args`` are in its metadata.

    Raises:
        UserError: the file system refused.
    """
    metadata = {"format": "pt", "epoch": str(epoch), "settings": json.dumps(args)}
    content = safetensors_bytes({name: tensor.contiguous() for name, tensor in weights.items()}, metadata)

    def write(file: BinaryIO) -> None:
        file.write(content)

    _save(path, write)


def _save(path: Path, write: Callable[[BinaryIO], None]) -> None:
    try:
        write_whole(path, write)
    except (OSError, RuntimeError) as error:  # torch's zip writer reports a full disk as a RuntimeError
        raise UserError(
            f"{path} could not be saved ({error}); earlier checkpoints are intact: free space or mend the "
            "permissions, then continue with --resume auto"
        ) from error


def holds_file(path: Path) -> bool:
    """Whether ``read_official`` is for this path: a file, or a folder as transformers writes it."""
    return path.is_file() or weights_file(path) is not None


def read_official(path: Path) -> OfficialFile:
    """Reads a training file, or one with the weights alone: a .pth, a .safetensors, or a folder of transformers.

    Raises:
        UserError: not such a file, or one that holds more than data.
    """
    path = weights_file(path) or path
    file = _read_safetensors(path) if path.suffix == ".safetensors" else _read_pickled(path)
    for name, tensor in file.model.items():
        dense = tensor.layout == torch.strided and tensor.is_floating_point()
        if not dense or tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
            # Such as one number that is repeated a million times: memory would be taken for all of them.
            raise UserError(f"{path}: {name} is no plain tensor of floating numbers; give an intact file")
    if not is_huggingface(file.model):
        return file
    weights, unused = from_huggingface(file.model)
    settings, heads, remarks = read_config(path.parent)
    if unused:
        remarks.append(f"not used, as no masked autoencoder has them: {_listed(unused)}")
    return OfficialFile(path, weights, None, None, {**settings, **file.args}, heads, tuple(remarks))


def report_remarks(file: OfficialFile) -> None:
    """Reports, once for all ranks, what of a file is not used."""
    if dist.is_initialized() and dist.get_rank() != 0:
        return
    for remark in file.remarks:
        logger.warning("%s: %s", file.path, remark)


def _listed(keys: list[str]) -> str:
    more = f" and {len(keys) - SHOWN_KEYS} more" if len(keys) > SHOWN_KEYS else ""
    return ", ".join(keys[:SHOWN_KEYS]) + more


def _read_pickled(path: Path) -> OfficialFile:
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # torch raises pickle, zip, EOF and runtime errors on foreign bytes
        if isinstance(error, pickle.UnpicklingError):
            reason = "not a torch file, or one with objects that could run code"
        else:
            reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(f"{path}: not a readable checkpoint ({reason}); give an intact .pth or a run folder") from error
    model = content.get("model", content) if isinstance(content, dict) else None
    if not isinstance(model, dict) or not model or not all(isinstance(t, torch.Tensor) for t in model.values()):
        raise UserError(f"{path}: holds no model; give a file with the keys of the published checkpoints")
    args = content.get("args")
    if not isinstance(args, dict):
        args = vars(args) if isinstance(args, argparse.Namespace) else {}
    epoch = content.get("epoch")
    return OfficialFile(path, model, content.get("optimizer"), epoch if isinstance(epoch, int) else None, args)


def _read_safetensors(path: Path) -> OfficialFile:
    """The library compares all sizes in the header with the file's before a tensor is made."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
        args = json.loads(metadata.get("settings", "{}"))
        epoch = int(metadata["epoch"]) if "epoch" in metadata else None
        if not isinstance(args, dict):
            raise ValueError("the settings in its metadata are none")
    except (SafetensorError, OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{path}: not a readable checkpoint ({reason}); give an intact file or a run folder") from error
    if not weights:
        raise UserError(f"{path}: holds no model; give a file with the keys of the published checkpoints")
    return OfficialFile(path, weights, None, epoch, args)


def load_weights(model: MaskedAutoencoderViT, file: OfficialFile) -> None:
    """Copies a file's weights into the model, every key accounted for; the decoder may be missing as a whole.

    Raises:
        UserError: keys or shapes that do not fit.
    """
    for flag, its, ours in (
        ("--decoder_attention", file.decoder_attention, model.decoder_attention),
        ("--decoder_depth", file.decoder_depth, len(model.decoder_blocks)),
    ):
        if file.has_decoder and its != ours:
            raise UserError(f"{file.path}: its decoder has {flag} {its}, not {ours}; give its {flag} and --model")
    for whose, its, ours in zip(("encoder", "decoder"), file.heads or (), _heads(model), strict=False):
        if its not in (None, ours):
            raise UserError(f"{file.path}: its {whose} has {its!r} heads, not {ours}; name its preset with --model")
    own = model.state_dict()
    wanted = own.keys() if file.has_decoder else {k for k in own if not k.startswith(("decoder_", "mask_token"))}
    missing, unknown = sorted(wanted - file.model.keys()), sorted(file.model.keys() - own.keys())
    shapes = [k for k in wanted & file.model.keys() if own[k].shape != file.model[k].shape]
    wrong = (("missing", missing), ("unknown", unknown), ("of another shape", sorted(shapes)))
    if any(keys for _, keys in wrong):
        mismatches = "; ".join(f"{len(keys)} tensors are {what} ({_listed(keys)})" for what, keys in wrong if keys)
        raise UserError(f"{file.path}: {mismatches}; name its preset with --model")
    with torch.no_grad():
        for key in wanted:
            own[key].copy_(laid_out_like(own[key], file.model[key]))


def _heads(model: MaskedAutoencoderViT) -> tuple[int, int]:
    widths = model.cls_token.shape[-1], model.mask_token.shape[-1]
    return widths[0] // model.head_dims[0], widths[1] // model.head_dims[1]


def model_of_file(file: OfficialFile, preset: str | None) -> MaskedAutoencoderViT:
    """A model with a file's weights; what the file does not say is taken from ``preset`` and the shapes.

    Raises:
        UserError: no preset is known to fit.
    """
    model = build_model(spec_of_file(file, preset))
    load_weights(model, file)
    return model


def spec_of_file(file: OfficialFile, preset: str | None) -> ModelSpec:
    """The model of a file; what the file does not say is taken from ``preset`` and the shapes.

    Raises:
        UserError: not a masked autoencoder, or its sizes contradict each other.
    """
    weight = file.model.get("patch_embed.proj.weight")
    if weight is None or weight.ndim != 4:
        raise UserError(f"{file.path}: has no patch_embed.proj.weight; it is not a checkpoint of a masked autoencoder")
    ph, pw = weight.shape[2:]
    name = str(preset or file.args.get("model") or _PRESET_OF_WIDTH.get((weight.shape[0], pw)))
    positions = file.model.get("pos_embed", weight[:0])
    side = math.isqrt(max(0, positions.shape[1] - 1)) if positions.ndim == 3 else 0
    size = file.args.get("input_size", (side * ph, side * pw))  # square, as all published ones, unless it says
    size = (size, size) if isinstance(size, int) else size
    if not isinstance(size, list | tuple) or len(size) != 2 or not all(isinstance(side, int) for side in size):
        raise UserError(f"{file.path}: input_size {size} in its settings is not a size; give an intact file")
    needed = 1 + size[0] // max(1, ph) * (size[1] // max(1, pw))
    if name in PRESETS and (positions.ndim != 3 or positions.shape[1] < needed):  # before memory is taken for a model
        shapes = f"{list(positions.shape)}, and {size[0]}×{size[1]} pixels need {needed} positions"
        raise UserError(f"{file.path}: pos_embed is of another shape ({shapes}); name its preset with --model")
    try:
        return ModelSpec(
            model=name,
            input_size=tuple(size),
            in_chans=weight.shape[1],
            norm_pix_loss=bool(file.args.get("norm_pix_loss", False)),
            decoder_attention=file.decoder_attention,
            decoder_depth=file.decoder_depth,
            mean=file.args.get("mean"),
            std=file.args.get("std"),
        )
    except SettingError as error:
        raise UserError(f"{file.path}: its settings make no model ({error}); give an intact file") from error
