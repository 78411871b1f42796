"""Data sets of every kind, made from a seed, with what is really in them.

    python tests/generated.py FOLDER SEED …

``make(folder, seed)`` makes the same data set for ever: a layout (flat, classes, parts, links, tars, tables, arrays …)
of images of every format and depth, some of them damaged, among files that are no images.
"""

from __future__ import annotations

import io
import os
import sys
import tarfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image

PARTS = {
    "train": ("train", "Train", "TRAIN", "training"),
    "val": ("val", "Val", "VAL", "valid", "validation", "Validation", "test", "Test"),
}
# (suffixes, format of Pillow, modes that it writes)
FORMATS = (
    ((".jpg", ".jpeg", ".JPG", ".JPEG", ".jfif", ".jpe"), "JPEG", ("L", "RGB", "CMYK")),
    ((".png", ".PNG"), "PNG", ("1", "L", "LA", "P", "RGB", "RGBA", "I;16")),
    ((".bmp",), "BMP", ("1", "L", "P", "RGB")),
    ((".tif", ".tiff", ".TIF"), "TIFF", ("1", "L", "RGB", "RGBA", "CMYK", "I;16")),
    ((".gif",), "GIF", ("L", "P")),
    ((".webp",), "WEBP", ("RGB", "RGBA")),
    ((".ppm",), "PPM", ("RGB",)),
    ((".pgm",), "PPM", ("L", "I;16")),
    ((".jp2",), "JPEG2000", ("L", "RGB")),
    ((".avif",), "AVIF", ("RGB",)),
)
DAMAGES = ("empty", "cut", "zeros", "text", "renamed", "pipe", "dangling", "a folder")
OTHERS = {
    "labels.csv": b"file,label\n", "README.md": b"# photos\n", "Thumbs.db": b"\xd0\xcf\x11", "scan.mha": bytes(200),
    "boxes.json": b"{}", "photo.heic": b"\0\0\0\x18ftypheic", "film.mp4": b"\0\0\0\x18ftypmp42", "notes": b"no suffix",
    "old.jpg.bak": b"\xff\xd8\xff", "mask.mat": b"MATLAB", ".DS_Store": b"\0\0\0\1Bud1", "._0.jpg": b"\0\5\x16\7",
}  # fmt: skip


@dataclass
class Made:
    """A data set on a disk, and what is really in it."""

    path: Path
    layout: str = ""
    sound: set[str] = field(default_factory=set)
    """Names of images that can be used for sure: of files their paths, of members ``TAR:MEMBER``."""
    broken: set[str] = field(default_factory=set)
    """Names of what looks like an image and is none."""
    no_files: set[str] = field(default_factory=set)
    """Of those, what is no file at all: pipes, and links that lead nowhere."""
    members: int = 0
    """Files in tars."""
    rows: int = 0
    """Rows of tables."""
    images: int = 0
    """Images in arrays."""
    labels: int = 0
    """Files of labels beside a file of images."""
    wrong: bool = False
    """Whether it must be refused."""


def make(folder: Path, seed: int) -> Made:
    """Makes data set ``seed`` in a folder that exists and is empty."""
    maker = LAYOUTS[seed % len(LAYOUTS)]
    made = Made(folder / "data", maker.__name__.strip("_").replace("_", " "))
    made.path.mkdir()
    maker(made, np.random.default_rng(seed))
    made.broken |= made.no_files
    return made


def files_below(path: Path) -> set[str]:
    """Every file below a path, and every entry that is no folder; a folder that links lead to twice counts once.

    Of what a link leads to, the name is the one that the link gives it.
    """
    if not path.is_dir():
        return {str(path)}
    found: set[str] = set()
    seen: set[str] = set()
    waiting = [str(path)]
    while waiting:
        folder = waiting.pop(0)
        real = os.path.realpath(folder)
        if real in seen:
            continue
        seen.add(real)
        for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
            is_folder = os.path.isdir(entry.path)
            (waiting.append if is_folder else found.add)(entry.path)
    return found


# --- images -----------------------------------------------------------------------------------------------------------


def picture(random: np.random.Generator, mode: str) -> Image.Image:
    """A smooth picture of 12 to 24 pixels a side."""
    height, width = random.integers(12, 25, 2).tolist()
    small = random.integers(0, 256, (3, 4, 3), dtype=np.uint8)
    image = Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)
    if mode == "I;16":
        return Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257)
    return image.convert(mode)


def encoded(random: np.random.Generator, formats: tuple = FORMATS) -> tuple[str, bytes]:
    """(suffix, bytes) of an image of any format and depth; one GIF, TIFF or WebP in three has several frames."""
    suffixes, file_format, modes = formats[int(random.integers(len(formats)))]
    mode = modes[int(random.integers(len(modes)))]
    buffer = io.BytesIO()
    image = picture(random, mode)
    more: dict[str, object] = {}
    if file_format in ("GIF", "TIFF", "WEBP") and mode in ("L", "RGB") and random.random() < 1 / 3:
        more = dict(save_all=True, append_images=[picture(random, mode).resize(image.size) for _ in range(2)])
    image.save(buffer, file_format, **more)
    return suffixes[int(random.integers(len(suffixes)))], buffer.getvalue()


def put_images(made: Made, folder: Path, random: np.random.Generator, count: int | None = None) -> None:
    """Puts 2 to 6 images into a folder, of which one in six is damaged."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(int(random.integers(2, 7)) if count is None else count):
        suffix, data = encoded(random)
        path = folder / f"{number}{'' if random.random() < 0.8 else ' [old]é'}{suffix}"
        if random.random() < 1 / 6 and count is None:
            damage(made, path, data, DAMAGES[int(random.integers(len(DAMAGES)))])
        else:
            path.write_bytes(data)
            made.sound.add(str(path))


def damage(made: Made, path: Path, data: bytes, kind: str) -> None:
    """Puts a damaged image there."""
    if kind == "renamed":  # another format than the name says is still an image
        path.with_suffix(".png").write_bytes(data)
        made.sound.add(str(path.with_suffix(".png")))
    elif kind == "a folder":
        path.mkdir()
        (path / "inside.txt").write_text("a folder with the name of an image")
    elif kind == "pipe":
        os.mkfifo(path)
        made.no_files.add(str(path))
    elif kind == "dangling":
        path.symlink_to("nowhere")
        made.no_files.add(str(path))
    else:
        path.write_bytes({"empty": b"", "cut": data[: len(data) // 3], "zeros": bytes(64), "text": b"<html>"}[kind])
        if kind in ("empty", "zeros", "text"):  # a cut image may still have all its pixels
            made.broken.add(str(path))


def put_others(folder: Path, random: np.random.Generator) -> None:
    """Puts up to three files into a folder that are no images."""
    for name in random.choice(list(OTHERS), int(random.integers(0, 4)), replace=False):
        (folder / str(name)).write_bytes(OTHERS[str(name)])


def spelling(part: str, random: np.random.Generator) -> str:
    return PARTS[part][int(random.integers(len(PARTS[part])))]


# --- layouts ----------------------------------------------------------------------------------------------------------


def _flat(made: Made, random: np.random.Generator) -> None:
    put_images(made, made.path, random)
    put_others(made.path, random)


def _classes(made: Made, random: np.random.Generator) -> None:
    for name in ("cat", "dog [old]", "n01440764")[: int(random.integers(2, 4))]:
        put_images(made, made.path / name, random)
        put_others(made.path / name, random)
    put_others(made.path, random)
    if random.random() < 1 / 3:
        (made.path / "empty").mkdir()


def _parts(made: Made, random: np.random.Generator, root: Path | None = None) -> None:
    root = root or made.path
    for part in ("train", "val"):
        where = root / spelling(part, random)
        for name in ("a", "b") if random.random() < 0.6 else ("",):
            put_images(made, where / name, random)
        put_others(where, random)
    put_others(root, random)


def _parts_one_level_down(made: Made, random: np.random.Generator) -> None:
    _parts(made, random, made.path / "photos-v2")
    put_others(made.path, random)


def _labelled_train_and_plain_test(made: Made, random: np.random.Generator) -> None:
    for name in ("a", "b"):
        put_images(made, made.path / "train" / name, random)
    put_images(made, made.path / "test", random)
    put_others(made.path, random)


def _three_parts(made: Made, random: np.random.Generator) -> None:
    for part in ("train", "val", "test"):
        for name in ("a", "b"):
            put_images(made, made.path / part / name, random)
    put_others(made.path, random)


def _nested(made: Made, random: np.random.Generator) -> None:
    for place in ("2019/spring", "2019/autumn/rolls/1", "2020"):
        put_images(made, made.path / place, random)
        put_others(made.path / place, random)


def _flat_and_folder(made: Made, random: np.random.Generator) -> None:
    put_images(made, made.path, random)
    put_images(made, made.path / "more", random, count=1)
    put_others(made.path, random)


def _links(made: Made, random: np.random.Generator) -> None:
    disk = made.path.parent / "disk"
    put_images(made, disk / "one", random, count=2)
    made.sound = {name.replace(str(disk / "one"), str(made.path / "cat" / "linked")) for name in made.sound}
    put_images(made, made.path / "cat", random)
    put_images(made, made.path / "dog", random)
    (made.path / "cat" / "linked").symlink_to(disk / "one")
    (made.path / "dog" / "round").symlink_to("../dog")
    (made.path / "dog" / "itself.jpg").symlink_to("itself.jpg")
    made.no_files.add(str(made.path / "dog" / "itself.jpg"))


def _hidden(made: Made, random: np.random.Generator) -> None:
    put_images(made, made.path / "a", random)
    put_images(made, made.path / "b", random)
    for name in (".thumbnails", "__MACOSX", "@eaDir"):
        inside = Made(made.path)
        put_images(inside, made.path / "a" / name, random, count=2)
        if name != ".thumbnails":
            made.sound |= inside.sound
    (made.path / ".DS_Store").write_bytes(b"\0\0\0\1Bud1")
    (made.path / "a" / "._0.jpg").write_bytes(b"\0\5\x16\7")


def _run_folder_inside(made: Made, random: np.random.Generator) -> None:
    put_images(made, made.path, random) if random.random() < 0.5 else put_images(made, made.path / "photos", random)
    run = made.path / "runs" / "one"
    (run / "checkpoints" / "step-00000010").mkdir(parents=True)
    (run / "checkpoints" / "step-00000010" / "manifest.json").write_text("{}")
    (run / "reconstructions").mkdir()
    (run / "config.json").write_text('{"model": "mae_vit_tiny_patch4"}')
    (run / "metrics.jsonl").write_text('{"step": 1}\n')
    (run / "log.txt").write_text("{}\n")
    picture(random, "RGB").save(run / "reconstructions" / "epoch-0000.png")


def _nothing(made: Made, random: np.random.Generator) -> None:
    made.wrong = True
    put_others(made.path, random)
    if random.random() < 0.5:
        (made.path / "empty").mkdir()


def _put_tar(made: Made, path: Path, random: np.random.Generator, hurt: bool = False) -> None:
    """Writes a tar of images by themselves, with labels, in folders, or with dots in their names."""
    style = int(random.integers(4))
    with tarfile.open(path, "w") as tar:

        def add(name: str, data: bytes) -> None:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
            made.members += 1

        for number in range(int(random.integers(2, 7))):
            suffix, data = encoded(random, FORMATS[:8])
            name = (f"{number:04}", f"{number:04}", f"{'ab'[number % 2]}/{number:04}", f"photo.{number}.of.9")[style]
            add(name + suffix, data)
            if style != 3:
                made.sound.add(f"{path}:{name}{suffix}")
            if style == 1:
                add(f"{name}.cls", b"3")
            if random.random() < 0.2:
                add(f"{name}.json", b"{}")
        if random.random() < 0.3:
            add("index.txt", b"nothing else")
    if hurt:
        whole = path.read_bytes()
        path.write_bytes(whole[: max(1024, len(whole) // 2)])
        made.sound -= {name for name in made.sound if name.startswith(f"{path}:")}
        made.members = -1  # nobody knows what lay behind the damage


def _tar(made: Made, random: np.random.Generator) -> None:
    made.path.rmdir()
    made.path = made.path.with_suffix(".tar")
    _put_tar(made, made.path, random, hurt=random.random() < 0.2)


def _tars(made: Made, random: np.random.Generator) -> None:
    for number in range(int(random.integers(1, 4))):
        _put_tar(made, made.path / f"part-{number:03}.tar", random)
    put_others(made.path, random)


def _tars_of_parts(made: Made, random: np.random.Generator) -> None:
    for part in ("train", "val"):
        _put_tar(made, made.path / f"photos-{part}-000.tar", random)
    put_others(made.path, random)


def _compressed(made: Made, random: np.random.Generator) -> None:
    made.wrong = True
    with tarfile.open(made.path / "photos.tar.gz", "w:gz") as tar:
        suffix, data = encoded(random)
        member = tarfile.TarInfo(f"0{suffix}")
        member.size = len(data)
        tar.addfile(member, io.BytesIO(data))


def _put_table(made: Made, path: Path, random: np.random.Generator) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    cells: list[bytes | None] = [encoded(random, FORMATS[:8])[1] for _ in range(int(random.integers(2, 7)))]
    if random.random() < 0.3:
        cells[0] = None
    if random.random() < 0.3:
        cells[-1] = b"no image"
    made.rows += len(cells)
    if random.random() < 0.5:
        column = pa.array([cell and {"bytes": cell, "path": f"{i}.png"} for i, cell in enumerate(cells)])
    else:
        column = pa.array(cells, pa.binary())
    parquet.write_table(pa.table({"image": column, "label": pa.array(range(len(cells)))}), path)


def _table(made: Made, random: np.random.Generator) -> None:
    made.path.rmdir()
    made.path = made.path.with_suffix(".parquet")
    _put_table(made, made.path, random)


def _tables(made: Made, random: np.random.Generator) -> None:
    for number in range(2):
        _put_table(made, made.path / f"train-{number:05}-of-00002.parquet", random)
    put_others(made.path, random)


def _array(made: Made, random: np.random.Generator) -> None:
    made.path.rmdir()
    made.images = int(random.integers(3, 20))
    shape = ((made.images, 12, 16, 3), (made.images, 12, 16, 1), (made.images, 12, 16))[int(random.integers(3))]
    images = random.integers(0, 256, shape, dtype=np.uint8)
    made.path = made.path.with_suffix(".npz" if random.random() < 0.3 else ".npy")
    if made.path.suffix == ".npz":
        np.savez(made.path, train_images=images, train_labels=np.arange(made.images) % 3)
    else:
        np.save(made.path, images)
        if random.random() < 0.3:
            np.save(made.path.with_name("data_labels.npy"), np.arange(made.images) % 3)
            made.labels = 1


def _array_that_is_none(made: Made, random: np.random.Generator) -> None:
    made.path.rmdir()
    made.wrong = True
    made.path = made.path.with_suffix(".npy")
    bytes_of = {
        "flat": np.zeros(100, np.uint8), "words": np.array(["a", "b"]), "empty": np.zeros((0, 8, 8), np.uint8),
        "complex": np.zeros((4, 8, 8), complex), "five axes": np.zeros((2, 2, 8, 8, 3), np.uint8),
        "one image": np.zeros((64, 64, 3), np.uint8),
    }  # fmt: skip
    np.save(made.path, bytes_of[list(bytes_of)[int(random.integers(len(bytes_of)))]])
    kind = int(random.integers(4))
    if kind == 0:
        made.path.write_bytes(b"")
    elif kind == 1:
        data = made.path.read_bytes()
        made.path.write_bytes(data[: len(data) // 2])


def _everything(made: Made, random: np.random.Generator) -> None:
    put_images(made, made.path / "a", random)
    put_images(made, made.path, random)
    _put_tar(made, made.path / "part-000.tar", random)
    _put_table(made, made.path / "more.parquet", random)
    np.save(made.path / "array.npy", random.integers(0, 256, (4, 12, 16, 3), dtype=np.uint8))
    made.members = made.rows = -1  # whether one looks into files that are left out is open
    made.sound = {name for name in made.sound if ".tar:" not in name}
    put_others(made.path, random)


LAYOUTS: tuple[Callable[[Made, np.random.Generator], None], ...] = (
    _flat, _classes, _parts, _tar, _links, _parts_one_level_down, _array, _labelled_train_and_plain_test, _tars,
    _nested, _flat_and_folder, _table, _hidden, _run_folder_inside, _array_that_is_none, _tars_of_parts, _three_parts,
    _nothing, _tables, _compressed, _everything,
)  # fmt: skip


if __name__ == "__main__":
    for word in sys.argv[2:]:
        place = Path(sys.argv[1]) / word
        place.mkdir(parents=True)
        print(make(place, int(word)))
