"""From the numbers of an image as they are stored to those of a batch: bands chosen, one type for all, its channels.

Nothing is lost but what a rule here names, and what does not fit is refused. An image has one of three types in the
end: uint8, uint16 or float32. uint8 among uint16 is multiplied by 257, so that 255 becomes 65535. All other numbers
stay as they are: int16, int32 and float64 become float32 where that is exact, and are refused where it is not.

Channels follow Pillow's ``convert``: colour becomes gray by ITU-R 601 luma, gray is repeated, alpha is dropped, and no
alpha is made up. Luma is the sum of red, green and blue times 19595, 38470 and 7471, divided by 65536: rounded half up
for whole numbers, to the nearest float32 from a sum in float64 for float32.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

import numpy as np
from PIL import Image

from fastmae.data.changes import note
from fastmae.data.reading import BadImageError, Reading
from fastmae.facts import PixelType

_LUMA = (19595, 38470, 7471)
"""Pillow's shares of red, green and blue, of 65536."""
FEW = 0.1
"""The share of images up to which their type does not decide on float32."""
_ALWAYS_EXACT = frozenset({"bool", "uint8", "int8", "uint16", "int16", "float16"})
"""Types of which float32 holds every number."""
_WIDTH = {"uint8": 0, "uint16": 1, "float32": 2}
"""Which of the types of a batch holds the numbers of which other ones."""


def pixel_type_of(dtype: np.dtype | str) -> PixelType:
    """Returns the narrowest type of a batch that may hold the numbers of a type exactly, by its name in NumPy."""
    name = np.dtype(dtype).name
    return "uint8" if name in ("bool", "uint8") else "uint16" if name == "uint16" else "float32"


def narrowest(types: Mapping[str, int]) -> PixelType:
    """Returns the narrowest type of a batch that may hold the numbers of some images exactly; uint8 of none.

    Few images of other numbers among many of uint8 or uint16 do not make float32 of all: they are not used.

    Args:
        types: how many images there are of each type, by its name in NumPy.
    """
    found = Counter({"uint8": 0})
    for name, count in types.items():
        found[pixel_type_of(name)] += count
    if found["float32"] > FEW * found.total():
        return "float32"
    return "uint16" if found["uint16"] else "uint8"


def to_batch(pixels: np.ndarray, reading: Reading) -> np.ndarray:
    """Returns numbers [H, W, c] of any type as pixels [H, W, in_chans] of the type of the batch.

    Raises:
        BadImageError: bands that are not there, numbers that do not fit, or channels without a rule.
    """
    bands = reading.read_as.bands
    if bands is not None:
        pixels = _choose_bands(pixels, bands, reading.in_chans)
    return convert_channels(as_type(pixels, reading), reading.in_chans, reading.nodata)


def _choose_bands(pixels: np.ndarray, bands: tuple[int, ...], in_chans: int) -> np.ndarray:
    count = pixels.shape[2]
    if max(bands) > count:
        raise BadImageError(f"{count} band{'s' if count > 1 else ''}, of which bands asks for number {max(bands)}")
    if len(bands) > in_chans:
        raise BadImageError(f"bands names {len(bands)} of them for {in_chans} channels; set in_chans to {len(bands)}")
    return pixels[..., [band - 1 for band in bands]]


def as_type(pixels: np.ndarray, reading: Reading) -> np.ndarray:
    """Returns numbers of any shape in the type of the batch, by the rule at the top of this file.

    Where images of other types are converted (``ReadAs.converts``), more is done. For uint8 the upper 8 bits of uint16
    are taken, as version 0.1 did; for uint8 and uint16 whole numbers of any type that lie in their range are taken as
    they are; and for float32 floats of 64 bits are rounded.

    Raises:
        BadImageError: numbers that do not fit, or that are infinite.
    """
    stored, wanted, converts = pixels.dtype.name, reading.dtype, reading.read_as.converts
    if stored != wanted:
        if stored == "bool":
            pixels, stored = pixels.astype(np.uint8) * np.uint8(255), "uint8"
        if not converts:
            refuse_wider(stored, wanted)
        if (stored, wanted) == ("uint8", "uint16"):
            note("multiplied")
            return np.multiply(pixels, 257, dtype=np.uint16)
        if (stored, wanted) == ("uint16", "uint8"):
            if reading.nodata is not None:
                raise BadImageError("uint16 pixels with nodata do not become uint8; set pixel_type to uint16")
            return upper_bits(pixels, 16)
        if wanted == "float32" and stored in ("uint8", "uint16"):
            note("kept")
        pixels = _exactly(pixels, wanted, may_round=converts and wanted == "float32" and pixels.dtype.kind == "f")
    elif not pixels.dtype.isnative:
        pixels = pixels.astype(wanted)
    if wanted == "float32" and np.isinf(pixels).any() and not np.isinf(reading.nodata or 0):
        count = int(np.isinf(pixels).sum())
        raise BadImageError(f"{count} of {pixels.size} values are infinite; store NaN for what is missing")
    return pixels


def refuse_wider(stored: str, wanted: PixelType) -> None:
    """Refuses an image of a type, by its name in NumPy, that a type of a batch does not hold.

    Raises:
        BadImageError: it does not.
    """
    kept_by = pixel_type_of(stored)
    if _WIDTH[kept_by] > _WIDTH[wanted]:
        upper = ", or to uint8 for their upper 8 bits" if (stored, wanted) == ("uint16", "uint8") else ""
        problem = f"{stored} pixels where {wanted} ones are meant; set pixel_type to {kept_by} to keep them{upper}"
        raise BadImageError(problem)


def upper_bits(pixels: np.ndarray, bits: int) -> np.ndarray:
    """Returns the upper 8 of the bits of whole numbers of more than 8 bits, as uint8."""
    note("upper bits")
    return (pixels >> (bits - 8)).clip(0, 255).astype(np.uint8)


def _exactly(pixels: np.ndarray, wanted: PixelType, may_round: bool) -> np.ndarray:
    """Returns the same numbers in another type.

    Raises:
        BadImageError: some do not fit.
    """
    if pixels.dtype.kind not in "iufb":
        raise BadImageError(f"pixels of {pixels.dtype} are no numbers that are used; store uint8, uint16 or float32")
    with np.errstate(all="ignore"):
        converted = pixels.astype(wanted)
        if wanted == "float32" and pixels.dtype.name in _ALWAYS_EXACT:
            return converted
        if may_round:
            if ((converted != pixels) & ~np.isnan(pixels)).any():
                note("rounded")
            differs = np.isinf(converted) & np.isfinite(pixels)
        else:
            # Compared as they were stored, but int64 in float32 is compared in float64: no 2**63 may wrap around.
            back = converted.astype(pixels.dtype if pixels.dtype.kind == "f" else np.longdouble)
            differs = (back != pixels) & ~(np.isnan(back) & np.isnan(pixels)) if wanted == "float32" else back != pixels
    if differs.any():
        count, first = int(differs.sum()), pixels[differs][0]
        remedy = f"set pixel_type to float32 to {'round' if wanted == 'float32' else 'keep'} them"
        remedy = "scale them" if may_round else remedy
        which = f"{count} of {pixels.size} values of {pixels.dtype.name}"
        raise BadImageError(f"{which} do not fit into {wanted}, such as {first}; {remedy}")
    return converted


def convert_channels(pixels: np.ndarray, in_chans: int, nodata: float | None = None) -> np.ndarray:
    """Returns pixels [H, W, c] with ``in_chans`` channels, by the rule at the top of this file, in their own type.

    Args:
        pixels: uint8, uint16 or float32.
        in_chans: how many channels to return.
        nodata: the value of missing pixels: the luma of a colour of which any band is missing is missing.

    Raises:
        BadImageError: no rule turns these channels into ``in_chans``.
    """
    channels = pixels.shape[2]
    if channels == in_chans:
        return pixels
    if channels in (2, 4):  # gray or colour with alpha
        note("alpha")
        return convert_channels(pixels[..., : channels - 1], in_chans, nodata)
    if channels == 1:
        note("repeated")
        return np.repeat(pixels, in_chans, axis=2)
    if channels == 3 and in_chans == 1:
        note("luma")
        return _luma(pixels, nodata)[..., None]
    advice = f"set in_chans to {channels}" + (f", or choose {in_chans} of them by bands" if channels > in_chans else "")
    raise BadImageError(f"no rule turns {channels} channels into {in_chans}; {advice}")


def _luma(pixels: np.ndarray, nodata: float | None) -> np.ndarray:
    """Returns the luma of colours [H, W, 3] as [H, W]."""
    if pixels.dtype == np.uint8 and nodata is None:
        return np.asarray(Image.fromarray(np.ascontiguousarray(pixels)).convert("L"))
    if pixels.dtype == np.float32:
        luma = (pixels.astype(np.float64) @ (np.array(_LUMA) / 65536)).astype(np.float32)
    else:  # 65535 · 65536 + 32768 is less than 2**32
        weighed = pixels.astype(np.uint32) * np.array(_LUMA, np.uint32)
        luma = ((weighed.sum(axis=2, dtype=np.uint32) + np.uint32(32768)) >> 16).astype(pixels.dtype)
    return luma if nodata is None else mark(luma, (pixels == pixels.dtype.type(nodata)).any(axis=2), nodata)


def mark(pixels: np.ndarray, missing: np.ndarray, nodata: float) -> np.ndarray:
    """Writes ``nodata`` where pixels are missing, and there alone: a value that came out as ``nodata`` moves beside it.

    Args:
        pixels: uint8, uint16 or float32, written to and returned.
        missing: bool, of the same shape.
        nodata: the value of missing pixels. NaN moves nothing.
    """
    value = pixels.dtype.type(nodata)
    if pixels.dtype == np.float32:
        beside = np.nextafter(value, np.float32(np.inf) if value < 0 else np.float32(-np.inf))
    else:
        beside = value + 1 if value < np.iinfo(pixels.dtype).max else value - 1
    np.copyto(pixels, beside, where=(pixels == value) & ~missing)
    np.copyto(pixels, value, where=missing)
    return pixels
