"""Features of a frozen encoder, a batch at a time, and files of them."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch

from fastmae.config import AnomalyPool
from fastmae.data.loader import Skipped, View, load_batches
from fastmae.data.sources import Concat, FolderSource, Source, Subset
from fastmae.errors import UserError, install_hint
from fastmae.files import write_whole
from fastmae.model.mae import MaskedAutoencoderViT

# Of image files the centre is looked at, as published: resized to 256, 224 cropped. Arrays are looked at whole.
FOLDER_SHARE = 224 / 256
FILE_SUFFIXES = (".npz", ".parquet")


@dataclass(frozen=True)
class Features:
    """What an encoder makes of the usable images of a source."""

    values: torch.Tensor
    """float32 [n, D] on the model's device."""
    indices: np.ndarray
    """int64 [n], rising: which of the source's images."""
    skipped: tuple[Skipped, ...]
    """Those that could not be used."""


def evaluation_view(model: MaskedAutoencoderViT, source: Source) -> View:
    """The central crop that suits a source's images."""
    share = FOLDER_SHARE if source.kind == "folder" else 1.0
    return View(model.img_size, model.in_chans, central_share=share)


def usable_batches(
    model: MaskedAutoencoderViT, source: Source, *, batch_size: int, num_workers: int
) -> Iterator[tuple[np.ndarray, torch.Tensor, tuple[Skipped, ...]]]:
    """(indices int64 [n], central crops uint8 [n, H, W, C] on the model's device, what was skipped), in order.

    The loader fills the place of an unusable image with another one, which has another name and label: left out here.
    """
    asked = [np.arange(start, min(start + batch_size, len(source))) for start in range(0, len(source), batch_size)]
    device, view = model.cls_token.device, evaluation_view(model, source)
    batches = load_batches(source, ((i, i) for i in asked), view, device=device, num_workers=num_workers)
    for indices, batch in zip(asked, batches, strict=True):
        usable = ~np.isin(indices, [skipped.index for skipped in batch.skipped])
        skipped = tuple(one for one in batch.skipped if indices[0] <= one.index <= indices[-1])
        if usable.all():
            yield indices, batch.images, skipped
        elif usable.any():
            yield indices[usable], batch.images[torch.from_numpy(usable).to(device)], skipped
        else:
            yield indices[:0], batch.images[:0], skipped


def pooled(tokens: torch.Tensor, pool: AnomalyPool) -> torch.Tensor:
    """Tokens [N, 1+L, D] as features: ``mean`` of the patch tokens or class token ``cls`` [N, D]; ``both`` [N, 2·D].

    ``tokens`` are all patch tokens one after another, [N, L·D].
    """
    if pool == "cls":
        return tokens[:, 0]
    if pool == "tokens":
        return tokens[:, 1:].flatten(1)
    mean = tokens[:, 1:].mean(dim=1)
    return torch.cat([tokens[:, 0], mean], dim=1) if pool == "both" else mean


@torch.no_grad()
def extract_features(
    model: MaskedAutoencoderViT, source: Source, *, pool: AnomalyPool, batch_size: int, num_workers: int
) -> Features:
    """The features of the central crops of all usable images, pooled after the encoder's norm.

    Args:
        model: computes where it is, without gradients.
        pool: as for ``pooled``.
        num_workers: threads that read and decode.
    """
    values, count = torch.empty(0), 0
    indices: list[np.ndarray] = []
    skipped: list[Skipped] = []
    for chosen, images, bad in usable_batches(model, source, batch_size=batch_size, num_workers=num_workers):
        found = pooled(model.forward_features(images), pool).float()
        if not indices:
            values = found.new_empty(len(source), found.shape[1])
        values[count : count + len(chosen)] = found
        count += len(chosen)
        indices.append(chosen)
        skipped += bad
    return Features(values[:count], np.concatenate(indices), tuple(skipped))


def tell_skipped(skipped: Sequence[Skipped]) -> None:
    """Says on stderr how many images were left out, and why the first one."""
    if skipped:
        first = f"the first is {skipped[0].name} ({skipped[0].reason})"
        print(f"fastmae: {len(skipped)} unusable images were left out; {first}", file=sys.stderr, flush=True)


def class_names(source: Source) -> tuple[str, ...] | None:
    """The names of the classes that a source's labels count, where it has class folders."""
    if isinstance(source, Subset):
        return class_names(source.source)
    if isinstance(source, Concat) and all(isinstance(part, FolderSource) for part in source.parts):
        return tuple(sorted({name for part in source.parts for name in class_names(part) or ()})) or None
    return (source.classes or None) if isinstance(source, FolderSource) else None


def classes_of(source: Source, indices: np.ndarray) -> np.ndarray | None:
    """The classes of some samples, as strings: names of folders, or else the numbers. None without labels."""
    if source.labels is None:
        return None
    labels, names = source.labels[indices], class_names(source)
    return labels.astype(str) if names is None else np.array(names)[labels]


def check_features_file(path: Path) -> None:
    """Refuses what features cannot be written to, before any are made.

    Raises:
        UserError: another ending, or .parquet without pyarrow.
    """
    if path.suffix not in FILE_SUFFIXES:
        raise UserError(f"--output {path}: must end in {' or '.join(FILE_SUFFIXES)}")
    if path.suffix == ".parquet":
        try:
            import pyarrow.parquet  # noqa: F401
        except ImportError as error:
            raise UserError(f"--output {path}: needs pyarrow; {install_hint('parquet')}, or use .npz") from error


def save_features(path: Path, source: Source, found: Features) -> None:
    """Writes ``features`` float32 [n, D], ``names``, and where there are labels ``labels`` int64 and ``classes``.

    An .npz has an array of each, a .parquet a column, its features lists of fixed size.

    Raises:
        UserError: the file cannot be written.
    """
    columns: dict[str, Any] = {"names": np.array([source.name(int(index)) for index in found.indices], dtype=str)}
    if source.labels is not None:
        columns |= {"labels": source.labels[found.indices], "classes": classes_of(source, found.indices)}
    values = found.values.cpu().numpy()

    def write(file: BinaryIO) -> None:
        if path.suffix == ".npz":
            np.savez(file, features=values, **columns)
            return
        import pyarrow
        import pyarrow.parquet

        lists = pyarrow.FixedSizeListArray.from_arrays(pyarrow.array(values.reshape(-1)), values.shape[1])
        table = pyarrow.table({**columns, "features": lists})
        pyarrow.parquet.write_table(table, file)

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, write)
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error}); free space or name another place") from error
