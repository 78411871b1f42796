"""DICOM by pydicom: pixels in the units of the modality, with black at zero, one frame at a time.

The modality LUT, or the rescale slope and intercept, is applied: exactly in integers where both are whole, else to the
nearest float32. MONOCHROME1 is inverted, a palette is looked up, YBR becomes RGB. A window is applied on request. Only
the elements that this needs are read. No value of an element is ever shown, as it may be a patient's.
"""

from __future__ import annotations

import contextlib
import io
import zlib
from typing import Any, BinaryIO

import numpy as np

from fastmae.data.codestreams import JPEG_START, size_of_jpeg, size_of_jpeg2000
from fastmae.data.formats.common import as_channels, check_pages, check_size, library
from fastmae.data.reading import BadImageError, Header
from fastmae.errors import install_hint
from fastmae.facts import ReadAs

_PREFIX = b"DICM"
_FIRST_ELEMENTS = (0x0000, 0x0001, 0x0005, 0x0008, 0x0010, 0x0012, 0x0014, 0x0016, 0x0018)
"""Elements of group 0008 with which a DICOM without the prefix begins."""
_MOST_OF_THEM = 256
"""Their values are no longer than this."""
_DEFLATED, _BIG_ENDIAN = "1.2.840.10008.1.2.1.99", "1.2.840.10008.1.2.2"
_MOST_DEFLATED = 200
"""Times that the elements of a deflated DICOM may be as long as the file."""
_JPEG_LOSSLESS = {"1.2.840.10008.1.2.4.57", "1.2.840.10008.1.2.4.70"}
_RLE = "1.2.840.10008.1.2.5"
_JPEG_12 = "1.2.840.10008.1.2.4.51"
_JPEG_LS = {"1.2.840.10008.1.2.4.80", "1.2.840.10008.1.2.4.81"}
_HTJ2K = {"1.2.840.10008.1.2.4.201", "1.2.840.10008.1.2.4.202", "1.2.840.10008.1.2.4.203"}
_NEEDED = [
    "SpecificCharacterSet", "SOPClassUID", "Modality", "SamplesPerPixel", "PhotometricInterpretation",
    "PlanarConfiguration", "NumberOfFrames", "Rows", "Columns", "BitsAllocated", "BitsStored", "HighBit",
    "PixelRepresentation", "SmallestImagePixelValue", "WindowCenter", "WindowWidth", "RescaleIntercept", "RescaleSlope",
    "VOILUTFunction", "VOILUTSequence", "ModalityLUTSequence", "RedPaletteColorLookupTableDescriptor",
    "GreenPaletteColorLookupTableDescriptor", "BluePaletteColorLookupTableDescriptor",
    "RedPaletteColorLookupTableData", "GreenPaletteColorLookupTableData", "BluePaletteColorLookupTableData",
    "AlphaPaletteColorLookupTableDescriptor", "AlphaPaletteColorLookupTableData",
    "SegmentedRedPaletteColorLookupTableData", "SegmentedGreenPaletteColorLookupTableData",
    "SegmentedBluePaletteColorLookupTableData", "SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence",
    "PixelData", "FloatPixelData", "DoubleFloatPixelData", "ExtendedOffsetTable", "ExtendedOffsetTableLengths",
]  # fmt: skip
_PIXELS = {"PixelData": 0x7FE00010, "FloatPixelData": 0x7FE00008, "DoubleFloatPixelData": 0x7FE00009}
_SIZED = ("Rows", "Columns", "SamplesPerPixel", "BitsAllocated", "BitsStored", "PixelRepresentation")
_GRAY = ("MONOCHROME1", "MONOCHROME2")
_COLOURS = {"MONOCHROME1": "gray", "MONOCHROME2": "gray", "PALETTE COLOR": "palette"}


def is_dicom(start: bytes) -> bool:
    """Tells whether bytes begin as those of a DICOM: by its prefix at 128, or by an element of its first groups."""
    if start[128:132] == _PREFIX:
        return True
    for order in ("little", "big"):
        group, element = (int.from_bytes(start[at : at + 2], order) for at in (0, 2))
        if len(start) >= 8 and ((group == 8 and element in _FIRST_ELEMENTS) or (group == 2 and element in (0, 1))):
            explicit = start[4:6].isalpha() and start[4:6].isupper()
            if explicit or int.from_bytes(start[4:8], order) <= _MOST_OF_THEM:
                return True
    return False


def header(data: bytes) -> Header:
    """Returns what the elements say.

    Raises:
        BadImageError: no pixels, too large, or elements that make no sense.
    """
    dataset, _ = _opened(io.BytesIO(data))
    colours, frames = str(dataset.PhotometricInterpretation), _frames(dataset)
    bits, is_gray = int(dataset.BitsStored), colours in _GRAY
    return Header(
        "DICOM",
        _COLOURS.get(colours, "colour"),
        int(dataset.SamplesPerPixel),
        bits,
        pages=frames,
        size=(int(dataset.Rows), int(dataset.Columns)),
        dtype=_dtype_of(dataset, is_gray).name,
    )


def pixels(data: bytes, read_as: ReadAs) -> np.ndarray:
    """Returns the first frame, or all as channels, [H, W, C] in the units of the modality.

    Raises:
        BadImageError: no pixels, damaged, too large, or compressed as nothing here decodes.
    """
    file = io.BytesIO(data)
    if read_as.pages != "channels":
        return page(file, 0, read_as)
    frames = _frames(_opened(file)[0])
    return as_channels((page(file, number, read_as) for number in range(frames)), frames)


def places(file: BinaryIO) -> list[int]:
    """Returns the number of each frame, from 0.

    Raises:
        BadImageError: as ``header``.
    """
    return [*range(_frames(_opened(file)[0]))]


def page(file: BinaryIO, place: int, read_as: ReadAs) -> np.ndarray:
    """Returns frame ``place`` as ``pixels`` does the first. The file is read by position, and not closed.

    Raises:
        BadImageError: as ``pixels``.
    """
    dataset, at = _opened(file)
    if place >= _frames(dataset):
        raise BadImageError(f"frame {place + 1} of {_frames(dataset)}")
    with _nothing_shown():
        if at is not None:
            _load(dataset, file, at, place)
        return _frame(dataset, place, read_as)


# --- elements ---------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _nothing_shown() -> Any:
    """Turns the errors of pydicom into a BadImageError without their text, which may quote an element."""
    try:
        yield
    except (BadImageError, MemoryError):
        raise
    except Exception as error:
        raise BadImageError(f"a DICOM that pydicom cannot decode ({type(error).__name__})") from error


_Place = tuple[str, str, int, int]
"""Which element holds the pixels, of which kind, where its value begins, and its bytes; -1 for frames in fragments."""


def _opened(file: BinaryIO) -> tuple[Any, _Place | None]:
    """Returns the elements that are needed, checked by what they claim, and where the pixels are.

    The pixels are not read. Only of a deflated file they are, and their place is None.

    Raises:
        BadImageError: no pixels, too large, or elements that make no sense.
    """
    pydicom = library("pydicom", "DICOM")
    with _nothing_shown():
        file.seek(0)
        is_deflated = _refuse_bomb(file)
        dataset = pydicom.dcmread(file, force=True, specific_tags=_NEEDED, stop_before_pixels=not is_deflated)
        at = None if is_deflated else _place(dataset, file)
        if at is not None:
            dataset.add_new(_PIXELS[at[0]], at[1], b"")
        if not any(name in dataset for name in _PIXELS):
            modality = str(dataset.get("Modality", ""))
            kind = f" (modality {modality})" if modality.isalnum() and len(modality) <= 16 else ""
            raise BadImageError(f"a DICOM without pixels{kind}")
        sized = _SIZED if "PixelData" in dataset else _SIZED[:4]
        absent = [name for name in sized if dataset.get(name) is None]
        if absent:
            raise BadImageError(f"a DICOM without {' and '.join(absent)}")
        for name in ("BitsStored", "PixelRepresentation"):
            if name not in dataset:  # as in float pixels
                setattr(dataset, name, dataset.BitsAllocated if name == "BitsStored" else 0)
        if "PhotometricInterpretation" not in dataset:
            dataset.PhotometricInterpretation = "MONOCHROME2" if dataset.SamplesPerPixel == 1 else "RGB"
        height, width, bands, bits = (int(dataset[name].value) for name in _SIZED[:4])
        check_size(height, width, bands, max(bits // 8, 1))
        check_pages(_frames(dataset))
        return dataset, at


def _place(dataset: Any, file: BinaryIO) -> _Place | None:
    """Returns the place of the pixels, at whose element the reading of a file has ended; None if there are none."""
    is_implicit, is_little = dataset.original_encoding
    order: Any = "little" if is_little else "big"
    start = file.read(12)
    tag = int.from_bytes(start[:2], order) << 16 | int.from_bytes(start[2:4], order)
    name = next((name for name, number in _PIXELS.items() if number == tag), None)
    if name is None or len(start) < 12:
        return None
    length = int.from_bytes(start[4:8] if is_implicit else start[8:12], order)
    kind = "OW" if is_implicit else start[4:6].decode("ascii")
    return name, kind, file.tell() - (4 if is_implicit else 0), -1 if length == 0xFFFFFFFF else length


def _refuse_bomb(file: BinaryIO) -> bool:
    """Returns whether a file is deflated, and refuses one whose elements would be absurdly long.

    Raises:
        BadImageError: it is refused.
    """
    start = file.read(4096)
    file.seek(0)
    if _DEFLATED.encode() not in start:
        return False
    from pydicom.filereader import _read_file_meta_info

    size = file.seek(0, io.SEEK_END)
    file.seek(132)
    _read_file_meta_info(file)
    stream, length = zlib.decompressobj(-zlib.MAX_WBITS), 0
    while (block := file.read(1 << 14)) and not stream.eof:
        while block:
            length += len(stream.decompress(block, 1 << 20))
            block = stream.unconsumed_tail
            if length > _MOST_DEFLATED * size:
                raise BadImageError(f"a deflated DICOM over {_MOST_DEFLATED} times as long as its file")
    file.seek(0)
    return True


def _frames(dataset: Any) -> int:
    return max(1, int(dataset.get("NumberOfFrames") or 1))


def _rescale(dataset: Any, frame: int) -> tuple[float, float]:
    """Returns (slope, intercept) of a frame: its own, or those of all frames; (1, 0) where there are none."""
    groups = [dataset]
    shared, each = (dataset.get(f"{of}FunctionalGroupsSequence") for of in ("Shared", "PerFrame"))
    for sequence, index in ((shared, 0), (each, frame)):
        if sequence and index < len(sequence) and (found := sequence[index].get("PixelValueTransformationSequence")):
            groups.append(found[0])
    slope, intercept = 1.0, 0.0
    for group in groups:
        slope = float(group.get("RescaleSlope", slope))
        intercept = float(group.get("RescaleIntercept", intercept))
    if not np.isfinite([slope, intercept]).all() or slope == 0:
        raise BadImageError("a rescale slope of 0, or one that is no number")
    return slope, intercept


def _limits(dataset: Any, bits: int) -> tuple[int, int]:
    """Returns the least and the largest number of so many bits."""
    if int(dataset.PixelRepresentation) == 1:
        return -(1 << (bits - 1)), (1 << (bits - 1)) - 1
    return 0, (1 << bits) - 1


def _dtype_of(dataset: Any, is_gray: bool) -> np.dtype:
    """Returns the type of the pixels that ``pixels`` returns, from the elements alone."""
    bits = int(dataset.BitsAllocated)
    if "PixelData" not in dataset:
        return np.dtype("float32" if "FloatPixelData" in dataset else "float64")
    held = next(size for size in (8, 16, 32, 64) if bits <= size)
    stored = np.dtype(f"{'int' if int(dataset.PixelRepresentation) else 'uint'}{held}")
    if "RedPaletteColorLookupTableDescriptor" in dataset and not is_gray:
        return np.dtype(np.uint16 if dataset.RedPaletteColorLookupTableDescriptor[2] > 8 else np.uint8)
    if not is_gray:
        return stored
    if dataset.get("ModalityLUTSequence"):
        return np.dtype("uint16")
    slope, intercept = _rescale(dataset, 0)
    if (slope, intercept) == (1, 0):
        return stored
    if not (slope.is_integer() and intercept.is_integer()) or "PerFrameFunctionalGroupsSequence" in dataset:
        return np.dtype(np.float32)
    return _holding([limit * int(slope) + int(intercept) for limit in _limits(dataset, bits)])


def _holding(limits: list[int]) -> np.dtype:
    """Returns the smallest signed or unsigned type that holds both."""
    for name in ("uint8", "uint16", "int16", "int32", "int64"):
        info = np.iinfo(name)
        if info.min <= min(limits) and max(limits) <= info.max:
            return np.dtype(name)
    return np.dtype(np.float32)


# --- pixels -----------------------------------------------------------------------------------------------------------


def _frame(dataset: Any, number: int, read_as: ReadAs) -> np.ndarray:
    """Returns a frame [H, W, C]. Its pixels are in the elements, alone or among all."""
    from pydicom.pixels import apply_color_lut, apply_modality_lut, apply_windowing

    stored = _stored(dataset, number if _frames(dataset) > 1 else 0)
    stored = stored.astype(stored.dtype.newbyteorder("="), copy=False)
    colours = str(dataset.PhotometricInterpretation)
    if colours == "PALETTE COLOR":
        return apply_color_lut(stored, dataset)
    if colours not in _GRAY:
        return stored if stored.ndim == 3 else stored[..., None]
    if read_as.window is None:
        if colours == "MONOCHROME1":
            stored = _inverted(dataset, stored)
        return _in_units(dataset, number, stored)[..., None]
    units = apply_modality_lut(stored, dataset) if dataset.get("ModalityLUTSequence") else None
    if units is None:
        slope, intercept = _rescale(dataset, number)
        units = stored * slope + intercept
    return _windowed(dataset, units, read_as, apply_windowing, colours == "MONOCHROME1")[..., None]


def _inverted(dataset: Any, stored: np.ndarray) -> np.ndarray:
    """Returns stored numbers with white where black was."""
    if stored.dtype.kind == "f":
        raise BadImageError("MONOCHROME1 of floating-point pixels, which have no white")
    low, high = _limits(dataset, int(dataset.BitsStored))
    if stored.min() < low or stored.max() > high:
        raise BadImageError(f"MONOCHROME1 with numbers of more than its {dataset.BitsStored} bits")
    return (low + high - stored.astype(np.int64)).astype(stored.dtype)


def _in_units(dataset: Any, number: int, stored: np.ndarray) -> np.ndarray:
    """Returns stored numbers in the units of the modality."""
    from pydicom.pixels import apply_modality_lut

    if dataset.get("ModalityLUTSequence"):
        return apply_modality_lut(stored, dataset).astype(np.uint16)
    slope, intercept = _rescale(dataset, number)
    dtype = _dtype_of(dataset, is_gray=True)
    if (slope, intercept) == (1, 0) and dtype.kind != "f":
        return stored
    if dtype.kind == "f":
        return (stored * slope + intercept).astype(dtype)
    return (stored.astype(np.int64) * int(slope) + int(intercept)).astype(dtype)


def _windowed(dataset: Any, units: np.ndarray, read_as: ReadAs, apply: Any, is_inverted: bool) -> np.ndarray:
    """Returns float32 in [0, 1]: where numbers lie within a window, by DICOM's rule (PS3.3 C.11.2.1.2)."""
    if read_as.window == ("file",):
        if "WindowCenter" not in dataset and not dataset.get("VOILUTSequence"):
            raise BadImageError("a DICOM that states no window; give --window CENTER WIDTH")
        slope, intercept = _rescale(dataset, 0)
        low, high = (limit * slope + intercept for limit in _limits(dataset, int(dataset.BitsStored)))
        shown = (apply(units, dataset) - low) / (high - low)
    else:
        center, width = (float(number) for number in read_as.window or ())
        shown = (units - (center - 0.5)) / max(width - 1, 1e-9) + 0.5
    shown = np.clip(shown, 0, 1)
    return (1 - shown if is_inverted else shown).astype(np.float32)


def _stored(dataset: Any, number: int) -> np.ndarray:
    """Returns the stored numbers of a frame, [H, W] or [H, W, 3]; YBR as RGB.

    Raises:
        BadImageError: cut, or compressed as nothing here decodes.
    """
    from pydicom.encaps import get_frame
    from pydicom.pixels import get_decoder, pixel_array

    syntax = _syntax(dataset)
    if not syntax.is_encapsulated:
        return pixel_array(dataset, index=number)
    frame = get_frame(dataset.PixelData, number, number_of_frames=_frames(dataset))
    is_codestream = syntax != _RLE
    size = size_of_jpeg(frame) if frame[:3] == JPEG_START else size_of_jpeg2000(frame[:4096])
    if size is None and is_codestream:
        raise BadImageError("a frame that does not say its size")
    if size is not None and is_codestream and size != (int(dataset.Rows), int(dataset.Columns)):
        stated = f"{dataset.Columns}×{dataset.Rows} pixels by its elements"
        raise BadImageError(f"{stated}, {size[1]}×{size[0]} by its frame")
    with contextlib.suppress(NotImplementedError):
        if get_decoder(syntax).is_available and syntax != _JPEG_12:
            return pixel_array(dataset, index=number)
    return _by_imagecodecs(dataset, str(syntax), syntax.name, frame)


def _syntax(dataset: Any) -> Any:
    """Returns the transfer syntax, which files without a prefix may not state."""
    from pydicom.uid import ExplicitVRBigEndian, ExplicitVRLittleEndian, ImplicitVRLittleEndian

    if getattr(dataset, "file_meta", None) is None or "TransferSyntaxUID" not in dataset.file_meta:
        implicit, little = dataset.original_encoding
        found = ImplicitVRLittleEndian if implicit else ExplicitVRLittleEndian if little else ExplicitVRBigEndian
        dataset.ensure_file_meta()
        dataset.file_meta.TransferSyntaxUID = found
    return dataset.file_meta.TransferSyntaxUID


def _load(dataset: Any, file: BinaryIO, at: _Place, number: int) -> None:
    """Reads the pixels of one frame into the elements, alone; or those of all, where a frame ends within a word.

    Raises:
        BadImageError: cut.
    """
    from pydicom.encaps import encapsulate, get_frame

    name, _, start, length = at
    file.seek(start)
    frames = _frames(dataset)
    if length < 0:
        tables = (dataset.get("ExtendedOffsetTable"), dataset.get("ExtendedOffsetTableLengths"))
        found = get_frame(file, number, number_of_frames=frames, extended_offsets=tables if all(tables) else None)
        for table in ("ExtendedOffsetTable", "ExtendedOffsetTableLengths"):
            dataset.pop(table, None)
        dataset.PixelData, dataset.NumberOfFrames = encapsulate([found]), 1
        dataset["PixelData"].is_undefined_length = True
        return
    bits = int(dataset.Rows) * int(dataset.Columns) * int(dataset.SamplesPerPixel) * int(dataset.BitsAllocated)
    if "422" in str(dataset.PhotometricInterpretation):
        bits = bits * 2 // 3
    needed, there = (bits * frames + 7) // 8, min(length, file.seek(0, io.SEEK_END) - start)
    if there < needed:
        raise BadImageError(f"cut: {there} bytes of pixels, of {needed}")
    if bits % 16 == 0:
        file.seek(start + number * bits // 8)
        found, dataset.NumberOfFrames = file.read(bits // 8), 1
    else:
        file.seek(start)
        found = file.read(needed)
    setattr(dataset, name, found + b"\0" * (len(found) % 2))


def _by_imagecodecs(dataset: Any, syntax: str, name: str, frame: bytes) -> np.ndarray:
    """Decodes what pydicom needs a plug-in for, as far as imagecodecs does.

    Raises:
        BadImageError: it does not.
    """
    if syntax not in {*_JPEG_LOSSLESS, *_JPEG_LS, *_HTJ2K, _JPEG_12}:
        raise BadImageError(f"a DICOM compressed as {name}, which no installed library decodes; decompress it")
    imagecodecs = library("imagecodecs", f"a DICOM compressed as {name}")
    if syntax in _JPEG_LS:
        found = imagecodecs.jpegls_decode(frame)
    elif syntax in _HTJ2K:
        found = imagecodecs.jpeg2k_decode(frame)
    elif syntax == _JPEG_12:
        found = imagecodecs.jpeg_decode(frame)
    else:
        found = imagecodecs.ljpeg_decode(frame)
    samples, bits = int(dataset.SamplesPerPixel), int(dataset.BitsStored)
    expected = (int(dataset.Rows), int(dataset.Columns), *((samples,) if samples > 1 else ()))
    if found.shape != expected or found.dtype.kind != "u":
        raise BadImageError(f"a frame of {found.shape} {found.dtype}, of {expected} by its elements")
    if samples > 1 and str(dataset.PhotometricInterpretation).startswith("YBR"):
        raise BadImageError(f"YBR compressed as {name}; run {install_hint('science')} pylibjpeg pylibjpeg-libjpeg")
    if int(dataset.PixelRepresentation) == 1:  # the sign is the highest bit that is stored
        sign = 1 << (bits - 1)
        return (((found.astype(np.int64) & ((1 << bits) - 1)) ^ sign) - sign).astype(f"int{8 * found.itemsize}")
    return found
