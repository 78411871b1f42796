"""TIFF tags: how pixels are stored, which files Pillow decodes wrongly, and what is changed before it does.

Pillow drops bands whose meaning no tag gives, takes signed numbers for unsigned ones, leaves 16-bit images with white
at zero as they are but inverts those of 8 bits, and mixes up 16-bit planes that lie one after another. Such files are
refused by their tags, or their tags are rewritten so that Pillow keeps what is stored. No pixel is read here.
"""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

# The byte order, and whether it is a BigTIFF, by the first bytes. Pillow takes the two misspelt ones as well.
STARTS = {
    b"II*\0": ("<", False), b"MM\0*": (">", False), b"MM*\0": (">", False), b"II\0*": ("<", False),
    b"II+\0": ("<", True), b"MM\0+": (">", True),
}  # fmt: skip
_TYPES = {1: "B", 2: "s", 3: "H", 4: "I", 6: "b", 8: "h", 9: "i", 13: "I", 16: "Q", 18: "Q"}

SUBFILE, WIDTH, HEIGHT, BITS, COMPRESSION, PHOTOMETRIC, FILL, DESCRIPTION = 254, 256, 257, 258, 259, 262, 266, 270
ORIENTATION, SAMPLES, PLANAR, INK_SET, EXTRA, FORMAT, SUBSAMPLING, DEPTH = 274, 277, 284, 332, 338, 339, 530, 32997
NODATA = 42113
_WANTED = {
    SUBFILE, WIDTH, HEIGHT, BITS, COMPRESSION, PHOTOMETRIC, FILL, DESCRIPTION, ORIENTATION, SAMPLES, PLANAR, INK_SET,
    EXTRA, FORMAT, SUBSAMPLING, DEPTH, NODATA,
}  # fmt: skip
WHITE_IS_ZERO, BLACK_IS_ZERO, RGB, PALETTE, SEPARATED, YCBCR, LAB = 0, 1, 2, 3, 5, 6, 8
_COLOURS = {WHITE_IS_ZERO: 1, BLACK_IS_ZERO: 1, RGB: 3, PALETTE: 1, SEPARATED: 4, YCBCR: 3, LAB: 3}
"""How many bands carry the picture, by the tag PhotometricInterpretation. More are extra samples."""
_UNSPECIFIED, _ALPHA = 0, 2
_FORMATS = {1: "unsigned", 2: "signed", 3: "floating-point", 4: "untyped", 5: "complex", 6: "complex"}
_REDUCED_OR_MASK = 1 | 4
"""Bits of the tag NewSubfileType: a smaller copy of another page, or a mask for it."""


_Directory = dict[int, tuple[tuple[Any, ...], int, str]]
"""By tag: its values, the offset of the first of them, and its struct format."""

_MOST_VALUES = 4096
"""How many values of a tag are read: no more are needed of any that is wanted."""
_STACK = re.compile(rb'^ImageJ=[\s\S]*\nimages=(\d{1,7})\b|^\{"shape": \[(\d{1,7}), \d+, \d+\].*"truncated": true')
"""How ImageJ and tifffile say in the tag ImageDescription that images follow the first."""


@dataclass(frozen=True)
class Tags:
    """What the tags of the first page say, with the defaults of TIFF 6.0 for tags that are missing."""

    width: int
    height: int
    bits: tuple[int, ...]
    """Per band, of a sample as stored."""
    samples: str
    """unsigned, signed, floating-point, complex or untyped."""
    photometric: int
    extra: tuple[int, ...]
    """What each band beside the picture is: 0 unspecified, 1 associated alpha, 2 alpha."""
    planar: bool
    """Whether the bands lie one after another rather than pixel by pixel."""
    compression: int
    """1 for none."""
    orientation: int
    problem: str
    """Why Pillow makes no picture of it as it is stored, and what to do; empty if it does."""
    nodata: float | None
    """The value of missing pixels by GDAL's tag."""
    places: dict[int, tuple[int, str]]
    """(offset, struct format) of the first value of the tags Orientation and ExtraSamples, where they are there."""

    @property
    def bands(self) -> int:
        return len(self.bits)

    @property
    def unspecified(self) -> int:
        """How many bands no tag gives a meaning: near infrared, depth, a mask …"""
        return sum(value != 1 and value != _ALPHA for value in self.extra)


def is_tiff(data: bytes) -> bool:
    """Tells whether bytes begin as those of a TIFF file. A DICOM may do so too, and goes on with its own prefix."""
    return data[:4] in STARTS and data[128:132] != b"DICM"


def read_tags(data: bytes) -> Tags:
    """Reads the tags of the first page.

    Raises:
        ValueError: there are none, or they make no sense.
    """
    try:
        first, _, _ = _directory(data, _first_directory(data))
    except (struct.error, KeyError, OverflowError) as error:
        raise ValueError(f"its TIFF tags cannot be read ({error})") from error
    values = {tag: value for tag, (value, _, _) in first.items()}

    def number(tag: int, default: int) -> int:
        value = values.get(tag)
        return value[0] if value else default

    bands = number(SAMPLES, 1)
    if not 1 <= bands <= 65535:
        raise ValueError(f"its TIFF tags make no sense: {bands} bands")
    bits = values.get(BITS) or (1,)
    formats = set(values.get(FORMAT) or (1,))
    samples = _FORMATS.get(next(iter(formats)), "untyped") if len(formats) == 1 else "mixed"
    photometric = number(PHOTOMETRIC, BLACK_IS_ZERO)
    extra = values.get(EXTRA) or ()
    beside = max(0, bands - _COLOURS.get(photometric, bands))
    tags = Tags(
        width=number(WIDTH, 0),
        height=number(HEIGHT, 0),
        bits=bits if len(bits) == bands else bits[:1] * bands,
        samples=samples,
        photometric=photometric,
        extra=(extra + (_UNSPECIFIED,) * beside)[: max(beside, len(extra))],
        planar=number(PLANAR, 1) == 2 and bands > 1,
        compression=number(COMPRESSION, 1),
        orientation=number(ORIENTATION, 1),
        problem="",
        nodata=_nodata(values.get(NODATA, (b"",))[0]),
        places={tag: (first[tag][1], first[tag][2]) for tag in (ORIENTATION, EXTRA) if tag in first},
    )
    return replace(tags, problem=_problem(tags, values))


def count_pages(data: bytes) -> int:
    """Returns how many pages of full size a file has: smaller copies of a page and masks are none.

    ImageJ and tifffile may write a stack with tags for its first page alone; then it is the number that they noted.
    """
    pages = 0
    for page in _directories(data):
        values = {tag: value for tag, (value, _, _) in page.items()}
        text = values.get(DESCRIPTION, (b"",))[0]
        if isinstance(text, bytes) and (noted := images_noted(text)):
            return noted
        pages += not values.get(SUBFILE, (0,))[0] & _REDUCED_OR_MASK
    return max(pages, 1)


def images_noted(description: bytes) -> int:
    """Returns how many images a file has by the tag ImageDescription of its first page; 0 if it says nothing of it."""
    noted = _STACK.search(description)
    return max(int(noted[1] or noted[2]), 1) if noted else 0


def for_pillow(data: bytes, tags: Tags) -> bytes:
    """Returns the bytes with tags from which Pillow decodes the pixels as they are stored.

    The tag Orientation becomes 1, as Pillow would turn the image, which is done with no other format. An unspecified
    fourth band becomes alpha, which Pillow keeps as it is; it would drop an unspecified one.
    """
    changes = {}
    if tags.orientation != 1:
        changes[ORIENTATION] = 1
    if tags.photometric == RGB and tags.extra == (_UNSPECIFIED,):
        changes[EXTRA] = _ALPHA
    changed = bytearray(data) if changes.keys() & tags.places.keys() else data
    for tag, value in changes.items():
        if tag in tags.places:  # without the tag ExtraSamples Pillow takes a fourth band for alpha anyway
            offset, form = tags.places[tag]
            struct.pack_into(form, changed, offset, value)
    return bytes(changed)


def _nodata(text: object) -> float | None:
    """Returns the number that GDAL's tag holds as text."""
    try:
        return float(text.rstrip(b"\0 ").replace(b",", b".")) if isinstance(text, bytes) else None
    except ValueError:
        return None


def _problem(tags: Tags, values: dict[int, tuple[Any, ...]]) -> str:
    """Returns why a file is refused, and what to do; empty if Pillow decodes it as it is stored."""
    bands, bits = len(tags.bits), tags.bits[0]
    what = f"{bands} band{'s' if bands > 1 else ''} of {bits} bit{'s' if bits > 1 else ''}"
    if len({*tags.bits}) > 1:
        return f"bands of different depths ({', '.join(map(str, tags.bits[:8]))} bits); store 8 bits per band"
    if tags.samples != "unsigned":
        return (
            f"{tags.samples} pixels of {bits} bits have no fixed range; scale them to 0–255 and store unsigned 8 bits"
        )
    if bits > 16:
        return f"pixels of {bits} bits have no fixed range; scale them to 0–255 and store unsigned 8 bits"
    if bands > 4:
        advice = "choose 1, 3 or 4 of them, or save all as an array .npy of uint8 [N, H, W, C]"
        return f"{what}; an image file gives 1, 3 or 4 channels; {advice}"
    if tags.photometric not in _COLOURS or tags.photometric == LAB:
        return f"colours of TIFF's kind {tags.photometric} have no rule; store gray or RGB"
    if bands < _COLOURS[tags.photometric] or (tags.photometric in (WHITE_IS_ZERO, BLACK_IS_ZERO) and bands > 2):
        return (
            f"{what} that are not marked as colours (PhotometricInterpretation {tags.photometric}); store gray or RGB"
        )
    if tags.photometric == SEPARATED and values.get(INK_SET, (1,))[0] != 1:
        return f"{bands} inks other than CMYK have no rule; store gray or RGB"
    if tags.photometric == WHITE_IS_ZERO and bits > 8:
        return f"{what} with white at 0 (WhiteIsZero); invert them and store them with black at 0"
    if tags.photometric == WHITE_IS_ZERO and bits == 8 and values.get(FILL, (1,))[0] == 2:
        return f"{what} with white at 0 and the bits of a byte reversed (FillOrder 2); store them with FillOrder 1"
    if tags.photometric == YCBCR and tags.compression == 1 and values.get(SUBSAMPLING, (2, 2)) != (1, 1):
        return "subsampled colours without compression; store RGB"
    if tags.planar and not _reads_planes(tags):
        return f"{what}, one band after another; store them pixel by pixel (PlanarConfiguration 1)"
    if bits > 8 and bits != 16 and (bits, bands, tags.compression) != (12, 1, 1):
        return f"{what}; store 8 or 16 bits"
    if values.get(DEPTH, (1,))[0] > 1:
        return f"a volume of {values[DEPTH][0]} slices in one page; store each as an image"
    return ""


def _reads_planes(tags: Tags) -> bool:
    """Tells whether Pillow puts bands together that lie one after another."""
    is_plain = tags.extra in ((), (_ALPHA,)) or (tags.extra == (_UNSPECIFIED,) and EXTRA in tags.places)
    return tags.photometric in (RGB, SEPARATED, YCBCR) and is_plain and (tags.bits[0] == 8 or tags.compression != 1)


def _first_directory(data: bytes) -> int:
    order, is_big = STARTS[data[:4]]
    return int(struct.unpack_from(order + ("Q" if is_big else "I"), data, 8 if is_big else 4)[0])


def _directories(data: bytes) -> Iterator[_Directory]:
    """Yields the tags of each page, as far as they can be read. Pages that overlap, or point at each other, end it."""
    unread, seen = len(data), {0}
    try:
        offset = _first_directory(data)
        while offset not in seen:
            seen.add(offset)
            page, offset, size = _directory(data, offset)
            unread -= size
            if unread < 0:
                return
            yield page
    except (struct.error, KeyError, ValueError, OverflowError):
        return


def _directory(data: bytes, offset: int) -> tuple[_Directory, int, int]:
    """Returns the wanted tags of a page, where the next page is (0 for none), and how many bytes the tags take.

    Raises:
        struct.error: the file ends before.
        ValueError: more values than the file has bytes.
    """
    order, is_big = STARTS[data[:4]]
    (entries,) = struct.unpack_from(order + ("Q" if is_big else "H"), data, offset)
    start, size, inline = (offset + 8, 20, 8) if is_big else (offset + 2, 12, 4)
    if entries * size > len(data):
        raise ValueError("its TIFF tags cannot be read (more of them than the file has bytes)")
    found = {}
    for place in range(start, start + entries * size, size):
        tag, kind, count = struct.unpack_from(order + ("HHQ" if is_big else "HHI"), data, place)
        if tag not in _WANTED or kind not in _TYPES or count == 0:
            continue
        form, at = _TYPES[kind], place + size - inline
        if count > len(data):
            raise ValueError(f"its TIFF tags cannot be read (tag {tag} has {count} values)")
        if struct.calcsize(form) * count > inline:
            (at,) = struct.unpack_from(order + ("Q" if is_big else "I"), data, at)
        first = f"{order}{min(count, _MOST_VALUES)}{form}"
        found[tag] = (struct.unpack_from(first, data, at), at, order + form)
    (following,) = struct.unpack_from(order + ("Q" if is_big else "I"), data, start + entries * size)
    return found, int(following), entries * size + inline


def stored_bits(tags: Tags) -> int:
    """Returns the bits per sample, or the largest where they differ."""
    return max(tags.bits)


def colours(tags: Tags) -> str:
    """Returns what a page shows, for people: "gray", "colour with alpha", "colour and 1 more band"."""
    names = {RGB: "colour", PALETTE: "palette", SEPARATED: "CMYK", YCBCR: "colour", LAB: "Lab"}
    name = names.get(tags.photometric, "black and white" if math.prod(tags.bits) == 1 else "gray")
    more = f" and {tags.unspecified} more band{'s' if tags.unspecified > 1 else ''}" if tags.unspecified else ""
    return name + " with alpha" * (len(tags.extra) > tags.unspecified) + more
