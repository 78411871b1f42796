"""Mutated image files, and what is loaded from them in a process of its own, which a crash may end.

    python tests/damage.py mutants DECODER FIRST LAST [KIND …]
    python tests/damage.py passes DECODER KIND COUNT PASSES

Mutation n of a kind of file is the same for ever, so what a failure names can be tried again alone. Each line of output
says what is done next: the last one, what a crash was in.
"""

from __future__ import annotations

import io
import os
import sys
import tarfile
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from fastmae.benchmarks.images import ImagesConfig, make_jpeg, write_images
from fastmae.data.decode import BadImageError, decode, plain_jpeg_shape
from fastmae.data.loader import Batch, View, load_batches
from fastmae.data.plan import crop_draws, is_flipped, plan_epoch, random_box
from fastmae.data.reading import Reading
from fastmae.data.resize import crop_and_resize
from fastmae.data.sources import FolderSource, Source, open_train

CPU = torch.device("cpu")
HEIGHT, WIDTH = 90, 120
HEADER = 700
"""The first bytes of a JPEG, with its tables, in which half of the mutations are made."""
CHUNK = 12
"""Mutants that are loaded at once, with a whole image after every third."""
BATCH = 8
# Of files that neither the threads nor DALI objects to: they may decode what a flipped bit made of a block differently.
MEAN_DIFFERENCE = 2.0
MEMORY_GROWTH = 1.1


def encoded(image: Image.Image, file_format: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=file_format, **options)
    return buffer.getvalue()


def whole_files() -> dict[str, bytes]:
    """A photograph-like image as every kind of file that has a decoder of its own; the first four can go to DALI."""
    jpeg = make_jpeg(0, 0, HEIGHT, WIDTH)
    image = Image.open(io.BytesIO(jpeg)).convert("RGB")
    return {
        "baseline": jpeg,
        "progressive": encoded(image, "JPEG", quality=90, progressive=True),
        "gray": encoded(image.convert("L"), "JPEG", quality=90),
        "restart": encoded(image, "JPEG", quality=90, restart_marker_rows=1),
        "cmyk": encoded(image.convert("CMYK"), "JPEG", quality=90),
        "png": encoded(image, "PNG"),
        "webp": encoded(image, "WEBP"),
        "tiff": encoded(image, "TIFF", compression="tiff_lzw"),
        "gif": encoded(image, "GIF"),
        "bmp": encoded(image, "BMP"),
    }


def mutated(data: bytes, seed: int) -> bytes:
    """One of several kinds of damage: cut, with and without an end; bits, bytes and runs changed, lost or repeated."""
    random = np.random.default_rng(seed)
    damaged = bytearray(data)
    zone = min(len(data), HEADER if random.random() < 0.5 else len(data))
    position, length = int(random.integers(zone)), int(random.integers(1, 400))
    kind = random.integers(8)
    if kind == 0:
        return data[: int(random.integers(len(data)))]
    if kind == 1:
        return data[: int(random.integers(2, len(data)))] + data[-2:]
    if kind in (2, 3):
        for at in random.integers(zone, size=int(random.integers(1, 9))):
            damaged[at] ^= 1 << int(random.integers(8))
    elif kind == 4:
        damaged[position : position + length] = random.bytes(length)
    elif kind == 5:
        del damaged[position : position + length]
    elif kind == 6:
        damaged[position:position] = damaged[position : position + length]
    else:
        damaged[position : position + 10 * length] = bytes(len(damaged[position : position + 10 * length]))
    # Many decoders are not asked about a file without its end.
    return bytes(damaged[:-2]) + data[-2:] if random.random() < 0.5 else bytes(damaged)


# --- mutants ----------------------------------------------------------------------------------------------------------

VIEW = View((48, 64), Reading(3), seed=5, scale=(0.2, 1.0), flip=True)


def load(source: Source, decoder: str) -> list[Batch]:
    """Loads all samples in order."""
    indices = np.arange(len(source))
    requests = [(indices[i : i + BATCH], indices[i : i + BATCH]) for i in range(0, len(source), BATCH)]
    return list(load_batches(source, iter(requests), VIEW, device=CPU, num_workers=2, decoder=decoder))


def threads_view(data: bytes, draw_id: int) -> np.ndarray | None:
    """The image that the threads make of a file, or None if they refuse it."""
    try:
        pixels = decode(data, VIEW.reading)
    except BadImageError:
        return None
    draws = crop_draws(VIEW.seed, np.array([draw_id]))[0]
    return crop_and_resize(
        pixels, random_box(draws, *pixels.shape[:2], VIEW.scale, VIEW.size), is_flipped(draws), VIEW.size
    )


def is_for_dali(data: bytes) -> bool:
    try:
        return plain_jpeg_shape(data, VIEW.reading) is not None
    except BadImageError:
        return False


def check(files: list[bytes], batches: list[Batch], decoder: str) -> int:
    """Asserts that every image is the file's own or the next usable one's; returns how many were refused."""
    refused = 0
    for batch in batches:
        asks_dali = decoder != "threads" and not batch.redone
        skipped: list[int] = []
        for draw_id, image in zip(batch.draw_ids.tolist(), batch.images.numpy(), strict=True):
            assert (image.shape, image.dtype) == ((*VIEW.size, VIEW.in_chans), np.uint8)
            used = draw_id
            while not (asks_dali and is_for_dali(files[used])) and threads_view(files[used], draw_id) is None:
                used += 1  # the last file is whole
            skipped += range(draw_id, used)
            expected = threads_view(files[used], draw_id)
            if not (asks_dali and is_for_dali(files[used])):
                assert np.array_equal(image, expected), f"sample {draw_id} is not the threads'"
            elif expected is not None:
                difference = abs(image.astype(int) - expected).mean()
                assert difference <= MEAN_DIFFERENCE, f"sample {draw_id} is {difference} levels from the threads'"
        assert [bad.index for bad in batch.skipped] == skipped
        refused += len(skipped)
    return refused


def try_mutants(decoder: str, first: int, last: int, kinds: list[str]) -> None:
    """Loads the mutations ``first`` to ``last`` of the kinds, twice, and asserts what must be so each time."""
    whole = make_jpeg(0, 1, HEIGHT, WIDTH)
    originals = whole_files()
    with tempfile.TemporaryDirectory() as folder:
        paths = tuple(os.path.join(folder, f"{i}.jpg") for i in range(CHUNK + CHUNK // 3))
        source = FolderSource(paths, None, ())

        def try_files(files: list[bytes]) -> int:
            for path, data in zip(paths, files, strict=True):
                Path(path).write_bytes(data)
            batches, again = load(source, decoder), load(source, decoder)
            for one, other in zip(batches, again, strict=True):
                assert torch.equal(one.images, other.images), "not the same pixels when loaded again"
                assert one.skipped == other.skipped
                assert bool(one.redone) == bool(other.redone)
            return check(files, batches, decoder)

        assert try_files([whole] * len(paths)) == 0  # libraries start threads of their own once
        threads, descriptors, memory = count_threads(), count_descriptors(), 0.0
        seeds = range(first, last, CHUNK)
        for kind in kinds:
            refused, started = 0, time.perf_counter()
            for seed in seeds:
                print(f"{decoder} {kind}: mutations {seed} to {seed + CHUNK}", flush=True)
                mutants = [mutated(originals[kind], n) for n in range(seed, seed + CHUNK)]
                files = [file for i in range(0, CHUNK, 3) for file in (*mutants[i : i + 3], whole)]
                refused += try_files(files)
                if kind == kinds[len(kinds) // 2] and seed == seeds[len(seeds) // 2]:
                    memory = resident()
            print(f"{decoder} {kind}: {refused} refusals in {time.perf_counter() - started:.1f} s", flush=True)
        settle(threads)
        assert count_threads() <= threads, f"{count_threads() - threads} threads are left"
        assert count_descriptors() == descriptors, f"{count_descriptors() - descriptors} file descriptors are left"
        assert resident() <= MEMORY_GROWTH * memory, f"{memory:.0f} MB half-way have become {resident():.0f}"


def count_threads() -> int:
    return len(os.listdir("/proc/self/task"))


def count_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def settle(threads: int) -> None:
    """Waits until no more than so many threads are left; those of libraries take a moment to end."""
    deadline = time.monotonic() + 10
    while count_threads() > threads and time.monotonic() < deadline:
        time.sleep(0.01)


def resident() -> float:
    """Memory of this process in MB."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


# --- passes -----------------------------------------------------------------------------------------------------------

DAMAGED_IN = 8


def try_passes(decoder: str, kind: str, count: int, passes: int) -> None:
    """Prints the memory in use after every pass over ``count`` images, of which one in eight is damaged."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "images"
        write_images(ImagesConfig(folder=root, count=count, kind=kind, shard=count // 2, height=HEIGHT, width=WIDTH))
        damage(root, kind)
        source = open_train(str(root))
        refused = 0
        for number in range(passes):
            plan = plan_epoch(0, number, len(source), BATCH, shards=source.shards)
            requests = (plan.batch(k) for k in range(len(plan)))
            for batch in load_batches(source, requests, VIEW, device=CPU, num_workers=2, decoder=decoder):
                refused += len(batch.skipped)
            print(f"{resident():.3f} MB", flush=True)
        assert refused > passes, "no damaged image was met, so nothing was tested"


def damage(root: Path, kind: str) -> None:
    """Overwrites the end of one image in eight, in place: it stays as long as it was."""
    for path in sorted(file for file in root.rglob("*") if file.is_file()):
        if kind == "folder":
            if int(path.stem) % DAMAGED_IN == 0:
                path.write_bytes(path.read_bytes()[:-200] + bytes(200))
        elif kind == "tar":
            with tarfile.open(path) as archive:
                members = [member for member in archive if member.name.endswith(".jpg")]
            overwrite(path, [member.offset_data + member.size - 200 for member in members[::DAMAGED_IN]])
        else:  # uncompressed values lie in the file as they are
            data = path.read_bytes()
            ends = [at for at in range(len(data)) if data.startswith(b"\xff\xd9", at)]
            overwrite(path, [end - 198 for end in ends[::DAMAGED_IN]])


def overwrite(path: Path, positions: list[int]) -> None:
    with open(path, "r+b") as file:
        for position in positions:
            file.seek(position)
            file.write(bytes(200))


def main(task: str, decoder: str, *words: str) -> None:
    if task == "mutants":
        first, last, *kinds = words
        every = list(whole_files())
        try_mutants(decoder, int(first), int(last), kinds or (every if decoder == "threads" else every[:5]))
    else:
        kind, count, passes = words
        try_passes(decoder, kind, int(count), int(passes))


if __name__ == "__main__":
    main(*sys.argv[1:])
