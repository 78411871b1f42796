"""``fastmae bench end-to-end``: what it leaves, what a sample is made of, and what it refuses to time."""

import dataclasses
import itertools
import json
import multiprocessing
import tempfile

import numpy as np
import pytest
import torch

from fastmae.benchmarks import end_to_end, loader
from fastmae.benchmarks.end_to_end import CACHED, FROM_FILES, OFFICIAL
from fastmae.benchmarks.images import ImagesConfig, write_images
from fastmae.cli import main
from fastmae.data.loader import View
from fastmae.data.plan import plan_epoch
from fastmae.data.reading import Reading

CPU = torch.device("cpu")
WORDS = ["bench", "end-to-end", "--model", "mae_vit_tiny_patch4", "--batch_size", "2", "--steps", "1", "--rounds", "2"]
WORDS += ["--num_workers", "1", "--device", "cpu"]


@pytest.fixture
def tar_of_images(tmp_path):
    """Of which the official pipeline, and so any process of it, has nothing."""
    write_images(ImagesConfig(folder=tmp_path / "x", count=6, kind="tar", height=40, width=50))
    return ["--data_path", str(tmp_path / "x")]


def test_everybody_trains_on_the_same_images_and_every_sample_is_kept(tmp_path, capsys, monkeypatch):
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    monkeypatch.setenv(
        "TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "compiler")
    )  # torch makes it when it loads its compiler
    before = set(multiprocessing.active_children())
    assert main([*WORDS, "--files", "6", "--output", str(tmp_path)]) == 0
    (path,) = tmp_path.glob("end-to-end-mae_vit_tiny_patch4-*-t1-n2-fp32.json")
    result = json.loads(path.read_text())
    losses, seconds = result["losses"], result["seconds"]
    assert (result["images"], result["skipped"]) == (6, {})
    assert losses.keys() == seconds.keys() == {FROM_FILES, CACHED, OFFICIAL}
    assert losses[FROM_FILES] == losses[CACHED]
    np.testing.assert_allclose(losses[OFFICIAL], losses[CACHED], rtol=1e-3)
    assert losses[CACHED][0] != losses[CACHED][1]
    assert all(len(samples) == 2 and min(samples) > 0 for samples in seconds.values())
    assert "speed-up over the official loop" in capsys.readouterr().out
    assert set(multiprocessing.active_children()) == before
    assert not any((tmp_path / "temporary").iterdir())


def test_a_loader_that_gives_other_images_is_not_timed(tar_of_images, tmp_path, capsys, monkeypatch):
    right = end_to_end.load_batches

    def darker(*words, **more):
        for batch in right(*words, **more):
            yield dataclasses.replace(batch, images=batch.images // 2)

    monkeypatch.setattr(end_to_end, "load_batches", darker)
    assert main([*WORDS, *tar_of_images, "--output", str(tmp_path / "results")]) == 1
    assert f"the losses of {FROM_FILES} differ" in (text := capsys.readouterr().err)
    assert "so no time is reported" in text
    assert not (tmp_path / "results").exists()


def test_who_cannot_read_the_data_is_named(tar_of_images, tmp_path, capsys):
    assert main([*WORDS, *tar_of_images, "--output", str(tmp_path)]) == 0
    (path,) = tmp_path.glob("*.json")
    assert json.loads(path.read_text())["seconds"].keys() == {FROM_FILES, CACHED}
    assert f"{OFFICIAL} cannot run: it reads folders" in capsys.readouterr().err


def test_a_window_begins_and_ends_with_as_much_work_ahead(monkeypatch):
    read, trained, asked, clock = [], [], [], []
    source = dataclasses.make_dataclass("Bytes", ["shards"])(None)
    type(source).__len__, type(source).read = lambda self: 10, lambda self, index: read.append(index)
    view = View((28, 28), Reading(3), seed=0, scale=(0.2, 1.0), flip=True)
    setting = end_to_end._Setting(source, view, model=None, batch_size=4, num_workers=1, device=CPU)

    @dataclasses.dataclass(frozen=True)
    class Step:
        batch: tuple = ()

        def go(self, stretch):
            trained.append(self.batch)

    def start(requests):
        asked.append(len(requests))
        for number, _ in enumerate(requests):
            yield number, None

    def now():
        clock.append(len(trained))
        return float(len(trained))

    one = end_to_end._Runner(Step(), start, ahead=3, tolerance=0.0)
    monkeypatch.setattr(loader.time, "perf_counter", now)
    requests = loader.requests_of(source, 4, 1, 5 + 2 * 3)
    assert end_to_end._turn(setting, one, 5, itertools.count(1)) == 5 / (5 * 4)
    assert clock == [3, 8]  # three before it, and nobody trains on the last three
    assert trained == [(number, None) for number in range(8)]
    assert asked == [11]
    assert set(read) == {index for indices, _ in requests for index in indices.tolist()}
    run = [plan_epoch(0, epoch, 10, 4).batch(i) for epoch in range(6) for i in range(2)]
    np.testing.assert_array_equal(requests, run[1:12])


def test_arrays_are_refused(blobs, capsys):
    assert main([*WORDS, "--data_path", blobs]) == 2
    assert "arrays need no decoding" in capsys.readouterr().err
