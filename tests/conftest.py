"""What several tests share."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image


@pytest.fixture(autouse=True)
def _no_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)


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


@pytest.fixture
def png() -> bytes:
    """The bytes of a small picture."""
    buffer = io.BytesIO()
    Image.fromarray(np.arange(48, dtype=np.uint8).reshape(4, 4, 3)).save(buffer, format="PNG")
    return buffer.getvalue()
