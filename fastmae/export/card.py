"""The model card of a folder for the hub, and the facts about the training that lie beside the weights."""

from __future__ import annotations

import html
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2

from fastmae.checkpoint.load import Opened
from fastmae.config.load import dump_yaml
from fastmae.data.statistics import shown_range
from fastmae.export.official import Part
from fastmae.facts import UINT8
from fastmae.screen import printable

TEMPLATE = Path(__file__).with_name("card.md.jinja")
TOLD = (
    "epochs", "batch_size", "accum_iter", "global_batch", "lr", "blr", "min_lr", "warmup_epochs", "weight_decay",
    "layer_decay", "clip_grad", "ema", "mask_ratio", "masking", "norm_pix_loss", "crop_scale", "flip", "mixup",
    "cutmix", "smoothing", "drop_path", "precision", "seed", "dataset_length",
)  # fmt: skip
"""The settings of a training that a card tells. Others name folders of a machine, or change no result."""


def training_facts(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the settings of a training that may be told to anybody: no paths."""
    return {name: settings[name] for name in TOLD if settings.get(name) is not None}


def model_card(
    name: str,
    opened: Opened,
    part: Part,
    architecture: str,
    license: str | None,
    facts: Mapping[str, Any],
    figures: Mapping[str, float],
    versions: Mapping[str, Any],
    picture: str | None,
) -> str:
    """Returns the text of README.md: front matter in YAML, then what the model is, how it is used and was trained.

    Args:
        name: of the model.
        part: which part of it the folder holds.
        architecture: the class of transformers that opens it.
        license: as the hub names it; without one the card asks for it.
        facts: about the training, as ``training_facts`` has them.
        figures: what was measured, by a name for people.
        versions: of the packages that trained it.
        picture: the name of a picture of reconstructions in the folder.
    """
    model = opened.model
    is_classifier = bool(opened.head)
    front = {
        "library_name": "transformers",
        "pipeline_tag": "image-classification" if is_classifier else "image-feature-extraction",
        "tags": ["fastmae", "masked-autoencoder", "mae", model.family],
    }
    if license is not None:
        front["license"] = license
    (height, width), (ph, pw) = model.img_size, model.patch_size
    weights = sum(
        p.numel() for n, p in model.named_parameters() if part == "full" or not n.startswith(("decoder_", "mask"))
    )
    blocks = sum(hasattr(m, "checkpointing") and not n.startswith("decoder_") for n, m in model.named_modules())
    sizes = {
        "weights": f"{(weights + sum(p.numel() for p in opened.head.values())) / 1e6:.2f} million, float32",
        "images": f"{height}×{width} pixels, {model.in_chans} channel{'s' if model.in_chans > 1 else ''}",
        "patches": f"{ph}×{pw} pixels",
        "width, blocks": f"{model.feature_dim}, {blocks}",
    }
    if model.pixels != UINT8:
        sizes["pixels"] = f"{model.pixels.dtype}, range {shown_range(model.pixels)}"
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    return template.render(
        front=dump_yaml(front).strip(),
        name=_plain(name),
        what="classifier" if is_classifier else "encoder and decoder" if part == "full" else "encoder",
        architecture=architecture,
        license=license,
        sizes=sizes,
        facts={key: _shown(value) for key, value in facts.items()},
        figures={key: f"{value:.4g}" for key, value in figures.items()},
        versions={key: _plain(value) for key, value in versions.items()},
        picture=picture,
    )


def _shown(value: Any) -> str:
    if isinstance(value, list | tuple):
        return " ".join(map(_shown, value))
    return f"{value:.6g}" if isinstance(value, float) else _plain(value)


def _plain(text: object) -> str:
    """Returns anybody's text as one line that is neither HTML nor the end of a table's cell."""
    return html.escape(printable(text), quote=False).replace("|", "\\|")
