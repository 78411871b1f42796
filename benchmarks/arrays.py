"""How fast are images read from HDF5 and Zarr, beside the same images in an .npy file, and by h5py and zarr alone?

    python -m fastmae.benchmarks.arrays [noise|ct|photo]

Each source is read by threads in the order of an epoch, twice: the pixels alone (`read`), and as a run reads them, that
is cropped and resized by the thread decoder (`load`). All of them take turns, and their images are compared before the
clock. Files are in the page cache. By the libraries alone each image is one `array[i]`, as in a plain Dataset.
"""

from __future__ import annotations

import itertools
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from fastmae.benchmarks import harness
from fastmae.data.plan import crop_draws, plan_epoch
from fastmae.data.reading import Reading
from fastmae.data.sample import View, load_sample
from fastmae.data.sources import open_train
from fastmae.facts import PixelType
from fastmae.ops.allocator import keep_freed_memory

IMAGES, SIDE, CHUNK = 1024, 224, 16
THREADS, ROUNDS, BASE = 2, 5, ".npy"


def pictures(kind: str) -> np.ndarray:
    """Returns images, on which the speed of a codec depends.

    `noise` are 12-bit pictures with the noise of a camera, `ct` 12-bit slices of a body in air, as a scanner gives
    them, and `photo` crops of the two photographs of scikit-learn, in colour and 8 bits.
    """
    rng = np.random.default_rng(0)
    if kind == "photo":
        from sklearn.datasets import load_sample_images

        photos = load_sample_images().images
        places = zip(rng.integers(0, 200, IMAGES), rng.integers(0, 400, IMAGES), strict=True)
        return np.stack([photos[n % 2][y : y + SIDE, x : x + SIDE] for n, (y, x) in enumerate(places)])
    rows, columns = np.mgrid[0:SIDE, 0:SIDE]
    waves = rng.uniform(0.01, 0.1, (IMAGES, 2, 1, 1))
    wave = np.sin(waves[:, 0] * rows) * np.cos(waves[:, 1] * columns)
    if kind == "ct":
        radius = np.hypot((rows - SIDE / 2) / 100, (columns - SIDE / 2) / 80)
        body = np.where(radius < 1, 1040 + 60 * wave + rng.normal(0, 10, wave.shape), rng.normal(24, 6, wave.shape))
        images = np.where(abs(radius - 0.95) < 0.03, 2200 + rng.normal(0, 30, wave.shape), body)
    else:
        images = 2000 + 1500 * wave + rng.normal(0, 12, wave.shape)
    return images.clip(0, 4095).astype(np.uint16)


def write(folder: Path, images: np.ndarray) -> dict[str, str]:
    """Writes images into every format."""
    import h5py
    import zarr

    chunk = (CHUNK, *images.shape[1:])
    np.save(folder / "x.npy", images)
    paths = {BASE: str(folder / "x.npy")}
    plain: dict[str, dict[str, Any]] = {
        "HDF5, one piece": {},
        "HDF5, chunks": {"chunks": chunk},
        "HDF5, gzip and shuffle": {"chunks": chunk, "compression": "gzip", "shuffle": True},
    }
    for number, (name, options) in enumerate(plain.items()):
        with h5py.File(folder / f"{number}.h5", "w") as file:
            file.create_dataset("images", data=images, **options)
        paths[name] = str(folder / f"{number}.h5")
    codecs: dict[str, dict[str, Any]] = {
        "Zarr, plain": {"compressors": None},
        "Zarr, zstd": {},
        "Zarr, blosc": {"compressors": zarr.codecs.BloscCodec(cname="zstd", shuffle="shuffle")},
    }
    for number, (name, kwargs) in enumerate(codecs.items()):
        array = zarr.create_array(
            folder / f"{number}.zarr", shape=images.shape, chunks=chunk, dtype=images.dtype, **kwargs
        )
        array[:] = images
        paths[name] = str(folder / f"{number}.zarr")
    return paths


def read_epoch(path: str, epoch: int, count: int) -> float:
    """Returns the images a second that threads read in the order of an epoch, with nothing held from before."""
    source = open_train(path)
    order = plan_epoch(0, epoch, len(source), 1, shards=source.shards).order[:count].tolist()
    with ThreadPoolExecutor(THREADS) as pool:
        started = time.perf_counter()
        list(pool.map(source.read, order))
        return count / (time.perf_counter() - started)


def load_epoch(path: str, epoch: int, count: int) -> float:
    """Returns the images a second that threads read, crop and resize in the order of an epoch."""
    source = open_train(path)
    order = plan_epoch(0, epoch, len(source), 1, shards=source.shards).order[:count]
    pixels = np.asarray(source.read(0))
    dtype: PixelType = "uint8" if pixels.dtype == np.uint8 else "uint16"
    view = View((SIDE, SIDE), Reading(pixels.shape[2], dtype=dtype), seed=0, scale=(0.2, 1.0), flip=True)
    draws = crop_draws(0, order)
    with ThreadPoolExecutor(THREADS) as pool:
        outs = [np.empty((SIDE, SIDE, pixels.shape[2]), dtype) for _ in range(THREADS)]
        started = time.perf_counter()
        list(pool.map(lambda n: load_sample(source, int(order[n]), view, draws[n], outs[n % THREADS]), range(count)))
        return count / (time.perf_counter() - started)


def by_library(array: Any, epoch: int, count: int) -> float:
    """Returns the images a second that `array[i]` gives in a full shuffle."""
    order = plan_epoch(0, epoch, array.shape[0], 1).order[:count].tolist()
    started = time.perf_counter()
    for index in order:
        array[index]
    return count / (time.perf_counter() - started)


def main() -> int:
    """Prints the speeds, and returns 1 if a source gives other pixels than the .npy file."""
    import h5py
    import torch
    import zarr

    torch.set_num_threads(1)
    keep_freed_memory()  # as a run does
    kind = sys.argv[1] if len(sys.argv) > 1 else "noise"
    with tempfile.TemporaryDirectory() as folder:
        paths = write(Path(folder), pictures(kind))
        sources = {name: open_train(path) for name, path in paths.items()}
        for name, source in sources.items():
            for index in range(0, IMAGES, 97):
                if not np.array_equal(source.read(index), sources[BASE].read(index)):
                    harness.refuse(f"{name} gives other pixels than {BASE}")
                    return 1
        reads: dict[str, Callable[..., float]] = {}
        for name, path in paths.items():
            reads[f"read {name}"] = partial(read_epoch, path, count=IMAGES)
            reads[f"load {name}"] = partial(load_epoch, path, count=IMAGES)
        gzip, zstd = h5py.File(paths["HDF5, gzip and shuffle"]), zarr.open_array(paths["Zarr, zstd"], mode="r")
        reads["read by h5py alone, gzip and shuffle"] = partial(by_library, gzip["images"], count=64)
        reads["read by zarr alone, zstd"] = partial(by_library, zstd, count=64)
        speeds: dict[str, list[float]] = {name: [] for name in reads}
        for epoch, name in itertools.product(range(ROUNDS), reads):
            speeds[name].append(reads[name](epoch=epoch))
        gzip.close()
    print(f"{kind}, {harness.machine_name(torch.device('cpu'))}, {THREADS} threads, median of {ROUNDS} rounds")
    for name, each in speeds.items():
        base = speeds[f"{name.split()[0]} {BASE}"]
        shares = statistics.median(a / b for a, b in zip(each, base, strict=True))
        print(f"{name:40} {statistics.median(each):10,.0f} images/s   {shares:5.2f} of {BASE}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
