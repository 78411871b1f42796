"""Verify says of every image what the loader would make of it, names the rest, and reads the data once, in order."""

import _thread
import io
import json
import os
import re
import signal
import struct
import subprocess
import sys
import tarfile
import threading
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from helpers import environment
from PIL import Image

from fastmae.cli import main
from fastmae.commands import verify as module
from fastmae.data.loader import View, load_batches
from fastmae.data.reading import Reading
from fastmae.data.sources import ArraySource, FolderSource, describe, open_train
from fastmae.data.survey import TURNED
from fastmae.data.verify import AHEAD, CHUNK, MISNAMED, ONE_COLOUR, SMALL, check


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def encoded(file_format, mode="RGB", size=(48, 40), **options):
    pixels = np.random.default_rng(0).integers(0, 256, (5, 6, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).resize(size).convert(mode).save(buffer, format=file_format, **options)
    return buffer.getvalue()


def png_of(width, height):
    """A PNG that claims a size and holds nothing."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(b"\0")), (b"IEND", b"")]
    packed = (struct.pack(">I", len(d)) + n + d + struct.pack(">I", zlib.crc32(n + d)) for n, d in chunks)
    return b"\x89PNG\r\n\x1a\n" + b"".join(packed)


def jpeg_of(width, height):
    """A JPEG whose header claims a size."""
    data = bytearray(encoded("JPEG"))
    start = data.index(b"\xff\xc0") + 5
    data[start : start + 4] = struct.pack(">HH", height, width)
    return bytes(data)


def spoilt(data, at):
    return data[:at] + bytes([data[at] ^ 0xFF]) * 30 + data[at + 30 :]


JPEG = encoded("JPEG", quality=95)
PNG = encoded("PNG")
FILES = {
    "good.jpg": JPEG, "gray.jpg": encoded("JPEG", "L"), "cmyk.jpg": encoded("JPEG", "CMYK"), "good.png": PNG,
    "alpha.png": encoded("PNG", "RGBA"),
    "palette.gif": encoded("GIF", "P"), "tiny.png": encoded("PNG", size=(1, 1)), "16-bit.png": encoded("PNG", "I;16"),
    "wide.jpg": encoded("JPEG", size=(900, 2)), "png-in-fact.jpg": PNG, "jpeg-in-fact.png": JPEG,
    "tail.jpg": JPEG + b"tail", "cut.jpg": JPEG[:400], "no-end.jpg": JPEG[:-300], "two-bytes-short.jpg": JPEG[:-2],
    "cut.png": PNG[:-40], "cut-header.png": PNG[:20], "empty.jpg": b"", "empty.webp": b"", "text.jpg": b"hello\nyou",
    "magic.jpg": b"\xff\xd8\xff", "html.png": b"<html>404</html>", "bomb.png": png_of(30_000, 30_000),
    "bomb.jpg": jpeg_of(65_000, 65_000), "spoilt.jpg": spoilt(JPEG, len(JPEG) // 2),
    "spoilt-header.jpg": spoilt(JPEG, 30), "spoilt.png": spoilt(PNG, 60), "float.tif": encoded("TIFF", "F"),
    "n\nl.jpg": b"junk", "\x1b[31mred.jpg": b"junk", os.fsdecode(b"\xff.jpg"): b"junk",
}  # fmt: skip


@pytest.fixture
def damaged(tmp_path):
    """A flat folder of files of all kinds, some of which are links or may not be read."""
    root = tmp_path / "damaged"
    root.mkdir()
    for name, data in FILES.items():
        (root / name).write_bytes(data)
    (root / "missing.jpg").symlink_to("nowhere.jpg")
    (root / "unreadable.jpg").symlink_to("/proc/self/mem")
    (root / "forbidden.jpg").write_bytes(JPEG)
    (root / "forbidden.jpg").chmod(0)
    return root


def write_tar(path, members):
    with tarfile.open(path, "w") as archive:
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return str(path)


def verify(*paths, output=None, status=0, **flags):
    """Runs verify, checks its exit status and returns the lines of --output."""
    words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    words += [] if output is None else ["--output", str(output)]
    assert main(["verify", "--data_path", *map(str, paths), *words]) == status
    return [] if output is None else [json.loads(line) for line in output.read_text().splitlines()]


def verify_threads():
    return [thread for thread in threading.enumerate() if thread.name.startswith("fastmae-verify")]


# --- the same judgement -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("in_chans", [1, 3, 4])
def test_what_verify_names_is_what_the_loader_replaces(damaged, in_chans):
    source = open_train(str(damaged))
    assert describe(source).pixels.dtype == "uint16"  # for the sake of one of them
    reading = Reading(in_chans, dtype="uint16")
    every = np.arange(len(source))
    view = View((16, 16), reading)
    (batch,) = load_batches(source, [(every, every)], view, device=torch.device("cpu"), num_workers=2)
    named = [bad for chunk in check(source, reading, num_workers=2) for bad in chunk.examples]
    assert set(named) == set(batch.skipped)
    assert [bad.index for bad in named] == sorted({bad.index for bad in batch.skipped})
    names = {os.path.basename(bad.name) for bad in named}
    assert {
        "cut.jpg",
        "empty.webp",
        "bomb.png",
        "bomb.jpg",
        "text.jpg",
        "missing.jpg",
        "unreadable.jpg",
        "n\nl.jpg",
    } <= names
    without_alpha = {"good.jpg", "png-in-fact.jpg", "tiny.png", "wide.jpg", "cmyk.jpg", "16-bit.png"}
    assert without_alpha & names == (without_alpha if in_chans == 4 else set())
    assert "alpha.png" not in names
    assert ("forbidden.jpg" in names) == (in_chans == 4 or not os.access(damaged / "forbidden.jpg", os.R_OK))


def test_an_error_that_would_end_a_run_is_named_too(monkeypatch, image_folder, tmp_path):
    original = FolderSource.read

    def read(self, index):
        if index == 3:
            raise MemoryError("no room")
        return original(self, index)

    monkeypatch.setattr(FolderSource, "read", read)
    train, val = verify(image_folder, output=tmp_path / "bad.jsonl", status=1)
    assert (train["part"], val["part"], train["index"]) == ("train", "val", 3)
    assert train["reason"] == "MemoryError: no room (this would end a run)"


@pytest.mark.parametrize("error", [PermissionError(13, "Permission denied", "x.jpg"), OSError(5, "Input/output error")])
def test_files_that_may_not_be_read_are_unusable(monkeypatch, image_folder, tmp_path, error):
    def read(self, index):
        raise error

    monkeypatch.setattr(FolderSource, "read", read)
    lines = verify(image_folder, output=tmp_path / "bad.jsonl", status=1)
    assert [line["reason"] for line in lines] == [str(error)] * 32


def test_any_number_of_threads_finds_the_same(damaged, image_folder, tmp_path, capsys):
    findings = []
    for threads in (1, 4):
        lines = verify(damaged, image_folder, num_workers=threads, output=tmp_path / "bad.jsonl", status=1)
        findings.append((lines, re.sub(r"speed .*", "", capsys.readouterr().out)))
    assert findings[0] == findings[1]
    assert len(findings[0][0]) > 15
    assert not verify_threads()


def test_threads_work_at_once(monkeypatch):
    together, original = threading.Barrier(2, timeout=20), ArraySource.read
    monkeypatch.setattr(ArraySource, "read", lambda self, index: (together.wait(), original(self, index))[1])
    chunks = check(ArraySource(np.zeros((2 * CHUNK, 2, 2, 1), np.uint8), None, "x"), Reading(1), num_workers=2)
    assert [(chunk.images, chunk.unusable) for chunk in chunks] == [(CHUNK, 0)] * 2


def test_few_tasks_wait_however_long_the_data_are(monkeypatch):
    tasks, original = [], ThreadPoolExecutor.submit
    monkeypatch.setattr(ThreadPoolExecutor, "submit", lambda *words: (tasks.append(words[3]), original(*words))[1])
    chunks = check(ArraySource(np.zeros((100_000, 2, 2, 1), np.uint8), None, "x"), Reading(1), num_workers=3)
    assert next(chunks).images == CHUNK
    chunks.close()
    assert tasks == [range(first, first + CHUNK) for first in range(0, 3 * AHEAD * CHUNK, CHUNK)]


# --- what is said -----------------------------------------------------------------------------------------------------


def test_a_folder_that_is_whole(image_folder, capsys, tmp_path):
    assert verify(image_folder, output=tmp_path / "bad.jsonl") == []
    lines = capsys.readouterr().out.splitlines()
    assert f"train           {image_folder}: 24 images in 2 class folders (n01, n02) of train" in lines
    assert f"val             {image_folder}: 8 images in 2 class folders (n01, n02) of val" in lines
    assert lines.count("  format        JPEG colour") == 2
    assert lines.count("  pixels        80×60, all alike") == 2
    assert lines[-1] == "all 32 images are usable"
    size = sum(path.stat().st_size for path in (image_folder / "train").rglob("*.JPEG"))
    assert f"  size          {size / 1000:.1f} KB, {size / 24_000:.1f} KB per image" in lines


def test_both_parts_are_checked_and_lines_are_those_of_the_quarantine_with_the_part(image_folder, capsys, tmp_path):
    for name in ("train/n01/3.JPEG", "val/n02/1.JPEG"):
        (image_folder / name).write_bytes(b"junk")
    lines = verify(image_folder, output=tmp_path / "bad.jsonl", status=1)
    reason = "no image format that Pillow knows"
    train, val = str(image_folder / "train/n01/3.JPEG"), str(image_folder / "val/n02/1.JPEG")
    position = open_train(str(image_folder)).paths.index(train)
    assert lines == [
        {"part": "train", "index": position, "name": train, "reason": reason},
        {"part": "val", "index": 5, "name": val, "reason": reason},
    ]
    out = capsys.readouterr().out.splitlines()
    assert out[-4] == "30 of 32 images are usable; 2 are not:"
    assert out[-3:-1] == [f"  train: {train}: {reason}", f"  val: {val}: {reason}"]
    assert out[-1] == f"listed in {tmp_path / 'bad.jsonl'}"


def test_examples_are_few_and_the_file_has_all(tmp_path, capsys):
    for i in range(70):
        (tmp_path / f"{i:02}.png").write_bytes(PNG if i == 50 else b"junk")
    assert len(verify(tmp_path, output=tmp_path / "bad.jsonl", status=1)) == 69
    out = capsys.readouterr().out
    assert out.count(": no image format") == 20
    assert "1 of 70 images are usable; 69 are not:" in out
    assert "  and 49 more\n" in out
    verify(tmp_path, status=1)
    assert "  and 49 more; --output FILE lists all\n" in capsys.readouterr().out


def test_no_usable_image_is_reported_and_names_cannot_move_the_cursor(tmp_path, capsys):
    (tmp_path / "a\n\x1b[2J.jpg").write_bytes(b"junk")
    (tmp_path / os.fsdecode(b"b\xff.jpg")).write_bytes(b"junk")
    verify(tmp_path, status=1)
    out = capsys.readouterr().out
    assert "0 of 2 images are usable; 2 are not:" in out
    assert r"/a\n\x1b[2J.jpg: no image" in out
    assert r"/b\xff.jpg: no image" in out
    assert "\x1b" not in out


def test_what_a_run_accepts_silently_is_counted(tmp_path, capsys):
    turned = Image.Exif()
    turned[0x0112] = 6
    upright = Image.Exif()
    upright[0x0112] = 1
    broken = encoded("JPEG", exif=turned).replace(b"Exif\0\0MM\0*", b"Exif\0\0??\0*")
    files = {
        "a.jpg": encoded("JPEG", exif=turned), "b.png": encoded("PNG", exif=turned), "d.jpg": broken, "e.jpg": PNG,
        "c.jpg": encoded("JPEG", exif=upright), "f.jpg": encoded("JPEG", size=(31, 500)),
        "g.jpg": encoded("JPEG", size=(32, 32)), "h.png": encoded("PNG", "RGBA"), "i.jpg": encoded("JPEG", "CMYK"),
    }  # fmt: skip
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    flat = io.BytesIO()
    Image.new("RGB", (64, 64), (9, 8, 7)).save(flat, "PNG")
    (tmp_path / "j.png").write_bytes(flat.getvalue())
    (findings,) = check(open_train(str(tmp_path)), Reading(3), num_workers=1)
    assert findings.notes == {MISNAMED: (1, 4), SMALL: (1, 5), ONE_COLOUR: (1, 9)}
    assert findings.survey.turned == (2, str(tmp_path / "a.jpg"))
    assert findings.survey.kinds == {"JPEG colour": 5, "JPEG CMYK": 1, "PNG colour": 3, "PNG colour with alpha": 1}
    verify(tmp_path)
    lines = capsys.readouterr().out.splitlines()
    assert f"  smallest      32×32 pixels, {tmp_path / 'g.jpg'}" in lines
    assert f"  largest       31×500 pixels, {tmp_path / 'f.jpg'}" in lines
    assert f"  note          2 images {TURNED}, first {tmp_path / 'a.jpg'}" in lines
    assert any("JPEG colour 5 (50 %)" in line for line in lines)


def test_progress_is_printed_as_lines_without_a_terminal(image_folder, capsys, monkeypatch):
    verify(image_folder)
    assert " images checked" not in capsys.readouterr().out
    monkeypatch.setattr(module, "QUIET_SECONDS", 0.0)
    verify(image_folder)
    lines = [line for line in capsys.readouterr().out.splitlines() if " images checked" in line]
    assert [line.split(" images")[0] for line in lines] == ["  16 of 32", "  24 of 32", "  32 of 32"]


# --- every kind of data -----------------------------------------------------------------------------------------------


def test_a_damaged_tar_fails_the_check_even_if_all_its_images_are_usable(tmp_path, capsys):
    members = [(f"{i}.jpg", JPEG) for i in range(9)]
    path = write_tar(tmp_path / "whole.tar", members)
    assert verify(path, output=tmp_path / "bad.jsonl") == []
    cut = tmp_path / "cut.tar"
    cut.write_bytes((tmp_path / "whole.tar").read_bytes()[:4000])
    capsys.readouterr()
    (line,) = verify(path, cut, output=tmp_path / "bad.jsonl", status=1)
    assert (line["part"], line["index"], line["name"]) == ("train", None, str(cut))
    assert line["reason"].startswith("is cut at byte 4000, so only its first ")
    out = capsys.readouterr().out
    assert re.search(
        r"all \d+ images are usable; 1 shard or folder cannot be read whole:\n  train: .*cut.tar is cut", out
    )


def test_bad_images_inside_a_tar_and_its_val_part(tmp_path):
    write_tar(tmp_path / "a-train.tar", [("0.jpg", JPEG), ("1.jpg", JPEG[:300]), ("2.png", PNG)])
    write_tar(tmp_path / "a-val.tar", [("0.png", PNG[:-40])])
    train, val = verify(tmp_path, output=tmp_path / "bad.jsonl", status=1)
    assert (train["part"], train["index"], train["name"]) == ("train", 1, f"{tmp_path / 'a-train.tar'}:1.jpg")
    assert (val["part"], val["index"], val["name"]) == ("val", 0, f"{tmp_path / 'a-val.tar'}:0.png")


def test_parquet_is_read_group_after_group(tmp_path, monkeypatch):
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    from fastmae.data import parquet

    images = [b"junk" if i in (3, 77) else None if i == 100 else JPEG for i in range(300)]
    path = tmp_path / "x.parquet"
    pq.write_table(
        pa.table({"image": images}), path, row_group_size=20
    )  # of which 9 are held, more than 2 threads are apart
    groups = []
    original = parquet.read_group
    monkeypatch.setattr(parquet, "read_group", lambda *words: (groups.append(words[1]), original(*words))[1])
    monkeypatch.setattr(parquet, "HELD_BYTES", 1)
    lines = verify(path, num_workers=2, output=tmp_path / "bad.jsonl", status=1)
    assert [(line["index"], line["name"]) for line in lines] == [(i, f"{path}[{i}]") for i in (3, 77, 100)]
    assert lines[2]["reason"] == "the table has no bytes for this image"
    assert {*groups} == {*range(15)}
    assert max(map(groups.count, range(15))) <= 2  # once for the few images by which their type is chosen


def test_arrays_and_digits(blobs, tmp_path, capsys):
    assert verify("digits") == []
    assert "all 1,797 images are usable" in capsys.readouterr().out
    assert verify(blobs, in_chans=3) == []
    out = capsys.readouterr().out
    assert out.count("  format        array of 16×16×1\n") == 2
    assert "all 96 images are usable" in out
    blank = np.random.default_rng(0).integers(0, 256, (5, 8, 8, 7), dtype=np.uint8)
    blank[2:4] = 5
    np.save(tmp_path / "seven.npy", blank)
    assert verify(tmp_path / "seven.npy") == []
    assert f"  note          2 {ONE_COLOUR}, first {tmp_path / 'seven.npy'}[2]" in capsys.readouterr().out


def test_channels_that_no_rule_makes_are_one_line_and_not_every_image(tmp_path, capsys, image_folder):
    np.save(tmp_path / "seven.npy", np.zeros((5, 8, 8, 7), np.uint8))
    for paths, flags, expected in (
        ([tmp_path / "seven.npy"], {"in_chans": 3}, "seven.npy: no rule turns 7 channels into 3; set in_chans to 7"),
        ([image_folder, tmp_path / "seven.npy"], {}, "seven.npy: no rule turns 7 channels into 3; set in_chans to 7"),
        ([image_folder, tmp_path / "seven.npy"], {"in_chans": 7}, "image files give 1, 3 or 4 channels"),
    ):
        verify(*paths, status=2, **flags)
        captured = capsys.readouterr()
        (line,) = captured.err.strip().splitlines()
        assert expected in line
        assert "usable" not in captured.out


def test_several_paths_of_several_kinds(damaged, image_folder, tmp_path, capsys):
    np.save(tmp_path / "gray.npy", np.random.default_rng(0).integers(0, 256, (5, 8, 8), dtype=np.uint8))
    path = write_tar(tmp_path / "x.tar", [("0.jpg", JPEG[:300])])
    alone = verify(damaged, output=tmp_path / "bad.jsonl", status=1)
    lines = verify(image_folder, tmp_path / "gray.npy", damaged, path, output=tmp_path / "bad.jsonl", status=1)
    assert lines[:-1] == [{**line, "index": line["index"] + 29} for line in alone]
    assert lines[-1]["name"] == f"{path}:0.jpg"
    assert "array of 8×8×1 5 (" in capsys.readouterr().out


# --- what cannot be ---------------------------------------------------------------------------------------------------

WRONG = {
    "no path": ([], "--data_path"),
    "nothing after it": (["--data_path"], "must name at least one"),
    "not there": (["--data_path", "{tmp}/nowhere"], "no such file or folder"),
    "holds nothing": (["--data_path", "{tmp}"], "holds no images"),
    "a tar that is none": (["--data_path", "{tmp}/notes.tar"], "not a tar file"),
    "no threads": (["--data_path", "digits", "--num_workers", "0"], "--num_workers 0: must be at least 1"),
    "no channels": (["--data_path", "digits", "--in_chans", "0"], "--in_chans 0: must be at least 1"),
    "no such folder to write to": (["--data_path", "digits", "--output", "{tmp}/no/x"], "cannot be written"),
    "unknown flag": (["--data_path", "digits", "--fast"], "see `fastmae verify --help`"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_input_is_one_line_and_status_2(case, tmp_path, refusal):
    words, expected = WRONG[case]
    (tmp_path / "notes.tar").write_text("hello " * 500)
    if case == "holds nothing":
        (tmp_path / "notes.tar").unlink()
    line = refusal(["verify", *(word.format(tmp=tmp_path) for word in words)])
    assert expected in line


# The second stands for a signal that arrives between the decision to wait and the wait, which it does not end.
INTERRUPTS = {
    "while it waits": lambda: signal.pthread_kill(threading.main_thread().ident, signal.SIGINT),
    "just before it waits": _thread.interrupt_main,
}


@pytest.mark.parametrize("case", INTERRUPTS)
def test_an_interrupt_ends_it_soon_with_no_thread_left(case, tmp_path, monkeypatch, capsys):
    np.save(tmp_path / "x.npy", np.zeros((3000, 4, 4), np.uint8))
    reads, later = [], []
    original = ArraySource.read

    def read(self, index):
        if later or (len(reads) > 2 * CHUNK and index % CHUNK == 0):
            if not later:
                INTERRUPTS[case]()
            later.append(index)
            threading.Event().wait(0.2)
        reads.append(index)
        return original(self, index)

    monkeypatch.setattr(ArraySource, "read", read)
    assert main(["verify", "--data_path", str(tmp_path / "x.npy"), "--num_workers", "2"]) == 130
    assert not verify_threads()
    assert 1 <= len(later) < CHUNK - 2  # neither the waiting tasks nor the rest of the one that had just begun
    assert "usable" not in capsys.readouterr().out


def test_python_dash_m_has_the_same_output_and_exit_status(damaged):
    words = [sys.executable, "-m", "fastmae", "verify", "--data_path", str(damaged)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=300, cwd="/", env=environment())
    assert done.returncode == 1, done.stderr
    assert done.stderr == ""
    assert "images are usable; " in done.stdout
