"""``fastmae export``: calls the format's module, checks a program, and describes the result."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from fastmae.config import ExportConfig
from fastmae.errors import SettingError
from fastmae.export.hf import save_huggingface
from fastmae.export.measure import Encode, EncoderFigures, measure, open_labelled, sample_difference
from fastmae.export.official import Part, export_official, numbers
from fastmae.export.onnx import opened_onnx, save_onnx
from fastmae.export.program import opened_program, save_program
from fastmae.export.timm import save_timm
from fastmae.model.mae import MaskedAutoencoderViT


def export(
    config: ExportConfig, model: MaskedAutoencoderViT, settings: dict[str, Any], has_decoder: bool, num_workers: int
) -> tuple[str, dict[str, EncoderFigures]]:
    """Exports a model as ``config`` says.

    Args:
        config: settings that are already checked.
        model: a model on the CPU, in evaluation mode.
        settings: those of its checkpoint: the preset's name as ``model``, and ``mask_ratio`` if it is known.
        has_decoder: whether the checkpoint holds a decoder; otherwise the model's is a fresh one.
        num_workers: decoding threads for ``config.check``.

    Returns:
        A line that describes the result; and the figures of encoders by name if ``config.check`` is set.

    Raises:
        UserError: the format cannot hold the model, a package is missing, or the file system refused.
    """
    path, uint8 = Path(config.output), config.input == "uint8"
    part: Part = config.part or ("full" if has_decoder and config.to in ("official", "hf") else "encoder")
    if part == "full" and not has_decoder:
        raise SettingError("part", "full", f"{config.checkpoint} holds the encoder alone; leave --part out")
    if config.to in ("onnx", "torch-export"):
        return _program(config, model, path, uint8, num_workers)
    if config.to == "official":
        export_official(path, model, _described(model, settings), part)
    elif config.to == "timm":
        save_timm(path, model)
    else:
        save_huggingface(path, model, float(settings.get("mask_ratio", 0.75)), part)
    what = "the encoder" if part == "encoder" else "encoder and decoder"
    return f"{path}: {what}, as {config.to} has it", {}


def _described(model: MaskedAutoencoderViT, settings: dict[str, Any]) -> dict[str, Any]:
    """Returns the settings that build the model again. A run's other settings are dropped, as they name folders."""
    described = {
        "model": settings["model"],
        "input_size": list(model.img_size),
        "in_chans": model.in_chans,
        "norm_pix_loss": model.norm_pix_loss,
        "mean": numbers(model.mean),
        "std": numbers(model.std),
        "decoder_attention": model.decoder_attention,
        "decoder_depth": len(model.decoder_blocks),
    }
    return described | {key: settings[key] for key in ("mask_ratio",) if key in settings}


def _program(
    config: ExportConfig, model: MaskedAutoencoderViT, path: Path, uint8: bool, num_workers: int
) -> tuple[str, dict[str, EncoderFigures]]:
    """Writes a program, opens it, and compares its tokens with the model's."""
    save, opened, runtime = {
        "onnx": (save_onnx, opened_onnx, "onnxruntime"),
        "torch-export": (save_program, opened_program, "torch"),
    }[config.to]
    labelled = None if config.check is None else open_labelled(config.check)
    save(path, model, config.variant, uint8)
    encode: Encode = opened(path)
    difference, largest = sample_difference(model, encode, uint8)
    size = sum(file.stat().st_size for file in path.parent.glob(f"{path.name}*")) / 1e6
    line = (
        f"{path}: the encoder, {config.variant}, {size:.1f} MB; in {runtime} its tokens differ by at most "
        f"{difference:.1e} from fastmae's, which go up to {largest:.1f} (5 images of noise)"
    )
    if labelled is None:
        return line, {}
    encoders: dict[str, Encode] = {"fastmae": model.forward_features}
    with tempfile.TemporaryDirectory() as folder:
        if config.variant != "fp32":
            whole = Path(folder) / f"fp32{path.suffix}"
            save(whole, model, "fp32", uint8)
            encoders[f"fp32 in {runtime}"] = opened(whole)
        encoders[f"{config.variant} in {runtime}"] = encode
        return line, measure(model, encoders, *labelled, uint8=uint8, num_workers=num_workers)
