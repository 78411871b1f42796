"""The loader: batches in order for any number of threads, bad images replaced and reported, no thread left."""

import sys
import threading

import numpy as np
import pytest
import torch

from fastmae.cli import main
from fastmae.data.loader import Skipped, View, choose_decoder, load_batches
from fastmae.data.plan import central_box, crop_draws, is_flipped, plan_epoch, random_box
from fastmae.data.quarantine import TOLERATED, Quarantine
from fastmae.data.reading import Reading
from fastmae.data.sample import crops_note
from fastmae.data.sources import ArraySource, open_train
from fastmae.data.statistics import measure
from fastmae.errors import UserError

CPU = torch.device("cpu")
IMAGES = np.random.default_rng(0).integers(0, 256, (40, 20, 24, 3), dtype=np.uint8)
TRAIN = View((16, 16), Reading(3), seed=7, scale=(0.2, 1.0), flip=True)


def batches(source, view=TRAIN, num_workers=2, batch_size=8, epoch=0):
    plan = plan_epoch(0, epoch, len(source), batch_size)
    requests = (plan.batch(k) for k in range(len(plan)))
    return load_batches(source, requests, view, device=CPU, num_workers=num_workers)


def decode_threads():
    return [thread for thread in threading.enumerate() if thread.name.startswith("fastmae-decode")]


def test_threads_change_nothing():
    source = ArraySource(IMAGES, None, "x")
    one, four = (list(batches(source, num_workers=n)) for n in (1, 4))
    assert len(one) == 5
    for a, b in zip(one, four, strict=True):
        assert torch.equal(a.images, b.images)
        assert torch.equal(a.draw_ids, b.draw_ids)
        assert a.images.shape == (8, 16, 16, 3)


def test_an_image_is_its_crop_flipped_or_not():
    source = ArraySource(IMAGES, None, "x")
    batch = next(batches(source, View((20, 24), Reading(3), seed=7, scale=(1.0, 1.0), flip=True), epoch=3))
    for image, draw_id in zip(batch.images, batch.draw_ids.tolist(), strict=True):
        draws = crop_draws(7, np.array([draw_id]))[0]
        assert random_box(draws, 20, 24, (1.0, 1.0), (20, 24)) == central_box(20, 24, (20, 24))
        expected = IMAGES[draw_id - 3 * 40]
        assert np.array_equal(image.numpy(), expected[:, ::-1] if is_flipped(draws) else expected)


def test_an_oblong_model_trains_on_whole_images_of_its_shape_with_a_scale_of_1():
    spectrograms = np.random.default_rng(0).integers(0, 256, (6, 8, 64, 1), dtype=np.uint8)
    view = View((8, 64), Reading(1), seed=7, scale=(1.0, 1.0))
    batch = next(batches(ArraySource(spectrograms, None, "x"), view, batch_size=6))
    assert np.array_equal(batch.images.numpy(), spectrograms[batch.draw_ids.numpy() % 6])


def test_a_note_says_what_crops_do_not_see_of_arrays_and_of_files(image_folder):
    source = ArraySource(np.zeros((3, 256, 32, 1), np.uint8), None, "x")
    assert crops_note(source, (224, 224)) == (
        "images of 256×32 (height×width) on a model of 224×224: a crop sees at most 17% of an image; "
        "give --input_size the images' shape"
    )
    assert crops_note(source, (256, 32)) is None
    files = open_train(str(image_folder))
    assert crops_note(files, (224, 224)) is None
    assert crops_note(files, (32, 256)).startswith("images of 60×80 (height×width) on a model of 32×256: a crop sees")


def test_files_and_arrays_go_the_same_way(image_folder):
    batch = next(batches(open_train(str(image_folder))))
    assert batch.images.dtype == torch.uint8
    assert batch.images.float().std() > 10


def test_bad_images_give_way_to_the_next_and_are_listed_once(image_folder, tmp_path):
    source = open_train(str(image_folder))
    for index in (4, 5):
        with open(source.paths[index], "wb") as file:
            file.write(b"\xff\xd8\xff garbage")
    (image_folder / "train" / "n02" / "0.JPEG").unlink()
    view = View((16, 16), Reading(3))
    loaded = {}
    quarantine = Quarantine(tmp_path / "quarantine.jsonl")
    for _ in range(2):
        for batch in batches(source, view):
            quarantine.add(batch.skipped, good=len(batch.images))
            loaded |= dict(zip(batch.draw_ids.tolist(), batch.images, strict=True))
    assert torch.equal(loaded[4], loaded[6])
    assert torch.equal(loaded[5], loaded[6])
    assert torch.equal(loaded[12], loaded[13])
    assert len(quarantine) == 3
    lines = (tmp_path / "quarantine.jsonl").read_text().splitlines()
    assert len(lines) == 3
    assert source.paths[4] in "".join(lines)
    again = Quarantine(tmp_path / "quarantine.jsonl")
    assert len(again) == 3


def test_nothing_usable_is_an_error_and_leaves_no_thread(tmp_path):
    for i in range(10):
        (tmp_path / f"{i}.png").write_bytes(b"junk")
    with pytest.raises(UserError, match="10 images in a row cannot be used"):
        list(batches(open_train(str(tmp_path))))
    assert not decode_threads()
    with pytest.raises(UserError, match="no image can be decoded"):
        measure(open_train(str(tmp_path)), Reading(1))


def skip(index):
    return Skipped(index, f"{index}.jpg", "cut off")


def test_too_many_unusable_images_stop_the_run_with_examples(tmp_path):
    quarantine = Quarantine(tmp_path / "few.jsonl", max_corrupt=0.01)
    for _ in range(1000):  # always the same: half of a small data set, read again and again
        quarantine.add([skip(i) for i in range(TOLERATED)], good=TOLERATED)
    quarantine = Quarantine(tmp_path / "many.jsonl", max_corrupt=0.01)
    quarantine.add([], good=3000)
    quarantine.add([skip(i) for i in range(30)], good=0)
    with pytest.raises(
        UserError,
        match=r"max_corrupt=0\.01: 31 of 3031 images .* such as 0\.jpg \(cut off\), .*many\.jsonl.*raise max_corrupt",
    ):
        quarantine.add([skip(31)], good=0)
    assert len((tmp_path / "many.jsonl").read_text().splitlines()) == 31
    tolerant = Quarantine(tmp_path / "many.jsonl", max_corrupt=1.0)
    tolerant.add([skip(i) for i in range(50)], good=0)


def test_a_run_stops_when_too_much_is_unusable(image_folder, tmp_path, capsys):
    for i in range(30):
        (image_folder / "train" / "n01" / f"bad{i}.JPEG").write_bytes(b"junk")
    words = ["--data_path", str(image_folder), "--output_dir", str(tmp_path / "run"), "--device", "cpu"]
    words += ["--model", "mae_vit_tiny_patch4", "--input_size", "16", "--batch_size", "8", "--epochs", "2"]
    assert main(["pretrain", *words, "--probe", "False"]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "--max_corrupt 0.01: " in line
    assert "cannot be used" in line
    assert "bad" in line


def test_the_decoder_is_chosen_for_a_reason_or_refused_with_a_remedy(image_folder, monkeypatch):
    cuda, files, arrays = torch.device("cuda"), open_train(str(image_folder)), ArraySource(IMAGES, None, "x")
    monkeypatch.setattr("fastmae.data.decoders.dali.why_not_installed", lambda: "")
    assert choose_decoder("auto", CPU, files, Reading(3)) == ("threads", "the fastest on a CPU")
    assert choose_decoder("auto", cuda, arrays, Reading(4))[0] == "threads"
    assert choose_decoder("dali-gpu", cuda, None, Reading(1)) == ("dali-gpu", "asked for")
    assert choose_decoder("dali-cpu", cuda, files, Reading(3)) == ("dali-cpu", "asked for")
    for asked, device, source, in_chans, match in (
        ("dali-gpu", CPU, files, 3, "the device is cpu; use device='cuda'"),
        ("dali-cpu", CPU, arrays, 3, "arrays, which need no decoding; use image_decoder='threads'"),
        ("dali-cpu", CPU, files, 4, "1 or 3 channels, not 4; use image_decoder='threads'"),
    ):
        with pytest.raises(UserError, match=f"image_decoder='{asked}': .*{match}"):
            choose_decoder(asked, device, source, Reading(in_chans))
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, "nvidia.dali.fn", None)
    with pytest.raises(UserError, match=r"nvidia-dali is not installed; pip install 'fastmae\[dali\]'"):
        choose_decoder("dali-cpu", CPU, files, Reading(3))


def test_leaving_early_leaves_no_thread():
    iterator = batches(ArraySource(IMAGES, None, "x"))
    next(iterator)
    assert decode_threads()
    iterator.close()
    assert not decode_threads()


def test_statistics_are_those_of_the_pixels():
    measured = measure(ArraySource(IMAGES, None, "x"), Reading(3))
    mean, std = measured.mean, measured.std
    pixels = IMAGES.reshape(-1, 3) / 255
    np.testing.assert_allclose(mean, pixels.mean(axis=0), atol=1e-6)
    np.testing.assert_allclose(std, pixels.std(axis=0), atol=1e-6)
    flat = measure(ArraySource(np.zeros((4, 4, 4, 1), np.uint8), None, "x"), Reading(1)).std
    assert flat[0] > 0
