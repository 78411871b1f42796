"""The settings of export."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Literal

from fastmae.config.shared import Checkpoint, ReadingConfig, check_reading
from fastmae.config.values import coerce, need, need_at_least_one, need_size, need_utf8
from fastmae.errors import SettingError

Prune = Literal["blocks", "heads"]
ExportFormat = Literal["official", "timm", "hf", "vitdet", "onnx", "torch-export"]


LEAST_IMAGES = 20
"""Of fewer images no accuracy is measured."""
OF_PRUNING = ("data_path", "prune_count", "prune_images")
"""The settings that go with --prune."""
OF_VITDET = ("window_size", "image_size", "relative_positions")
"""The settings that go with --to vitdet."""


@dataclass(frozen=True, kw_only=True)
class ExportConfig(ReadingConfig):
    """Write a pretrained model in a form that other tools read."""

    checkpoint: Checkpoint
    to: ExportFormat
    """official: a .pth or .safetensors file with the names of the official files. timm: a state dict for its models
    vit_*_patch*_224.mae. hf: a folder for ViTMAEForPreTraining of transformers, or for ViTModel with the encoder alone.
    vitdet: a folder for VitDetBackbone of transformers, for detection. onnx and torch-export: the encoder as a program
    (.onnx, .pt2)."""
    output: str
    """The file to write, or the folder for hf and vitdet."""
    part: Literal["encoder", "full"] | None = None
    """Write the encoder alone, or the decoder as well. Default: both, where the checkpoint has a decoder and the format
    is official or hf."""
    variant: Literal["fp32", "fp16", "bf16", "int8"] = "fp32"
    """Format of the numbers of a program: float32, float16, bfloat16 (only for torch-export), or matrices of int8 (only
    for onnx)."""
    input: Literal["float", "uint8", "uint16", "float32"] = "float"
    """What a program takes: normalised float32 images [N, C, H, W] (float), or pixels [N, H, W, C] of the type that the
    model was trained with, which it normalises itself (uint8, uint16, float32)."""
    window_size: int | None = None
    """With --to vitdet, the side of the windows of patches that most blocks attend to, all but four; 0 lets every block
    attend to all patches. Default: 14, as published."""
    image_size: tuple[int, ...] | None = None
    """With --to vitdet, the side of the images to detect in, or their height and width; 1024 as published. Default:
    that of the pretrained encoder."""
    relative_positions: bool | None = None
    """With --to vitdet, whether attention has relative positions, which start at zero. Default: it has, as
    published."""
    check: str | tuple[str, ...] | None = None
    """Labelled data, such as `digits`, on which the features and the speed of a program are compared with those of
    fastmae."""
    prune: Prune | None = None
    """Leave out blocks, or attention heads (only for onnx and torch-export), and say what that costs and saves. One
    after another, that one goes whose absence costs the least accuracy of k-NN. Writes the encoder alone."""
    prune_count: int = 1
    """With --prune, how many are left out."""
    data_path: str | tuple[str, ...] | None = None
    """With --prune, labelled data: the choice is made within the train part, and the figures are those of the val or
    test part. Default: the data of the run."""
    prune_images: int = 2048
    """With --prune, at most so many images of each part are taken, evenly spaced."""

    def __post_init__(self) -> None:
        coerce(self)
        check_export(self)


def check_export(config: ExportConfig) -> None:
    """Refuses what does not go together, whatever the checkpoint.

    Raises:
        SettingError: naming the setting, its value and what it must be.
    """
    check_reading(config)
    to = f"with --to={config.to}"
    endings = {"onnx": (".onnx",), "torch-export": (".pt2",), "hf": (), "vitdet": ()}.get(
        config.to, (".pth", ".safetensors")
    )
    if endings and not config.output.endswith(endings):
        raise SettingError("output", config.output, f"must end in {' or '.join(endings)} {to}")
    need(config, config.part != "full" or config.to in ("official", "hf"), "part", f"encoder, or left out, {to}")
    is_program = config.to in ("onnx", "torch-export")
    if is_program:
        need_utf8(config, "output")
    for name, default in (("variant", "fp32"), ("input", "float")):
        need(config, is_program or getattr(config, name) == default, name, f"{default}, or left out, {to}")
    if config.check is not None and not is_program:
        problem = f"must be left out {to}; its numbers are those of the checkpoint, unchanged"
        raise SettingError("check", problem=problem)
    _check_pruning(config, is_program, to)
    for name in OF_VITDET:
        need(config, config.to == "vitdet" or getattr(config, name) is None, name, f"left out {to}")
    need(config, config.window_size is None or config.window_size >= 0, "window_size", "0 or more patches")
    need_size(config, "image_size")
    for name in ("pixel_type", "value_range"):
        is_open = getattr(config, name) in ("auto", ("auto",))
        need(config, not is_open, name, "other than auto, as an export looks at no data")
    other = {"bf16": "torch-export", "int8": "onnx"}.get(config.variant, config.to)
    need(config, other == config.to, "variant", f"given together with --to={other}")


def _check_pruning(config: ExportConfig, is_program: bool, to: str) -> None:
    """Refuses settings of pruning that do not go together."""
    if config.prune is None:
        for field in fields(config):
            if field.name in OF_PRUNING:
                need(config, getattr(config, field.name) == field.default, field.name, "left out without --prune")
        return
    problem = f"blocks {to}, which has as many heads in every block; --to=onnx and --to=torch-export take heads"
    need(config, config.prune == "blocks" or is_program, "prune", problem)
    need(
        config, config.part != "full", "part", "encoder, or left out, with --prune; the decoder read all of the encoder"
    )
    need_at_least_one(config, "prune_count")
    need(config, config.prune_images >= LEAST_IMAGES, "prune_images", f"{LEAST_IMAGES} or more")
