"""The images that scikit-image bundles, beside what its own readers make of the same files."""

from pathlib import Path

import numpy as np
import pytest

from fastmae.data.decode import decode
from fastmae.data.reading import BadImageError, Reading
from fastmae.data.sources import open_train
from fastmae.facts import ReadAs

skimage = pytest.importorskip("skimage")

DATA = Path(skimage.__file__).parent / "data"
FILES = sorted(path for path in DATA.iterdir() if path.suffix in (".png", ".jpg", ".tif", ".gif"))


def test_there_are_files_of_every_kind():
    assert len(FILES) > 25
    assert {path.suffix for path in FILES} == {".png", ".jpg", ".tif", ".gif"}


def in_full(path: Path) -> np.ndarray:
    """[H, W, C] of the file's own type, by scikit-image's readers; the first page, and no alpha."""
    if path.name == "chessboard_RGB.png":  # of 16 bits, of which Pillow gives scikit-image 8
        return pytest.importorskip("imagecodecs").png_decode(path.read_bytes())
    pixels = skimage.io.imread(path)
    if path.name.startswith("multipage") or pixels.ndim == 4:
        pixels = pixels[0]
    pixels = pixels.astype(np.uint8) * 255 if pixels.dtype == bool else pixels
    pixels = pixels[:, :, None] if pixels.ndim == 2 else pixels
    return pixels[:, :, :3] if pixels.shape[2] == 4 else pixels


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_every_pixel_is_that_of_scikit_image(path):
    theirs = in_full(path)
    wide = {"chessboard_RGB.png": "uint16", "multipage_rgb.tif": "float32"}  # the latter of float64
    dtype = wide.get(path.name, "uint8")
    assert theirs.dtype == ("float64" if dtype == "float32" else dtype)
    ours = decode(path.read_bytes(), Reading(theirs.shape[2], dtype=dtype, read_as=ReadAs(pixel_type=dtype)))
    np.testing.assert_array_equal(ours, theirs.astype(dtype))


@pytest.mark.parametrize("name", ["multipage.tif", "multipage_rgb.tif"])
def test_every_page_is_an_image(name, tmp_path):
    theirs = skimage.io.imread(DATA / name)
    (tmp_path / name).write_bytes((DATA / name).read_bytes())
    source = open_train(str(tmp_path), ReadAs(pages="all"))
    assert len(source) == len(theirs)
    dtype = "uint8" if theirs.dtype == np.uint8 else "float32"
    for index, page in enumerate(theirs):
        reading = Reading(1 if page.ndim == 2 else 3, dtype=dtype, read_as=ReadAs(pixel_type=dtype))
        np.testing.assert_array_equal(decode(source.read(index), reading).squeeze(), page.astype(dtype))


def test_arrays_of_floats_keep_every_bit():
    faces = np.load(DATA / "lfw_subset.npy")
    source = open_train(str(DATA / "lfw_subset.npy"), ReadAs())
    assert len(source) == len(faces) == 200
    for index in (0, 77, 199):
        np.testing.assert_array_equal(source.read(index).squeeze(), faces[index])
    with np.load(DATA / "motorcycle_disp.npz") as disparities:
        (values,) = disparities.values()
    reading = Reading(1, dtype="float32", read_as=ReadAs(pixel_type="float32"))
    with pytest.raises(BadImageError, match="values are infinite; store NaN for what is missing"):
        decode(values[:, :, None], reading)
    known = np.where(np.isfinite(values), values, np.nan)
    np.testing.assert_array_equal(decode(known[:, :, None], reading).squeeze(), known)
