"""How images are read: the flags that every command has that reads data, in one place.

Each is None where it is not given: then it is as in the checkpoint or the run that is read or resumed, and by default
where there is none. To add one: a field here with its text, the field of the same name in ``facts.ReadAs`` with its
default, and its name in groups.py. Commands, checkpoints, resumed runs and config.yaml have it then.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal

from fastmae.config.family import family_of
from fastmae.config.values import check_type, field_types, need
from fastmae.facts import AxisName, LayoutName, PixelFacts, ReadAs

LARGEST_WHOLE = {"uint8": 255, "uint16": 65535}
NOTHING: Mapping[str, Any] = MappingProxyType({})


@dataclass(frozen=True, kw_only=True)
class ImagesConfig:
    """How the images of a command are read."""

    pixel_type: Literal["auto", "uint8", "uint16", "float32"] | None = None
    """The type of the pixels in memory. auto: the narrowest of the three that holds the images exactly. uint8 keeps the
    upper 8 of more bits, as version 0.1 did. Default: as in the checkpoint; without one auto."""
    other_types: Literal["skip", "convert"] | None = None
    """What is done with an image whose numbers the type does not hold: skip lists it as unusable, convert takes the
    upper 8 of 16 bits, or rounds 64-bit floats, and counts it. Default: convert with a --pixel_type of its own;
    otherwise as in the checkpoint; without one skip."""
    value_range: tuple[Literal["auto", "dtype"] | float, ...] | None = None
    """The values that count as 0 and 1: LOW HIGH, or such a pair for each channel. Values beyond them are kept. dtype:
    the range of the type (0 to 255, 0 to 65535, 0 to 1). auto: from the 0.1st to the 99.9th percentile of each channel.
    Default: as in the checkpoint; without one dtype for uint8, otherwise auto, and 0 to 1 for float32 images whose
    values lie between 0 and 1."""
    nodata: float | None = None
    """A value that marks missing pixels. They count in no mean, deviation or range, the encoder sees the mean in their
    place, and a patch that has any is never a target. NaN in float32 images is always such a value. Default: as in the
    checkpoint; without one none."""
    bands: tuple[int, ...] | None = None
    """Which bands of each image become the channels, numbered from 1, in this order: 4 3 2 8. Default: as in the
    checkpoint; without one all of them."""
    pages: Literal["first", "all", "channels"] | None = None
    """Of a TIFF or DICOM of several pages or frames: the first alone, each as an image, or all of them as the channels
    of one image. Default: as in the checkpoint; without one first."""
    window: tuple[Literal["file"] | float, ...] | None = None
    """CENTER WIDTH of the numbers of a DICOM that become 0 to 1, or file for the window that each states. Default: as
    in the checkpoint; without one no number is cut off."""
    layout: LayoutName | None = None
    """The axes of arrays of images: hwc for [N, H, W, C], chw for [N, C, H, W]; for time series, which are
    images of one row, tc for [N, T, C] and ct for [N, C, T]; of a file with one image, without N.
    auto: as their sizes say, and refused where they do not. Default: as in the checkpoint; without one auto."""
    axis: AxisName | None = None
    """Which slices of a NIfTI volume are the images: axial, coronal or sagittal ones of the body, turned by the affine
    of the file; or 0, 1 or 2 for those along an axis of the array as it is stored. Default: as in the checkpoint;
    without one axial."""
    constant_slices: Literal["keep", "drop"] | None = None
    """Whether slices of volumes whose voxels are all alike are images. drop reads every volume once before the run.
    Default: as in the checkpoint; without one keep."""
    spectrogram: int | None = None
    """Read sound files (WAV, FLAC, Ogg, MP3; the extra `audio`) as log-mel spectrograms of this many frames of 10 ms,
    by 128 bands; AudioMAE has 1024. Shorter sounds are followed by zeros, of longer ones each epoch takes another part.
    Default: as in the checkpoint; without one sounds are not read."""
    root: str | None = None
    """The folder that the relative paths of a list (.txt, .csv, .tsv, .jsonl) are relative to. Default: as in the
    checkpoint; without one the folder of the list."""
    image_key: str | None = None
    """Of samples in tars that have several images: the end of the name of the one to use, such as left.jpg, or all for
    each as an image. Default: as in the checkpoint; without one the first with one dot in its name, or else all."""
    columns: tuple[str, ...] | None = None
    """Of tables (mae_mlp), the columns that are features, by name. Default: as in the checkpoint; without one all that
    hold numbers."""
    label_column: str | None = None
    """Of tables, the column that holds classes; it is no feature. Default: as in the checkpoint; without one a column
    called label, target or class, if it holds words or at most 100 integers."""


IMAGE_SETTINGS = tuple(field.name for field in dataclasses.fields(ImagesConfig) if field.name != "root")
"""The names of these settings but root, as data may be moved. They are fixed in a run."""


def images_given(config: ImagesConfig, before: Mapping[str, Any] = NOTHING) -> dict[str, Any]:
    """Returns these settings by their names: as they are given, otherwise as they were ``before``, otherwise None.

    Args:
        before: the settings of a checkpoint or a run, as JSON has them. Those without a ``pixel_type`` are of version
            0.1 or of another program, and mean uint8. Those without ``other_types`` convert images of other types.

    Raises:
        SettingError: one of ``before`` is of another type.
    """
    types, before = field_types(ImagesConfig), _as_saved(before)
    own = {name: getattr(config, name) for name in types}
    earlier = {name: check_type(name, before.get(name), types[name]) for name, value in own.items() if value is None}
    if "other_types" in earlier and config.pixel_type is not None:
        earlier["other_types"] = None  # that of the checkpoint is about the type there
    return own | earlier


def read_as(config: ImagesConfig, before: Mapping[str, Any] = NOTHING) -> ReadAs:
    """Returns what is asked of reading, as ``open_train`` takes it. The arguments are those of ``images_given``."""
    known = {field.name for field in dataclasses.fields(ReadAs)}
    given = images_given(config, before)
    if given["columns"] is None and family_of(getattr(config, "model", None) or before.get("model")) == "mlp":
        given["columns"] = ()
    return ReadAs(**{name: value for name, value in given.items() if name in known and value is not None})


def images_of_model(config: ImagesConfig, before: Mapping[str, Any], channels: int) -> dict[str, Any]:
    """Returns these settings as ``ModelSpec`` takes them: a type, and a range for each of the channels or None.

    What is to be measured on data (``must_measure``) is as before until then, or the range of the type.
    """
    saved, images = images_given(ImagesConfig(), before), images_given(config, before)
    saved_type = saved["pixel_type"] or "uint8"
    if images["pixel_type"] in (None, "auto"):
        images["pixel_type"] = saved_type
    if config.value_range in (None, ("auto",)):
        images["value_range"] = saved["value_range"] if images["pixel_type"] == saved_type else None
    elif config.value_range == ("dtype",):
        images["value_range"] = None
    elif len(config.value_range) == 2:
        images["value_range"] = config.value_range * channels
    return images


def must_measure(config: ImagesConfig, before: Mapping[str, Any]) -> bool:
    """Tells whether data are to be looked at to know the type or the range, as a flag asks for another one."""
    if "auto" in (config.pixel_type, *(config.value_range or ())):
        return True
    is_other = config.pixel_type not in (None, "uint8", _as_saved(before).get("pixel_type", "uint8"))
    return is_other and config.value_range is None


def _as_saved(before: Mapping[str, Any]) -> Mapping[str, Any]:
    """Returns settings as earlier versions meant them, which converted images of other types."""
    if not before or "other_types" in before:
        return before
    return {"pixel_type": "uint8", "other_types": "convert", **before}


def chosen_other_types(config: ImagesConfig) -> Literal["skip", "convert"]:
    """Returns what is done with images of other types, by default as ``pixel_type`` is given or left to the data."""
    return "convert" if read_as(config).converts else "skip"


def pixel_settings(pixels: PixelFacts) -> dict[str, Any]:
    """Returns the facts of pixels as the resolved settings that ``pixel_facts`` makes them of again."""
    low, high = pixels.low, pixels.high
    pairs = None if low is None or high is None else tuple(end for pair in zip(low, high, strict=True) for end in pair)
    return {"pixel_type": pixels.dtype, "value_range": pairs, "nodata": pixels.nodata}


def pixel_facts(config: Any) -> PixelFacts:
    """Returns what the resolved ``pixel_type``, ``value_range`` and ``nodata`` of a configuration say."""
    numbers = config.value_range
    low, high = (None, None) if numbers is None else (numbers[::2], numbers[1::2])
    return PixelFacts(dtype=config.pixel_type, low=low, high=high, nodata=config.nodata)


def check_images(config: ImagesConfig) -> None:
    """Refuses what cannot be meant, whatever the data.

    Raises:
        SettingError: naming the setting, its value and what it must be.
    """
    numbers = config.value_range
    if numbers is not None and numbers not in (("auto",), ("dtype",)):
        are_pairs = len(numbers) > 0 and len(numbers) % 2 == 0 and not any(isinstance(value, str) for value in numbers)
        rises = are_pairs and all(low < high for low, high in zip(numbers[::2], numbers[1::2], strict=True))  # type: ignore[operator]
        need(config, rises, "value_range", "LOW HIGH with LOW below HIGH, such a pair for each channel, dtype or auto")
    if config.bands is not None:
        need(config, len(config.bands) > 0 and min(config.bands) >= 1, "bands", "numbers of bands, from 1")
    if config.window is not None and config.window != ("file",):
        is_pair = len(config.window) == 2 and not any(isinstance(value, str) for value in config.window)
        need(config, is_pair and float(config.window[1]) > 0, "window", "CENTER WIDTH with WIDTH above 0, or file")
    need(config, config.spectrogram is None or config.spectrogram >= 1, "spectrogram", "a number of frames, from 1")
    need(config, config.columns != (), "columns", "the names of at least one column")
    largest = LARGEST_WHOLE.get(config.pixel_type or "")
    if config.nodata is not None and largest is not None:
        fits = 0 <= config.nodata <= largest and config.nodata.is_integer()
        need(config, fits, "nodata", f"a whole number from 0 to {largest} with --pixel_type={config.pixel_type}")
