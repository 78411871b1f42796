"""Export of the encoder to a program of ``torch.export`` (a .pt2), which runs without fastmae."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from fastmae.export.atomic import written_aside
from fastmae.export.encoder import Encoder, Exported
from fastmae.model.pixels import DTYPES as PIXELS

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


Head = dict[str, torch.Tensor] | None
"""``head.weight`` and ``head.bias`` of a classifier, whose program gives logits; None for an encoder's tokens."""


def encoder_and_images(model: Exported, variant: str, raw: bool, head: Head = None) -> tuple[Encoder, torch.Tensor]:
    """Returns the encoder in one of ``DTYPES``, and images of the form that it takes, for tracing.

    There are two images, as torch would take a batch of one for a constant.
    """
    images = torch.zeros(2, model.in_chans, *model.img_size)
    if raw:
        images = images.permute(0, 2, 3, 1).contiguous().to(PIXELS[model.pixels.dtype])
    return Encoder(model, DTYPES[variant], raw, head).eval(), images


def save_program(path: Path, model: Exported, variant: str, raw: bool, head: Head = None) -> None:
    """Writes a .pt2; ``torch.export.load(path).module()`` takes images and gives tokens, or a classifier's logits.

    Raises:
        UserError: the file system refused.
    """
    encoder, images = encoder_and_images(model, variant, raw, head)
    shapes = {"images": {0: torch.export.Dim("batch", min=1)}}
    with torch.no_grad():
        program = torch.export.export(encoder, (images,), dynamic_shapes=shapes)
    with written_aside(path) as aside:
        torch.export.save(program, aside)


def opened_program(path: Path) -> Any:
    """Opens a program as a function from a batch of images to tokens."""
    return torch.export.load(path).module()
