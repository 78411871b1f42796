"""Packs: every number and every byte in them, the same shards after a kill, and what is refused."""

import json
import os
import re
from pathlib import Path
from types import SimpleNamespace

import h5py
import numpy as np
import pytest
from PIL import Image

from fastmae.cli import main
from fastmae.commands import pack as command
from fastmae.data import pack
from fastmae.data.decode import decode
from fastmae.data.pack import LOG, MANIFEST
from fastmae.data.reading import Reading
from fastmae.data.sources import open_train, open_val

DTYPES = {"uint8": "uint8", "uint16": "uint16", "float32": "float32", "int16": "float32", "float64": "float32"}


def packed(*words):
    return main(["pack", *map(str, words)])


def by_index(source):
    """The samples of a pack by their index in the data that were packed."""
    return {int(re.search(r"(\d{12})\.", source.name(row))[1]): row for row in range(len(source))}


@pytest.fixture
def photos(tmp_path):
    """14 photographs of two classes in two parts, with one that is cut."""
    rng = np.random.default_rng(0)
    for number in range(14):
        folder = tmp_path / "photos" / ("val" if number >= 10 else "train") / ("cat", "dog")[number % 2]
        folder.mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 256, (16, 20, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number:02d}.{('png', 'jpg')[number % 3 == 0]}")
    return tmp_path / "photos"


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("dtype", DTYPES)
def test_numbers_of_every_type_reach_the_model_unchanged(dtype, channels, tmp_path):
    rng = np.random.default_rng(0)
    values = rng.integers(0, 200, (6, 9, 7, channels)) if dtype[0] in "ui" else rng.normal(size=(6, 9, 7, channels))
    images = values.astype(np.float32).astype(dtype)
    if dtype == "int16":
        images -= 100
    np.savez(tmp_path / "a.npz", images=images, labels=np.arange(6) + 3)
    assert packed(tmp_path / "a.npz", tmp_path / "out", "--layout", "hwc") == 0
    source, reading = open_train(str(tmp_path / "out")), Reading(channels, dtype=DTYPES[dtype])
    rows = by_index(source)
    assert [*sorted(rows)] == [*range(6)]
    for index, row in rows.items():
        assert np.array_equal(decode(source.read(row), reading), images[index].astype(DTYPES[dtype]))
        assert int(source.classes[source.labels[row]] if source.classes else source.labels[row]) == index + 3


def test_image_files_keep_their_bytes_their_labels_and_their_parts(photos, tmp_path):
    assert packed(photos, tmp_path / "out") == 0
    for opened in (open_train, open_val):
        before, after = opened(str(photos)), opened(str(tmp_path / "out"))
        assert after.classes == before.classes == ("cat", "dog")
        assert len(after) == len(before)
        for index, row in by_index(after).items():
            assert after.read(row) == before.read(index)
            assert after.labels[row] == before.labels[index]
    manifest = json.loads((tmp_path / "out" / MANIFEST).read_text())
    assert [shard["name"] for shard in manifest["shards"]] == ["train-000000.tar", "val-000000.tar"]
    assert not any("left out" in line for line in open_train(str(tmp_path / "out")).stock.lines())


def test_a_pack_that_was_stopped_goes_on_to_the_same_bytes(tmp_path, monkeypatch):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["images"] = np.random.default_rng(0).integers(0, 4096, (40, 256, 256, 1), dtype=np.uint16)
    words = (tmp_path / "a.h5", "--shard_mb", 1, "--num_workers", 1)
    assert packed(words[0], tmp_path / "whole", *words[1:]) == 0
    count = 0

    def stopped(*arguments):
        nonlocal count
        count += 1
        if count == 3:
            raise KeyboardInterrupt
        return write_shard(*arguments)

    write_shard = command.write_shard
    monkeypatch.setattr(command, "write_shard", stopped)
    assert packed(words[0], tmp_path / "out", *words[1:]) == 130
    there = os.listdir(tmp_path / "out")
    assert {LOG, "train-000000.tar", "train-000001.tar"} <= {*there}
    assert MANIFEST not in there
    assert "train-000002.tar" not in there
    kept = (tmp_path / "out" / "train-000000.tar").stat().st_mtime_ns
    monkeypatch.setattr(command, "write_shard", write_shard)
    assert packed(words[0], tmp_path / "out", *words[1:]) == 0
    assert (tmp_path / "out" / "train-000000.tar").stat().st_mtime_ns == kept
    files = {path.name: path.read_bytes() for path in (tmp_path / "whole").iterdir()}
    assert len(files) > 4
    assert files == {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}


def test_what_cannot_be_read_is_named_and_the_status_is_1(photos, tmp_path, capsys):
    (photos / "train" / "cat" / "broken").mkdir()
    path = photos / "train" / "cat" / "00.jpg"
    path.unlink()
    path.symlink_to(photos / "nowhere.jpg")
    assert packed(photos, tmp_path / "out") == 1
    printed = capsys.readouterr().out
    assert "left out        1 image" in printed
    assert "00.jpg" in printed
    assert len(open_train(str(tmp_path / "out"))) == 9


def test_verify_compares_the_checksums(photos, tmp_path, capsys):
    assert packed(photos, tmp_path / "out") == 0
    assert main(["verify", "--data_path", str(tmp_path / "out")]) == 0
    shard = tmp_path / "out" / "val-000000.tar"
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1  # behind the end, where no image is
    shard.write_bytes(data)
    capsys.readouterr()
    assert main(["verify", "--data_path", str(tmp_path / "out")]) == 1
    assert "another checksum" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("before", "words", "problem"),
    [
        (lambda out: (out.mkdir(), (out / "mine.txt").write_text("x")), [], "is not empty (mine.txt, …)"),
        (lambda out: packed("digits", out), [], "a whole pack is there already"),
        (lambda out: None, ["--shard_mb", "0"], "--shard_mb"),
    ],
)
def test_what_cannot_be_meant_is_refused(before, words, problem, tmp_path, capsys):
    before(tmp_path / "out")
    capsys.readouterr()
    assert packed("digits", tmp_path / "out", *words) == 2
    printed = capsys.readouterr().err
    assert problem in printed
    assert printed.count("\n") == 1


def test_a_pack_of_other_data_is_not_gone_on_with(photos, tmp_path, monkeypatch, capsys):
    def stopped(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "write_shard", stopped)
    assert packed(photos, tmp_path / "out") == 130
    assert packed("digits", tmp_path / "out") == 2
    assert "the pack there is of other data" in capsys.readouterr().err
    assert packed(photos, tmp_path / "out", "--seed", 1) == 2
    assert "with other settings" in capsys.readouterr().err


def test_shards_stay_the_same_when_another_image_of_the_sample_cannot_be_read(tmp_path, monkeypatch):
    """Shards by another count of images would hold some images twice and others never."""
    np.savez(tmp_path / "a.npz", images=np.random.default_rng(0).integers(0, 9, (30, 256, 256, 1), dtype=np.uint16))
    written = []

    def two(folder, plan, source):
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(plan.name)
        return write_shard(folder, plan, source)

    write_shard, words = command.write_shard, ("--shard_mb", 1, "--num_workers", 1)
    monkeypatch.setattr(command, "write_shard", two)
    assert packed(tmp_path / "a.npz", tmp_path / "out", *words) == 130
    monkeypatch.setattr(command, "write_shard", write_shard)
    monkeypatch.setattr(pack, "bytes_an_image", lambda source: 500_000)
    assert packed(tmp_path / "a.npz", tmp_path / "out", *words) == 0
    assert sorted(by_index(open_train(str(tmp_path / "out")))) == [*range(30)]
    assert len(open_train(str(tmp_path / "out"))) == 30


def test_a_log_whose_first_line_was_cut_is_begun_anew(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / LOG).write_text('{"version": 1, "set')
    assert packed("digits", tmp_path / "out") == 0


def test_a_disk_that_is_too_small_is_told_before_anything_is_written(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(command.shutil, "disk_usage", lambda path: SimpleNamespace(free=3000))
    assert packed("digits", tmp_path / "out") == 2
    assert "are to be written, 3 KiB are free; make room" in capsys.readouterr().err
    assert os.listdir(tmp_path / "out") == [LOG]


def test_a_shuffled_pack_has_another_order_and_a_kept_one_the_same(tmp_path):
    for order in ("shuffled", "kept"):
        assert packed("digits", tmp_path / order, "--order", order) == 0
    kept, shuffled = (open_train(str(Path(tmp_path, order))) for order in ("kept", "shuffled"))
    assert [*by_index(kept)] == [*range(len(kept))]
    assert [*by_index(shuffled)] != [*range(len(kept))]
    assert sorted(by_index(shuffled)) == [*range(len(kept))]
