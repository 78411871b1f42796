"""Headers of image files and the pixels that go with them, by format, depth and bands, as tifffile has them."""

import io
import itertools
import re
import struct
import zlib
from functools import partial

import numpy as np
import pytest
import tifffile
from PIL import Image

from fastmae.data.decode import BadImageError, decode, refuse_by_header
from fastmae.data.headers import Header, bits_of, explain, read_header
from fastmae.data.reading import Reading
from fastmae.data.tiff import count_pages, read_tags
from fastmae.facts import ReadAs

ORIENTATION = 0x0112
RNG = np.random.default_rng(0)
COLOUR = RNG.integers(0, 256, (24, 20, 3), dtype=np.uint8)


def saved(image, file_format, **options):
    buffer = io.BytesIO()
    (Image.fromarray(image) if isinstance(image, np.ndarray) else image).save(buffer, file_format, **options)
    return buffer.getvalue()


def tiff(pixels, **options):
    buffer = io.BytesIO()
    tifffile.imwrite(buffer, pixels, **options)
    return buffer.getvalue()


def png(pixels, kind, bits):
    """A PNG of a kind of colours (0 gray, 2 RGB, 4 gray with alpha, 6 RGBA) with 1 to 16 bits; pixels [H, W, C]."""
    if bits == 16:
        rows = [b"\0" + row.astype(">u2").tobytes() for row in pixels]
    else:
        rows = [b"\0" + packed(row.ravel(), bits) for row in pixels]
    height, width = pixels.shape[:2]
    header = struct.pack(">IIBBBBB", width, height, bits, kind, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(b"".join(rows))), (b"IEND", b"")]
    written = (struct.pack(">I", len(d)) + n + d + struct.pack(">I", zlib.crc32(n + d)) for n, d in chunks)
    return b"\x89PNG\r\n\x1a\n" + b"".join(written)


def packed(samples, bits):
    """Samples of ``bits`` bits each, one after another, up to a whole byte."""
    text = "".join(f"{int(sample):0{bits}b}" for sample in samples)
    text += "0" * (-len(text) % 8)
    return bytes(int(text[i : i + 8], 2) for i in range(0, len(text), 8))


def gray_tiff(values, bits, order, photometric=1, fill=1, compressed=False):
    """A TIFF of one band of any number of bits per sample, which tifffile does not write."""
    rows = b""
    for row in values:
        data = row.astype(order + "u2").tobytes() if bits == 16 else packed(row, bits)
        rows += bytes(int(f"{byte:08b}"[::-1], 2) for byte in data) if fill == 2 else data
    rows = zlib.compress(rows) if compressed else rows
    height, width = values.shape
    tags = [(256, 3, width), (257, 3, height), (258, 3, bits), (259, 3, 8 if compressed else 1), (262, 3, photometric)]
    tags += [(266, 3, fill), (273, 4, 8), (277, 3, 1), (278, 3, height), (279, 4, len(rows))]
    rows += b"\0" * (len(rows) % 2)
    data = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(order + "I", 8 + len(rows)) + rows
    data += struct.pack(order + "H", len(tags))
    for tag, kind, value in tags:
        data += struct.pack(order + "HHI", tag, kind, 1)
        data += struct.pack(order + "HH", value, 0) if kind == 3 else struct.pack(order + "I", value)
    return data + struct.pack(order + "I", 0)


IN_8_BITS = ReadAs(pixel_type="uint8")
"""The upper 8 bits of all images, as version 0.1 used them."""


def refusal(data, in_chans):
    """The reason for which the header of a file is refused, or None."""
    try:
        refuse_by_header(data, Reading(in_chans, read_as=IN_8_BITS))
    except BadImageError as error:
        return str(error)
    return None


def read(data, in_chans):
    """The pixels, or None if the file is refused: in one line, and by its header as by its pixels."""
    reason = refusal(data, in_chans)
    if reason is None:
        return decode(data, Reading(in_chans, read_as=IN_8_BITS))
    assert "\n" not in reason
    with pytest.raises(BadImageError, match=re.escape(reason)):
        decode(data, Reading(in_chans, read_as=IN_8_BITS))
    return None


# --- TIFF as tifffile reads it ----------------------------------------------------------------------------------------

CALLED = {1: "minisblack", 0: "miniswhite", 2: "rgb", 5: "separated"}
COLOURS = {"minisblack": 1, "miniswhite": 1, "rgb": 3, "separated": 4}
EXTRA = ("unspecified", "unassalpha", "assocalpha")


def as_stated(pixels, photometric, extra, in_chans):
    """What the rule of docs/data.md makes of stored pixels uint8 or uint16 [H, W, C]; None if it has none."""
    if pixels.dtype not in (np.uint8, np.uint16) or pixels.shape[2] > 4:
        return None
    bands = pixels.shape[2]
    if pixels.dtype == np.uint16:
        if photometric == "miniswhite":
            return None
        pixels = (pixels >> 8).astype(np.uint8)
    if photometric == "miniswhite":
        pixels = np.concatenate([255 - pixels[..., :1], pixels[..., 1:]], axis=2)
    if photometric == "separated":
        return (
            np.asarray(Image.fromarray(pixels, "CMYK").convert("RGB" if in_chans == 3 else "L"))
            if in_chans < 4
            else None
        )
    if in_chans == 4:
        return pixels if bands == 4 else None if bands != 2 or "unspecified" in extra else pixels[..., [0, 0, 0, 1]]
    shown = pixels[..., : 3 if photometric == "rgb" else 1]
    if shown.shape[2] == 3 and in_chans == 1:
        return np.asarray(Image.fromarray(np.ascontiguousarray(shown)).convert("L"))[..., None]
    return np.broadcast_to(shown, (*shown.shape[:2], in_chans))


def layouts(dtypes, orders, most):
    """Yields (dtype, byte order, bands, photometric, extra samples, planar, compression) of all TIFFs of a matrix."""
    for dtype, order, bands in itertools.product(dtypes, orders, range(1, most + 1)):
        for photometric, colours in COLOURS.items():
            if bands < colours or (bands > 2 and photometric == "miniswhite"):
                continue
            kinds = [(first, *("unspecified",) * (bands - colours - 1)) for first in EXTRA] if bands > colours else [()]
            for extra, planar in itertools.product(kinds, ("contig", "separate") if bands > 1 else ("contig",)):
                for compression in (None, "zlib"):
                    yield np.dtype(dtype), order, bands, photometric, extra, planar, compression


def check_layouts(cases):
    """Reads TIFFs of many layouts by each number of channels. Returns how many were used and refused."""
    used = refused = 0
    for dtype, order, bands, photometric, extra, planar, compression in cases:
        info = None if dtype.kind == "f" else np.iinfo(dtype)
        pixels = RNG.random((12, 10, bands)).astype(dtype) if info is None else RNG.integers(
            info.min, info.max, (12, 10, bands), dtype, endpoint=True
        )  # fmt: skip
        options = {"photometric": photometric, "byteorder": order, "compression": compression}
        options |= {"extrasamples": extra} if extra else {}
        options |= {"planarconfig": planar} if bands > 1 else {}
        written = np.moveaxis(pixels, -1, 0).copy() if planar == "separate" else pixels if bands > 1 else pixels[..., 0]
        data = tiff(written, **options)
        tags = read_tags(data)
        assert (tags.bands, tags.bits[0]) == (bands, 8 * dtype.itemsize)
        for in_chans in (1, 3, 4):
            got = read(data, in_chans)
            case = f"{dtype} {order} {bands} {photometric} {extra} {planar} {compression} to {in_chans}"
            if got is None:
                refused += 1
                # Whatever Pillow reads right is used.
                is_plain = dtype == np.uint8 and planar == "contig" and photometric == "rgb" and bands - 3 in (0, 1)
                assert not is_plain or (in_chans == 4 and bands == 3), case
                continue
            used += 1
            expected = as_stated(pixels, photometric, extra, in_chans)
            if expected is None or tags.problem:  # what Pillow does not read as it is stored: formats/test_tiff.py
                continue
            if "assocalpha" in extra:  # colours are divided by it, as everywhere that images are shown
                expected, got = expected[..., 3:], got[..., 3:]
            assert np.array_equal(got, expected.reshape(got.shape)), case
    return used, refused


def test_tiffs_have_the_pixels_that_tifffile_stored_or_are_refused():
    used, refused = check_layouts(layouts(["u1", "u2"], "<", 4))
    assert used > 100
    assert refused > 50


@pytest.mark.slow
def test_tiffs_of_every_layout_have_the_pixels_that_tifffile_stored_or_are_refused():
    used, refused = check_layouts(layouts(["u1", "u2"], "<>", 6))
    assert used > 200
    assert refused > 200


@pytest.mark.parametrize("bits", [1, 2, 4, 8, 10, 12, 14, 16])
def test_gray_tiffs_of_every_depth_are_scaled_to_8_bits_or_refused(bits):
    values = RNG.integers(0, 1 << bits, (10, 21))
    top = (1 << bits) - 1
    used = 0
    for order, photometric, fill, compressed in itertools.product("<>", (0, 1), (1, 2), (False, True)):
        if compressed and fill == 2:
            continue  # what is reversed then are the compressed bytes
        got = read(gray_tiff(values, bits, order, photometric, fill, compressed), 1)
        if got is None:
            assert bits > 8 or (bits, photometric, fill) == (8, 0, 2), f"{order} {photometric} {fill} {compressed}"
            continue
        used += 1
        scaled = values >> (bits - 8) if bits > 8 else values * 255 // top
        assert np.array_equal(got[..., 0], 255 - scaled if photometric == 0 else scaled), (order, photometric, fill)
    assert used >= (0 if bits in (10, 14) else 1)


def test_a_fourth_band_of_a_tiff_is_kept_whatever_the_tag_says_of_it():
    pixels = RNG.integers(0, 256, (12, 10, 4), dtype=np.uint8)
    for extra in (["unspecified"], ["unassalpha"]):
        data = tiff(pixels, photometric="rgb", extrasamples=extra)
        assert np.array_equal(decode(data, Reading(4)), pixels)
        assert np.array_equal(decode(data, Reading(3)), pixels[..., :3])
    planes = tiff(
        np.moveaxis(pixels, -1, 0).copy(), photometric="rgb", planarconfig="separate", extrasamples=["unspecified"]
    )
    assert np.array_equal(decode(planes, Reading(4)), pixels)


REFUSED = {
    "colours of TIFF's kind 32803": tiff(np.zeros((9, 8), np.uint8), photometric="cfa"),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_what_no_rule_makes_a_picture_of_is_refused_with_what_it_is(reason):
    with pytest.raises(BadImageError, match=re.escape(reason)):
        decode(REFUSED[reason], Reading(3))


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
def test_damaged_tags_are_a_reason_and_no_crash():
    data = tiff(COLOUR, photometric="rgb")
    for cut in range(4, 200, 7):
        with pytest.raises(BadImageError):
            decode(data[:cut], Reading(3))
    for position in range(4, 200):
        spoilt = bytearray(data)
        spoilt[position] ^= 0xFF
        refusal(bytes(spoilt), 3)
        read_header(bytes(spoilt))
        explain(bytes(spoilt))
        count_pages(bytes(spoilt))


def test_pages_that_point_at_each_other_are_counted_once():
    data = bytearray(tiff(COLOUR, photometric="rgb", metadata=None))
    (first,) = struct.unpack_from("<I", data, 4)
    (entries,) = struct.unpack_from("<H", data, first)
    struct.pack_into("<I", data, first + 2 + 12 * entries, first)
    assert count_pages(bytes(data)) == 1


# --- other formats ----------------------------------------------------------------------------------------------------


PNGS = [(0, 1, bits) for bits in (1, 2, 4)] + [
    (kind, bands, bits) for kind, bands in ((0, 1), (2, 3), (4, 2), (6, 4)) for bits in (8, 16)
]
"""(the kind of colour, bands, bits) of which PNGs may be."""


@pytest.mark.parametrize(("kind", "bands", "bits"), PNGS)
@pytest.mark.parametrize("asked", ["auto", "uint8"])
def test_pngs_of_every_depth_have_what_is_stored_or_the_upper_8_bits_of_it(kind, bands, bits, asked):
    values = RNG.integers(0, 1 << bits, (6, 8, bands))
    data = png(values, kind, bits)
    is_wide = bits == 16 and asked == "auto"
    reading = partial(Reading, dtype="uint16" if is_wide else "uint8", read_as=ReadAs(pixel_type=asked))
    shown = values >> (0 if is_wide else 8) if bits == 16 else values * 255 // ((1 << bits) - 1)
    shown = shown.astype(reading(1).dtype)
    assert np.array_equal(decode(data, reading(3)), np.broadcast_to(shown[..., : 3 if bands > 2 else 1], (6, 8, 3)))
    header = read_header(data)
    assert (header.bands, header.bits, header.alpha, header.size) == (bands, max(bits, 8), kind in (4, 6), (6, 8))
    assert header.dtype == ("uint16" if bits == 16 else "uint8")
    if kind in (4, 6):
        assert np.array_equal(decode(data, reading(4)), shown if bands == 4 else shown[..., [0, 0, 0, 1]])
    else:
        with pytest.raises(BadImageError, match=f"{bands} bands?, in_chans 4 asks for 4; set in_chans to 1 or 3"):
            decode(data, reading(4))


@pytest.mark.parametrize("maxval", [1, 15, 255, 1000, 4095, 65535])
@pytest.mark.parametrize(("magic", "bands"), [(b"P5", 1), (b"P6", 3)])
def test_portable_maps_are_scaled_by_the_largest_value_that_they_name(maxval, magic, bands):
    values = RNG.integers(0, maxval + 1, (6, 5, bands))
    data = magic + b"\n# a remark\n5 6\n%d\n" % maxval + values.astype(">u2" if maxval > 255 else "u1").tobytes()
    assert abs(decode(data, Reading(bands, read_as=IN_8_BITS)) - values * 255 / maxval).max() <= 1
    header = read_header(data)
    assert (header.bits, header.dtype) == (max(8, maxval.bit_length()), "uint16" if maxval > 255 else "uint8")
    if maxval > 255:
        assert np.array_equal(decode(data, Reading(bands, dtype="uint16")), values)
        words = magic.replace(b"5", b"2").replace(b"6", b"3") + b" 5 6 %d\n" % maxval
        words += b" ".join(b"%d" % value for value in values.flat)
        assert np.array_equal(decode(words, Reading(bands, dtype="uint16")), values)
        for cut in (data[:-1], words[: -len(str(values.flat[-1])) - 1], words[:20], data[:12]):
            with pytest.raises(BadImageError):
                decode(cut, Reading(bands, dtype="uint16"))


def test_depths_of_jpeg_2000_and_avif():
    wide = RNG.integers(0, 65536, (16, 16), dtype=np.uint16)
    gray = saved(wide, "JPEG2000")
    assert np.array_equal(decode(gray, Reading(1, read_as=IN_8_BITS))[..., 0], wide >> 8)
    assert np.array_equal(decode(gray, Reading(1, dtype="uint16"))[..., 0], wide)
    assert read_header(gray).kind == "JPEG2000 16-bit gray"
    assert read_header(saved(COLOUR, "JPEG2000")).kind == "JPEG2000 colour"
    avif = bytearray(saved(COLOUR, "AVIF"))
    assert read_header(bytes(avif)).bits == 8
    avif[avif.index(b"av1C") + 6] |= 64
    assert bits_of(bytes(avif), "AVIF", "RGB") == 10
    avif[avif.index(b"av1C") + 6] |= 32
    assert bits_of(bytes(avif), "AVIF", "RGB") == 12


@pytest.mark.parametrize("orientation", range(1, 9))
def test_no_image_is_turned_and_its_orientation_is_known(orientation):
    xmp = b'<rdf:Description tiff:Orientation="%d"/>' % orientation
    files = {}
    for file_format in ("PNG", "WEBP", "AVIF", "JPEG"):
        exif = Image.Exif()
        exif[ORIENTATION] = orientation
        files[file_format] = saved(
            COLOUR, file_format, exif=exif, **{"lossless": True} if file_format == "WEBP" else {}
        )
    for compression in (None, "zlib"):
        tag = (ORIENTATION, 3, 1, orientation, True)
        files[f"TIFF {compression}"] = tiff(COLOUR, photometric="rgb", compression=compression, extratags=[tag])
        tag = (700, 1, len(xmp), xmp, True)
        files[f"TIFF {compression} by XMP"] = tiff(COLOUR, photometric="rgb", compression=compression, extratags=[tag])
    for name, data in files.items():
        pixels = decode(data, Reading(3))
        assert pixels.shape == COLOUR.shape, name
        assert np.array_equal(pixels, COLOUR) or name in ("AVIF", "JPEG"), name
        header = read_header(data)
        assert (header.orientation, header.is_turned) == (orientation, orientation > 1), name


def test_pages_frames_and_sizes_are_counted():
    frames = [Image.fromarray(RNG.integers(0, 256, (24, 20, 3), dtype=np.uint8)) for _ in range(5)]
    for file_format in ("PNG", "WEBP", "AVIF", "GIF", "TIFF", "MPO"):
        first, *others = (frame.copy() for frame in frames)
        assert read_header(saved(first, file_format, save_all=True, append_images=others)).pages == 5, file_format
        assert read_header(saved(frames[0].copy(), file_format if file_format != "MPO" else "JPEG")).pages == 1
    assert read_header(saved(frames[0], "ICO", sizes=[(16, 16), (20, 20)])).pages == 2
    stack = np.stack([np.asarray(frame)[..., 0] for frame in frames])
    for options in ({"imagej": True}, {"ome": True}, {"bigtiff": True}, {"byteorder": ">"}, {"truncate": True}):
        assert read_header(tiff(stack, **options)).pages == 5, options
        assert read_header(tiff(stack[0], **options)).pages == 1, options
    with tifffile.TiffWriter(pyramid := io.BytesIO()) as writer:
        writer.write(stack[0], subifds=1)
        for step in (2, 4):
            writer.write(stack[0, ::step, ::step], subfiletype=1)
    assert read_header(pyramid.getvalue()).pages == 1


FOREIGN = {
    "HEIC; convert it": b"\0\0\0\x18ftypheic" + bytes(40),
    "a JPEG XL that cannot be decoded": b"\xff\x0a" + bytes(40),
    "a DICOM without pixels": bytes(128) + b"DICM" + bytes(40),
    "HDF5": b"\x89HDF\r\n\x1a\n" + bytes(600),
    "SVG; convert it": b'<?xml version="1.0"?>\n<svg xmlns="http://www.w3.org/2000/svg"/>',
    "a web page; fetch the image again": b"<!DOCTYPE html><html>404</html>",
    "git lfs pull": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
    "unpack it": zlib.compress(b"x", wbits=31),
    "a NumPy array": b"\x93NUMPY\x01\x00" + bytes(80),
    "a JPEG of 12 bits per sample": b"\xff\xd8\xff\xc1" + struct.pack(">HBHHB", 11, 12, 8, 8, 1) + bytes(3),
}


@pytest.mark.parametrize("reason", FOREIGN)
def test_files_that_pillow_does_not_know_are_called_by_their_name(reason):
    with pytest.raises(BadImageError, match=re.escape(reason)):
        decode(FOREIGN[reason], Reading(3))


def test_a_header_that_cannot_be_read_is_unknown():
    assert read_header(b"") == read_header(b"junk") == Header("unknown", "")


@pytest.mark.parametrize(
    ("data", "kind", "bands"),
    [
        (saved(COLOUR, "JPEG"), "JPEG colour", 3), (saved(COLOUR[..., 0], "JPEG"), "JPEG gray", 1),
        (saved(Image.fromarray(COLOUR).convert("CMYK"), "JPEG"), "JPEG CMYK", 4),
        (saved(COLOUR, "JPEG", progressive=True), "JPEG colour", 3),
        (saved(Image.fromarray(COLOUR).convert("1"), "PNG"), "PNG black and white", 1),
        (saved(Image.fromarray(COLOUR).convert("P"), "GIF"), "GIF palette", 1),
        (saved(COLOUR, "WEBP"), "WEBP colour", 3), (saved(COLOUR, "BMP"), "BMP colour", 3),
        (tiff(COLOUR, photometric="rgb"), "TIFF colour", 3), (tiff(COLOUR[..., 0]), "TIFF gray", 1),
        (tiff(COLOUR.astype(np.uint16), photometric="rgb"), "TIFF 16-bit colour", 3),
        (tiff(RNG.integers(0, 9, (9, 8, 4), np.uint8), photometric="rgb", extrasamples=["unspecified"]),
         "TIFF colour and 1 more band", 4),
    ],
)  # fmt: skip
def test_format_colours_and_depth_are_said(data, kind, bands):
    header = read_header(data)
    assert (header.kind, header.bands) == (kind, bands)
