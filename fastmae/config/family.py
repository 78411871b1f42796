"""The families of masked autoencoders: which one a preset is of, and which settings go with which family."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, Literal

from fastmae.config.shape import SHAPE
from fastmae.config.values import need, need_at_least_one
from fastmae.errors import SettingError

Family = Literal["vit", "convnext", "conv", "mlp"]
PRESET_OF_FAMILY = {"vit": "mae_vit_", "convnext": "mae_convnextv2_", "conv": "mae_conv", "mlp": "mae_mlp"}
"""How the names of a family's presets begin, or what its one preset is called."""
LIKE = "a kind of"
"""What stands before the family in the phrase of a model that no preset makes."""
USUAL_RATIO: dict[Family, float] = {"vit": 0.75, "convnext": 0.6, "conv": 0.25, "mlp": 0.5}
"""The mask ratio where none is given: those of He et al. (2021) and of Woo et al. (2023), and ours."""


@dataclass(frozen=True, kw_only=True)
class FamilySettings:
    """What decides models of other families than vision transformers. None is the family's own default."""

    widths: tuple[int, ...] | None = None
    """Of mae_conv the channels of its levels, each of half the resolution of the one before; of mae_mlp the widths of
    its hidden layers, the last of which is the latent."""
    latent_dim: int | None = None
    """Of mae_conv: how many numbers the latent of an image is, which is its feature."""
    mask_unit: Literal["pixel", "patch"] | None = None
    """Of mae_conv: what is masked, single pixels or patches (--patch_size)."""
    fill: Literal["zero", "mean", "noise"] | None = None
    """Of mae_conv and mae_mlp: what stands in the place of what is masked."""
    loss: Literal["mse", "bce"] | None = None
    """Of mae_conv and mae_mlp: the squared error, or the binary cross-entropy of values between the ends of their
    range."""
    loss_on: Literal["masked", "all"] | None = None
    """Of mae_conv and mae_mlp: what the loss is computed from, what is masked or everything."""


FAMILY = tuple(field.name for field in fields(FamilySettings))
"""The names of their settings."""
TAKEN_BY: dict[str, tuple[Family, ...]] = {
    "widths": ("conv", "mlp"),
    "columns": ("mlp",),
    "label_column": ("mlp",),
    "latent_dim": ("conv",),
    "mask_unit": ("conv",),
    "fill": ("conv", "mlp"),
    "loss": ("conv", "mlp"),
    "loss_on": ("conv", "mlp"),
    **dict.fromkeys(SHAPE, ("vit",)),
    "patch_size": ("vit", "conv"),
    "decoder_attention": ("vit",),
    "init": ("vit", "convnext"),
    "predict_ratio": ("vit",),
    "start_size": ("vit", "convnext"),
    "spectrogram": ("vit", "convnext", "conv"),
    "residual": ("vit",),
    "float8": ("vit",),
    "attention": ("vit",),
    "norm_pix_loss": ("vit", "convnext", "conv"),
    "masking": ("vit", "convnext", "conv"),
    "masks": ("vit", "convnext", "conv"),
    "mask_ratio_schedule": ("vit", "convnext", "conv"),
    "adversarial": ("vit", "convnext", "conv"),
}
"""Which families a setting is for; settings that are not here are for all."""


def family_of(model: object) -> Family:
    """Returns the family of a preset by its name, or of a model given in Python by its phrase (``phrase_of``).

    Other names, and what is none, are of vision transformers.
    """
    name = model.rpartition(f"{LIKE} ")[2] if isinstance(model, str) else ""
    if name.startswith(PRESET_OF_FAMILY["convnext"]):
        return "convnext"
    name = name.removesuffix(">")
    return "conv" if name == PRESET_OF_FAMILY["conv"] else "mlp" if name == PRESET_OF_FAMILY["mlp"] else "vit"


def phrase_of(model: Any) -> str:
    """Returns what stands for a model that no preset makes in settings: its class, and the presets of its family."""
    family: Family = model.family
    like = "" if family == "vit" else f", {LIKE} {PRESET_OF_FAMILY[family]}"
    return f"<{type(model).__name__} of {type(model).__module__}{like}>"


def usual_ratio(model: str | None) -> float:
    """Returns the mask ratio of a preset where none is given."""
    return USUAL_RATIO[family_of(model)]


def check_family(config: Any) -> None:
    """Refuses settings that are for other families than that of the model.

    Raises:
        SettingError: naming the setting and the models that it is for.
    """
    family = family_of(config.model)
    defaults = {field.name: field.default for field in fields(config)}
    for name, families in TAKEN_BY.items():
        unset = (defaults.get(name), "random" if name == "masking" else None)  # what a run of any family has saved
        if name in defaults and family not in families and getattr(config, name) not in unset:
            presets = ", ".join(PRESET_OF_FAMILY[one] + "*" * (one in ("vit", "convnext")) for one in families)
            problem = f"is for {presets}, not for {config.model or 'vision transformers'}; leave it out"
            raise SettingError(name, getattr(config, name), problem)
    computes_gelu_again = getattr(config, "checkpointing", "none") == "gelu"
    can = family == "vit" or not computes_gelu_again
    need(config, can, "checkpointing", f"none, selective or full for {config.model}; gelu is for mae_vit_*")
    need_at_least_one(config, "latent_dim")
    normed = getattr(config, "norm_pix_loss", False)
    if config.mask_unit == "pixel":
        need(config, config.patch_size is None, "patch_size", "left out with --mask_unit=pixel, whose patch is a pixel")
        need(config, not normed, "norm_pix_loss", "left out with --mask_unit=pixel, as it is of patches")
    if config.loss == "bce":
        problem = "left out with --loss=bce, which compares shares of the value range"
        need(config, not normed, "norm_pix_loss", problem)
    positive = config.widths is None or (len(config.widths) > 0 and min(config.widths) >= 1)
    need(config, positive, "widths", "one or more whole numbers of at least 1")
