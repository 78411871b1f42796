"""A run says what it did to images that no sample of its start held, and does nothing to them that nobody asked for."""

import json

import numpy as np
import pytest
from helpers import small_run
from PIL import Image

from fastmae.config import PretrainConfig
from fastmae.errors import SettingError
from fastmae.train.pretrain import pretrain

SMALL = dict(model="mae_vit_tiny_patch4", input_size=(8, 8), epochs=2, tune="off", batch_size=20, max_corrupt=0.5)
STRAY = 49
"""Not among the 64 evenly spaced of 80 images."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """80 images of 8 bits, of which one has 16."""
    path, random = tmp_path_factory.mktemp("strays"), np.random.default_rng(0)
    for number in range(80):
        pixels = random.integers(0, 256, (8, 8), np.uint8).astype(np.uint16 if number == STRAY else np.uint8)
        Image.fromarray(pixels * (257 if number == STRAY else 1)).save(path / f"{number:02}.png")
    return path


def test_a_stray_image_of_16_bits_is_listed_as_unusable_where_nobody_asked_for_8(folder, tmp_path, capsys):
    """And the settings of the run say so, so that a run that goes on and all that reads its checkpoint do the same."""
    pretrain(small_run(str(folder), tmp_path / "run", **SMALL))
    (listed,) = map(json.loads, (tmp_path / "run" / "quarantine.jsonl").read_text().splitlines())
    assert listed["index"] == STRAY
    assert "set pixel_type to uint16 to keep them, or to uint8 for their upper 8 bits" in listed["reason"]
    kept = json.loads((tmp_path / "run" / "config.json").read_text())
    assert (kept["pixel_type"], kept["other_types"]) == ("uint8", "skip")
    printed = capsys.readouterr().out
    assert "changed" not in printed
    assert "1 unusable image" in printed
    resumed = small_run(str(folder), tmp_path / "run", **SMALL | {"epochs": 3}, resume="auto", pixel_type="uint8")
    pretrain(resumed)
    assert json.loads((tmp_path / "run" / "config.json").read_text())["other_types"] == "skip"
    with pytest.raises(SettingError, match="other_types"):
        pretrain(small_run(str(folder), tmp_path / "run", **SMALL, resume="auto", other_types="convert"))


def test_8_bits_that_are_asked_for_are_taken_and_told_once_with_the_number_and_what_to_do(folder, tmp_path, capsys):
    pretrain(small_run(str(folder), tmp_path / "run", **SMALL, pixel_type="uint8"))
    assert not (tmp_path / "run" / "quarantine.jsonl").exists()
    assert json.loads((tmp_path / "run" / "config.json").read_text())["other_types"] == "convert"
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("changed")]
    assert "1 image of 16 bits among uint8: only their upper 8 bits are used; --pixel_type=uint16 keeps all" in line
    assert line.endswith(f"{STRAY}.png)")


def test_either_can_be_asked_for_whatever_the_type():
    assert PretrainConfig(pixel_type="uint8", other_types="skip").other_types == "skip"
    with pytest.raises(SettingError, match="other_types"):
        PretrainConfig(other_types="drop")
