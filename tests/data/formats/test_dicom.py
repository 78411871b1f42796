"""DICOM: values as pydicom has them in the units of the modality, real files among them; hostile files are one line."""

from __future__ import annotations

import io
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fastmae.data.formats import common, dicom
from fastmae.data.reading import BadImageError
from fastmae.facts import AS_STORED, ReadAs

pydicom = pytest.importorskip("pydicom")
pytest.importorskip("imagecodecs")
from pydicom.dataset import Dataset, FileMetaDataset  # noqa: E402
from pydicom.pixels import apply_color_lut, apply_modality_lut  # noqa: E402
from pydicom.sequence import Sequence  # noqa: E402
from pydicom.uid import DeflatedExplicitVRLittleEndian, ExplicitVRLittleEndian, RLELossless  # noqa: E402

REAL = Path(pydicom.__file__).parent / "data" / "test_files"
SECRET = "DOE^JANE"


def made(array: np.ndarray, syntax: Any = ExplicitVRLittleEndian, **elements: Any) -> bytes:
    """Returns a DICOM with these numbers; [frames, H, W], or [H, W, 3] with samples=3."""
    dataset = Dataset()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = syntax
    dataset.SOPClassUID, dataset.SOPInstanceUID = "1.2.840.10008.5.1.4.1.1.7", "1.2.3"
    dataset.PatientName, dataset.Modality = SECRET, "OT"
    samples = elements.pop("samples", 1)
    frames = array.shape[0] if array.ndim == 3 and samples == 1 else 1
    dataset.Rows, dataset.Columns = array.shape[-2:] if samples == 1 else array.shape[:2]
    dataset.SamplesPerPixel = samples
    dataset.PhotometricInterpretation = "MONOCHROME2" if samples == 1 else "RGB"
    if samples > 1:
        dataset.PlanarConfiguration = 0
    if frames > 1:
        dataset.NumberOfFrames = frames
    dataset.BitsAllocated = dataset.BitsStored = 8 * array.itemsize
    dataset.HighBit, dataset.PixelRepresentation = dataset.BitsStored - 1, int(array.dtype.kind == "i")
    data = array.tobytes()
    dataset.PixelData = data + b"\0" * (len(data) % 2)
    dataset["PixelData"].VR = "OW"
    for name, value in elements.items():
        setattr(dataset, name, value)
    file = io.BytesIO()
    pydicom.dcmwrite(file, dataset, enforce_file_format=True)
    return file.getvalue()


def test_a_damaged_number_of_frames_does_not_keep_a_run_waiting():
    """Thousands of frames of a pixel, which a damaged size makes of any image, are refused before one is decoded."""
    data = made(numbers("uint16", 5000, 1, 1))
    assert dicom.pixels(data, AS_STORED).shape == (1, 1, 1)
    with pytest.raises(BadImageError, match="5,000 pages as channels, over the limit of 1,024; set pages to all"):
        dicom.pixels(data, ReadAs(pages="channels"))


def numbers(dtype: str, *shape: int, bits: int | None = None) -> np.ndarray:
    info = np.iinfo(dtype)
    top = info.max if bits is None else (1 << bits) - 1
    return np.random.default_rng(0).integers(info.min if bits is None else 0, top, shape, dtype, endpoint=True)


def pixels(data: bytes, **read_as: Any) -> np.ndarray:
    found = dicom.pixels(data, ReadAs(**read_as))
    header = dicom.header(data)
    assert found.dtype.isnative
    if "window" not in read_as:
        assert (header.dtype, header.size) == (found.dtype.name, found.shape[:2]), "the header says what is read"
    return found


@pytest.mark.parametrize("dtype", ["uint8", "int8", "uint16", "int16", "uint32", "int32"])
def test_every_value_is_that_of_the_file(dtype: str) -> None:
    array = numbers(dtype, 31, 16)
    found = pixels(made(array))
    assert found.dtype == array.dtype
    np.testing.assert_array_equal(found[..., 0], array)


def test_all_values_of_16_bits_and_of_12_arrive() -> None:
    every = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    np.testing.assert_array_equal(pixels(made(every))[..., 0], every)
    twelve = np.arange(4096, dtype=np.uint16).reshape(64, 64)
    np.testing.assert_array_equal(pixels(made(twelve, BitsStored=12, HighBit=11))[..., 0], twelve)


def test_a_whole_slope_and_intercept_are_exact_in_integers() -> None:
    twelve = numbers("uint16", 20, 30, bits=12)
    found = pixels(made(twelve, RescaleSlope=1, RescaleIntercept=-1024))
    assert found.dtype == np.int32
    np.testing.assert_array_equal(found[..., 0], twelve.astype(int) - 1024)
    steep = pixels(made(twelve, RescaleSlope=3, RescaleIntercept=7))
    np.testing.assert_array_equal(steep[..., 0], 3 * twelve.astype(int) + 7)


def test_another_slope_gives_the_nearest_float32_and_keeps_values_apart() -> None:
    every = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    data = made(every, RescaleSlope="0.0123", RescaleIntercept="-4.5")
    found = pixels(data)[..., 0]
    truth = apply_modality_lut(every, pydicom.dcmread(io.BytesIO(data)))
    np.testing.assert_array_equal(found, truth.astype(np.float32))
    assert len(np.unique(found)) == 65536


def test_the_rescale_of_each_frame_is_its_own() -> None:
    array = numbers("uint16", 2, 20, 30, bits=12)

    def group(slope: float) -> Dataset:
        values, outer = Dataset(), Dataset()
        values.RescaleSlope, values.RescaleIntercept = slope, 1
        outer.PixelValueTransformationSequence = Sequence([values])
        return outer

    data = made(array, PerFrameFunctionalGroupsSequence=Sequence([group(2), group(5)]))
    file = io.BytesIO(data)
    for place, slope in zip(dicom.places(file), (2, 5), strict=True):
        np.testing.assert_array_equal(dicom.page(file, place, AS_STORED)[..., 0], array[place].astype(int) * slope + 1)


def test_monochrome1_is_inverted_within_its_bits() -> None:
    twelve = numbers("uint16", 20, 30, bits=12)
    found = pixels(made(twelve, BitsStored=12, HighBit=11, PhotometricInterpretation="MONOCHROME1"))
    np.testing.assert_array_equal(found[..., 0], 4095 - twelve)
    signed = numbers("int16", 20, 30)
    found = pixels(made(signed, PhotometricInterpretation="MONOCHROME1"))
    np.testing.assert_array_equal(found[..., 0], -1 - signed)


def test_frames_are_pages_or_channels() -> None:
    stack = numbers("uint16", 5, 20, 30)
    data = made(stack)
    file = io.BytesIO(data)
    assert dicom.places(file) == [0, 1, 2, 3, 4]
    assert dicom.header(data).pages == 5
    for place, array in enumerate(stack):
        np.testing.assert_array_equal(dicom.page(file, place, AS_STORED)[..., 0], array)
    np.testing.assert_array_equal(pixels(data, pages="channels"), np.moveaxis(stack, 0, -1))
    np.testing.assert_array_equal(pixels(data)[..., 0], stack[0])


def test_colour_comes_as_rgb() -> None:
    colour = numbers("uint8", 20, 30, 3)
    np.testing.assert_array_equal(pixels(made(colour, samples=3)), colour)


def test_a_window_is_applied_on_request_alone() -> None:
    array = numbers("uint16", 20, 30, bits=12)
    elements = {"RescaleSlope": 1, "RescaleIntercept": -1024, "WindowCenter": 40, "WindowWidth": 400}
    data = made(array, BitsStored=12, HighBit=11, **elements)
    assert pixels(data).min() < -500
    given = pixels(data, window=(40.0, 400.0))[..., 0]
    values = array.astype(float) - 1024
    np.testing.assert_allclose(given, np.clip((values - 39.5) / 399 + 0.5, 0, 1), atol=1e-6)
    np.testing.assert_allclose(pixels(data, window=("file",))[..., 0], given, atol=1e-5)
    dark = made(array, BitsStored=12, HighBit=11, PhotometricInterpretation="MONOCHROME1", **elements)
    np.testing.assert_allclose(pixels(dark, window=(40.0, 400.0))[..., 0], 1 - given, atol=1e-6)
    with pytest.raises(BadImageError, match="--window CENTER WIDTH"):
        dicom.pixels(made(array), ReadAs(window=("file",)))


def test_a_dicom_is_known_by_its_prefix_or_its_first_element() -> None:
    data = made(numbers("uint16", 20, 30))
    assert dicom.is_dicom(data[:512])
    bare = data[128 + 4 + 12 + int.from_bytes(data[140:144], "little") :]
    assert dicom.is_dicom(bare[:512])
    np.testing.assert_array_equal(dicom.pixels(bare, AS_STORED), dicom.pixels(data, AS_STORED))
    for other in (
        b"\x89PNG\r\n\x1a\n" + bytes(200),
        b"\xff\xd8\xff\xe0" + bytes(200),
        b"II*\0" + bytes(200),
        bytes(600),
        b"",
    ):
        assert not dicom.is_dicom(other)


# --- real files -------------------------------------------------------------------------------------------------------

AS_PYDICOM = (
    "CT_small", "MR_small", "MR_small_RLE", "MR_small_bigendian", "MR_small_expb", "MR_small_implicit",
    "MR_small_padded", "MR_small_jp2klossless", "JPEG2000", "J2K_pixelrep_mismatch", "693_J2KI", "ExplVR_BigEnd",
    "SC_rgb_rle",
    "SC_rgb_rle_16bit", "SC_rgb_rle_32bit", "SC_rgb_small_odd", "SC_rgb_jpeg_dcmtk", "SC_ybr_full_422_uncompressed",
    "examples_rgb_color", "examples_palette", "examples_overlay", "image_dfl", "liver_1frame", "rtdose_1frame",
    "examples_jpeg2k", "SC_jpeg_no_color_transform", "SC_rgb_gdcm_KY", "rtdose_expb_1frame",
)  # fmt: skip


@pytest.mark.parametrize("name", AS_PYDICOM)
def test_real_files_are_as_pydicom_reads_them(name: str) -> None:
    path = REAL / f"{name}.dcm"
    dataset = pydicom.dcmread(path)
    truth = dataset.pixel_array
    if dataset.PhotometricInterpretation == "PALETTE COLOR":
        truth = apply_color_lut(truth, dataset)
    elif dataset.SamplesPerPixel == 1:
        truth = apply_modality_lut(truth, dataset)
    found = pixels(path.read_bytes())
    np.testing.assert_array_equal(found.astype(truth.dtype).squeeze(), truth.squeeze())


@pytest.mark.parametrize("name", ["rtdose", "rtdose_rle", "SC_rgb_rle_2frame", "examples_ybr_color"])
def test_real_files_of_several_frames(name: str) -> None:
    path = REAL / f"{name}.dcm"
    truth = pydicom.dcmread(path).pixel_array
    with open(path, "rb") as file:
        places = dicom.places(file)
        assert len(places) == len(truth)
        for place in (places[0], places[-1]):
            np.testing.assert_array_equal(dicom.page(file, place, AS_STORED).squeeze(), truth[place])


def test_jpeg_ls_without_a_plug_in_is_decoded_exactly() -> None:
    found = pixels((REAL / "MR_small_jpeg_ls_lossless.dcm").read_bytes())
    np.testing.assert_array_equal(found, pixels((REAL / "MR_small.dcm").read_bytes()))


@pytest.mark.parametrize("name", ["rtstruct", "test-SR", "waveform_ecg", "rtplan"])
def test_a_dicom_without_pixels_is_named(name: str) -> None:
    with pytest.raises(BadImageError, match="without pixels"):
        dicom.pixels((REAL / f"{name}.dcm").read_bytes(), AS_STORED)


# --- hostile ----------------------------------------------------------------------------------------------------------

ARRAY = numbers("uint16", 20, 30)
GOOD = made(ARRAY)


def deflated_bomb() -> bytes:
    dataset = made(ARRAY, DeflatedExplicitVRLittleEndian)
    stop = 128 + 4 + 12 + int.from_bytes(dataset[140:144], "little")
    packer = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS)
    return dataset[:stop] + b"".join(packer.compress(bytes(1 << 20)) for _ in range(60)) + packer.flush()


HOSTILE: dict[str, Any] = {
    "cut in its pixels": lambda: GOOD[:-100],
    "cut in its elements": lambda: GOOD[:400],
    "only a prefix": lambda: GOOD[:132],
    "huge": lambda: made(ARRAY, Rows=65535, Columns=65535),
    "no rows": lambda: made(ARRAY, Rows=0),
    "frames that are not there": lambda: made(ARRAY, NumberOfFrames=5000),
    "absurd frames": lambda: made(ARRAY, NumberOfFrames=2_000_000_000),
    "bits that do not exist": lambda: made(ARRAY, BitsAllocated=13),
    "a slope of 0": lambda: made(ARRAY, RescaleSlope=0, RescaleIntercept=0),
    "an unknown transfer syntax": lambda: GOOD.replace(b"1.2.840.10008.1.2.1\0", b"1.2.840.10008.1.2.9\0"),
    "RLE that is none": lambda: GOOD.replace(b"1.2.840.10008.1.2.1\0", b"1.2.840.10008.1.2.5\0"),
    "a deflated bomb": deflated_bomb,
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_file_is_one_line_without_a_word_of_the_patient(
    name: str, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    data = HOSTILE[name]()
    empty = np.empty

    def allocate(shape: Any, *args: Any, **kwargs: Any) -> np.ndarray:
        assert np.prod(shape, dtype=float) < 1e8, "allocated by what an element claims"
        return empty(shape, *args, **kwargs)

    monkeypatch.setattr(np, "empty", allocate)
    with pytest.raises(BadImageError) as error:
        dicom.pixels(data, AS_STORED)
    assert "\n" not in str(error.value)
    assert "DOE" not in str(error.value)
    assert capfd.readouterr() == ("", "")


def test_a_frame_that_is_larger_than_its_elements_say_is_refused() -> None:
    data = (REAL / "JPEG2000.dcm").read_bytes()
    start = data.index(b"\xff\x4f\xff\x51") + 8
    wrong = data[:start] + (60000).to_bytes(4, "big") + data[start + 4 :]
    with pytest.raises(BadImageError, match="60000×1024 by its frame"):
        dicom.pixels(wrong, AS_STORED)


def test_rle_written_by_pydicom_is_exact() -> None:
    dataset = pydicom.dcmread(io.BytesIO(made(ARRAY)))
    dataset.compress(RLELossless)
    file = io.BytesIO()
    dataset.save_as(file)
    np.testing.assert_array_equal(pixels(file.getvalue())[..., 0], ARRAY)


def test_without_the_library_one_line_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> Any:
        raise ImportError(name)

    monkeypatch.setattr(common, "_imported", missing)
    with pytest.raises(BadImageError, match=r"pydicom; run pip install 'fastmae\[science\]'"):
        dicom.pixels(GOOD, AS_STORED)


def test_many_threads_read_the_same_as_one() -> None:
    files = [path.read_bytes() for name in ("CT_small", "MR_small_RLE", "JPEG2000") for path in [REAL / f"{name}.dcm"]]
    alone = [dicom.pixels(data, AS_STORED) for data in files]
    with ThreadPoolExecutor(8) as pool:
        together = [*pool.map(lambda data: dicom.pixels(data, AS_STORED), files * 8)]
    for number, found in enumerate(together):
        np.testing.assert_array_equal(found, alone[number % 3])


def test_a_frame_that_does_not_say_its_size_is_refused() -> None:
    data = (REAL / "MR_small_jpeg_ls_lossless.dcm").read_bytes()
    start = data.index(b"\xff\xd8\xff\xf7")
    with pytest.raises(BadImageError, match="does not say its size"):
        dicom.pixels(data[: start + 3] + b"\xe1" + data[start + 4 :], AS_STORED)
