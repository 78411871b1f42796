"""What images are is said when a run begins and by verify, in the same words and with numbers that add up."""

import io

import numpy as np
import pytest
import tifffile
from PIL import Image

from fastmae.cli import main
from fastmae.data.headers import read_header
from fastmae.data.reading import Reading
from fastmae.data.sources import LOOKED_AT, Concat, FolderSource, describe, open_train
from fastmae.data.survey import ALPHA, CHOICE_OF_PAGES, FOURTH, SECOND, TURNED, Survey, take_stock
from fastmae.errors import SettingError
from fastmae.facts import ReadAs

IN_8_BITS = ReadAs(pixel_type="uint8")
RNG = np.random.default_rng(0)
UPPER = "only the upper 8 bits are used; their values lie between 0"


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def png(pixels, **options):
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", **options)
    return buffer.getvalue()


def tiff(pixels, **options):
    buffer = io.BytesIO()
    tifffile.imwrite(buffer, pixels, **options)
    return buffer.getvalue()


def deep(high, bits=16):
    return png(RNG.integers(0, high, (40, 40), np.uint16, endpoint=True))


def colour(bands=3):
    return RNG.integers(0, 256, (40, 40, bands), dtype=np.uint8)


def folder(path, files):
    path.mkdir(exist_ok=True)
    for number, data in enumerate(files):
        suffix = "tif" if data[:2] == b"II" else "png"
        (path / f"{number:03}.{suffix}").write_bytes(data)
    return open_train(str(path))


def verified(path, capsys, *words):
    """The exit status of verify, and its lines."""
    status = main(["verify", "--data_path", str(path), *words])
    captured = capsys.readouterr()
    return status, captured.out.splitlines() + captured.err.splitlines()


def test_12_bits_in_16_are_refused_with_what_would_be_left_of_them(tmp_path, capsys):
    source = folder(tmp_path / "x", [deep(4095) for _ in range(6)])
    told = f"6 images of 16 bits: {UPPER} and 4,095, so 16 of 4,096 levels"
    remedy = "leave pixel_type out to keep all bits, .* first .*000.png"
    with pytest.raises(SettingError, match=f"{told} remain, which cannot be meant; {remedy}"):
        take_stock(source, 1, IN_8_BITS)
    status, lines = verified(tmp_path / "x", capsys, "--pixel_type", "uint8")
    assert status == 2
    assert any(line.startswith(f"  note          {told}") for line in lines)
    assert lines[-1].startswith(f"fastmae: --data_path: {told}")


def test_16_bits_that_use_their_range_are_told(tmp_path, capsys):
    source = folder(tmp_path / "x", [deep(65535), png(colour()), png(colour())])
    notes = take_stock(source, 3, IN_8_BITS).notes
    told = f"1 image of 16 bits: {UPPER} and 65,535, so 256 of 65,536 levels remain"
    assert notes[0] == "formats: PNG colour 2 (66.7 %), PNG 16-bit gray 1 (33.3 %)"
    assert notes[1].startswith(told)
    status, lines = verified(tmp_path / "x", capsys, "--pixel_type", "uint8")
    assert status == 0
    assert f"  note          {notes[1]}" in lines
    notes = take_stock(source, 3).notes
    assert notes[1:] == ("2 images of uint8 among those of uint16: multiplied by 257, so that 255 becomes 65535",)
    status, lines = verified(tmp_path / "x", capsys)
    assert status == 0
    assert f"  note          {notes[1]}" in lines
    assert describe(source).pixels.dtype == "uint16"


def test_few_deep_and_dark_images_among_many_are_told_and_do_not_end_a_run(tmp_path):
    files = [png(colour()) for _ in range(30)]
    notes = take_stock(folder(tmp_path / "x", [*files, deep(999)]), 3, IN_8_BITS).notes
    assert any("values lie between 0 and 1,023, so 4 of 1,024 levels remain" in note for note in notes)


@pytest.mark.parametrize(
    ("pixels", "options", "reason", "used", "left"),
    [
        (colour(4), {"photometric": "rgb", "extrasamples": ["unspecified"]}, FOURTH, 3, 1),
        (colour(4), {"photometric": "rgb", "extrasamples": ["unassalpha"]}, ALPHA, 3, 1),
        (colour(2), {"photometric": "minisblack", "extrasamples": ["unspecified"]}, SECOND, 1, 1),
    ],
)
def test_bands_that_are_not_used_are_counted(tmp_path, capsys, pixels, options, reason, used, left):
    source = folder(tmp_path / "x", [tiff(pixels, planarconfig="contig", **options), png(colour())])
    stock = take_stock(source, 3)
    (item,) = stock.left_out
    assert (item.unit, item.count, item.reason) == ("bands", left, reason)
    assert (stock.used["bands"], stock.total("bands")) == (used + 3, pixels.shape[2] + 3)
    assert any(reason in line for line in verified(tmp_path / "x", capsys)[1])


def test_a_fourth_band_that_is_used_is_not_left_out(tmp_path):
    files = [tiff(colour(4), photometric="rgb", extrasamples=["unspecified"]), png(colour(4)), png(colour(2))]
    assert take_stock(folder(tmp_path / "x", files), 4).left_out == ()


def test_pages_that_are_not_used_are_counted(tmp_path, capsys):
    source = folder(tmp_path / "x", [tiff(RNG.integers(0, 256, (10, 40, 40), dtype=np.uint8)), png(colour())])
    stock = take_stock(source, 3)
    assert [(item.unit, item.count, item.reason) for item in stock.left_out] == [("pages", 9, CHOICE_OF_PAGES)]
    assert (stock.used["pages"], stock.total("pages")) == (2, 11)
    lines = verified(tmp_path / "x", capsys)[1]
    assert any(line.startswith(f"  note          9 pages left out: {CHOICE_OF_PAGES}") for line in lines)


def test_images_that_a_viewer_turns_are_counted(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    source = folder(tmp_path / "x", [png(colour()), png(colour(), exif=exif)])
    assert f"1 image {TURNED}, first {tmp_path / 'x' / '001.png'}" in take_stock(source, 3).notes


@pytest.mark.parametrize(
    ("files", "in_chans", "said"),
    [
        ([png(colour()[..., 0])] * 3, 3, "all images are gray"),
        ([png(np.repeat(colour(1), 3, axis=2))] * 3, 3, "all images are stored in colour and hold gray"),
        ([png(colour()[..., 0]), png(colour())], 3, None),
        ([png(colour()[..., 0])] * 3, 1, None),
    ],
)
def test_gray_images_that_are_taken_for_colour_are_told_with_the_remedy(tmp_path, files, in_chans, said):
    notes = [note for note in take_stock(folder(tmp_path / "x", files), in_chans).notes if "equal channels" in note]
    assert len(notes) == (said is not None)
    assert said is None or (notes[0].startswith(said) and "in_chans 1 takes one" in notes[0])


def test_a_run_begins_with_few_reads_evenly_spaced(tmp_path, monkeypatch):
    source = folder(tmp_path / "x", [png(colour())] * 300)
    reads, original = [], FolderSource.read
    monkeypatch.setattr(FolderSource, "read", lambda self, index: (reads.append(index), original(self, index))[1])
    assert take_stock(source, 3).notes == (f"formats: PNG colour (of {LOOKED_AT} images sampled)",)
    assert len(reads) == LOOKED_AT
    assert (reads[0], reads[-1]) == (0, 299)
    assert max(np.diff(reads)) <= 5


def test_data_of_which_nothing_can_be_used_are_refused_with_the_first_reason(tmp_path):
    file = tiff(RNG.integers(0, 9, (20, 20, 12), np.uint16), photometric="minisblack", planarconfig="contig")
    source = folder(tmp_path / "x", [file] * 3)
    with pytest.raises(SettingError, match=r"none of 3 images can be used, the first is .*000\.tif: no rule turns 12 "):
        take_stock(source, 3)
    assert take_stock(source, None).notes == ("formats: TIFF 16-bit gray and 11 more bands",)
    assert describe(source).channels == 12


def test_damaged_images_beside_whole_ones_do_not_end_the_sample(tmp_path):
    source = folder(tmp_path / "x", [b"junk", png(colour()), b""])
    assert take_stock(source, 3).notes == ("formats: PNG colour",)


def test_arrays_are_not_sampled(tmp_path):
    np.save(tmp_path / "x.npy", np.zeros((5, 8, 8, 3), np.uint8))
    source = open_train(str(tmp_path / "x.npy"))
    assert take_stock(source, None) == source.stock
    both = Concat((source, folder(tmp_path / "x", [png(colour())])))
    assert take_stock(both, 3).notes == ("formats: PNG colour",)


def test_the_sum_of_two_surveys_is_that_of_all_images():
    files = [
        deep(60000),
        png(colour(4)),
        tiff(np.zeros((3, 9, 9), np.uint8), photometric="minisblack"),
        deep(4000),
        png(colour()),
    ]
    whole, parts = Survey(), [Survey(), Survey()]
    for number, data in enumerate(files):
        for survey in (whole, parts[number > 2]):
            survey.see(read_header(data), f"{number}.png", colour() // 2 + number, Reading(3))
    parts[0].add(parts[1])
    assert parts[0] == whole
    assert parts[0].stock(Reading(3)) == whole.stock(Reading(3))
