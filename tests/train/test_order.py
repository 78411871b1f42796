"""What training sees: the same images, crops, flips and masks for any ranks, threads, restarts and decoders."""

import io
import os
import signal
import tarfile
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import assert_same_run, small_run, soak

from fastmae.cli import main
from fastmae.data import packed
from fastmae.data.changes import ChangedImages
from fastmae.data.loader import LoadingStats, View
from fastmae.data.quarantine import Quarantine
from fastmae.data.reading import Reading
from fastmae.data.sources import open_train
from fastmae.errors import UserError
from fastmae.signals import EXIT_INTERRUPTED
from fastmae.train import pretrain as module
from fastmae.train.batches import BatchStream
from fastmae.train.parallel import DistContext
from fastmae.train.pretrain import pretrain
from fastmae.train.schedule import Steps

CPU = torch.device("cpu")
# 48 images in 6 shards: 6 steps of 8 an epoch, 24 in all.
TINY = dict(model="mae_vit_tiny_patch4", input_size=(16, 16), checkpoint_freq=4, num_workers=2)
INTERRUPTED = [(5,), (1, 2, 3), (6, 17, 22), *soak([], [(step,) for step in range(23)])]


@pytest.fixture(autouse=True)
def _scattered(monkeypatch):
    """Two shards' worth of samples in use at a time, so that the order is no full shuffle."""
    monkeypatch.setattr(packed, "WINDOW_SHARDS", 2)
    monkeypatch.setattr(packed, "WINDOW_SAMPLES", 1)


@pytest.fixture
def tars(image_folder, tmp_path):
    """A folder of 6 shards, 8 smooth JPEGs each."""
    (tmp_path / "tars").mkdir()
    files = sorted(image_folder.rglob("*.JPEG")) * 2
    write_shards(tmp_path / "tars", [file.read_bytes() for file in files[:48]], 8)
    return tmp_path / "tars"


def write_shards(folder, images, each):
    for start in range(0, len(images), each):
        with tarfile.open(folder / f"part-{start:03}.tar", "w") as tar:
            for i, data in enumerate(images[start : start + each], start):
                member = tarfile.TarInfo(f"{i:03}.jpg")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))


class Seen:
    """The micro-batches of every step that was begun, by step; calls ``before(step)`` first."""

    def __init__(self, monkeypatch):
        self.steps, self.before, self.first = {}, lambda step: None, 0
        take_step, steps_of = module.train_step, BatchStream.steps

        def recording_step(loss_of, optimizer, micro_batches, *rest):
            batches = list(micro_batches)
            step = self.first + self.taken
            self.taken += 1
            self.before(step)
            self.steps[step] = [(images.clone(), ids.clone()) for images, ids in batches]
            return take_step(loss_of, optimizer, iter(batches), *rest)

        def recording_steps(stream, first, end):
            self.first, self.taken = first, 0
            return steps_of(stream, first, end)

        monkeypatch.setattr(module, "train_step", recording_step)
        monkeypatch.setattr(BatchStream, "steps", recording_steps)


def run_with_stops(seen, config, stops, decoders=("threads",)):
    """Runs to the end; stopped by a signal in each of the steps ``stops``, gone on with the next decoder."""
    for number, stop in enumerate([*stops, None]):
        seen.before = lambda step, stop=stop: os.kill(os.getpid(), signal.SIGUSR1) if step == stop else None
        this_time = replace(config, resume="auto", image_decoder=decoders[number % len(decoders)])
        assert pretrain(this_time) == (0 if stop is None else EXIT_INTERRUPTED)


@pytest.mark.parametrize("stops", INTERRUPTED, ids=str)
def test_a_scattered_order_goes_on_where_it_was(tars, tmp_path, monkeypatch, stops, record_property):
    seen = Seen(monkeypatch)
    run_with_stops(seen, small_run(str(tars), tmp_path / "whole", **TINY), [])
    whole, seen.steps = seen.steps, {}
    assert open_train(str(tars)).shards.window == 16
    run_with_stops(seen, small_run(str(tars), tmp_path / "parts", **TINY), stops)
    assert seen.steps.keys() == whole.keys() == set(range(24))
    for step, batches in whole.items():
        for (images, ids), (images_too, ids_too) in zip(batches, seen.steps[step], strict=True):
            assert torch.equal(images, images_too)
            assert torch.equal(ids, ids_too)
    assert_same_run(tmp_path / "whole", tmp_path / "parts")
    record_property("interruptions", len(stops))


def test_a_crash_in_any_step_loses_nothing_of_a_scattered_order(tars, tmp_path, monkeypatch):
    seen = Seen(monkeypatch)
    config = small_run(str(tars), tmp_path / "run", **TINY, resume="auto")

    def crash(step):
        raise RuntimeError("power cut")

    for steps_before in (3, 6, 2):
        left = iter([None] * steps_before)
        seen.before = lambda step, left=left: next(left, "crash") == "crash" and crash(step)
        with pytest.raises(RuntimeError, match="power cut"):
            pretrain(config)
    seen.before = lambda step: None
    assert pretrain(config) == 0
    assert pretrain(replace(config, output_dir=str(tmp_path / "whole"))) == 0
    assert_same_run(tmp_path / "whole", tmp_path / "run")


@pytest.mark.parametrize("stops", INTERRUPTED[1:], ids=str)
def test_the_decoder_may_change_on_the_way(tars, tmp_path, monkeypatch, stops, record_property):
    """The masks are the same bits; the images are as near as two decoders are, so crops and flips are the same."""
    pytest.importorskip("nvidia.dali", reason="DALI is not installed (the extra `dali`)")
    seen = Seen(monkeypatch)
    run_with_stops(seen, small_run(str(tars), tmp_path / "pool", **TINY), [])
    pool, seen.steps = seen.steps, {}
    run_with_stops(seen, small_run(str(tars), tmp_path / "both", **TINY), stops, ("dali-cpu", "threads"))
    assert seen.steps.keys() == pool.keys()
    for step, batches in pool.items():
        for (images, ids), (images_too, ids_too) in zip(batches, seen.steps[step], strict=True):
            assert torch.equal(ids, ids_too)
            difference = (images.int() - images_too.int()).abs()
            assert difference.float().mean() <= 0.5
            assert difference.max() <= 24
    record_property("interruptions", len(stops))


@pytest.mark.parametrize("accum_iter", [1, 2])
@pytest.mark.parametrize("repeated_masks", [1, 2])
def test_ranks_see_one_order_from_any_step_on(tars, tmp_path, accum_iter, repeated_masks):
    source = open_train(str(tars))
    view = View((16, 16), Reading(3), seed=3, scale=(0.2, 1.0), flip=True)

    def crops(ranks, start):
        """(draw_ids, images) of steps ``start`` to 14, 4 an epoch: each global step's, in the order of the ranks."""
        by_rank = []
        for rank in range(ranks):
            run = SimpleNamespace(
                config=SimpleNamespace(accum_iter=accum_iter, num_workers=2, pin_mem=False),
                context=DistContext(rank, ranks, CPU),
                steps=Steps(per_epoch=4, total=14, between_checkpoints=14),
                log=SimpleNamespace(loading=LoadingStats()),
                quarantine=Quarantine(tmp_path / "quarantine.jsonl"),
                changed=ChangedImages(len(source)),
            )
            stream = BatchStream(
                run,
                source,
                seed=3,
                crops=12 // ranks // accum_iter // repeated_masks,
                view_of=lambda epoch: view,
                to_inputs=lambda batch: (batch.draw_ids, batch.images),
            )
            by_rank.append([pair for _, micro_batches in stream.steps(start, 14) for pair in micro_batches])
            assert run.log.loading.images == len(by_rank[-1]) * 12 // ranks // accum_iter // repeated_masks
            again = list(stream.at(start))
            assert len(again) == accum_iter
            for micro_batch, same in zip(again, by_rank[-1][:accum_iter], strict=True):
                assert all(map(torch.equal, micro_batch, same))
        # Ranks take turns within a micro-step, micro-steps within a step.
        return [torch.cat(parts) for parts in zip(*(pair for pairs in zip(*by_rank, strict=True) for pair in pairs),
                                                  strict=True)]  # fmt: skip

    ids, images = crops(1, 0)
    assert len(ids) == 14 * 12 // repeated_masks
    for epoch in range(3):
        of_epoch = ids[epoch * 48 // repeated_masks : (epoch + 1) * 48 // repeated_masks]
        assert len(set(of_epoch.tolist())) == len(of_epoch)
    for ranks in (2, 3):
        if 12 // ranks // accum_iter % repeated_masks:
            continue
        for start in (0, 5):
            skipped = start * 12 // repeated_masks
            ids_too, images_too = crops(ranks, start)
            assert torch.equal(ids_too, ids[skipped:])
            assert torch.equal(images_too, images[skipped:])


@pytest.mark.parametrize("cache_gb", [None, 2e-5], ids=["all fits", "little fits"])
def test_a_cache_changes_nothing(tars, tmp_path, capsys, cache_gb):
    config = small_run(str(tars), tmp_path / "none", **TINY)
    assert pretrain(config) == 0
    assert pretrain(replace(config, output_dir=str(tmp_path / "ram"), cache="ram", cache_gb=cache_gb)) == 0
    assert_same_run(tmp_path / "none", tmp_path / "ram")
    lines = capsys.readouterr().out.splitlines()
    (line,) = [line for line in lines if line.startswith("cache ")]
    assert ("decoded images in memory" if cache_gb is None else "as many as fit") in line


def test_other_shards_are_refused_and_said_so(tars, tmp_path):
    config = small_run(str(tars), tmp_path / "run", **TINY, resume="auto")
    assert pretrain(replace(config, epochs=1)) == 0
    images = [open_train(str(tars)).read(i) for i in range(48)]
    for file in tars.glob("*.tar"):
        file.unlink()
    write_shards(tars, images, 12)
    with pytest.raises(
        UserError, match=r"was made with other train data: .* has other contents or sizes of part-000.tar"
    ):
        pretrain(replace(config, epochs=2))


def test_settings_that_change_the_steps_are_refused(blobs, tmp_path):
    config = small_run(blobs, tmp_path / "run", epochs=1)
    assert pretrain(config) == 0
    for change in (dict(keep_last=True), dict(repeated_masks=2)):
        with pytest.raises(UserError, match=f"was made with {next(iter(change))}"):
            pretrain(replace(config, resume="auto", **change))


def test_keep_last_trains_on_every_image(blobs, tmp_path, monkeypatch):
    seen = Seen(monkeypatch)
    for keep_last, steps in ((False, 4), (True, 5)):
        seen.steps = {}
        config = small_run(blobs, tmp_path / str(keep_last), epochs=1, batch_size=16, keep_last=keep_last)
        assert pretrain(replace(config, crop_scale=(1.0, 1.0))) == 0
        assert len(seen.steps) == steps
        shown = {image.numpy().tobytes() for batches in seen.steps.values() for image in batches[0][0]}
        assert len(shown) == (72 if keep_last else 64)
    with pytest.raises(UserError, match=r"--batch_size 100 is more than the 72 images .*, or use --keep_last"):
        pretrain(small_run(blobs, tmp_path / "more", batch_size=100))


def test_repeated_masks_share_a_crop_and_take_as_many_steps(blobs, tmp_path, monkeypatch):
    seen = Seen(monkeypatch)
    config = small_run(blobs, tmp_path / "run", epochs=2, repeated_masks=4, accum_iter=2, checkpoint_freq=5)
    run_with_stops(seen, config, [7])
    assert sorted(seen.steps) == list(range(36))  # 72 images · 4 masks / 16 rows, twice
    masks = []
    for batches in seen.steps.values():
        for images, ids in batches:
            assert len(images) == len(ids) == 8
            for crop in images.unflatten(0, (2, 4)):
                assert (crop == crop[0]).all()
            assert not torch.equal(images[0], images[4])
            masks += ids.tolist()
    assert len(np.unique(masks, axis=0)) == len(masks)
    one = replace(config, output_dir=str(tmp_path / "whole"))
    assert pretrain(one) == 0
    assert_same_run(tmp_path / "run", tmp_path / "whole")


def test_a_number_of_masks_that_does_not_divide_the_batch_is_refused(blobs, tmp_path, capsys):
    words = ["pretrain", "--data_path", blobs, "--output_dir", str(tmp_path), "--batch_size", "6"]
    assert main([*words, "--repeated_masks", "4"]) == 2
    assert "--repeated_masks 4: must be a divisor of --batch_size 6" in capsys.readouterr().err
