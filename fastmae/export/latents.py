"""Export of the features of models without tokens (mae_mlp, mae_conv) as a program that runs without fastmae."""

from __future__ import annotations

import copy
from pathlib import Path

import torch
from torch import nn

from fastmae.config import ExportConfig
from fastmae.errors import SettingError
from fastmae.export.atomic import written_aside
from fastmae.export.onnx import opened_onnx, traced
from fastmae.export.program import opened_program
from fastmae.model.family import MaskedModel
from fastmae.model.pixels import DTYPES, normalised, range_ends

PROGRAMS = ("onnx", "torch-export")
SAMPLES = 5


class Latents(nn.Module):
    """Computes ``model.features`` of images, of the form that they are traced with."""

    def __init__(self, model: MaskedModel) -> None:
        super().__init__()
        self.model = copy.deepcopy(model).eval()

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.model.features(images)


def export_latents(config: ExportConfig, model: MaskedModel) -> str:
    """Writes a program with the input ``images`` and the output ``features`` [N, D], both with a free first axis, and
    opens it again. Missing numbers of float32 pixels are NaN.

    Returns:
        A line that describes the result.

    Raises:
        UserError: the format or the variant is for other models, or the file system refused.
    """
    path, raw = Path(config.output), config.input != "float"
    if config.to not in PROGRAMS:
        problem = f"has no such model as {type(model).__name__}; export to {' or '.join(PROGRAMS)}"
        raise SettingError("to", config.to, problem)
    if config.variant != "fp32":
        raise SettingError("variant", config.variant, f"must be fp32 for {type(model).__name__}")
    if config.check is not None:
        raise SettingError("check", problem=f"is for models with tokens, not {type(model).__name__}; leave it out")
    if raw and config.input != model.pixels.dtype:
        problem = f"must be {model.pixels.dtype}, the type of the model's pixels, or float"
        raise SettingError("input", config.input, problem)
    images = _noise(model)
    images = images if raw else normalised(model, images).contiguous()
    module = Latents(model)
    with torch.no_grad():
        truth = module(images)
        if config.to == "onnx":
            graph = traced(module, images, "features")
            with written_aside(path) as aside:
                graph.save(aside)
        else:
            shapes = {"images": {0: torch.export.Dim("batch", min=1)}}
            program = torch.export.export(module, (images,), dynamic_shapes=shapes)
            with written_aside(path) as aside:
                torch.export.save(program, aside)
        found = (opened_onnx if config.to == "onnx" else opened_program)(path)(images[:3])
    difference, largest = float((found - truth[:3]).abs().max()), float(truth.abs().max())
    size = path.stat().st_size / 1e6
    return (
        f"{path}: the encoder, fp32, {size:.1f} MB; its features differ by at most {difference:.1e} from fastmae's, "
        f"which go up to {largest:.1f} (3 images of noise)"
    )


def _noise(model: MaskedModel) -> torch.Tensor:
    """Returns pixels [N, H, W, C] of noise with the mean and the deviation of each channel; whole numbers between the
    ends of the value range."""
    low, high = range_ends(model)
    shape, generator = (SAMPLES, *model.img_size, model.in_chans), torch.Generator().manual_seed(0)
    shares = model.mean.cpu() + model.std.cpu() * torch.randn(shape, generator=generator)
    dtype = DTYPES[model.pixels.dtype]
    if dtype == torch.float32:
        return low + shares * (high - low)
    return (low + shares.clamp(0, 1) * (high - low)).round().to(dtype)
