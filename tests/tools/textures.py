"""Small labelled pictures of ten textures, to learn features from when no data set is at hand.

    python tests/tools/textures.py FILE.npz --count 4000

Each is one texture of random place, period, tilt, contrast and sign over four colours that run into each other, under
noise. On average no pixel is brighter in one class than in another. Image i is a function of (seed, i) alone, for one
version of NumPy. The last fifth is the test part.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, BinaryIO

import numpy as np
import tyro

from fastmae.errors import UserError
from fastmae.files import write_whole

SIDE = 32
TILT = np.pi / 9
PERIODS = (4.5, 12)  # pixels
TEST_SHARE = 0.2
MIN_COUNT = 20

Texture = Callable[[np.ndarray, np.ndarray], np.ndarray]
"""Of places (x, y), in which 2π is a period, somewhere on the plane: brightness, about -1 to 1."""


@dataclass(frozen=True, kw_only=True)
class TexturesConfig:
    """Make an .npz of 32×32 colour pictures of ten textures, with labels and a test part."""

    file: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="FILE.npz")]
    """Where to write; must not be there yet."""
    count: int = 4000
    """How many pictures, as many of each texture; a fifth of them are the test part."""
    seed: int = 0
    """Of the pictures."""


def _zigzag(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.sin(y + 2 * np.abs((x / np.pi) % 2 - 1))


TEXTURES: tuple[tuple[str, Texture], ...] = (
    ("lying stripes", lambda x, y: np.sin(y)),
    ("standing stripes", lambda x, y: np.sin(x)),
    ("rising stripes", lambda x, y: np.sin((x + y) / np.sqrt(2))),
    ("falling stripes", lambda x, y: np.sin((x - y) / np.sqrt(2))),
    ("checks", lambda x, y: np.sign(np.sin(x)) * np.sign(np.sin(y))),
    ("dots", lambda x, y: np.clip(2 * (np.sin(x) + np.sin(y)) - 1.5, -1, 1)),
    ("grid", lambda x, y: 2 * np.maximum(np.cos(x / 2) ** 8, np.cos(y / 2) ** 8) - 1),
    ("zigzag", _zigzag),
    ("bricks", lambda x, y: 2 * np.maximum(np.cos(y) ** 8, np.cos(x / 2 + (np.sin(y) > 0) * np.pi / 2) ** 16) - 1),
    ("waves", lambda x, y: np.sin(y + 1.5 * np.sin(x / 2)) * np.sin(x / 2)),
)


def make_texture(seed: int, index: int) -> np.ndarray:
    """Picture ``index``, uint8 [SIDE, SIDE, 3], of texture ``index % 10``."""
    random = np.random.default_rng([seed, index])
    _, texture = TEXTURES[index % len(TEXTURES)]
    turn, finer = random.uniform(-TILT, TILT), 2 * np.pi / random.uniform(*PERIODS)
    across, down = np.arange(SIDE)[None, :] * finer, np.arange(SIDE)[:, None] * finer
    x = across * np.cos(turn) - down * np.sin(turn) + random.uniform(0, 100)
    y = across * np.sin(turn) + down * np.cos(turn) + random.uniform(0, 100)
    # Four corners' colours that run into each other, and a contrast that may go either way.
    corners = random.uniform(100, 155) + random.normal(0, 15, (2, 2, 3))
    along = np.linspace(0, 1, SIDE)[:, None]
    rows = (1 - along)[..., None] * corners[0] + along[..., None] * corners[1]  # [SIDE, 2, 3]
    ground = (1 - along) * rows[:, None, 0] + along * rows[:, None, 1]
    contrast = random.choice([-1, 1]) * random.uniform(15, 40) + random.normal(0, 5, 3)
    light = ground + texture(x, y)[..., None] * contrast + random.normal(0, random.uniform(8, 20), ground.shape)
    return np.clip(np.round(light), 0, 255).astype(np.uint8)


def write_textures(config: TexturesConfig) -> None:
    """Writes x_train, y_train, x_test and y_test.

    Raises:
        UserError: too few pictures, another ending, or a file that is there or cannot be written.
    """
    if config.count < MIN_COUNT:
        raise UserError(f"--count {config.count}: must be at least {MIN_COUNT}")
    if config.file.suffix != ".npz":
        raise UserError(f"{config.file}: must end in .npz")
    if config.file.exists():
        raise UserError(f"{config.file}: is there already; name another file")
    images = np.stack([make_texture(config.seed, index) for index in range(config.count)])
    labels = np.arange(config.count) % len(TEXTURES)
    train = config.count - round(TEST_SHARE * config.count)

    def write(file: BinaryIO) -> None:
        np.savez(file, x_train=images[:train], y_train=labels[:train], x_test=images[train:], y_test=labels[train:])

    try:
        config.file.parent.mkdir(parents=True, exist_ok=True)
        write_whole(config.file, write)
    except OSError as error:
        raise UserError(f"{config.file}: cannot be written ({error}); name another file") from error


def main() -> int:
    """Reads the command line; 0, or 2 for what is wrong with it."""
    try:
        write_textures(tyro.cli(TexturesConfig, prog="python tests/tools/textures.py"))
    except UserError as error:
        print(f"textures.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
