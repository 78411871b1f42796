"""TIFF of any kind by tifffile and imagecodecs: every depth, sign, layout and number of bands, as it is stored.

What Pillow decodes in 8 bits as it is stored (``fastmae.data.tiff`` tells) is left to it and needs no extra. An image
is not turned by the tag Orientation. White at zero is inverted; the colours of a palette are looked up.
"""

from __future__ import annotations

import io
import math
import struct
from typing import Any, BinaryIO

import numpy as np

from fastmae.data import tiff
from fastmae.data.changes import note
from fastmae.data.codestreams import size_of_jpeg, size_of_jpeg2000
from fastmae.data.formats.common import as_channels, check_pages, check_size, library
from fastmae.data.reading import BadImageError, Header
from fastmae.facts import ReadAs

is_tiff = tiff.is_tiff

_WHITE_IS_ZERO, _PALETTE, _MASK, _SEPARATED, _YCBCR = 0, 3, 4, 5, 6
_INK_SET = 332
_KNOWN_COLOURS = {0, 1, 2, 3, 5, 6}
_JPEG = 7
_JPEG2000 = {33003, 33004, 33005, 34712}
_COMPRESSIONS = {1, 5, 8, 32946, 32773, 34925, 50000, _JPEG, *_JPEG2000}
"""None, LZW, deflate, PackBits, LZMA, Zstandard, JPEG, JPEG 2000: all are decoded into memory of a known size."""
_GDAL_NODATA = 42113
_SUBFILE, _DESCRIPTION = 254, 270
_REDUCED_OR_MASK = 1 | 4
_SIZES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4, 16: 8, 17: 8, 18: 8}
"""Bytes of a value, by the type of a tag."""
_MOST_ENTRIES = 4096
_TYPES = {"unsigned": "uint", "signed": "int", "floating-point": "float"}


def header(data: bytes) -> Header:
    """Returns what the tags of the first page say.

    Raises:
        ValueError, struct.error: there are none, or they make no sense.
    """
    tags = tiff.read_tags(data)
    bits = tiff.stored_bits(tags)
    return Header(
        "TIFF",
        tiff.colours(tags),
        tags.bands - (tags.photometric == tiff.SEPARATED),  # CMYK becomes RGB
        bits,
        alpha=len(tags.extra) > tags.unspecified,
        unspecified=tags.unspecified,
        pages=tiff.count_pages(data),
        size=(tags.height, tags.width),
        orientation=tags.orientation,
        dtype=_dtype(tags.samples, bits),
        nodata=tags.nodata,
    )


def _dtype(samples: str, bits: int) -> str:
    """Returns the name of the type that holds samples as they are stored."""
    if samples not in _TYPES:
        return "uint8"
    held = next((size for size in (8, 16, 32, 64) if bits <= size), 64)
    return f"{_TYPES[samples]}{max(held, 16) if samples == 'floating-point' else held}"


def pixels(data: bytes, read_as: ReadAs) -> np.ndarray | None:
    """Returns the first page, or all as channels, [H, W, C] as stored; None for what Pillow decodes as it is stored.

    Raises:
        BadImageError: damaged, too large, or colours without a rule.
    """
    if is_for_pillow(data, read_as):
        return None
    note_tags(tiff.read_tags(data))
    file = io.BytesIO(data)
    if read_as.pages != "channels":
        return page(file, _first_directory(file), read_as)
    found = places(file)
    return as_channels((page(file, place, read_as) for place in found), len(found))


def is_for_pillow(data: bytes, read_as: ReadAs) -> bool:
    """Tells whether Pillow decodes a file as it is stored, or as version 0.1 did where the user asks for that.

    Raises:
        BadImageError: the tags make no sense.
    """
    try:
        tags = tiff.read_tags(data)
    except (ValueError, struct.error) as error:
        raise BadImageError(str(error)) from error
    as_before = read_as.takes_upper_bits and tags.samples == "unsigned" and max(tags.bits) <= 16
    is_first = read_as.pages == "first" or tiff.count_pages(data) == 1
    is_pair = tags.bands == 2 and tags.unspecified == 1  # of which Pillow makes gray with alpha
    is_plain = max(tags.bits) <= 8 and not is_pair
    return is_first and read_as.bands is None and not tags.problem and (is_plain or as_before)


def note_tags(tags: tiff.Tags) -> None:
    """Notes that a page would be turned, or states a value of missing pixels."""
    if tags.orientation != 1:
        note("turned")
    if tags.nodata is not None and not math.isnan(tags.nodata):  # NaN is missing in any case
        note("missing", tags.nodata)


# --- one page ---------------------------------------------------------------------------------------------------------


def page(file: BinaryIO, place: int, read_as: ReadAs) -> np.ndarray:
    """Returns a page [H, W, C] as it is stored, in the byte order of this machine.

    Args:
        file: the file. It is read by position, and not closed.
        place: one of ``places``: where its tags are, or -k for the image k behind the one whose tags come first.

    Raises:
        BadImageError: damaged, too large, or colours without a rule.
    """
    tifffile = library("tifffile", "such a TIFF")
    library("imagecodecs", "such a TIFF")
    try:
        first = _first_directory(file)
        offset = place if place > 0 else first
        _check_entries(file, offset)
        file.seek(0)
        with tifffile.TiffFile(file, is_ome=False) as opened:
            opened.filehandle.seek(offset)
            found = opened.pages.first if offset == first else tifffile.TiffPage(opened, index=0)
            _check(found, opened.filehandle.size)
            stored = _image_behind(file, found, -place) if place < 0 else found.asarray(maxworkers=1)
            return _as_shown(found, stored, read_as)
    except (BadImageError, MemoryError):
        raise
    except Exception as error:  # of tifffile's and imagecodecs' many kinds
        raise BadImageError(f"a TIFF that cannot be decoded ({type(error).__name__}: {error})") from error


def _check(page: Any, file_size: int) -> None:
    """Refuses a page by its tags.

    Raises:
        BadImageError: too large, not all there, or pixels or colours without a rule.
    """
    if page.imagedepth > 1:
        raise BadImageError(f"a volume of {page.imagedepth} slices in one page; store each as a page")
    if page.dtype is None or page.dtype.kind == "c":
        kind = "complex" if page.sampleformat in (5, 6) else f"SampleFormat {page.sampleformat}"
        raise BadImageError(f"pixels of {page.bitspersample} bits ({kind}), which have no rule; store real numbers")
    check_size(page.imagelength, page.imagewidth, page.samplesperpixel, page.dtype.itemsize)
    if page.photometric not in _KNOWN_COLOURS and page.photometric != _MASK:
        raise BadImageError(f"colours of TIFF's kind {int(page.photometric)} have no rule; store gray or RGB")
    if page.photometric == _YCBCR and page.compression != _JPEG:
        raise BadImageError("colours as YCbCr without JPEG; store RGB")
    if page.photometric == _WHITE_IS_ZERO and page.dtype.kind != "u" and page.dtype.kind != "b":
        raise BadImageError(f"{page.dtype.name} pixels with white at 0 (WhiteIsZero); store them with black at 0")
    if page.compression not in _COMPRESSIONS:
        name = getattr(page.compression, "name", page.compression)
        raise BadImageError(f"compression {int(page.compression)} ({name}) is not read; store deflate or LZW")
    chunk = page.chunks
    if page.is_tiled:
        check_size(page.tilelength, page.tilewidth, page.samplesperpixel, page.dtype.itemsize)
    offsets, counts = (np.asarray(values, np.int64) for values in (page.dataoffsets, page.databytecounts))
    expected = math.prod(page.chunked)
    if page.is_contiguous:  # one run of bytes, whatever the tags say of its parts
        if not len(offsets) or offsets[0] <= 0 or offsets[0] + page.nbytes > file_size:
            raise BadImageError(f"cut: it has {file_size} bytes, and its pixels take {page.nbytes}")
        return
    if len(offsets) < expected or len(counts) < expected:
        raise BadImageError(f"tags for {min(len(offsets), len(counts))} of its {expected} strips or tiles")
    offsets, counts = offsets[:expected], counts[:expected]
    absent = (offsets == 0) | (counts == 0)
    if absent.any() and _GDAL_NODATA not in page.tags:
        raise BadImageError(f"{absent.sum()} of its {expected} strips or tiles are not there")
    if (offsets < 0).any() or (counts < 0).any() or (offsets + counts > file_size).any():
        raise BadImageError(f"cut: it has {file_size} bytes, and its pixels reach to {(offsets + counts).max()}")
    if page.compression == _JPEG or page.compression in _JPEG2000:
        _check_codestreams(page, offsets[~absent].tolist(), chunk)


def _check_codestreams(page: Any, offsets: list[int], chunk: tuple[int, ...]) -> None:
    """Refuses JPEG and JPEG 2000 inside of a TIFF that claim to be larger than the strip or tile that they are.

    Raises:
        BadImageError: one of them does.
    """
    handle = page.parent.filehandle
    for offset in offsets:
        handle.seek(offset)
        start = handle.read(1 << 16)
        size = size_of_jpeg(start) if page.compression == _JPEG else size_of_jpeg2000(start)
        if size is None:
            raise BadImageError("a tile that does not say its size")
        if size[0] > chunk[0] or size[1] > chunk[1]:
            raise BadImageError(f"a tile of {chunk[1]}×{chunk[0]} pixels that holds {size[1]}×{size[0]}")


def _image_behind(file: BinaryIO, first: Any, number: int) -> np.ndarray:
    """Returns image ``number`` of those that follow the first without tags of their own, as ImageJ writes large stacks.

    Raises:
        BadImageError: it is not there.
    """
    if not first.is_contiguous or first.predictor != 1 or first.fillorder != 1:
        raise BadImageError("images without tags behind a compressed one")
    file.seek(first.dataoffsets[0] + number * first.nbytes)
    data = file.read(first.nbytes)
    if len(data) < first.nbytes:
        raise BadImageError(f"cut: image {number + 1} of its stack is not there")
    stored = np.frombuffer(data, np.dtype(first.parent.byteorder + first.dtype.char)).reshape(first.shape)
    return stored.astype(first.dtype)


def _as_shown(page: Any, stored: np.ndarray, read_as: ReadAs) -> np.ndarray:
    """Returns pixels [H, W, C] with bands last, black at zero, and the colours of a palette or of inks."""
    if stored.dtype == bool:
        stored = stored.astype(np.uint8) * np.uint8(255)
    if page.photometric == _PALETTE and page.colormap is not None:
        if page.samplesperpixel > 1 or stored.max(initial=0) >= page.colormap.shape[1]:
            raise BadImageError("a palette with more bands, or with fewer colours than are used; store RGB")
        return np.ascontiguousarray(page.colormap.T)[stored]
    shown = stored[..., None] if stored.ndim == 2 else np.moveaxis(stored, 0, -1) if page.axes == "SYX" else stored
    if page.photometric == _WHITE_IS_ZERO:  # of gray; the bands beside it have no white
        bits = page.bitspersample if page.bitspersample > 1 else 8
        shown = shown.copy()
        shown[..., 0] = shown.dtype.type((1 << bits) - 1) - shown[..., 0]
    return _without_ink(page, shown) if page.photometric == _SEPARATED and read_as.bands is None else shown


def _without_ink(page: Any, inks: np.ndarray) -> np.ndarray:
    """Returns CMYK as RGB, as Pillow does it with 8 bits.

    Raises:
        BadImageError: other inks.
    """
    if page.tags.valueof(_INK_SET, 1) != 1 or inks.shape[2] < 4 or inks.dtype.kind != "u":
        raise BadImageError(f"{inks.shape[2]} inks other than CMYK have no rule; name them by bands, or store RGB")
    white = np.uint64((1 << page.bitspersample) - 1)
    paper = white - inks[..., 3:4].astype(np.uint64)
    covered = (inks[..., :3].astype(np.uint64) * paper + white // np.uint64(2)) // white
    colours = (paper - np.minimum(covered, paper)).astype(inks.dtype)
    return np.concatenate([colours, inks[..., 4:]], axis=2)


# --- pages ------------------------------------------------------------------------------------------------------------


def places(file: BinaryIO) -> list[int]:
    """Returns the place of each page of full size: smaller copies of a page, and masks, are left out.

    Raises:
        BadImageError: damaged, or too many.
    """
    found: list[int] = []
    try:
        offset = _first_directory(file)
        seen: set[int] = set()
        while offset:
            if offset in seen:
                raise BadImageError("its pages lead in a circle")
            seen.add(offset)
            values, following = _entries(file, offset)
            if not found and (behind := _images_behind(file, values)):
                return [offset, *range(-1, -behind - 1, -1)]
            if not _number(file, values.get(_SUBFILE)) & _REDUCED_OR_MASK:
                found.append(offset)
            check_pages(len(seen))
            offset = following
    except (struct.error, OverflowError, OSError) as error:
        raise BadImageError("cut within its tags") from error
    return found or [_first_directory(file)]


_Entry = tuple[int, int, int]
"""Type, number of values, and where they are."""


def _order(file: BinaryIO) -> tuple[str, bool]:
    """Returns the byte order, and whether it is a BigTIFF."""
    file.seek(0)
    return tiff.STARTS[file.read(4)]


def _first_directory(file: BinaryIO) -> int:
    order, is_big = _order(file)
    return int(_unpack(file, order + ("Q" if is_big else "I"), 8 if is_big else 4)[0])


def _unpack(file: BinaryIO, form: str, offset: int) -> tuple[Any, ...]:
    file.seek(offset)
    return struct.unpack(form, file.read(struct.calcsize(form)))


def _entries(file: BinaryIO, offset: int) -> tuple[dict[int, _Entry], int]:
    """Returns the tags of a page without their values, and where the next page is.

    Raises:
        struct.error: the file ends before.
        BadImageError: absurdly many of them.
    """
    order, is_big = _order(file)
    head, entry, width, next_form = ("Q", "HHQ", 20, "Q") if is_big else ("H", "HHI", 12, "I")
    (count,) = _unpack(file, order + head, offset)
    if count > _MOST_ENTRIES:
        raise BadImageError(f"{count} tags in a page, over the limit of {_MOST_ENTRIES}")
    start = offset + struct.calcsize(head)
    block = file.read(count * width + struct.calcsize(next_form))
    entries: dict[int, _Entry] = {}
    inline = struct.calcsize(next_form)
    for number in range(count):
        tag, kind, values = struct.unpack_from(order + entry, block, number * width)
        at = number * width + width - inline
        where = start + at
        if values * _SIZES.get(kind, 1) > inline:
            (where,) = struct.unpack_from(order + next_form, block, at)
        entries.setdefault(tag, (kind, values, where))
    (following,) = struct.unpack_from(order + next_form, block, count * width)
    return entries, int(following)


def _check_entries(file: BinaryIO, offset: int) -> None:
    """Refuses tags that claim more values than the file has bytes, before tifffile allocates room for them.

    Raises:
        BadImageError: one does, or the tags are cut.
    """
    size = file.seek(0, io.SEEK_END)
    try:
        entries, _ = _entries(file, offset)
    except (struct.error, OverflowError, OSError) as error:
        raise BadImageError("cut within its tags") from error
    for tag, (kind, values, where) in entries.items():
        if values * _SIZES.get(kind, 1) > size or where > size:
            raise BadImageError(f"its tag {tag} has {values} values, more than the file has bytes")


def _number(file: BinaryIO, entry: _Entry | None) -> int:
    if entry is None or entry[0] not in (3, 4):
        return 0
    order, _ = _order(file)
    return int(_unpack(file, order + ("H" if entry[0] == 3 else "I"), entry[2])[0])


def _images_behind(file: BinaryIO, values: dict[int, _Entry]) -> int:
    """Returns how many images follow the first without tags of their own, as its description says; 0 for none."""
    if _DESCRIPTION not in values:
        return 0
    _, count, where = values[_DESCRIPTION]
    file.seek(where)
    noted = tiff.images_noted(file.read(min(count, 4096)))
    check_pages(noted)
    return max(noted - 1, 0)
