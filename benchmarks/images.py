"""Photograph-like JPEGs to read and decode, as class folders, tar shards or Parquet files, when no data set is at hand.

`fastmae bench loader`, `end-to-end` and `all` make their images here; tests/tools/make_images.py writes others.

A 500×375 image is a pile of coloured leaves under a 1/f texture, so it has the edges and the spectrum of photographs;
stored at quality 90 to 95 it takes about 110 KB, as ImageNet's do. Image i is a function of (seed, i) alone, for one
version of NumPy and libjpeg.
"""

from __future__ import annotations

import functools
import io
import os
import tarfile
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
import simplejpeg
from PIL import Image, ImageDraw

from fastmae.errors import UserError

HEIGHT, WIDTH = 375, 500
LEAVES = 24
GROUP_ROWS = 100


@dataclass(frozen=True, kw_only=True)
class ImagesConfig:
    """Make photograph-like JPEGs of 500×375 pixels and about 110 KB."""

    folder: Path
    """Where to write; must be empty or not there yet."""
    count: int = 1000
    """How many images."""
    kind: Literal["folder", "tar", "parquet"] = "folder"
    """train/CLASS/*.jpg, part-000000.tar …, or train-00000-of-00001.parquet …; the same images with the same labels."""
    classes: int = 10
    """Labels, of about as many images each, in ascending order."""
    shard: int = 1000
    """Images in a tar or Parquet file."""
    height: int = HEIGHT
    """In pixels."""
    width: int = WIDTH
    """In pixels."""
    seed: int = 0
    """Of the images."""


def make_jpeg(seed: int, index: int, height: int = HEIGHT, width: int = WIDTH) -> bytes:
    """Image ``index``, as the bytes of a JPEG."""
    random = np.random.default_rng([seed, index])
    # Every image has its own contrast of texture, so that sizes differ as those of photographs do.
    texture = _textures(random, height, width) * random.uniform(12, 42)
    light = np.float32(random.uniform(90, 150)) + _leaves(random, height, width) + texture
    pixels = np.clip(light, 0, 255).astype(np.uint8)
    quality = int(random.integers(90, 96))
    return simplejpeg.encode_jpeg(np.ascontiguousarray(pixels), quality=quality, colorsubsampling="420")


@functools.lru_cache(4)
def _fall_off(height: int, width: int) -> np.ndarray:
    """1/f over the frequencies of a real image, without its mean: float32 [height, width // 2 + 1]."""
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None, :])
    frequency[0, 0] = np.inf
    return (1 / frequency).astype(np.float32)


def _textures(random: np.random.Generator, height: int, width: int) -> np.ndarray:
    """1/f noise of deviation about 1: float32 [height, width, 3], the channels alike but not the same."""
    fall_off = _fall_off(height, width)
    noise = random.standard_normal((3, *fall_off.shape, 2), dtype=np.float32).view(np.complex64)[..., 0]
    planes = np.fft.irfft2(noise * fall_off, s=(height, width), axes=(1, 2))
    planes /= planes.std(axis=(1, 2), keepdims=True)
    # Most of what differs in a photograph is light, not colour.
    mixed = 0.9 * planes[:1] + 0.3 * planes
    return mixed.transpose(1, 2, 0).astype(np.float32)


def _leaves(random: np.random.Generator, height: int, width: int) -> np.ndarray:
    """Overlapping ellipses and triangles, the large ones behind: float32 [height, width, 3] around 0."""
    canvas = Image.new("RGB", (width, height), (128, 128, 128))
    draw = ImageDraw.Draw(canvas)
    for radius in np.sort(random.pareto(1.5, LEAVES))[::-1]:
        size = min(0.05 + 0.1 * radius, 0.5) * width
        x, y = random.uniform(0, width), random.uniform(0, height)
        light = random.uniform(60, 196)
        colour = tuple(int(c) for c in np.clip(light + random.normal(0, 18, 3), 0, 255))
        if random.random() < 0.5:
            draw.ellipse((x - size, y - size * random.uniform(0.4, 1), x + size, y + size * 0.7), fill=colour)
        else:
            draw.polygon([(x + dx, y + dy) for dx, dy in random.uniform(-size, size, (3, 2)).tolist()], fill=colour)
    return np.asarray(canvas, np.float32) - 128


def write_images(config: ImagesConfig, made: Iterable[bytes] | None = None) -> None:
    """Writes the images of ``config``, which may have been ``made`` before (``make_jpegs``).

    Raises:
        UserError: a number that cannot be, a folder that is not empty, or no pyarrow for Parquet.
    """
    for flag in ("count", "classes", "shard", "height", "width"):
        if getattr(config, flag) < 1:
            raise UserError(f"--{flag} {getattr(config, flag)}: must be at least 1")
    if config.folder.exists() and (not config.folder.is_dir() or any(config.folder.iterdir())):
        raise UserError(f"{config.folder}: is there already; name a new or empty folder")
    write: Callable[[ImagesConfig, Iterator[tuple[int, int, bytes]]], None]
    write = {"folder": _write_folder, "tar": _write_tar, "parquet": _write_parquet}[config.kind]
    if config.kind == "parquet":
        _pyarrow()
    config.folder.mkdir(parents=True, exist_ok=True)
    jpegs = make_jpegs(config) if made is None else made
    write(config, ((index, index * config.classes // config.count, data) for index, data in enumerate(jpegs)))


def make_jpegs(config: ImagesConfig) -> Iterator[bytes]:
    """All images in order, made by all cores, a few ahead of what is asked for."""
    workers = len(os.sched_getaffinity(0))
    make = functools.partial(make_jpeg, config.seed, height=config.height, width=config.width)
    indices = iter(range(config.count))
    with ThreadPoolExecutor(workers) as pool:
        while some := list(islice(indices, 8 * workers)):
            yield from pool.map(make, some)


def _write_folder(config: ImagesConfig, images: Iterator[tuple[int, int, bytes]]) -> None:
    for index, label, data in images:
        path = config.folder / "train" / f"class-{label:04d}" / f"{index:08d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)


def _write_tar(config: ImagesConfig, images: Iterator[tuple[int, int, bytes]]) -> None:
    number = 0
    while some := list(islice(images, config.shard)):
        with tarfile.open(config.folder / f"part-{number:06d}.tar", "w", format=tarfile.USTAR_FORMAT) as archive:
            for index, label, data in some:
                for suffix, content in (("cls", str(label).encode()), ("jpg", data)):
                    member = tarfile.TarInfo(f"{index:08d}.{suffix}")
                    member.size = len(content)
                    archive.addfile(member, io.BytesIO(content))
        number += 1


def _write_parquet(config: ImagesConfig, images: Iterator[tuple[int, int, bytes]]) -> None:
    pa, pq = _pyarrow()
    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    schema = pa.schema([("image", image), ("label", pa.int64())])
    files = -(-config.count // config.shard)
    for number in range(files):
        path = config.folder / f"train-{number:05d}-of-{files:05d}.parquet"
        with pq.ParquetWriter(path, schema, compression="none") as writer:
            left = config.shard
            while left and (some := list(islice(images, min(left, GROUP_ROWS)))):
                rows = [
                    {"image": {"bytes": data, "path": f"{index:08d}.jpg"}, "label": label}
                    for index, label, data in some
                ]
                writer.write_table(pa.Table.from_pylist(rows, schema))
                left -= len(some)


def _pyarrow() -> tuple[Any, Any]:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise UserError("Parquet files need pyarrow; run pip install 'fastmae[parquet]'") from error
    return pa, pq
