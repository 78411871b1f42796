"""Messages go to a logger: as lines on stderr from the command line, as a program wants them from Python."""

import logging
import os
import subprocess
import sys

import pytest

from fastmae.cli import main
from fastmae.files import JsonLines
from fastmae.messages import logger, messages_on_stderr


@pytest.fixture
def as_in_python():
    """Without what tests/conftest.py attaches for the others."""
    handlers, propagate = logger.handlers[:], logger.propagate
    logger.handlers.clear()
    logger.propagate = True
    yield
    logger.handlers[:], logger.propagate = handlers, propagate


def test_the_command_line_shows_a_warning_once_with_its_name(as_in_python, capsys):
    with messages_on_stderr(), messages_on_stderr():
        logger.warning("%d images", 3)
        logger.info("not shown")
    assert capsys.readouterr().err == "fastmae: 3 images\n"
    assert not logger.handlers
    assert logger.propagate


def test_a_program_gets_records(as_in_python, caplog, tmp_path):
    lines = JsonLines(tmp_path / "no folder" / "metrics.jsonl")
    lines.add([{"step": 1}])
    assert [(record.name, record.levelno) for record in caplog.records] == [("fastmae", logging.WARNING)]
    assert "cannot be written" in caplog.text


def test_by_default_a_program_shows_warnings():
    code = "import logging, fastmae.messages as m; m.logger.warning('a disk is full'); m.logger.info('step 1')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd="/", check=True)
    assert done.stderr == "a disk is full\n"


def test_what_a_run_says_is_logged_for_those_who_want_it(as_in_python, caplog, blobs, tmp_path):
    caplog.set_level(logging.INFO, logger="fastmae")
    words = ["--epochs", "1", "--warmup_epochs", "0", "--no_probe", "--output_dir", str(tmp_path / "run")]
    assert "RANK" not in os.environ
    assert main(["pretrain", "--data_path", blobs, *words]) == 0
    assert not caplog.records  # the command line's messages are for its screen alone
    import fastmae

    settings = dict(epochs=1, warmup_epochs=0, probe=False, batch_size=32)
    assert fastmae.pretrain(blobs, output_dir=tmp_path / "python", **settings).status == 0
    assert any(record.getMessage().startswith("reconstruction ") for record in caplog.records)
