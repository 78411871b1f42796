"""Headers of image files: format, colours, bits per sample, bands, pages and orientation, without reading a pixel.

``decode`` refuses by them what cannot be used as it is stored. `verify` and the start of a run say by them what the
images are. What is special about TIFF is in tiff.py.
"""

from __future__ import annotations

import contextlib
import io
import re
import struct
from dataclasses import replace

from PIL import Image

from fastmae.data import tiff
from fastmae.data.codestreams import J2K_SIZE, JPEG_START, jpeg_frame, jpeg_segments
from fastmae.data.formats import dicom, heif, jpeg2000
from fastmae.data.formats import tiff as wide_tiff
from fastmae.data.reading import Header
from fastmae.facts import AS_STORED, ReadAs

ORIENTATION = 0x0112
PAGED = ("TIFF", "DICOM")
"""The formats whose pages can be read each, or all as channels."""
_REACH = 4096
"""How far into a file the patterns of its first bytes may reach."""
_JPEG_COLOURS = {1: "gray", 3: "colour", 4: "CMYK"}
_PILLOW_COLOURS = {
    "1": "black and white", "L": "gray", "LA": "gray with alpha", "La": "gray with alpha", "P": "palette",
    "PA": "palette with alpha", "RGB": "colour", "RGBA": "colour with alpha", "RGBa": "colour with alpha",
    "RGBX": "colour", "YCbCr": "colour", "LAB": "Lab", "I": "gray", "F": "gray",
}  # fmt: skip
_CONVERT = "convert it to PNG, JPEG or TIFF"
_FOREIGN = (
    (4, rb"ftyp(?:hei[cxms]|hev[cmsx]|mif1|msf1)", f"HEIC; {_CONVERT}"),
    (0, rb"\x89HDF\r\n\x1a\n|CDF[\x01\x02\x05]", f"HDF5 or NetCDF; {_CONVERT}"),
    (344, rb"n[+i]1\0", f"NIfTI; {_CONVERT}"),
    (0, rb"%PDF", f"PDF; {_CONVERT}"),
    (0, rb"\s*(?:<\?xml[^>]*>\s*)?(?:<!--.*?-->\s*)?<svg", f"SVG; {_CONVERT}"),
    (0, rb"\x93NUMPY", "a NumPy array; give it the suffix .npy, and its path"),
    (0, rb"\x1f\x8b|PK\x03\x04|BZh|\xfd7zXZ|\x28\xb5\x2f\xfd", "a compressed file; unpack it"),
    (0, rb"(?i)\s*<(?:!doctype )?html", "a web page; fetch the image again"),
    (0, rb"version https://git-lfs", "a pointer of Git LFS; fetch the file with `git lfs pull`"),
)
"""What users take for images and Pillow does not know: where the pattern lies, the pattern, and what it is."""


def read_header(data: bytes) -> Header:
    """Returns what the header of a usable image file says; what is damaged or unknown has its default."""
    if data[:3] == JPEG_START:
        header, needs_pillow = _jpeg_header(data)
        if not needs_pillow:
            return header
    with contextlib.suppress(Exception):
        known = native_header(data)
        if known is not None:
            return known
    header = Header("unknown", "")
    with contextlib.suppress(Exception), Image.open(io.BytesIO(data)) as image:
        header = _pillow_header(data, image)
        with contextlib.suppress(Exception):  # damaged EXIF does not make an image unusable
            turned = image.getexif().get(ORIENTATION, 1)
            header = replace(header, orientation=turned if isinstance(turned, int) else 1)
    return header


def as_read(header: Header, read_as: ReadAs) -> Header:
    """Returns what a file gives where pages become channels, or a window makes floats of numbers."""
    if header.format == "DICOM" and read_as.window is not None and header.bands == 1:
        header = replace(header, dtype="float32")
    if header.format in PAGED and read_as.pages == "channels" and header.pages > 1:
        header = replace(header, bands=header.bands * header.pages, pages=1)
    return header


def native_header(data: bytes) -> Header | None:
    """Returns the header of a file of which Pillow does not know all; None if it does.

    Raises:
        BadImageError and others: the header makes no sense.
    """
    start = data[:_REACH]
    if tiff.is_tiff(start):
        return None if wide_tiff.is_for_pillow(data, AS_STORED) else wide_tiff.header(data)
    if dicom.is_dicom(start):
        return dicom.header(data)
    if heif.is_heif(start):
        return heif.header(data)
    if jpeg2000.is_jpeg2000(start) or jpeg2000.is_jpegxl(start):
        return jpeg2000.header(data)
    return None


def explain(data: bytes) -> str:
    """Returns what bytes are that Pillow does not decode, and why not, as far as their beginning tells; or nothing."""
    for offset, pattern, what in _FOREIGN:
        if re.compile(pattern, re.DOTALL).match(data[: offset + _REACH], offset):
            return what
    with contextlib.suppress(struct.error, ValueError):
        if tiff.is_tiff(data):
            tags = tiff.read_tags(data)
            stored = f"TIFF {tiff.colours(tags)} of {tags.bands} bands of {tiff.stored_bits(tags)} bits"
            return (
                tags.problem or f"{stored}, compression {tags.compression}; store gray, RGB or RGBA of 8 bits, or PNG"
            )
        if data[:3] == JPEG_START and (frame := jpeg_frame(data)) is not None:
            marker, bits, bands = frame
            if bits != 8:
                return f"a JPEG of {bits} bits per sample; store 8 bits, or PNG"
            if marker in (0xC3, 0xCB, 0xF7):
                return "a lossless JPEG; store PNG"
            return f"a JPEG of {bands} bands" if bands not in _JPEG_COLOURS else ""
    return ""


def bits_of(data: bytes, file_format: str, mode: str) -> int:
    """Returns the bits per sample with which a file that Pillow opens stores its pixels.

    Args:
        data: the bytes of the file.
        file_format: Pillow's name of its format.
        mode: Pillow's mode.
    """
    with contextlib.suppress(struct.error, ValueError, IndexError):
        if file_format == "TIFF":
            return tiff.stored_bits(tiff.read_tags(data))
        if file_format == "PNG":
            return max(data[24], 8)
        if file_format == "PPM" and (
            found := re.match(rb"P[2356]\s(?:\s*#[^\n]*\n)*\s*\d+\s+\d+\s+(\d+)", data[:_REACH])
        ):
            return max(int(found[1]).bit_length(), 8)
        if file_format == "JPEG2000" and (start := data.find(J2K_SIZE)) >= 0:
            return (data[start + 42] & 127) + 1
        if file_format == "AVIF" and (start := data.find(b"av1C")) >= 0:
            high, twelve = data[start + 6] & 64, data[start + 6] & 32
            return 12 if high and twelve else 10 if high else 8
        if file_format == "SGI":
            return 8 * data[3]
    return 16 if mode.startswith("I;16") else 32 if mode in ("I", "F") else 8


def jpeg2000_problem(data: bytes) -> str:
    """Returns why the samples of a JPEG 2000 cannot be used as Pillow decodes them; empty if they can."""
    start = data.find(J2K_SIZE)
    if not 0 <= start < len(data) - 42:
        return ""
    bands, depth = int.from_bytes(data[start + 40 : start + 42], "big"), data[start + 42]
    bits = (depth & 127) + 1
    if depth & 128:  # which Pillow would take away by an offset
        return "signed pixels have no fixed range; scale them to 0–255 and store unsigned 8 bits"
    if bits > 16:
        return f"pixels of {bits} bits have no fixed range; scale them to 0–255 and store 8 bits"
    if bits > 8 and bands > 1:
        return f"a JPEG 2000 of {bands} bands of {bits} bits, whose brightest pixels Pillow makes black; store 8 bits"
    return ""


def _pillow_header(data: bytes, image: Image.Image) -> Header:
    """Returns the header of a file that Pillow opened. It may close the image's file."""
    file_format, mode, size = image.format or "unknown", image.mode, (image.height, image.width)
    bits = bits_of(data, file_format, mode)
    if file_format == "TIFF":
        tags = tiff.read_tags(data)
        return Header(
            file_format,
            tiff.colours(tags),
            tags.bands,
            bits,
            alpha=len(tags.extra) > tags.unspecified,
            unspecified=tags.unspecified,
            pages=tiff.count_pages(data),
            size=(tags.height, tags.width),
        )
    colours = _PILLOW_COLOURS.get(mode, "gray" if mode.startswith("I;16") else mode)
    alpha = mode in ("LA", "La", "PA", "RGBA", "RGBa")
    bands = len(image.getbands())
    if file_format == "PNG" and data[25:26] == b"\x04":  # gray with alpha of 16 bits, which Pillow opens as RGBA
        colours, bands = "gray with alpha", 2
    is_wide = mode.startswith("I") or (bits > 8 and file_format in ("PNG", "PPM"))
    dtype = "uint16" if is_wide else "uint8"
    return Header(file_format, colours, bands, bits, alpha, pages=_count_frames(image), size=size, dtype=dtype)


def _count_frames(image: Image.Image) -> int:
    """Returns how many pictures a file holds: frames, pages, or sizes of an icon. Thumbnails and layers are none."""
    with contextlib.suppress(Exception):
        if image.format in ("ICO", "ICNS", "CUR"):
            return max(1, len(image.info.get("sizes", ())))
        if image.format == "PSD":
            return 1
        if image.format == "MPO":
            entries = image.mpinfo[0xB002]  # type: ignore[attr-defined]
            return sum("Thumbnail" not in entry["Attribute"]["MPType"] for entry in entries)
        return int(getattr(image, "n_frames", 1))
    return 1


def _jpeg_header(data: bytes) -> tuple[Header, bool]:
    """Returns the header of a JPEG, and whether Pillow must say the rest: it has EXIF, XMP, or several pictures."""
    header, needs_pillow = Header("JPEG", ""), False
    with contextlib.suppress(IndexError, struct.error):
        for marker, start in jpeg_segments(data):
            if marker == 0xE1 or (marker == 0xE2 and data[start : start + 4] == b"MPF\0"):
                needs_pillow = True
            if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
                bits, height, width, bands = struct.unpack_from(">BHHB", data, start)
                colours = _JPEG_COLOURS.get(bands, f"{bands} bands")
                return Header("JPEG", colours, bands, bits, size=(height, width)), needs_pillow
    return header, True
