"""The published checkpoint file: {'model', 'optimizer', 'epoch', 'scaler', 'args'} in a .pth, read and written; and its
weights alone as .safetensors, under the same names. Read are also a folder of transformers, and files with its names.

Written .pth files load with ``weights_only=True``. Read ones may carry the published ``argparse.Namespace``, the one
class that is let through; anything else that a pickle could hold is refused by torch.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import pickle
import re
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, BinaryIO, Literal

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as safetensors_bytes

from fastmae.checkpoint.contents import Kind, NotMeantError, described, foreign_parts, listed, understand
from fastmae.checkpoint.huggingface import CONFIG, read_config, weights_file
from fastmae.checkpoint.positions import Positions, UnknownGridError, made_table, read_table
from fastmae.config.family import Family, family_of
from fastmae.config.images import images_of_model, pixel_settings
from fastmae.config.model import ModelSpec
from fastmae.config.shape import Shape
from fastmae.config.shared import ReadingConfig
from fastmae.config.values import given as chosen
from fastmae.errors import SettingError, UserError
from fastmae.files import write_whole
from fastmae.messages import logger
from fastmae.model.build import build_model
from fastmae.model.classifier import take_pooled_norm
from fastmae.model.convnext import ConvNeXtMAE
from fastmae.model.family import MaskedModel
from fastmae.model.mae import MaskedAutoencoderViT
from fastmae.model.presets import PRESETS
from fastmae.model.sharding import laid_out_like
from fastmae.model.sizes import CONVNEXT_SIZES, HEAD_WIDTH, PRESET_SIZES, beyond_preset, full_shape, sizes_of
from fastmae.model.vit import patch_grid

# The state of a fresh gradient scaler. bf16 and fp32 need none, but the published loader asks for one.
_SCALER = {"scale": 65536.0, "growth_factor": 2.0, "backoff_factor": 0.5, "growth_interval": 2000, "_growth_tracker": 0}
_PRESET_OF_WIDTH = {sizes["embed_dim"]: name for name, sizes in reversed(PRESET_SIZES.items())}


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
    kind: Kind = "autoencoder"

    @property
    def head(self) -> dict[str, torch.Tensor]:
        """Of a classifier: ``head.weight`` [classes, D] and ``head.bias``; they are in ``model`` as well."""
        return {name: self.model[name] for name in ("head.weight", "head.bias") if self.kind == "classifier"}

    @property
    def family(self) -> Family:
        """By the names of its tensors, or the settings beside them."""
        return "convnext" if "stem.0.weight" in self.model else family_of(self.args.get("model"))

    @property
    def has_decoder(self) -> bool:
        return "decoder_pred.weight" in self.model or self.family in ("conv", "mlp")

    @property
    def what(self) -> str:
        """What the file holds, in words."""
        return described(self.model, self.head)

    @property
    def decoder_attention(self) -> Literal["self", "cross"]:
        """By the names of its tensors, which a file with weights alone has too."""
        return "cross" if "decoder_map_weights" in self.model else "self"

    @property
    def shape(self) -> dict[str, Any]:
        """What its tensors tell of its sizes, under the names of ``Shape``: all but heads, and what is missing.

        The first block tells those of a stack. Nothing is told of blocks that would be more than twice as large as all
        tensors together, so that no file makes us build what it does not hold.
        """
        said: dict[str, Any] = {}
        numbers = sum(tensor.numel() for tensor in self.model.values())
        for part, width_of, axis in (("", "patch_embed.proj.weight", 0), ("decoder_", "decoder_pred.weight", 1)):
            names = {key.split(".")[1] for key in self.model if key.startswith(f"{part}blocks.")}
            out, hidden = (self.model.get(f"{part}blocks.0.{name}.weight") for name in ("attn.proj", "mlp.fc1"))
            width = self.model[width_of].shape[axis] if width_of in self.model else 0
            if out is None or hidden is None or out.shape != (width, width) or hidden.shape[1:] != (width,):
                continue
            if len(names) * (out.numel() + hidden.numel()) <= 2 * numbers:
                ratio = hidden.shape[0] / width
                said |= {f"{part}embed_dim": width, f"{part}depth": len(names), f"{part}mlp_ratio": ratio}
        registers = self.model.get("reg_token")
        if registers is not None and registers.ndim == 3 and registers.shape[0] == 1:
            said["registers"] = registers.shape[1]
        return said


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
    """Whether ``read_official`` is for this path: a file, or a folder as transformers writes it.

    Raises:
        UserError: a folder of transformers whose weights are in several files, or neither a file nor a folder.
    """
    if path.exists() and not (path.is_file() or path.is_dir()):
        raise UserError(f"{path}: a pipe or a device; give a run folder, one of its checkpoints, or a file")
    pieces = sorted(path.glob("*.index.json")) if (path / CONFIG).is_file() else []
    if pieces and weights_file(path) is None:
        raise UserError(
            f"{path}: is a folder of transformers in pieces ({pieces[0].name}); save it in one, with "
            "model.save_pretrained(folder, max_shard_size='100GB')"
        )
    return path.is_file() or weights_file(path) is not None


def read_official(path: Path) -> OfficialFile:
    """Reads a training file, or one with the weights alone: a .pth, a .safetensors, or a folder of transformers.

    Names with prefixes and tensors in containers, as trainers of others write them, are read as well.

    Raises:
        UserError: not such a file, or one that holds more than data.
    """
    path = weights_file(path) or path
    content, said = _read_safetensors(path) if path.suffix == ".safetensors" else (_read_pickled(path), {})
    try:
        found = understand(content, said.get("args"))
    except NotMeantError as error:
        raise UserError(f"{path}: {error}") from error
    for name, tensor in {**found.weights, **found.head}.items():
        dense = tensor.layout == torch.strided and tensor.is_floating_point()
        if not dense or tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
            # Such as one number that is repeated a million times: memory would be taken for all of them.
            raise UserError(f"{path}: {name} is no plain tensor of floating numbers; give an intact file")
    settings, heads, remarks = read_config(path.parent) if found.is_huggingface else ({}, None, [])
    return OfficialFile(
        path,
        {**found.weights, **found.head},
        found.optimizer,
        said.get("epoch", found.epoch),
        {**settings, **found.args},
        heads,
        (*remarks, *found.notes),
        found.kind,
    )


def report_remarks(file: OfficialFile) -> None:
    """Reports, once for all ranks, what of a file is not used."""
    report(file.path, file.remarks)


def report(path: Path | str, lines: Iterable[str]) -> None:
    """Reports lines about a checkpoint, once for all ranks."""
    rank = dist.get_rank() if dist.is_initialized() else int(os.environ.get("RANK") or 0)
    for line in lines if rank == 0 else ():
        logger.warning("%s: %s", path, line)


def _read_pickled(path: Path) -> Any:
    """Returns what a .pth holds: tensors, numbers, texts, and containers of them, but no other objects."""
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # torch raises pickle, zip, EOF and runtime errors on foreign bytes
        raise UserError(f"{path}: not a readable checkpoint ({_unreadable(path, error)})") from error


def _unreadable(path: Path, error: Exception) -> str:
    """Says why torch did not read a file, and what to do."""
    program = {".onnx": "an ONNX program", ".pt2": "a program of torch.export"}.get(path.suffix)
    if program is None and "TorchScript" in str(error):
        program = "a TorchScript program"
    if program is not None:
        return f"it is {program}; give the checkpoint that it was exported from"
    if not isinstance(error, pickle.UnpicklingError):
        reason = (str(error) or type(error).__name__).splitlines()[0]
        return f"{reason}; give an intact .pth or a run folder"
    objects = re.search(r"GLOBAL (\S+) was not an allowed", str(error))
    named = f" ({objects[1]})" if objects else ""
    return (
        f"not a torch file, or one with objects{named} that could run code; give an intact .pth, or save the tensors "
        "alone: torch.save(model.state_dict(), …)"
    )


def _read_safetensors(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Returns the tensors, and what the metadata say: ``args`` and ``epoch``.

    The library compares all sizes in the header with the file's before a tensor is made.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
        args = json.loads(metadata.get("settings", "{}"))
        if not isinstance(args, dict):
            raise ValueError("the settings in its metadata are none")
        return weights, {"args": args} | ({"epoch": int(metadata["epoch"])} if "epoch" in metadata else {})
    except (SafetensorError, OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{path}: not a readable checkpoint ({reason}); give an intact file or a run folder") from error


# --- a model of a file ------------------------------------------------------------------------------------------------


def model_of_file(file: OfficialFile, given: ReadingConfig | None = None) -> MaskedModel:
    """A model with a file's weights and the size of its positions; what the file does not say is ``given``.

    Raises:
        UserError: no preset is known to fit.
    """
    spec, tables, _ = spec_of_file(file, given)
    model = build_model(spec)
    if "fc_norm.weight" in file.model and isinstance(model, MaskedAutoencoderViT):
        take_pooled_norm(model, has_norm="norm.weight" in file.model)
    elif "fc_norm.weight" in file.model and isinstance(model, ConvNeXtMAE):
        model.take_pooled_norm()
    load_weights(model, dataclasses.replace(file, model={**file.model, **tables}))
    return model


def load_into(model: MaskedModel, file: OfficialFile) -> None:
    """Copies a file's weights into the model of a run, which has a size and settings of its own.

    Raises:
        UserError: keys or shapes that do not fit, or positions of another grid.
    """
    if file.family != model.family:
        raise UserError(f"{file.path}: is {file.what}, and the run trains {model.sizes}; name its preset with --model")
    size = model.img_size
    tables: dict[str, torch.Tensor] = {}
    notes: tuple[str, ...] = ()
    if model.family == "vit":
        size, tables, notes = _placed(file, model.patch_size, ReadingConfig(input_size=model.img_size))
    if size != model.img_size:
        its, ours = (f"{height}×{width}" for height, width in (size, model.img_size))
        problem = f"{file.path} is of images of {its} pixels, not {ours}; give --input_size={size[0]} {size[1]}"
        raise SettingError("resume", str(file.path), problem)
    if model.has_other_sizes and not all(read_table(t, name, model.grid_size).is_fixed for name, t in tables.items()):
        problem = f"{file.path} has positions that were learnt, which growing crops cannot take; leave --start_size out"
        raise SettingError("resume", str(file.path), problem)
    load_weights(model, dataclasses.replace(file, model={**file.model, **tables}))
    own = {"norm_pix_loss": model.norm_pix_loss, "mean": model.mean.tolist(), "std": model.std.tolist()}
    own |= pixel_settings(model.pixels)
    differing = [
        f"says {name} {file.args[name]}, and this run has {value}"
        for name, value in own.items()
        if name in file.args and not _alike(file.args[name], value)
    ]
    report(file.path, [*notes, *differing])


def _alike(one: Any, other: Any) -> bool:
    """Whether two values of a setting mean the same, of which one may have been rounded to float32."""
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        return len(one) == len(other) and all(abs(a - b) <= 1e-6 for a, b in zip(one, other, strict=True))
    return bool(one == other)


def load_weights(model: MaskedModel, file: OfficialFile) -> None:
    """Copies a file's weights into the model, every key accounted for; the decoder may be missing as a whole.

    Raises:
        UserError: keys or shapes that do not fit.
    """
    if isinstance(model, MaskedAutoencoderViT):
        _check_sizes(model, file)
    own = model.state_dict()
    wanted = own.keys() if file.has_decoder else {k for k in own if not k.startswith(("decoder_", "mask_token"))}
    missing, unknown = sorted(wanted - file.model.keys()), sorted(file.model.keys() - own.keys() - file.head.keys())
    shapes = [k for k in wanted & file.model.keys() if own[k].shape != file.model[k].shape]
    wrong = (("missing", missing), ("unknown", unknown), ("of another shape", sorted(shapes)))
    if any(keys for _, keys in wrong):
        mismatches = "; ".join(f"{len(keys)} tensors are {what} ({listed(keys)})" for what, keys in wrong if keys)
        foreign = foreign_parts(unknown)
        remedy = f"a masked autoencoder has no {foreign}" if foreign else "name its preset with --model"
        raise UserError(f"{file.path}: is {file.what}, but {mismatches}; {remedy}")
    for key in sorted(wanted):
        if not bool(file.model[key].isfinite().all()):
            raise UserError(f"{file.path}: {key} holds numbers that are not finite; give an intact file")
    with torch.no_grad():
        for key in wanted:
            own[key].copy_(laid_out_like(own[key], file.model[key]))


def _check_sizes(model: MaskedAutoencoderViT, file: OfficialFile) -> None:
    """Refuses a file of a vision transformer of other sizes, naming the setting that would fit.

    Raises:
        UserError: naming it.
    """
    sizes = {"decoder_attention": model.decoder_attention, **sizes_of(model).shape}
    its_decoder = {"decoder_attention": file.decoder_attention} if file.has_decoder else {}
    for name, its in {**its_decoder, "registers": 0, **file.shape}.items():
        if its != sizes[name]:
            flag, whose = f"--{name}", "decoder" if name.startswith("decoder_") else "encoder"
            problem = f"its {whose} has {flag} {its}, not {sizes[name]}; give its {flag} and --model"
            raise UserError(f"{file.path}: {problem}")
    for whose, its, ours in zip(("encoder", "decoder"), file.heads or (), _heads(model), strict=False):
        if its not in (None, ours):
            raise UserError(f"{file.path}: its {whose} has {its!r} heads, not {ours}; name its preset with --model")


def _heads(model: MaskedAutoencoderViT) -> tuple[int, int]:
    widths = model.cls_token.shape[-1], model.mask_token.shape[-1]
    return widths[0] // model.head_dims[0], widths[1] // model.head_dims[1]


def spec_of_file(
    file: OfficialFile, given: ReadingConfig | None = None
) -> tuple[ModelSpec, dict[str, torch.Tensor], tuple[str, ...]]:
    """The model of a file at the size of its positions; its tables of positions, [1, 1+L, width] each; notes on both.

    What the file does not say is ``given``, or follows from names and shapes.

    Raises:
        UserError: not a masked autoencoder, its sizes contradict each other, or nothing tells its grid.
    """
    given = given or ReadingConfig()
    if file.family != "vit":
        return _spec_of_other(file, given), {}, ()
    weight = file.model.get("patch_embed.proj.weight")
    if weight is None or weight.ndim != 4:
        raise UserError(f"{file.path}: has no patch_embed.proj.weight; it is not a checkpoint of a masked autoencoder")
    patch = int(weight.shape[2]), int(weight.shape[3])
    size, tables, notes = _placed(file, patch, given)
    check_channels(file.path, weight.shape[1], given)
    name = given.model or _preset(file, weight)
    shape, unsaid = _shape(file, name, weight.shape[0], given)
    try:
        spec = ModelSpec(
            model=name,
            input_size=size,
            patch_size=patch,
            in_chans=weight.shape[1],
            norm_pix_loss=bool(chosen(given.norm_pix_loss, file.args.get("norm_pix_loss", False))),
            decoder_attention=file.decoder_attention,
            **shape,
            mean=chosen(given.mean, file.args.get("mean")),
            std=chosen(given.std, file.args.get("std")),
            **images_of_model(given, file.args, weight.shape[1]),
        )
        if name in PRESETS:
            full_shape(name, spec)
    except SettingError as error:
        raise UserError(f"{file.path}: its settings make no model ({error}); give an intact file") from error
    return spec, tables, (*notes, *unsaid)


def _spec_of_other(file: OfficialFile, given: ReadingConfig) -> ModelSpec:
    """The model of a file of another family than vision transformers.

    Raises:
        UserError: nothing tells its sizes, or they contradict each other.
    """
    settings = dict(file.args)
    if file.family == "convnext":
        settings |= {"model": _convnext_preset(file), "in_chans": file.model["stem.0.weight"].shape[1]}
        settings |= {"input_size": chosen(given.input_size, settings.get("input_size", (224,)))}
        settings |= {"patch_size": None}
    if given.model not in (None, settings.get("model")):
        raise SettingError("model", given.model, f"{file.path} is of {settings.get('model')}; leave it out")
    channels = settings.get("in_chans")
    if not isinstance(channels, int):
        raise UserError(f"{file.path}: does not say the channels of its images; give an intact file")
    check_channels(file.path, channels, given)
    known = {name: getattr(given, name) for name in ("norm_pix_loss", "mean", "std")}
    settings |= {name: value for name, value in known.items() if value is not None}
    try:
        return ModelSpec.from_json({**settings, **images_of_model(given, file.args, channels)})
    except (SettingError, TypeError) as error:
        raise UserError(f"{file.path}: its settings make no model ({error}); give an intact file") from error


def _convnext_preset(file: OfficialFile) -> str:
    """Returns the preset of the blocks and widths that the tensors of a ConvNeXt V2 tell."""
    stages = range(len({name.split(".")[1] for name in file.model if name.startswith("stages.")}))
    blocks = [re.compile(rf"stages\.{stage}\.blocks\.\d+\.conv_dw\.weight") for stage in stages]
    found = [[t.shape[0] for name, t in file.model.items() if pattern.fullmatch(name)] for pattern in blocks]
    sizes = {"depths": tuple(map(len, found)), "dims": tuple(dims[0] if dims else 0 for dims in found)}
    name = next((name for name, known in CONVNEXT_SIZES.items() if known == sizes), None)
    if name is None:
        raise UserError(
            f"{file.path}: is {file.what}; no preset has these blocks and widths: {', '.join(CONVNEXT_SIZES)}"
        )
    return name


def check_heads(path: Path, said: Any, given: ReadingConfig) -> None:
    """Refuses a given number of heads of the encoder if a checkpoint says another one.

    Raises:
        SettingError: naming both.
    """
    if said is not None and given.num_heads not in (None, said):
        raise SettingError("num_heads", given.num_heads, f"the encoder of {path} has {said}; leave it out")


def check_channels(path: Path, channels: int, given: ReadingConfig) -> None:
    """Refuses a given mean, std or value range of another number of channels.

    Raises:
        SettingError: naming which.
    """
    for name in ("mean", "std"):
        values = getattr(given, name)
        if values is not None and len(values) != channels:
            raise SettingError(name, values, f"must be {channels} numbers, one for each channel of {path}")
    if len(given.value_range or ("dtype",)) not in (1, 2, 2 * channels):
        problem = f"must be one pair LOW HIGH, or {channels} pairs, one for each channel of {path}"
        raise SettingError("value_range", given.value_range, problem)


def _preset(file: OfficialFile, weight: torch.Tensor) -> str:
    """Returns the preset that a file names, in fastmae's, the official or timm's words, or that its shapes tell."""
    name, width = file.args.get("model"), weight.shape[0]
    if isinstance(name, str) and name not in PRESETS:
        named = f"mae_{name.partition('.')[0]}"
        name = next((preset for preset in PRESETS if named == preset or named.startswith(f"{preset}_")), name)
    if name in PRESETS or (name and "vit" not in name and "deit" not in name):
        return str(name)
    if width in _PRESET_OF_WIDTH:
        return _PRESET_OF_WIDTH[width]
    if file.shape.get("embed_dim") != width:
        raise UserError(f"{file.path}: is {file.what}; no preset has such a width: {', '.join(PRESETS)}")
    return _PRESET_OF_WIDTH[min(_PRESET_OF_WIDTH, key=lambda known: abs(known - width))]


def _shape(file: OfficialFile, name: str, width: int, given: ReadingConfig) -> tuple[dict[str, Any], list[str]]:
    """Returns the sizes of a file's model as settings, None where they are those of the preset ``name``; and a line on
    the heads, if nothing says how many there are.

    Raises:
        UserError: the preset that somebody names has another width, or nothing tells the heads.
    """
    if name not in PRESETS:
        return {}, []  # building refuses it
    preset, shape, notes = full_shape(name, Shape()), file.shape, []
    if given.model is not None and shape.get("embed_dim", width) != preset["embed_dim"]:
        problem = f"its tokens are {preset['embed_dim']} wide, and those of {file.path} {width}; leave it out"
        raise SettingError("model", given.model, problem)
    said = (
        [given.num_heads, None],
        file.heads or (None, None),
        [file.args.get(f"{p}num_heads") for p in ("", "decoder_")],
    )
    for part, numbers in zip(("", "decoder_"), zip(*said, strict=True), strict=True):
        its = shape.get(f"{part}embed_dim")
        heads = next((number for number in numbers if isinstance(number, int) and number > 0), None)
        if not part:
            check_heads(file.path, next(filter(None, numbers[1:]), None), given)
        if heads is None and its not in (None, preset[f"{part}embed_dim"]):
            whose, usual = ("decoder", HEAD_WIDTH // 2) if part else ("encoder", HEAD_WIDTH)
            if its % usual:
                problem = f"is {file.what}; no preset has such a width, and nothing says the heads of its {whose}"
                raise UserError(f"{file.path}: {problem}; give --num_heads, or its settings beside the tensors")
            heads = its // usual
            notes.append(f"does not say the heads of its {whose}; {heads} of {usual} numbers each are taken")
        shape[f"{part}num_heads"] = heads or preset[f"{part}num_heads"]
    return {**beyond_preset(name, shape), "decoder_depth": shape.get("decoder_depth")}, notes


def _placed(
    file: OfficialFile, patch: tuple[int, int], given: ReadingConfig
) -> tuple[tuple[int, int], dict[str, torch.Tensor], tuple[str, ...]]:
    """Returns the size of the images that the tables of positions are for, the tables, and notes on them.

    A fixed table tells its grid. That of a learnt table, or of a missing one, is that of the size in the file's
    settings, or the given one.
    """
    in_settings = "input_size" in file.args
    size = file.args["input_size"] if in_settings else given.input_size
    grid = _said_grid(file.path, size, patch) if in_settings or size is not None else None
    found: dict[str, Positions] = {}
    for name, token in (("pos_embed", "cls_token"), ("decoder_pos_embed", "mask_token")):
        if token not in file.model:
            continue  # its absence is told with that of other tensors
        where = found["pos_embed"].grid if "pos_embed" in found else grid
        try:
            if name in file.model:
                registers = file.shape.get("registers", 0) if name == "pos_embed" else 0
                found[name] = read_table(file.model[name], name, where, registers)
            elif where is not None:
                found[name] = made_table(file.model[token].shape[-1], where, name)
            else:
                raise UnknownGridError(f"{name} is missing, and nothing says the size of the images")
        except UnknownGridError as error:
            problem = f"must be given as height and width: {file.path}: {error}"
            raise SettingError("input_size", problem=problem) from error
    if "pos_embed" not in found:
        raise UserError(f"{file.path}: is {file.what}, but has no class token; it is not one of a masked autoencoder")
    own = found["pos_embed"].grid
    others = [positions.grid for positions in found.values() if positions.grid != own]
    if others:
        grids = f"pos_embed is of {own[0]}×{own[1]} patches and decoder_pos_embed of {others[0][0]}×{others[0][1]}"
        raise UserError(f"{file.path}: {grids}; give an intact file")
    if in_settings and grid is not None and grid != own:
        shapes = f"of {own[0]}×{own[1]} patches, and the input_size of its settings has {grid[0]}×{grid[1]}"
        raise UserError(f"{file.path}: pos_embed is of another shape ({shapes}); give an intact file")
    tables = {name: positions.table for name, positions in found.items()}
    if found["pos_embed"].registers is not None:
        tables["reg_token"] = file.model["reg_token"] + found["pos_embed"].registers
    notes = tuple(note for positions in found.values() for note in positions.notes)
    return (own[0] * patch[0], own[1] * patch[1]), tables, notes


def _said_grid(path: Path, size: Any, patch: tuple[int, int]) -> tuple[int, int]:
    """Returns the (rows, columns) of patches of the size that somebody says."""
    sides = [size] if isinstance(size, int) else size
    if not isinstance(sides, list | tuple) or len(sides) not in (1, 2) or not all(isinstance(s, int) for s in sides):
        raise UserError(f"{path}: input_size {size} in its settings is not a size; give an intact file")
    try:
        return patch_grid((sides[0], sides[-1]), patch)
    except ValueError as error:
        raise SettingError("input_size", tuple(sides), f"{path}: {error}; give another size or file") from error
