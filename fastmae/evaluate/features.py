"""Features of a frozen encoder, computed batch by batch, and the files that hold them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import astuple, dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch

from fastmae.config import AnomalyPool
from fastmae.config.evaluate import Pool
from fastmae.data.augment import Augment
from fastmae.data.changes import OF_NUMBERS, ChangedImages
from fastmae.data.loader import Skipped, View, load_batches
from fastmae.data.plan import central_share
from fastmae.data.sources import Source, classes_of
from fastmae.errors import SettingError, UserError, install_hint
from fastmae.evaluate.sharing import WHOLE, Share, gather
from fastmae.files import write_whole
from fastmae.messages import logger
from fastmae.model.family import MaskedModel
from fastmae.model.pixels import range_ends
from fastmae.screen import printable

FILE_SUFFIXES = (".npz", ".parquet")
SAME = 0.05
"""How far two marks of a model may lie apart, as a share of their length: bfloat16 and TF32 round differently."""


@dataclass(frozen=True)
class Features:
    """The features of the usable images of a source."""

    values: torch.Tensor
    """float32 [n, D] on the model's device."""
    indices: np.ndarray
    """int64 [n], rising: the numbers of the images in their source."""
    skipped: tuple[Skipped, ...]
    """The images that could not be used."""


def evaluation_view(model: MaskedModel, source: Source) -> View:
    """Returns the central crop that suits the images of a source."""
    return View(model.img_size, model.reading, central_share=central_share(source.kind, model.img_size))


def usable_batches(
    model: MaskedModel,
    source: Source,
    *,
    batch_size: int,
    num_workers: int,
    share: Share = WHOLE,
    augment: Augment | None = None,
) -> Iterator[tuple[np.ndarray, torch.Tensor, tuple[Skipped, ...]]]:
    """Yields (indices int64 [n], central crops [n, H, W, C] on the model's device, skipped images), in order.

    They are the batches of this process's ``share``; ``augment`` changes their pixels.
    The loader puts another image where one is unusable; it has another name and label, so it is removed here.
    What was done to the numbers of images is told at the end.
    """
    starts = range(0, len(source), batch_size)[share.rank :: share.ranks]
    chunks = [np.arange(start, min(start + batch_size, len(source))) for start in starts]
    device, view = model.device, replace(evaluation_view(model, source), augment=augment)
    batches = load_batches(source, ((i, i) for i in chunks), view, device=device, num_workers=num_workers)
    changed = ChangedImages(len(source))
    for indices, batch in zip(chunks, batches, strict=True):
        changed.add(batch.changed, read=len(indices))
        usable = ~np.isin(indices, [skipped.index for skipped in batch.skipped])
        # Each once, though several samples in a row may come across the same one in search of another image.
        bad = {image.index: image for image in batch.skipped if indices[0] <= image.index <= indices[-1]}
        skipped = tuple(bad.values())
        if usable.all():
            yield indices, batch.images, skipped
        elif usable.any():
            yield indices[usable], batch.images[torch.from_numpy(usable).to(device)], skipped
        else:
            yield indices[:0], batch.images[:0], skipped
    for line in changed.lines(OF_NUMBERS):
        logger.warning("%s", line)


@torch.no_grad()
def extract_features(
    model: MaskedModel,
    source: Source,
    *,
    pool: AnomalyPool,
    batch_size: int,
    num_workers: int,
    share: Share = WHOLE,
    of: Callable[[torch.Tensor], torch.Tensor] | None = None,
    augment: Augment | None = None,
) -> Features:
    """Computes the features of the central crops of all usable images, pooled after the encoder's norm.

    With a ``share`` of several ranks, all of them call it; the first returns all features, and the others their own.

    Args:
        model: the encoder; features are computed on its device, without gradients.
        pool: as in ``model.features``.
        num_workers: threads that read and decode images.
        of: other features of images, [n, H, W, C] to [n, D], instead of the model's.
        augment: changes the pixels of the crops.

    Raises:
        SettingError: the model does not pool so.
    """
    if pool not in model.pools:
        raise SettingError("pool", pool, f"must be {' or '.join(model.pools)} for {type(model).__name__}")
    values, count = torch.empty(0), 0
    indices: list[np.ndarray] = []
    skipped: list[Skipped] = []
    batches = usable_batches(
        model, source, batch_size=batch_size, num_workers=num_workers, share=share, augment=augment
    )
    for chosen, images, bad in batches:
        skipped += bad
        if not len(chosen):
            continue
        features = (model.features(images, pool) if of is None else of(images)).float()
        if not indices:
            values = features.new_empty(-(-len(source) // share.ranks) + batch_size, features.shape[1])
        values[count : count + len(chosen)] = features
        count += len(chosen)
        indices.append(chosen)
    own = Features(values[:count], np.concatenate([np.empty(0, np.int64), *indices]), tuple(skipped))
    return own if share.ranks == 1 else _together(own, share)


def _together(features: Features, share: Share) -> Features:
    """Returns the features of all ranks on the first one, in the order of the images."""
    tensors = {"values": features.values, "indices": torch.from_numpy(features.indices)}
    parts = gather(share, tensors, [astuple(image) for image in features.skipped])
    if parts is None:
        return features
    indices = torch.cat([part["indices"] for part, _ in parts])
    order = indices.argsort()
    values = torch.cat([part["values"] for part, _ in parts if len(part["indices"])])
    skipped = sorted((Skipped(*image) for _, images in parts for image in images), key=lambda image: image.index)
    return Features(values[order.to(values.device)], indices[order].numpy(), tuple(skipped))


def report_skipped(skipped: Sequence[Skipped]) -> None:
    """Reports how many images were skipped, and the reason for the first one."""
    if skipped:
        first = f"the first is {skipped[0].name} ({skipped[0].reason})"
        logger.warning("%d unusable images were skipped; %s", len(skipped), first)


def check_features_file(path: Path) -> None:
    """Refuses a file that features cannot be written to, before any are computed.

    Raises:
        SettingError: the name has another ending, or ends in .parquet and pyarrow is not installed.
    """
    if path.suffix not in FILE_SUFFIXES:
        raise SettingError("path", str(path), f"must end in {' or '.join(FILE_SUFFIXES)}", flag="--output")
    if path.suffix == ".parquet":
        try:
            import pyarrow.parquet  # noqa: F401
        except ImportError as error:
            problem = f"needs pyarrow; {install_hint('parquet')}, or use .npz"
            raise SettingError("path", str(path), problem, flag="--output") from error


@torch.no_grad()
def mark_of(model: MaskedModel, pool: Pool) -> torch.Tensor | None:
    """Returns the features float32 [D] of a fixed picture, by which an index is known as that of a model and its pool.

    None for a model of rows of a table.
    """
    if not model.has_pictures:
        return None
    H, W = model.img_size
    shares = torch.arange(H * W * model.in_chans, dtype=torch.float64).mul(40_503).remainder(65_536).div(65_535)
    low, high = range_ends(model, torch.float64)
    pixels = low.cpu() + (high - low).cpu() * shares.reshape(H, W, model.in_chans)
    picture = torch.from_numpy(pixels.numpy().astype(model.pixels.dtype))
    return model.features(picture[None].to(model.device), pool)[0].float().cpu()


def has_mark(mark: torch.Tensor, other: np.ndarray) -> bool:
    """Whether two marks are of the same model, up to the rounding of other machines and backends."""
    theirs = torch.from_numpy(np.asarray(other)).float()
    return mark.shape == theirs.shape and float((mark - theirs).norm()) <= SAME * float(mark.norm())


def _in_utf8(text: str) -> str:
    """Returns a name as Parquet can hold it: bytes that are no UTF-8 are escaped."""
    return text if text == text.encode(errors="replace").decode() else printable(text)


def save_features(
    path: Path,
    source: Source,
    features: Features,
    points: np.ndarray | None = None,
    mark: torch.Tensor | None = None,
) -> None:
    """Writes ``features`` float32 [n, D], ``names``, and if there are labels ``labels`` int64 and ``classes``.

    Places ``points`` float32 [n, 2] in a map are written as ``reduced``, and the ``mark`` of the model, as ``mark_of``
    gives it, to an .npz.

    An .npz has one array for each. A .parquet has one column for each; the features are lists of fixed size.

    Raises:
        UserError: the file cannot be written.
    """
    columns: dict[str, Any] = {"names": np.array([source.name(int(index)) for index in features.indices], dtype=str)}
    if source.labels is not None:
        columns |= {"labels": source.labels[features.indices], "classes": classes_of(source, features.indices)}
    numbers: dict[str, Any] = {"features": features.values.cpu().numpy()}
    numbers |= {} if points is None else {"reduced": points}
    marks: dict[str, Any] = {} if mark is None else {"mark": mark.numpy()}

    def write(file: BinaryIO) -> None:
        if path.suffix == ".npz":
            np.savez(file, **numbers, **columns, **marks)
            return
        import pyarrow
        import pyarrow.parquet

        lists = {
            name: pyarrow.FixedSizeListArray.from_arrays(pyarrow.array(values.reshape(-1)), values.shape[1])
            for name, values in numbers.items()
        }
        texts = {name: [*map(_in_utf8, text)] for name, text in columns.items() if text.dtype.kind == "U"}
        table = pyarrow.table({**columns, **texts, **lists})
        pyarrow.parquet.write_table(table, file)

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, write)
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error}); free space or name another file") from error
