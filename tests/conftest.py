"""What several tests share."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastmae.messages import messages_on_stderr


def pytest_configure() -> None:
    """Lets no run measure what is fastest, here or in a process that a test starts: results would depend on it.

    SIGINT interrupts, as tests expect; a shell ignores it for commands that it starts in the background.
    """
    os.environ["FASTMAE_TUNE"] = "off"
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def _no_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(autouse=True)
def _messages_as_on_the_command_line() -> Iterator[None]:
    with messages_on_stderr():
        yield


@pytest.fixture
def refusal(capsys: pytest.CaptureFixture[str]) -> Callable[[Sequence[str]], str]:
    """Gives the command line words that it must refuse, with status 2 and one line, which is returned."""
    from fastmae.cli import main

    def refuse(words: Sequence[str]) -> str:
        assert main(words) == 2
        lines = capsys.readouterr().err.strip().splitlines()
        assert len(lines) == 1, lines
        assert lines[0].startswith("fastmae: ")
        return lines[0]

    return refuse


@pytest.fixture
def image_folder(tmp_path: Path) -> Path:
    """train/ and val/ with two classes of smooth colour JPEGs, 12 and 4 a class."""
    root = tmp_path / "photos"
    rng = np.random.default_rng(0)
    for part, count in (("train", 12), ("val", 4)):
        for label, name in enumerate(("n01", "n02")):
            (root / part / name).mkdir(parents=True)
            for i in range(count):
                small = rng.integers(0, 120, (6, 8, 3), dtype=np.uint8) + np.uint8(120 * label)
                picture = Image.fromarray(small).resize((80, 60), Image.Resampling.BICUBIC)
                picture.save(root / part / name / f"{i}.JPEG", quality=92)
    return root


@pytest.fixture(scope="session")
def blobs(tmp_path_factory: pytest.TempPathFactory) -> str:
    """An .npz of 96 gray 16×16 images of three classes (bright blobs in different places), 72 of them to train on."""
    rng = np.random.default_rng(0)
    labels = np.arange(96) % 3
    y, x = np.mgrid[:16, :16]
    centres = np.array([[4, 4], [8, 12], [12, 5]])[labels] + rng.normal(0, 1, (96, 2))
    distance = (y - centres[:, :1, None]) ** 2 + (x - centres[:, 1:, None]) ** 2
    images = (230 * np.exp(-distance / 12) + rng.integers(0, 25, (96, 16, 16))).astype(np.uint8)
    path = tmp_path_factory.mktemp("data") / "blobs.npz"
    np.savez(path, x_train=images[:72], y_train=labels[:72], x_test=images[72:], y_test=labels[72:])
    return str(path)
