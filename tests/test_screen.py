"""What is shown: names of files harm no screen, and a screen that is gone, full or blocked harms no run."""

import errno
import io
import os
import threading
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from fastmae.cli import main
from fastmae.evaluate.features import Features, save_features
from fastmae.evaluate.pictures import confusion_picture, grid_picture
from fastmae.messages import logger
from fastmae.screen import OutputLostError, Stream, complain, open_console, printable, safe_streams, say, show_table
from fastmae.train.metrics import Screen

NAMES = {
    "cat[old]": "cat[old]",
    "dog[/]": "dog[/]",
    "[bold]x": "[bold]x",
    "\x1b[2Jclear": "\\x1b[2Jclear",
    "two\nlines": "two\\nlines",
    "\u202egnp.jpg": "\\u202egnp.jpg",
    "caf\udce9": "caf\\xe9",
    ":smile:": ":smile:",
    "c:\\a": "c:\\a",
}


class Failing(io.StringIO):
    """A stream that fails with an error after it has taken so many texts."""

    def __init__(self, number: int, takes: int = 0) -> None:
        super().__init__()
        self.number, self.takes, self.asked = number, takes, 0

    def write(self, text: str) -> int:
        self.asked += 1
        if self.asked > self.takes:
            raise OSError(self.number, os.strerror(self.number))
        return super().write(text)


# --- names ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "shown"), list(NAMES.items()))
def test_a_name_is_shown_as_it_is_and_what_is_not_printable_is_escaped(name, shown, capsys):
    assert printable(name) == shown
    say(name)
    complain(f"{name}: is broken")
    show_table({"name": "left", name: "right"}, [(name, 1), None, (name, name)], title=name)
    open_console().print(printable(name))
    out, err = capsys.readouterr()
    assert out.splitlines()[0] == out.splitlines()[-1] == shown
    assert out.count(shown) >= 7
    assert err == f"fastmae: {shown}: is broken\n"
    assert "\x1b" not in out + err
    assert "\u202e" not in out + err


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_every_text_goes_to_a_terminal_of_any_encoding(encoding):
    file = io.BytesIO()
    stream = Stream(io.TextIOWrapper(file, encoding))
    stream.write("8×8 … 写真 \udcff\n")
    expected = {"ascii": b"8x8 ... \\u5199\\u771f \\xff\n", "latin-1": b"8\xd78 ... \\u5199\\u771f \\xff\n"}
    assert file.getvalue() == expected.get(encoding, "8×8 … 写真 \\xff\n".encode())


def test_names_are_drawn_and_kept_whatever_they_are(tmp_path):
    names, image = list(NAMES), np.zeros((8, 8, 1), np.uint8)
    picture = grid_picture([[image]] * len(names), names[4], names, [[name] for name in names])
    plain = grid_picture([[image]] * len(names), printable(names[4]), [*map(printable, names)], [[n] for n in names])
    assert picture.tobytes() == plain.tobytes()
    table = np.eye(len(names), dtype=int)
    assert confusion_picture({"k-NN": table}, names, names[5]).size == (
        confusion_picture({"k-NN": table}, [*map(printable, names)], printable(names[5])).size
    )
    source = SimpleNamespace(labels=None, name=names.__getitem__)
    features = Features(torch.zeros(9, 2), np.arange(9), ())
    save_features(tmp_path / "f.npz", source, features)
    assert np.load(tmp_path / "f.npz")["names"].tolist() == names
    pytest.importorskip("pyarrow")
    save_features(tmp_path / "f.parquet", source, features)
    import pyarrow.parquet

    kept = pyarrow.parquet.read_table(tmp_path / "f.parquet")["names"].to_pylist()
    assert kept == [name if "\udce9" not in name else "caf\\xe9" for name in names]


def test_a_folder_that_safetensors_cannot_write_into_is_refused_at_the_start(refusal):
    assert "--output_dir caf\\xe9: must be a path in UTF-8" in refusal(["pretrain", "--output_dir", "caf\udce9"])
    words = ["export", "run", "--to", "onnx", "--output", "caf\udce9.onnx"]
    assert "--output caf\\xe9.onnx: must be a path in UTF-8" in refusal(words)


# --- lost streams -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [errno.EPIPE, errno.ENOSPC, errno.EIO, errno.EBADF])
def test_a_stream_that_fails_is_silent_from_then_on_or_raises_where_its_text_is_the_result(number):
    failing = Failing(number, takes=1)
    stream = Stream(failing)
    for _ in range(5):
        assert stream.write("text") == 4
    assert (failing.getvalue(), failing.asked) == ("text", 2)
    must_show = Stream(Failing(number), must_show=True)
    for _ in range(2):  # whoever catches the first one meets the next
        with pytest.raises(OutputLostError, match=os.strerror(number)) as raised:
            must_show.write("text")
        assert raised.value.reader_left == (number == errno.EPIPE)


def test_a_stream_that_is_none_or_closed_takes_everything_in_silence():
    closed = io.StringIO()
    closed.close()
    for stream in (None, closed):
        assert Stream(stream).write("text") == 4
        assert not Stream(stream).isatty()
        with pytest.raises(OutputLostError):
            Stream(stream, must_show=True).write("text")


def test_a_blocked_pipe_is_waited_for_once_and_shows_again_what_comes_when_it_is_read(monkeypatch):
    monkeypatch.setattr("fastmae.screen.PATIENCE", 0.05)
    reading, writing = os.pipe()
    os.set_blocking(reading, False)
    with open(writing, "w") as file:
        stream, lines = Stream(file), 0
        while stream.shown:
            stream.write("x" * 1000 + "\n")
            lines += 1
        for _ in range(1000):  # would take a minute if each of them waited
            stream.write("not shown\n")
        taken = b""
        while len(taken) < 1000 * (lines - 1):
            taken += os.read(reading, 1 << 20)
        stream.write("shown again\n")
        assert stream.shown
        assert os.read(reading, 1 << 20).endswith(b"shown again\n")
    os.close(reading)


def test_a_result_waits_for_a_slow_reader():
    reading, writing = os.pipe()
    os.set_blocking(writing, False)  # as a terminal that another program has left so
    got = []

    def read() -> None:
        with open(reading) as file:
            got.append(file.read())

    reader = threading.Timer(0.1, read)
    reader.start()
    with open(writing, "w") as file:
        stream = Stream(file, must_show=True)
        for number in range(3000):
            stream.write(f"{number:099}\n")
    reader.join()
    assert got[0].split() == [f"{number:099}" for number in range(3000)]


def test_the_end_of_python_has_nothing_left_to_write(monkeypatch):
    """A stream that failed leads nowhere afterwards; otherwise Python would fail with status 120."""
    with open("/dev/full", "w") as full:
        monkeypatch.setattr("sys.stdout", full)
        with safe_streams(must_show=False):
            print("text")
        full.flush()


def test_lines_and_warnings_that_a_lost_screen_did_not_take_are_kept(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.stdout", Failing(errno.EPIPE, takes=1))
    monkeypatch.setattr("sys.stderr", Failing(errno.EPIPE, takes=1))
    with safe_streams(must_show=False):
        unseen = tmp_path / "unseen.txt"
        with Screen(total_steps=9, epochs=1, images_per_step=1, start_step=0, shows=True, unseen=unseen) as screen:
            screen.say("shown")
            logger.warning("shown, too")
            assert not unseen.exists()
            screen.say("one\ntwo")
            logger.warning("a disk is full")
    assert unseen.read_text() == "one\\ntwo\na disk is full\n"


# --- the command line -------------------------------------------------------------------------------------------------


def test_a_run_goes_on_to_its_end_without_a_screen(blobs, tmp_path, monkeypatch):
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(f"sys.{name}", Failing(errno.EPIPE, takes=1))
    words = ["--epochs", "1", "--warmup_epochs", "0", "--no_probe", "--batch_size", "36", "--device", "cpu"]
    assert main(["pretrain", "--data_path", blobs, "--output_dir", str(tmp_path / "run"), *words]) == 0
    assert (tmp_path / "run" / "checkpoint-0.pth").exists()
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 2
    unseen = (tmp_path / "run" / "unseen.txt").read_text().splitlines()
    assert any(line.startswith("masks  ") for line in unseen)
    assert any(line.startswith("checkpoint  ") for line in unseen)


def test_a_result_that_cannot_be_shown_is_an_error_unless_its_reader_has_seen_enough(monkeypatch, capsys):
    for number, status in ((errno.ENOSPC, 1), (errno.EIO, 1), (errno.EPIPE, 0)):
        for words in (["info"], ["info", "--json"], ["--help"], ["--version"]):
            monkeypatch.setattr("sys.stdout", Failing(number))
            assert main(words) == status
            err = capsys.readouterr().err
            assert err.startswith("fastmae: stdout takes no more (") == bool(status)
            assert err.count("\n") == status


def test_verify_does_not_call_usable_what_it_has_not_checked(blobs, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdout", Failing(errno.EPIPE, takes=1))
    assert main(["verify", "--data_path", blobs]) == 1
    assert capsys.readouterr().err == ""
