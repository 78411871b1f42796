"""What decides the architecture of a model: the settings that ``build_model`` needs."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from fastmae.config.family import FamilySettings
from fastmae.config.images import ImagesConfig, pixel_facts
from fastmae.config.shape import Shape, check_shape
from fastmae.config.values import coerce, need, need_at_least_one, need_size
from fastmae.facts import PixelFacts, PixelType


@dataclass(frozen=True, kw_only=True)
class ModelSpec(ImagesConfig, Shape, FamilySettings):
    """A masked autoencoder without its weights, and how its images are read. Sizes that are None are the preset's."""

    model: str
    """The name of its preset."""
    input_size: tuple[int, ...]
    """(height, width) of its images in pixels; one number is both."""
    in_chans: int
    patch_size: tuple[int, ...] | None = None
    """(height, width) of a patch in pixels; one number is both. None: the preset's."""
    mean: tuple[float, ...] | None = None
    """One number per channel, as a share of the value range. None: the model's own default."""
    std: tuple[float, ...] | None = None
    pixel_type: PixelType = "uint8"
    value_range: tuple[float, ...] | None = None
    """LOW HIGH of each channel. None: the range of the type."""
    norm_pix_loss: bool = False
    decoder_attention: Literal["self", "cross"] = "self"

    def __post_init__(self) -> None:
        coerce(self)
        need_size(self, "input_size")
        need_size(self, "patch_size")
        need_at_least_one(self, "in_chans")
        check_shape(self)
        need(self, all(value > 0 for value in self.std or ()), "std", "above 0")
        pairs = 2 * self.in_chans
        need(
            self, len(self.value_range or range(pairs)) == pairs, "value_range", f"{pairs} numbers, LOW HIGH a channel"
        )
        object.__setattr__(self, "input_size", (self.input_size[0], self.input_size[-1]))
        if self.patch_size is not None:
            object.__setattr__(self, "patch_size", (self.patch_size[0], self.patch_size[-1]))

    @property
    def pixels(self) -> PixelFacts:
        """What the numbers of its images are."""
        return pixel_facts(self)

    @classmethod
    def of(cls, config: Any) -> ModelSpec:
        """The model of a resolved configuration of pretrain."""
        return cls(**{field.name: getattr(config, field.name) for field in dataclasses.fields(cls)})

    @classmethod
    def from_json(cls, settings: Mapping[str, Any]) -> ModelSpec:
        """The model of settings that were saved: a manifest's, a config.json's, or those in an official file.

        Settings of other things are passed over. What versions did not save yet has its default.

        Raises:
            TypeError: the model, its size or its channels are not among them.
            SettingError: a value has another type.
        """
        return cls(**{field.name: settings[field.name] for field in dataclasses.fields(cls) if field.name in settings})

    def as_json(self) -> dict[str, Any]:
        """The settings as they look after a round trip through JSON."""
        return {name: list(v) if isinstance(v, tuple) else v for name, v in dataclasses.asdict(self).items()}
