"""``fastmae export``: calls the format's module, checks a program, and describes the result."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch

from fastmae.checkpoint.load import Opened
from fastmae.config import ExportConfig, pixel_settings
from fastmae.config.family import FAMILY
from fastmae.data.statistics import shown_range
from fastmae.errors import SettingError
from fastmae.evaluate.sharing import WHOLE, Share
from fastmae.export.convnext import as_timm_convnext, save_timm_convnext, save_transformers_convnext
from fastmae.export.encoder import AnyEncoder
from fastmae.export.hf import save_huggingface
from fastmae.export.latents import export_latents
from fastmae.export.measure import Encode, EncoderFigures, measure, open_labelled, sample_difference
from fastmae.export.official import Part, export_official, numbers
from fastmae.export.onnx import opened_onnx, save_onnx
from fastmae.export.program import opened_program, save_program
from fastmae.export.timm import as_timm, save_timm
from fastmae.export.vitdet import save_vitdet
from fastmae.facts import UINT8
from fastmae.model.convnext import ConvNeXtMAE
from fastmae.model.family import MaskedModel
from fastmae.model.mae import MaskedAutoencoderViT, as_vit
from fastmae.model.pixels import nodata_of
from fastmae.model.sizes import sizes_of


def export(
    config: ExportConfig,
    opened: Opened,
    num_workers: int,
    share: Share = WHOLE,
    together: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> tuple[str, dict[str, EncoderFigures]]:
    """Exports a model as ``config`` says. With a ``share`` of several ranks, the first writes, and all check.

    Args:
        config: settings that are already checked.
        opened: a checkpoint, whose model is on the CPU and in evaluation mode.
        num_workers: decoding threads for ``config.check``.
        share: this process among the ranks.
        together: a context that all ranks leave together, or with an error if one has one.

    Returns:
        A line that describes the result; and the figures of encoders by name if ``config.check`` is set.

    Raises:
        UserError: the format cannot hold the model, a package is missing, or the file system refused.
    """
    path, model = Path(config.output), opened.model
    if config.to != "official" and not isinstance(model, AnyEncoder):
        return (export_latents(config, model) if share.is_first else ""), {}
    head = {} if config.part == "encoder" else opened.head
    if config.part == "full" and not opened.has_decoder and not head:
        raise SettingError("part", "full", f"{config.checkpoint} holds the encoder alone; leave --part out")
    formats = ("official", "hf") if isinstance(model, MaskedAutoencoderViT) else ("official",)
    if config.part == "full" and not head and config.to == "hf" and config.to not in formats:
        problem = "transformers has the encoder of a ConvNeXt V2 alone, not its decoder; leave --part out"
        raise SettingError("part", "full", problem)
    is_full = config.part != "encoder" and opened.has_decoder and config.to in formats
    part: Part = "full" if is_full else "encoder"
    what = "encoder and decoder" if is_full else "the encoder"
    if head:
        what = f"the classifier of {head['head.weight'].shape[0]} classes"
    if config.to in ("onnx", "torch-export"):
        assert isinstance(model, AnyEncoder)
        return _program(config, model, head, what, num_workers, share, together)
    if not share.is_first:
        return "", {}
    if config.to == "vitdet":
        return _to_vitdet(config, model), {}
    if config.to == "official":
        export_official(path, model, _described(opened, head), part, head)
    elif config.to == "timm":
        return _to_timm(path, model, head, what), {}
    else:
        save_for_transformers(path, opened, part, head)
    prepared = "" if config.to == "official" else _how_to_prepare(model)
    return f"{path}: {what}, as {config.to} has it{prepared}", {}


def _to_vitdet(config: ExportConfig, model: MaskedModel) -> str:
    """Writes the encoder as a ViTDet backbone. Returns the line that says what it is."""
    vit = as_vit(model, "--to=vitdet")
    size = config.image_size or vit.img_size
    attends = save_vitdet(
        Path(config.output),
        vit,
        window=14 if config.window_size is None else config.window_size,
        image_size=(size[0], size[-1]),
        relative=config.relative_positions is not False,
    )
    return f"{config.output}: the encoder, as VitDetBackbone of transformers has it: {attends}{_how_to_prepare(vit)}"


def _to_timm(path: Path, model: MaskedModel, head: dict[str, torch.Tensor], what: str) -> str:
    """Writes the encoder for timm. Returns the line that says how it is opened."""
    classes = head["head.weight"].shape[0] if head else 0
    if isinstance(model, ConvNeXtMAE):
        save_timm_convnext(path, model, head)
        call = as_timm_convnext(model, classes)
    else:
        vit = as_vit(model, "--to=timm")
        save_timm(path, vit, head)
        call = f"timm.models.{as_timm(vit, classes)}"
    return f"{path}: {what}, as timm has it: {call}{_how_to_prepare(model)}"


def save_for_transformers(folder: Path, opened: Opened, part: Part, head: dict[str, torch.Tensor]) -> None:
    """Writes the folder that transformers opens.

    Raises:
        UserError: transformers has no class for the model, or the file system refused.
    """
    names = opened.settings.get("class_names") or ()
    if isinstance(opened.model, ConvNeXtMAE):
        save_transformers_convnext(folder, opened.model, head, names)
    else:
        ratio = float(opened.settings.get("mask_ratio") or 0.75)
        save_huggingface(folder, as_vit(opened.model, "a folder of transformers"), ratio, part, head, names)


def _described(opened: Opened, head: dict[str, torch.Tensor]) -> dict[str, Any]:
    """Returns the settings that build the model again. A run's other settings are dropped, as they name folders."""
    model, settings = opened.model, opened.settings
    described = {
        "model": settings["model"],
        "input_size": list(model.img_size),
        "in_chans": model.in_chans,
        "norm_pix_loss": model.norm_pix_loss,
        "mean": numbers(model.mean),
        "std": numbers(model.std),
        "decoder_attention": model.decoder_attention,
        **(sizes_of(model).shape if isinstance(model, MaskedAutoencoderViT) else {}),
        **{name: settings[name] for name in FAMILY if settings.get(name) is not None},
        **_images(model),
    }
    kept = ("nb_classes", "global_pool", "class_names") if head else ("mask_ratio",)
    return described | {key: settings[key] for key in kept if key in settings}


def _images(model: MaskedModel) -> dict[str, Any]:
    """Returns the settings of how its images are read, as JSON has them."""
    images = dataclasses.asdict(model.read_as) | pixel_settings(model.pixels)
    return {name: list(value) if isinstance(value, tuple) else value for name, value in images.items()}


def _how_to_prepare(model: MaskedModel) -> str:
    """Says how images are prepared that are no uint8 images, for a file that cannot say it; empty for those."""
    if model.pixels == UINT8:
        return ""
    mean, std = (" ".join(f"{value:g}" for value in numbers(values)) for values in (model.mean, model.std))
    line = f"; it takes ((pixels - low) / (high - low) - mean) / std with range {shown_range(model.pixels)}"
    missing = "" if nodata_of(model.pixels) is None else ", missing pixels as 0"
    return f"{line}, mean {mean}, std {std}{missing}"


def _program(
    config: ExportConfig,
    model: AnyEncoder,
    head: dict[str, torch.Tensor],
    what: str,
    num_workers: int,
    share: Share,
    together: Callable[[], AbstractContextManager[Any]],
) -> tuple[str, dict[str, EncoderFigures]]:
    """Writes a program, opens it, and compares its tokens, or a classifier's logits, with the model's."""
    path, raw = Path(config.output), config.input != "float"
    if raw and config.input != model.pixels.dtype:
        problem = f"must be {model.pixels.dtype}, the type of the model's pixels, or float"
        raise SettingError("input", config.input, problem)
    save, opened, runtime = {
        "onnx": (save_onnx, opened_onnx, "onnxruntime"),
        "torch-export": (save_program, opened_program, "torch"),
    }[config.to]
    if head and config.check is not None:
        raise SettingError("check", problem="compares features; give --part=encoder with it, or leave it out")
    labelled = None if config.check is None else open_labelled(config.check, model.read_as)
    with together():
        if share.is_first:
            save(path, model, config.variant, raw, head)
    if labelled is None and not share.is_first:
        return "", {}
    encode: Encode = opened(path)
    difference, largest = sample_difference(model, encode, raw, head)
    size = sum(file.stat().st_size for file in path.parent.glob(f"{path.name}*")) / 1e6
    line = (
        f"{path}: {what}, {config.variant}, {size:.1f} MB; in {runtime} its {'logits' if head else 'tokens'} differ by "
        f"at most {difference:.1e} from fastmae's, which go up to {largest:.1f} (5 images of noise)"
    )
    if labelled is None:
        return line, {}
    encoders: dict[str, Encode] = {"fastmae": model.forward_features}
    with tempfile.TemporaryDirectory() as folder:
        if config.variant != "fp32":
            whole = Path(folder) / f"fp32{path.suffix}"
            save(whole, model, "fp32", raw)
            encoders[f"fp32 in {runtime}"] = opened(whole)
        encoders[f"{config.variant} in {runtime}"] = encode
        return line, measure(model, encoders, *labelled, raw=raw, num_workers=num_workers, share=share)
