"""The settings of export."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from fastmae.config.shared import (
    Checkpoint,
    Preset,
)
from fastmae.errors import UserError

ExportFormat = Literal["official", "timm", "hf", "onnx", "torch-export"]


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """Write a pretrained model in a form that other tools read."""

    checkpoint: Checkpoint
    to: ExportFormat
    """official: .pth or .safetensors with the published names. timm: a state dict for its vit_*_patch*_224.mae. hf: a
    folder for transformers' ViTMAEForPreTraining, or ViTModel for the encoder. onnx, torch-export: the encoder as a
    program (.onnx, .pt2)."""
    output: str
    """The file to write, or the folder for hf."""
    part: Literal["encoder", "full"] | None = None
    """Without or with the decoder. Default: with it, where the checkpoint has one and the format is official or hf."""
    variant: Literal["fp32", "fp16", "bf16", "int8"] = "fp32"
    """Of a program's numbers: float32; fp16; bf16 (torch-export alone); int8 matrices (onnx alone)."""
    input: Literal["float", "uint8"] = "float"
    """What a program takes: normalised float32 [N, C, H, W], or uint8 [N, H, W, C] that it normalises itself."""
    check: str | tuple[str, ...] | None = None
    """Labelled data, such as `digits`, on which a program's features and speed are compared with fastmae's."""
    model: Preset = None


def check_export(config: ExportConfig) -> None:
    """Refuses what does not go together, whatever the checkpoint.

    Raises:
        UserError: naming the flag, its value and what it must be.
    """
    endings = {"onnx": (".onnx",), "torch-export": (".pt2",), "hf": ()}.get(config.to, (".pth", ".safetensors"))
    if endings and not config.output.endswith(endings):
        raise UserError(f"--output {config.output}: must end in {' or '.join(endings)} with --to {config.to}")
    if config.part == "full" and config.to not in ("official", "hf"):
        raise UserError(f"--part full: must be encoder, or left out, with --to {config.to}")
    is_program = config.to in ("onnx", "torch-export")
    for flag, value, default in (("variant", config.variant, "fp32"), ("input", config.input, "float")):
        if value != default and not is_program:
            raise UserError(f"--{flag} {value}: must be {default}, or left out, with --to {config.to}")
    if config.check is not None and not is_program:
        raise UserError(f"--check: must be left out with --to {config.to}; its numbers are the checkpoint's, unchanged")
    other = {"bf16": "torch-export", "int8": "onnx"}.get(config.variant, config.to)
    if other != config.to:
        raise UserError(f"--variant {config.variant}: must be given together with --to {other}")
