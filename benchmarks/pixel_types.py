"""How fast images of 8 bits, 16 bits and floats are loaded from .npy files, at equal pixels and in turns.

    python -m fastmae.benchmarks.pixel_types

Every image is read, cropped at random and resized as in training. A copy of the uint8 file comes first and last in each
round, so that the difference of two equal things is known. Before times are taken, the crops of the three types are
compared: they hold the same picture.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from fastmae.data.loader import View, default_workers, load_batches
from fastmae.data.plan import plan_epoch
from fastmae.data.reading import Reading
from fastmae.data.sources import Source, describe, open_train

IMAGES, SIDE, CROP, BATCH, ROUNDS = 512, 256, 224, 64, 7
TYPES = ("uint8", "uint16", "float32", "uint8 again")


def write(folder: Path, channels: int) -> dict[str, Source]:
    """Writes the same squares of 8×8 pixels in every type, none so dark or bright that a crop clips, and opens it."""
    rng = np.random.default_rng(0)
    coarse = rng.integers(64, 192, (IMAGES, SIDE // 8, SIDE // 8, channels), np.uint8)
    pixels = coarse.repeat(8, axis=1).repeat(8, axis=2)
    for name in ("uint8", "uint16", "float32"):
        np.save(folder / f"{name}.npy", pixels.astype(name) * (257 if name == "uint16" else 1))
    return {name: open_train(str(folder / f"{name.split()[0]}.npy")) for name in TYPES}


def load(source: Source, view: View, images: int = IMAGES) -> torch.Tensor:
    """Loads an epoch and returns the last batch."""
    plan = plan_epoch(0, 0, images, BATCH)
    requests = (plan.batch(number) for number in range(len(plan)))
    last = torch.empty(0)
    for batch in load_batches(source, requests, view, device=torch.device("cpu"), num_workers=default_workers()):
        last = batch.images
    return last


def main() -> None:
    """Prints a table of images per second, and of what is that of uint8."""
    print(f"{IMAGES} images of {SIDE}×{SIDE}, crops of {CROP}×{CROP}, {default_workers()} threads, medians of {ROUNDS}")
    for channels in (1, 3):
        with tempfile.TemporaryDirectory() as folder:
            sources = write(Path(folder), channels)
            readings = {
                name: Reading(channels, dtype=describe(source).pixels.dtype) for name, source in sources.items()
            }
            views = {name: View((CROP, CROP), readings[name], seed=0, scale=(0.2, 1.0), flip=True) for name in sources}
            crops = {name: load(source, views[name]).to(torch.float32) for name, source in sources.items()}
            assert (crops["uint8"] - crops["uint16"] / 257).abs().max() <= 4, "16 bits are another picture"
            assert (crops["float32"].clamp(0, 255) - crops["uint16"] / 257).abs().max() < 0.01, "floats are another one"
            rates: dict[str, list[float]] = {name: [] for name in sources}
            for _ in range(ROUNDS):
                for name, source in sources.items():
                    started = time.perf_counter()
                    load(source, views[name])
                    rates[name].append(IMAGES / (time.perf_counter() - started))
            for name, found in rates.items():
                share = statistics.median(one / other for one, other in zip(found, rates["uint8"], strict=True))
                print(f"{channels} channels  {name:12} {statistics.median(found):8,.0f} images/s  {share:.2f} of uint8")


if __name__ == "__main__":
    main()
