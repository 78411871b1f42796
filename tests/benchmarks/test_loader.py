"""``fastmae bench loader``: what it leaves, what a sample is made of, and what it refuses to time."""

import dataclasses
import itertools
import json
import multiprocessing
import tempfile

import numpy as np
import pytest
import torch

from fastmae.benchmarks import images, loader
from fastmae.benchmarks.baselines.official_pipeline import OfficialPipeline, _Crops, grey_levels
from fastmae.benchmarks.images import ImagesConfig, write_images
from fastmae.cli import main
from fastmae.data.loader import View, load_sample
from fastmae.data.parquet import ParquetSource
from fastmae.data.plan import crop_draws, plan_epoch
from fastmae.data.reading import Reading
from fastmae.data.sources import open_train
from fastmae.errors import UserError

CPU = torch.device("cpu")
WORDS = ["bench", "loader", "--batch_size", "4", "--batches", "2", "--rounds", "2", "--input_size", "32"]
WORDS += ["--num_workers", "1", "--device", "cpu"]
# Without a folder there are no worker processes.
ONE_KIND = [*WORDS, "--files", "8", "--kinds", "tar", "--image_decoders", "threads"]


def small_view():
    return View((32, 32), Reading(3), seed=0, scale=(0.2, 1.0), flip=True)


def request(*numbers):
    return np.array(numbers), np.array(numbers)


def test_every_sample_is_kept_and_who_cannot_run_is_named(tmp_path, capsys, monkeypatch):
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    threads = torch.get_num_threads()
    assert main([*WORDS, "--files", "12", "--image_decoders", "dali-gpu", "--output", str(tmp_path)]) == 0
    (path,) = tmp_path.glob("loader-*-t1-n4.json")
    result = json.loads(path.read_text())
    seconds, skipped, off = (result[key] for key in ("seconds", "skipped", "differences"))
    assert result["images"] == {"folder": 12, "tar": 12, "parquet": 12}
    assert all(len(samples) == 2 and min(samples) > 0 for samples in seconds.values())
    assert {"official, folder", "threads, folder", "threads, tar", "threads, parquet"} <= seconds.keys()
    assert {"simplejpeg alone, 1 thread", "Pillow alone, 1 thread"} <= seconds.keys()
    # The same images from all, those of the official pipeline but for rounding and another build of libjpeg.
    assert [off[f"threads, {kind}"]["largest"] for kind in ("folder", "tar", "parquet")] == [0, 0, 0]
    assert 0 < off["official, folder"]["mean"] < 0.5
    assert "use --device cuda" in skipped["dali-gpu"]
    for spent in result["one_thread"].values():
        assert {part: len(samples) for part, samples in spent.items()} == {"read": 2, "decode": 2, "crop and resize": 2}
        assert min(min(samples) for samples in spent.values()) > 0
    captured = capsys.readouterr()
    assert "speed-up over official" in captured.out
    assert "dali-gpu cannot run" in captured.err
    assert torch.get_num_threads() == threads
    assert not any((tmp_path / "temporary").iterdir())


def test_a_wrong_implementation_is_not_timed(capsys, monkeypatch):
    monkeypatch.setattr(loader, "TOLERANCE", -1.0)
    assert main(ONE_KIND) == 1
    captured = capsys.readouterr()
    assert "no time is reported" in captured.err
    assert "threads, tar" not in captured.out


def test_own_data_have_their_path_as_their_name(tmp_path, capsys):
    write_images(ImagesConfig(folder=tmp_path / "x", count=8, kind="tar", height=50, width=60))
    words = ["--data_path", str(tmp_path / "x"), "--image_decoders", "threads", "--output", str(tmp_path)]
    assert main([*WORDS, *words]) == 0
    (path,) = tmp_path.glob("*.json")
    result = json.loads(path.read_text())
    assert len(result["seconds"][f"threads, {tmp_path / 'x'}"]) == 2
    assert "folder" in result["skipped"]["official"]
    assert "official cannot run" in capsys.readouterr().err


def test_a_sample_begins_and_ends_with_as_much_work_ahead():
    source = dataclasses.make_dataclass("Bytes", ["shards"])(None)
    type(source).__len__, type(source).read = lambda self: 10, lambda self, index: b""
    setting = loader._Setting({}, small_view(), batch_size=4, num_workers=1, device=CPU, skipped={})
    asked, given, reads = [], [], []

    def start(requests):
        asked.append(requests)
        for number, _ in enumerate(requests):
            given.append(number)
            yield torch.zeros(1)

    def clock():
        reads.append(len(given))
        return float(len(given))

    starts = itertools.count(0, 11)
    one = loader._Loader("fake", source, start, ahead=3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loader.time, "perf_counter", clock)
        seconds = [loader._sample(setting, one, starts, 5) for _ in range(2)]
    assert reads[:2] == [3, 8]  # of 11: three before the clock, three after it
    assert given == 2 * list(range(11))
    assert seconds == [5 / (5 * 4)] * 2
    first, second = (np.concatenate([draw_ids for _, draw_ids in requests]) for requests in asked)
    assert [len(indices) for indices, _ in asked[0]] == 11 * [4]
    assert not np.array_equal(first, second)


def test_batches_are_those_of_a_run_wherever_it_has_come_to(blobs):
    source = open_train(blobs)
    run = [plan_epoch(0, epoch, 72, 30).batch(i) for epoch in range(4) for i in range(2)]
    for start, count in ((0, 1), (1, 1), (0, 5), (2, 6)):
        requests = loader.requests_of(source, 30, start, count)
        np.testing.assert_array_equal(requests, run[start : start + count])


def test_row_groups_are_read_anew_in_every_epoch(tmp_path, monkeypatch):
    monkeypatch.setattr(images, "GROUP_ROWS", 2)
    write_images(ImagesConfig(folder=tmp_path / "x", count=40, kind="parquet", height=8, width=8))
    reads = []
    inner = ParquetSource._read_group
    monkeypatch.setattr(ParquetSource, "_read_group", lambda self, group: reads.append(group) or inner(self, group))
    source = open_train(str(tmp_path / "x"))
    # All 20 are held, or 5 of them: then an epoch reads what the last one did not end with, and its own end twice.
    for each, least, most in ((source, 20, 20), (loader.holding_little(source), 3 * 14, 3 * 23)):
        for epoch in range(3):
            for index in plan_epoch(0, epoch, 40, 4, shards=each.shards).order.tolist():
                each.read(index)
        assert least <= len(reads) <= most
        assert set(reads) == set(range(20))
        reads.clear()


def test_the_official_pipeline_makes_the_crops_of_the_requests(image_folder):
    source = open_train(str(image_folder))
    for draw_id in range(8):
        (draws,) = crop_draws(0, np.array([draw_id]))
        ours = np.empty((32, 32, 3), np.uint8)
        load_sample(source, 5, small_view(), draws, ours)
        theirs = _Crops(source.paths, 32, (0.2, 1.0))[5, draws]
        assert theirs.dtype == torch.float32
        (pixels,) = grey_levels(theirs[None]).numpy()
        assert np.abs(pixels - pixels.round()).max() < 1e-3
        assert np.abs(pixels - ours).max() < 3


def test_processes_serve_turn_after_turn_until_closed(image_folder):
    paths = tuple(open_train(str(image_folder)).paths)
    (image_folder / "broken.jpg").write_bytes(b"no image")
    paths += (str(image_folder / "broken.jpg"),)
    before = set(multiprocessing.active_children())
    pipeline = OfficialPipeline(paths, size=32, scale=(0.2, 1.0), seed=0, num_workers=1, device=CPU)
    (first,) = pipeline.batches([request(0, 1)])
    processes = set(multiprocessing.active_children()) - before
    with pytest.raises(UserError, match=r"official pipeline fails \(.*broken.jpg'\); mend") as caught:
        list(pipeline.batches([request(2), request(len(paths) - 1)]))
    assert "\n" not in str(caught.value)
    batches = pipeline.batches([request(number) for number in range(9)])
    next(batches)
    batches.close()  # with work under way, none of which belongs to the next turn
    again = list(pipeline.batches([request(0, 1), request(1, 2)]))
    assert [len(batch) for batch in again] == [2, 2]
    torch.testing.assert_close(again[0], first, rtol=0, atol=0)
    assert set(multiprocessing.active_children()) - before == processes
    assert len(processes) == 1
    pipeline.close()
    assert not set(multiprocessing.active_children()) - before


def test_arrays_are_refused(blobs, capsys):
    assert main([*WORDS, "--data_path", blobs]) == 2
    assert "arrays need no decoding" in capsys.readouterr().err
