"""Signals are remembered from the beginning, in the process of the run alone, and what is ignored stays ignored."""

import os
import signal
import subprocess
import sys
import time

import pytest

from fastmae.cli import main
from fastmae.signals import EXIT_INTERRUPTED, SIGNALS, StopSignals, remembered
from fastmae.train import recovery


@pytest.fixture(autouse=True)
def _signals_as_in_a_terminal():
    """What runs in the background has SIGINT ignored, and under nohup SIGHUP."""
    before = {number: signal.signal(number, signal.SIG_DFL) for number in SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", SIGNALS)
def test_the_first_signal_is_remembered_and_later_ones_change_nothing(number):
    before = [signal.getsignal(number) for number in SIGNALS]
    with StopSignals() as stop:
        for sent in (number, signal.SIGTERM, signal.SIGHUP):
            signal.raise_signal(sent)  # to this thread, so that it is handled at once
        assert stop.received == signal.Signals(number).name
    assert [signal.getsignal(number) for number in SIGNALS] == before


def test_an_ignored_signal_stays_ignored():
    for number in (signal.SIGHUP, signal.SIGINT):
        before = signal.signal(number, signal.SIG_IGN)
        try:
            with StopSignals() as stop:
                signal.raise_signal(number)
                assert stop.received is None
        finally:
            signal.signal(number, before)


def test_a_forked_child_takes_signals_as_if_there_were_no_run():
    reading, writing = os.pipe()
    with StopSignals() as stop:
        child = os.fork()
        if not child:
            os.write(writing, b"x")
            time.sleep(20)
            os._exit(0)
        os.read(reading, 1)  # Python itself forgets signals that come while it forks
        os.kill(child, signal.SIGTERM)
        assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGTERM
        assert stop.received is None


def test_a_signal_before_the_run_begins_stops_it_at_its_beginning(blobs, tmp_path, monkeypatch, capsys):
    def checked(*settings):
        signal.raise_signal(signal.SIGTERM)  # before anything of the run listens

    monkeypatch.setattr(recovery, "check_sinks", checked)
    words = ["--data_path", blobs, "--output_dir", str(tmp_path / "run"), "--device", "cpu"]
    assert main(["pretrain", *words]) == EXIT_INTERRUPTED
    assert capsys.readouterr().err == (
        "fastmae: stopped by SIGTERM before the run began; nothing was changed: run the same command again\n"
    )
    assert not (tmp_path / "run").exists()
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_what_was_remembered_is_known_to_the_run():
    with remembered(), remembered():
        signal.raise_signal(signal.SIGHUP)
        with StopSignals() as stop:
            assert stop.received == "SIGHUP"
    with StopSignals() as stop:
        assert stop.received is None


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1])
def test_a_signal_while_pytorch_is_imported_ends_with_the_status_of_a_stopped_run(blobs, tmp_path, number):
    """It comes as soon as the process has opened the first file of PyTorch."""
    words = ["pretrain", "--data_path", blobs, "--output_dir", str(tmp_path / "run"), "--device", "cpu"]
    process = subprocess.Popen([sys.executable, "-m", "fastmae", *words], stderr=subprocess.PIPE, text=True, cwd="/")
    while "libtorch" not in open(f"/proc/{process.pid}/maps").read():  # noqa: SIM115
        assert process.poll() is None
    process.send_signal(number)
    _, err = process.communicate(timeout=120)
    assert process.returncode == EXIT_INTERRUPTED, err
    assert "Traceback" not in err
