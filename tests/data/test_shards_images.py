"""The JPEGs of benchmarks/images.py: as large as ImageNet's, the same each time, and one line for what is wrong."""

import io
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from helpers import environment
from PIL import Image
from tools import make_images

from fastmae.benchmarks.images import ImagesConfig, make_jpeg, write_images
from fastmae.data.sources import open_train
from fastmae.errors import UserError

ROOT = Path(__file__).parents[2]


def test_sizes_are_those_of_imagenet():
    made = [make_jpeg(0, i) for i in range(40)]
    sizes = np.array([len(data) for data in made])
    assert 88_000 < sizes.mean() < 132_000
    assert sizes.std() > 10_000
    assert len({*made}) == 40
    image = Image.open(io.BytesIO(made[0]))
    assert (image.format, image.mode, image.size) == ("JPEG", "RGB", (500, 375))


def test_the_spectrum_falls_as_that_of_photographs_does():
    """Amplitude falls with about the first power of the frequency (Field 1987)."""
    pixels = [np.asarray(Image.open(io.BytesIO(make_jpeg(0, i))).convert("L"), float)[:, :375] for i in range(6)]
    amplitude = np.mean([np.abs(np.fft.fft2(p - p.mean())) for p in pixels], axis=0)
    frequency = 375 * np.hypot(np.fft.fftfreq(375)[:, None], np.fft.fftfreq(375)[None, :])
    among = (frequency > 4) & (frequency < 120)
    slope = np.polyfit(np.log(frequency[among]), np.log(amplitude[among]), 1)[0]
    assert -1.5 < slope < -0.8


def test_an_image_depends_on_seed_and_number_alone(tmp_path):
    assert make_jpeg(0, 3, 20, 30) == make_jpeg(0, 3, 20, 30)
    assert make_jpeg(0, 3, 20, 30) != make_jpeg(1, 3, 20, 30)
    write_images(ImagesConfig(folder=tmp_path / "x", count=5, classes=2, height=20, width=30))
    source = open_train(str(tmp_path / "x"))
    assert [source.read(i) for i in range(5)] == [make_jpeg(0, i, 20, 30) for i in range(5)]
    assert source.labels.tolist() == [0, 0, 0, 1, 1]


def test_the_command(tmp_path, monkeypatch, capsys):
    words = [str(ROOT / "tests/tools/make_images.py"), "--folder", str(tmp_path / "x"), "--count", "3", "--kind", "tar"]
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True, env=environment(), cwd="/")
    assert done.returncode == 0, done.stderr
    assert len(open_train(str(tmp_path / "x"))) == 3
    monkeypatch.setattr(sys, "argv", words)
    assert make_images.main() == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "name a new or empty folder" in error


def test_what_cannot_be_is_said(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="--count 0: must be at least 1"):
        write_images(ImagesConfig(folder=tmp_path / "x", count=0))
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UserError, match="pip install"):
        write_images(ImagesConfig(folder=Path(tmp_path / "x"), kind="parquet"))
    assert not (tmp_path / "x").exists()
