"""Export of a segmenter with its head: a program, or a folder of transformers where the head is UPerNet."""

from __future__ import annotations

from pathlib import Path

import torch

from fastmae.checkpoint.load import load_segmenter, read_settings
from fastmae.config import ExportConfig
from fastmae.errors import SettingError
from fastmae.export.measure import as_taken, noise_for
from fastmae.export.onnx import opened_onnx, save_onnx
from fastmae.export.program import opened_program, save_program
from fastmae.export.upernet import save_upernet
from fastmae.model.segmenter import Segmenter

WITH_HEAD = ("hf", "onnx", "torch-export")
"""The formats that hold a segmenter with its head. The others hold its encoder, as ``--part=encoder`` asks for."""


def open_whole_segmenter(config: ExportConfig) -> tuple[Segmenter, tuple[str, ...]] | None:
    """Returns the segmenter that is to be exported with its head, and the names of its classes; None for all else."""
    if config.to not in WITH_HEAD or config.part == "encoder" or not Path(config.checkpoint).is_dir():
        return None
    settings = read_settings(config.checkpoint)
    if "segmenter_head" not in settings:
        return None
    return load_segmenter(config.checkpoint), tuple(settings.get("classes") or ())


@torch.no_grad()
def export_segmenter(config: ExportConfig, model: Segmenter, class_names: tuple[str, ...]) -> str:
    """Exports a segmenter as ``config`` says. Returns a line that describes the result.

    Raises:
        UserError: the format cannot hold the model, a package is missing, or the file system refused.
    """
    if config.check is not None:
        raise SettingError("check", problem="compares features; give --part=encoder with it, or leave it out")
    if config.prune is not None:
        problem = "is for encoders, and the head was trained on this whole one; give --part=encoder with it"
        raise SettingError("prune", config.prune, problem)
    path, raw = Path(config.output), config.input != "float"
    what = f"a segmenter of {model.num_classes} classes"
    if config.to == "hf":
        save_upernet(path, model, class_names)
        return f"{path}: {what}, as UperNetForSemanticSegmentation of transformers has it"
    if raw and config.input != model.pixels.dtype:
        problem = f"must be {model.pixels.dtype}, the type of the model's pixels, or float"
        raise SettingError("input", config.input, problem)
    save, opened, runtime = {
        "onnx": (save_onnx, opened_onnx, "onnxruntime"),
        "torch-export": (save_program, opened_program, "torch"),
    }[config.to]
    save(path, model, config.variant, raw)
    images = as_taken(model, noise_for(model), raw)
    truth, found = model(images), opened(path)(images)
    largest, same = float((found - truth).abs().max()), float((found.argmax(1) == truth.argmax(1)).double().mean())
    size = sum(file.stat().st_size for file in path.parent.glob(f"{path.name}*")) / 1e6
    return (
        f"{path}: {what}, {config.variant}, {size:.1f} MB; in {runtime} its logits differ by at most {largest:.1e} "
        f"from fastmae's, which go up to {float(truth.abs().max()):.1f}, and {100 * same:.2f} % of the pixels have the "
        "same class (5 images of noise)"
    )
