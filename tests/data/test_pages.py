"""Pages as images: each page of a file is a sample with its label, found once, and never torn between two parts."""

from __future__ import annotations

import io
import os
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fastmae.data import pages
from fastmae.data.decode import decode
from fastmae.data.fingerprint import fingerprint
from fastmae.data.pages import PagedSource
from fastmae.data.reading import BadImageError, Reading
from fastmae.data.sources import Subset, describe, open_train, open_val, train_and_val
from fastmae.data.survey import sample, take_stock
from fastmae.facts import PixelFacts, ReadAs

tifffile = pytest.importorskip("tifffile")
ALL = ReadAs(pages="all")


def stack(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 65536, shape, np.uint16)


@pytest.fixture
def folder(tmp_path: Path) -> tuple[Path, dict[str, np.ndarray]]:
    """Two classes: stacks of 3 and 5 pages, and an image of one page between them."""
    root, stacks = tmp_path / "set", {}
    for name, count in (("a/1.tif", 3), ("a/3.tif", 5), ("b/4.tif", 2)):
        stacks[name] = stack(count, 20, 30, seed=count)
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        tifffile.imwrite(root / name, stacks[name], photometric="minisblack")
    Image.fromarray(stack(20, 30).astype(np.uint8)).save(root / "a/2.png")
    return root, stacks


def test_every_page_is_a_sample_with_the_label_of_its_file(folder: Any) -> None:
    root, stacks = folder
    source = open_train(str(root), ALL)
    assert isinstance(source, PagedSource)
    assert len(source) == 3 + 1 + 5 + 2
    assert np.asarray(source.labels).tolist() == [0] * 9 + [1] * 2
    assert source.classes == ("a", "b")
    expected = [*stacks["a/1.tif"], None, *stacks["a/3.tif"], *stacks["b/4.tif"]]
    for index, page in enumerate(expected):
        found = source.read(index)
        if page is None:
            assert found == (root / "a/2.png").read_bytes()
            assert source.name(index) == str(root / "a/2.png")
        else:
            np.testing.assert_array_equal(np.asarray(found)[..., 0], page)
    assert source.name(5) == f"{root / 'a/3.tif'}, page 2"
    assert source.location == "in 2 class folders (a, b), the pages of 4 files"
    assert source.stock.used == {"files": 4, "pages": 11}


def test_without_the_flag_a_file_is_one_sample(folder: Any) -> None:
    assert len(open_train(str(folder[0]))) == 4


def test_the_places_are_kept_and_found_again_until_a_file_changes(
    folder: Any, monkeypatch: Any, tmp_path: Path
) -> None:
    root, _ = folder
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(pages, "_WORTH_KEEPING", -1.0)
    for path in root.rglob("*.*"):
        os.utime(path, ns=(10**18, 10**18))
    first = open_train(str(root), ALL)
    monkeypatch.setattr(pages, "_places", None)
    again = open_train(str(root), ALL)
    assert isinstance(first, PagedSource)
    assert isinstance(again, PagedSource)
    assert again.places.tolist() == first.places.tolist()
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    tifffile.imwrite(root / "b/4.tif", stack(4, 20, 30), photometric="minisblack")
    assert len(open_train(str(root), ALL)) == 13
    assert fingerprint(open_train(str(root), ALL)) != fingerprint(first)


def test_pages_of_a_file_are_held_out_together(tmp_path: Path) -> None:
    for number in range(10):
        tifffile.imwrite(tmp_path / f"{number}.tif", stack(4, 8, 8, seed=number), photometric="minisblack")
    train, val = train_and_val(str(tmp_path), ALL)
    assert isinstance(train, Subset)
    assert isinstance(val, Subset)
    assert sorted([*train.indices, *val.indices]) == list(range(40))
    assert not {*(train.indices // 4)} & {*(val.indices // 4)}
    assert len(val) == 8


def test_pages_in_tars_and_frames_of_dicom(tmp_path: Path) -> None:
    data = io.BytesIO()
    stored = stack(3, 20, 30)
    tifffile.imwrite(data, stored, photometric="minisblack")
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        member = tarfile.TarInfo("one.tif")
        member.size = len(data.getvalue())
        tar.addfile(member, io.BytesIO(data.getvalue()))
    source = open_train(str(tmp_path / "a.tar"), ALL)
    np.testing.assert_array_equal(np.asarray(source.read(2))[..., 0], stored[2])
    assert source.shards is not None
    assert source.shards.starts.tolist() == [0, 3]


def test_a_file_that_changes_gives_no_wrong_page(folder: Any) -> None:
    root, _ = folder
    source = open_train(str(root), ALL)
    Image.fromarray(stack(20, 30).astype(np.uint8)).save(root / "a/3.tif", "PNG")
    with pytest.raises(BadImageError, match="no file of several pages any more"):
        source.read(5)
    (root / "a/3.tif").unlink()
    with pytest.raises(OSError, match="No such file"):
        source.read(5)


def test_a_damaged_file_stays_one_sample_that_tells_why(tmp_path: Path) -> None:
    tifffile.imwrite(tmp_path / "1.tif", stack(3, 20, 30), photometric="minisblack")
    (tmp_path / "2.tif").write_bytes(b"II*\0\xff\xff\xff\x7f")
    source = open_train(str(tmp_path), ALL)
    assert len(source) == 4
    assert source.read(3) == b"II*\0\xff\xff\xff\x7f"


def test_the_pages_of_a_val_part(folder: Any) -> None:
    root, stacks = folder
    (root / "val" / "a").mkdir(parents=True)
    (root / "train").mkdir()
    for name in ("a", "b"):
        (root / name).rename(root / "train" / name)
    tifffile.imwrite(root / "val/a/5.tif", stacks["a/3.tif"], photometric="minisblack")
    assert len(open_train(str(root), ALL)) == 11
    val = open_val(str(root), ALL)
    assert val is not None
    assert len(val) == 5


def test_pages_as_channels_are_all_channels_of_the_model(folder: Any) -> None:
    root, _ = folder
    facts = describe(open_train(str(root / "b")), read_as=ReadAs(pages="channels"))
    assert (facts.channels, facts.pixels.dtype) == (2, "uint16")
    survey, _ = sample(open_train(str(root / "b")), None, ReadAs(pages="channels"))
    assert (survey.used["pages"], survey.left_out) == (2, {})


def test_the_first_page_alone_is_told_with_both_remedies(folder: Any) -> None:
    lines = take_stock(open_train(str(folder[0] / "b")), 1).lines()
    words = "1 page left out: only the first page or frame of a file is used; set pages to all for each as an image"
    assert any(line.startswith(words) for line in lines), lines


def test_missing_pixels_that_all_files_state_are_missing(tmp_path: Path) -> None:
    stated = [(42113, "s", 0, "-9999", False)]
    for number in range(3):
        array = stack(8, 8, seed=number).astype(np.float32)
        tifffile.imwrite(tmp_path / f"{number}.tif", array, photometric="minisblack", extratags=stated)
    source = open_train(str(tmp_path))
    assert describe(source).pixels == PixelFacts(dtype="float32", nodata=-9999)
    assert describe(source, read_as=ReadAs(nodata=0)).pixels.nodata == 0
    assert "all images state that -9999 marks missing pixels: nodata is -9999" in take_stock(source, 1).lines()
    tifffile.imwrite(tmp_path / "3.tif", stack(8, 8).astype(np.float32), photometric="minisblack")
    source = open_train(str(tmp_path))
    assert describe(source).pixels.nodata is None
    words = "3 images of which -9999 marks missing pixels: not used; set nodata to it"
    assert words in take_stock(source, 1).lines()


def test_a_window_makes_floats_of_a_dicom(tmp_path: Path) -> None:
    pydicom = pytest.importorskip("pydicom")
    real = Path(pydicom.__file__).parent / "data" / "test_files" / "MR_small.dcm"
    (tmp_path / "1.dcm").write_bytes(real.read_bytes())
    source = open_train(str(tmp_path))
    given = ReadAs(window=(600.0, 1600.0))
    assert describe(source).pixels.dtype == describe(source, read_as=given).pixels.dtype == "float32"
    found = decode(source.read(0), Reading(1, dtype="float32", read_as=given))
    assert 0 <= found.min() < found.max() <= 1
