"""A model with pixels of another type or range than those that it was trained with, as flags ask for."""

from __future__ import annotations

import dataclasses

from fastmae.checkpoint.load import Opened
from fastmae.config import ImagesConfig, must_measure
from fastmae.data.reading import Reading
from fastmae.data.sources import Source, describe
from fastmae.data.statistics import measure
from fastmae.model.pixels import register_pixels


def measure_for(opened: Opened, given: ImagesConfig, source: Source) -> tuple[str, ...]:
    """Gives a model the type and the range of other pixels than it was trained with, if flags ask for such.

    Args:
        opened: a checkpoint; its model is changed in place, and keeps its mean and deviation.
        given: the flags.
        source: the data that are looked at.

    Returns:
        Lines about it; none where the checkpoint's own range stays.
    """
    if not must_measure(given, opened.settings):
        return ()
    model = opened.model
    model.read_as = dataclasses.replace(model.read_as, pixel_type=given.pixel_type or model.pixels.dtype)
    facts = describe(source, read_as=model.read_as).pixels
    reading = Reading(model.in_chans, dtype=facts.dtype, nodata=model.pixels.nodata, read_as=model.read_as)
    mean, std = tuple(model.mean.tolist()), tuple(model.std.tolist())
    measured = measure(source, reading, given.value_range, mean, std)
    register_pixels(model, model.in_chans, mean, std, measured.pixels)
    return measured.lines
