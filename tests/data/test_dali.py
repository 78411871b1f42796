"""DALI beside the threads: the same pixels up to another resampler, the same replacements, no thread left."""

import io
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import command, environment
from PIL import Image

pytest.importorskip("nvidia.dali", reason="DALI is not installed (the extra `dali`)")

from fastmae.cli import main
from fastmae.data import reading, sample
from fastmae.data.decode import decode, plain_jpeg_shape
from fastmae.data.decoders import dali
from fastmae.data.decoders.dali import DaliDecoder, DaliError, Encoded, graph
from fastmae.data.loader import View, load_batches
from fastmae.data.plan import Box, crop_draws, plan_epoch, random_box
from fastmae.data.reading import Reading
from fastmae.data.resize import crop_and_resize
from fastmae.data.sources import open_train
from fastmae.errors import UserError
from fastmae.signals import EXIT_INTERRUPTED

CPU = torch.device("cpu")
DEVICES = [
    "cpu",
    pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")),
]
# Of a photograph, decoded and resized: mean and largest difference in grey levels. GPUs decode JPEG a little otherwise.
TOLERANCE = {"cpu": (0.3, 3), "cuda": (1.0, 12)}
TRAIN = View((32, 48), Reading(3), seed=7, scale=(0.2, 1.0), flip=True)


def photo(seed=0, height=150, width=200, mode="RGB"):
    """Smooth shapes under fine detail, as photographs have them."""
    rng = np.random.default_rng(seed)
    pixels = np.zeros((height, width, 3), np.float32)
    for octave in range(1, 6):
        small = rng.normal(0, 1, (3, 2**octave, 2**octave)).astype(np.float32)
        layers = [Image.fromarray(layer).resize((width, height), Image.Resampling.BICUBIC) for layer in small]
        pixels += np.stack([np.asarray(layer) for layer in layers], axis=2) * 0.6**octave
    pixels = 120 + 50 * pixels / pixels.std()
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).convert(mode)


def encoded(image, file_format="JPEG", **options):
    buffer = io.BytesIO()
    image.save(buffer, format=file_format, **options)
    return buffer.getvalue()


def rotated_by_exif():
    exif = Image.Exif()
    exif[0x0112] = 6
    return encoded(photo(3), exif=exif, quality=92)


PLAIN = {
    "baseline": encoded(photo(), quality=95),
    "no subsampling": encoded(photo(1), quality=90, subsampling=0),
    "progressive": encoded(photo(2, 151, 203), progressive=True, quality=90),
    "turned by EXIF": rotated_by_exif(),
    "gray": encoded(photo(4, mode="L"), quality=90),
    "restart markers": encoded(photo(5), quality=90, restart_marker_rows=1),
    "one pixel": encoded(Image.new("RGB", (1, 1), (9, 99, 199)), quality=95),
}
OTHER = {
    "empty": b"",
    "text": b"a text, not an image",
    "cut": encoded(photo(6))[:-900],
    "magic and end": b"\xff\xd8\xff\xe0 and nothing in between \xff\xd9",
    "cmyk": encoded(photo(7, mode="CMYK"), quality=92),
    "16 bits": encoded(Image.fromarray(np.arange(0, 65536, 16, dtype=np.uint16).reshape(64, 64)), "PNG"),
    "alpha": encoded(photo(8).convert("RGBA"), "PNG"),
    "gif": encoded(photo(9), "GIF"),
    "end in front of an end": encoded(photo(10)) + b"appended",
}


def batch_of(names, seed=0):
    draws = crop_draws(seed, np.arange(len(names)))
    batch = []
    for i, name in enumerate(names):
        height, width = plain_jpeg_shape(PLAIN[name], Reading(3))
        batch.append(Encoded(PLAIN[name], random_box(draws[i], height, width, (0.2, 1.0)), flip=i % 2 == 0))
    return batch


def by_threads(batch, size, in_chans):
    images = [crop_and_resize(decode(one.data, Reading(in_chans)), one.box, one.flip, size) for one in batch]
    return np.stack(images).astype(int)


def decoder_on(device, size=(64, 56), in_chans=3, batch_size=8):
    return DaliDecoder(size, in_chans, batch_size=batch_size, num_threads=2, device=torch.device(device))


def threads():
    return len(os.listdir("/proc/self/task"))


@pytest.fixture
def folder(tmp_path):
    """All of PLAIN and OTHER as files, and one that is missing."""
    for i, data in enumerate([*PLAIN.values(), *OTHER.values(), *PLAIN.values()]):
        (tmp_path / f"{i:02}.jpg").write_bytes(data)
    source = open_train(str(tmp_path))
    (tmp_path / "03.jpg").unlink()
    return source


def load(source, decoder, view=TRAIN, batch_size=5):
    plan = plan_epoch(0, 0, len(source), batch_size)
    requests = (plan.batch(k) for k in range(len(plan)))
    return load_batches(source, requests, view, device=CPU, num_workers=2, decoder=decoder)


def compare(source, view=TRAIN):
    """Asserts that threads and DALI give the same batches within the tolerance, and returns DALI's."""
    ours, other = list(load(source, "threads", view)), list(load(source, "dali-cpu", view))
    assert len(ours) == len(other) > 1
    mean, largest = TOLERANCE["cpu"]
    for a, b in zip(ours, other, strict=True):
        assert torch.equal(a.draw_ids, b.draw_ids)
        assert a.skipped == b.skipped
        difference = (a.images.int() - b.images.int()).abs()
        assert difference.float().mean() <= mean
        assert difference.max() <= largest
    return other


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("in_chans", [1, 3])
def test_a_batch_is_that_of_the_threads(device, in_chans):
    decoder = decoder_on(device, in_chans=in_chans)
    batches = [batch_of(PLAIN), batch_of(list(PLAIN)[:3], seed=1), batch_of(list(PLAIN)[3:], seed=2)]
    for batch in batches:
        decoder.schedule(batch)
    results = [decoder.collect() for _ in batches]  # all of them alive at once: none may lie in another's memory
    for batch, got in zip(batches, results, strict=True):
        assert (got.dtype, got.device.type) == (torch.uint8, device)
        difference = abs(got.cpu().numpy().astype(int) - by_threads(batch, (64, 56), in_chans))
        assert difference.mean() <= TOLERANCE[device][0]
        assert difference.max() <= TOLERANCE[device][1]


def test_the_header_decides_which_files_go_to_dali():
    assert {name: plain_jpeg_shape(data, Reading(3)) for name, data in PLAIN.items()} == {
        **dict.fromkeys(PLAIN, (150, 200)), "progressive": (151, 203), "one pixel": (1, 1)
    }  # fmt: skip
    assert {name: plain_jpeg_shape(data, Reading(3)) for name, data in OTHER.items()} == dict.fromkeys(OTHER)
    assert plain_jpeg_shape(PLAIN["baseline"], Reading(4)) is None


@pytest.mark.parametrize("in_chans", [1, 3])
def test_every_kind_of_file_is_loaded_replaced_and_reported_as_by_the_threads(folder, in_chans):
    batches = compare(folder, View((32, 48), Reading(in_chans), seed=7, scale=(0.2, 1.0), flip=True))
    assert {bad.name[-6:] for batch in batches for bad in batch.skipped} >= {"03.jpg", "08.jpg", "09.jpg", "10.jpg"}
    assert not any(batch.redone for batch in batches)
    compare(folder, View((32, 48), Reading(in_chans)))


def test_a_batch_that_dali_fails_on_is_redone_by_the_threads_and_the_next_are_dalis(folder, monkeypatch):
    right = sample.plain_jpeg_shape

    def credulous(data, reading):
        return (150, 200) if data == OTHER["cut"] else right(data, reading)

    monkeypatch.setattr(sample, "plain_jpeg_shape", credulous)
    redone = [batch.redone for batch in compare(folder)]
    assert any("Failed to decode" in reason for reason in redone)
    assert not all(redone)
    assert all(len(reason.splitlines()) <= 1 for reason in redone)


def test_a_batch_without_a_plain_jpeg_is_left_to_the_threads(tmp_path):
    for i in range(20):
        (tmp_path / f"{i:02}.png").write_bytes(OTHER["alpha"])
    for a, b in zip(*(load(open_train(str(tmp_path)), name) for name in ("threads", "dali-cpu")), strict=True):
        assert torch.equal(a.images, b.images)


def test_a_failure_costs_the_batches_behind_it_nothing():
    decoder = decoder_on("cpu")
    good, bad = batch_of(PLAIN), [Encoded(b"\xff\xd8\xff junk", Box(0, 0, 9, 9), False)]
    before = threads()
    for batch in (good, bad, good):
        decoder.schedule(batch)
    first = decoder.collect()
    with pytest.raises(DaliError):
        decoder.collect()
    assert torch.equal(decoder.collect(), first)
    decoder.schedule(good)
    assert torch.equal(decoder.collect(), first)
    assert threads() <= before  # the first pipeline ended


def fields(message):
    """Returns the fields of a protobuf message, as DALI writes graphs: number and value, bytes or int, in order."""
    at, pairs = 0, []

    def varint():
        nonlocal at
        value = shift = 0
        while True:
            byte, at = message[at], at + 1
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value

    while at < len(message):
        key = varint()
        if key & 7 == 0:
            value = varint()
        else:
            length = {1: 8, 5: 4}.get(key & 7) or varint()
            value, at = message[at : at + length], at + length
        pairs.append((key >> 3, value))
    return pairs


@pytest.mark.parametrize("in_chans", [1, 3])
def test_the_graph_for_a_gpu_can_be_made_without_one_and_stays_on_it_from_the_decoder_on(in_chans):
    places = {}
    for message in (value for number, value in fields(graph((32, 48), in_chans, 8, 2, "mixed", None).serialize())
                    if number == 5):  # fmt: skip
        operator = fields(message)
        (name,) = (value.decode() for number, value in operator if number == 1)
        inputs, outputs = ([dict(fields(value))[2].decode() for number, value in operator if number == n]
                           for n in (2, 3))  # fmt: skip
        places.setdefault(name, []).append((inputs, outputs))
    assert places == {
        "ExternalSource": [([], ["cpu"])] * 4,
        "decoders__Image": [(["cpu"], ["gpu"])],
        "Slice": [(["gpu", "cpu", "cpu"], ["gpu"])],
        "Resize": [(["gpu"], ["gpu"])],
        "Flip": [(["gpu", "cpu"], ["gpu"])],
    }


def test_threads_and_neighbours_change_nothing():
    one = DaliDecoder((64, 56), 3, batch_size=8, num_threads=1, device=CPU)
    four = DaliDecoder((64, 56), 3, batch_size=8, num_threads=4, device=CPU)
    batch = batch_of(PLAIN)
    one.schedule(batch)
    four.schedule(batch[::-1])
    assert torch.equal(one.collect(), four.collect().flip(0))


def test_too_many_pixels_are_refused_unread(folder, monkeypatch):
    monkeypatch.setattr(reading, "MAX_PIXELS", 150 * 200)
    batches = compare(folder)
    assert "203×151 pixels" in "".join(bad.reason for batch in batches for bad in batch.skipped)


def test_dali_that_cannot_start_is_one_line(folder, monkeypatch):
    def broken(*_, **__):
        raise RuntimeError("no\nluck")

    monkeypatch.setattr("nvidia.dali.Pipeline", broken)
    with pytest.raises(
        UserError, match=r"image_decoder='dali-cpu': DALI cannot start \(no; luck\); use image_decoder='threads'"
    ):
        next(load(folder, "dali-cpu"))


def test_leaving_early_leaves_no_thread(folder):
    list(load(folder, "dali-cpu"))  # libraries start threads of their own once
    before = threads()
    iterator = load(folder, "dali-cpu")
    next(iterator)
    assert threads() > before
    iterator.close()
    deadline = time.monotonic() + 5
    while threads() > before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert threads() <= before


LOOP = """
import signal, sys
import numpy as np, torch
from fastmae.data.loader import View, load_batches
from fastmae.data.reading import Reading
from fastmae.data.resize import crop_and_resize
from fastmae.data.sources import open_train
signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended by SIGTERM"))
source = open_train(sys.argv[1])
requests = ((np.arange(8), np.arange(8)) for _ in range(10**9))
view = View((224, 224), Reading(3), seed=0, scale=(0.2, 1.0))
for n, batch in enumerate(load_batches(source, requests, view, device=torch.device("cpu"), num_workers=2,
                                       decoder=sys.argv[2])):
    if n == 3:
        print("running", flush=True)
"""


@pytest.mark.parametrize("decoder", ["threads", "dali-cpu"])
@pytest.mark.parametrize(("number", "words"), [("SIGINT", "KeyboardInterrupt"), ("SIGTERM", "ended by SIGTERM")])
def test_a_signal_ends_the_process(folder, decoder, number, words):
    line = [sys.executable, "-c", LOOP, str(Path(folder.paths[0]).parent), decoder]
    process = subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == "running\n"
        process.send_signal(signal.Signals[number])
        _, complaint = process.communicate(timeout=60)
    finally:
        process.kill()
    assert words in complaint
    assert process.returncode in (1, -signal.SIGINT)  # and of no crash on the way out


def test_sigterm_in_a_run_saves_and_ends_it(image_folder, tmp_path):
    words = command(
        str(image_folder),
        tmp_path / "run",
        decoder="dali-cpu",
        epochs=10_000,
        model="mae_vit_tiny_patch4",
        input_size=16,
    )
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment())
    try:
        deadline = time.monotonic() + 120
        while not list((tmp_path / "run").glob("checkpoints/step-*")):
            assert process.poll() is None, process.communicate()[1]
            assert time.monotonic() < deadline, "no step was done"
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        out, complaint = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == EXIT_INTERRUPTED, complaint
    assert "SIGTERM" in out
    assert "Traceback" not in complaint


def test_pretraining_uses_dali_and_reports_what_it_failed_on(image_folder, tmp_path, capsys, monkeypatch):
    right, calls = DaliDecoder._outputs, []

    def fails_once(self):
        calls.append(1)
        if len(calls) == 2:
            raise RuntimeError("bad luck")
        return right(self)

    monkeypatch.setattr(DaliDecoder, "_outputs", fails_once)
    words = ["--data_path", str(image_folder), "--output_dir", str(tmp_path / "run"), "--device", "cpu"]
    words += ["--model", "mae_vit_tiny_patch4", "--input_size", "16", "--batch_size", "8", "--epochs", "1"]
    assert main(["pretrain", *words, "--probe", "False", "--image_decoder", "dali-cpu", "--num_workers", "1"]) == 0
    out = capsys.readouterr().out
    assert f"decoding        dali-cpu (asked for): NVIDIA DALI {dali.version()} on the CPU" in out
    assert "DALI failed on a batch, which the threads decoded instead: bad luck" in out
    assert "batches that DALI failed on and the threads decoded instead: 1" in out
    assert len(calls) == 3
    assert "dali-cpu (asked for)" in (tmp_path / "run" / "environment.jsonl").read_text()


def test_dali_never_holds_more_batches_than_it_may(folder, monkeypatch):
    """DALI never holds more than AHEAD batches."""
    held, most = [0], [0]
    right_schedule, right_collect = DaliDecoder.schedule, DaliDecoder.collect

    def schedule(self, batch):
        held[0] += 1
        most[0] = max(most[0], held[0])
        return right_schedule(self, batch)

    def collect(self):
        held[0] -= 1
        return right_collect(self)

    monkeypatch.setattr(DaliDecoder, "schedule", schedule)
    monkeypatch.setattr(DaliDecoder, "collect", collect)
    list(load(folder, "dali-cpu", batch_size=2))
    assert held == [0]
    assert 1 <= most[0] <= dali.AHEAD
