"""One sample: read from its source, decoded, cropped to the model's size, or replaced when it cannot be used.

It knows nothing of batches or threads; fastmae/data/decoders has those.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace

import numpy as np

from fastmae.data.augment import Augment
from fastmae.data.changes import noting
from fastmae.data.decode import BadImageError, decode, plain_jpeg_shape
from fastmae.data.distort import Distortion
from fastmae.data.headers import read_header
from fastmae.data.label_maps import MapReading, crop_map
from fastmae.data.plan import Box, central_box, is_flipped, random_box, random_rows, scaled_box, unseen_note
from fastmae.data.reading import Reading
from fastmae.data.resize import crop_and_resize, crop_beyond
from fastmae.data.sources import Source, evenly_spaced
from fastmae.errors import UserError

MAX_REPLACEMENTS = 1000


@dataclass(frozen=True)
class View:
    """How a sample becomes an image of the model's size: cropped at random for training, centrally otherwise."""

    size: tuple[int, int]
    """(height, width) in pixels."""
    reading: Reading
    """How bytes become pixels."""
    seed: int | None = None
    """The seed of crops and flips; None for the central region."""
    scale: tuple[float, float] = (1.0, 1.0)
    """The smallest and the largest share of the area that a random crop takes."""
    flip: bool = False
    """Whether a random crop is mirrored with a chance of ½."""
    central_share: float = 1.0
    """The share that a central crop takes of the height and width that it could have."""
    random_scale: tuple[float, float] | None = None
    """The smallest and the largest zoom of a random crop of fixed size, as ``plan.scaled_box`` has it, in place of
    ``scale``."""
    maps: MapReading | None = None
    """How label maps are read, of a source that has them. They are cropped with their images."""
    augment: Augment | Distortion | None = None
    """Changes the pixels of a crop. Only the thread decoder can do it."""

    @property
    def in_chans(self) -> int:
        return self.reading.in_chans


@dataclass(frozen=True)
class Skipped:
    """An image that could not be used, and why."""

    index: int
    name: str
    reason: str


@dataclass(frozen=True)
class Encoded:
    """A plain JPEG that is not decoded yet, with the region of it that is wanted."""

    data: bytes
    box: Box
    flip: bool


@dataclass(frozen=True)
class LoadedSample:
    """What became of a sample, beside its pixels."""

    skipped: tuple[Skipped, ...]
    encoded: Encoded | None
    """A plain JPEG that was read for DALI and not decoded."""
    bytes_read: int
    busy: float
    """Seconds that a thread spent on it."""
    changes: tuple[str, ...] = ()
    """What was done to the image that its owner may not expect: keys of ``CHANGES``."""
    image: tuple[int, str] = (0, "")
    """The number and the name of an image that was changed."""


def load_sample(
    source: Source,
    index: int,
    view: View,
    draws: np.ndarray | None,
    out: np.ndarray,
    for_dali: bool = False,
    changes: np.ndarray | None = None,
    out_map: np.ndarray | None = None,
) -> LoadedSample:
    """Writes sample ``index`` into ``out``; an image that cannot be used is replaced by the next one that can.

    Args:
        source: the data set.
        index: the sample.
        view: how it becomes an image.
        draws: float64, the row of ``plan.crop_draws`` that decides crop and flip; None for the central region.
        out: [H, W, C] of the type of the batch, the place for the pixels.
        for_dali: only read a plain JPEG, and return it as ``encoded``.
        changes: float64, the row of ``view.augment.draws`` that decides the augmentation; None for none.
        out_map: uint8 [H, W], the place for the label map, if the view has maps.

    Raises:
        UserError: none of the next ``MAX_REPLACEMENTS`` images can be used.
    """
    started, bytes_read = time.perf_counter(), 0
    skipped: list[Skipped] = []
    for attempt in range(min(len(source), MAX_REPLACEMENTS)):
        candidate = (index + attempt) % len(source)
        encoded = None
        try:
            with noting() as noted:
                data = source.read(candidate)
                bytes_read += len(data) if isinstance(data, bytes) else data.nbytes
                if for_dali and isinstance(data, bytes) and (shape := plain_jpeg_shape(data, view.reading)):
                    encoded = Encoded(data, *_crop(view, draws, *shape))
                else:
                    pixels = decode(data, view.reading)
                if out_map is not None and view.maps is not None:
                    out_map[:] = _cropped_map(source, candidate, view, view.maps, draws, pixels.shape[:2])
        except (BadImageError, OSError) as error:
            skipped.append(Skipped(candidate, source.name(candidate), str(error)))
            continue
        if encoded is None:
            out[:] = _cropped(pixels, view, draws)
            if view.augment is not None and changes is not None:
                out[:] = view.augment(out, changes)
        loaded = LoadedSample(tuple(skipped), encoded, bytes_read, time.perf_counter() - started)
        kinds = dict.fromkeys(kind for kind, stated in noted if stated is None or stated != view.reading.nodata)
        if kinds:
            loaded = replace(loaded, changes=(*kinds,), image=(candidate, source.name(candidate)))
        return loaded
    first = skipped[0]
    raise UserError(f"{len(skipped)} images in a row cannot be used, from {first.name} ({first.reason}); mend the data")


def prepared(data: bytes | np.ndarray, view: View, draws: np.ndarray | None) -> np.ndarray:
    """Returns what a source gave as pixels [H, W, C] of a view.

    Args:
        data, view: of ``load_sample``.
        draws: float64, the row of ``plan.crop_draws`` that decides crop and flip; None for the central region.

    Raises:
        BadImageError: it cannot be used.
    """
    return _cropped(decode(data, view.reading), view, draws)


def _cropped(pixels: np.ndarray, view: View, draws: np.ndarray | None) -> np.ndarray:
    box, flip = _crop(view, draws, *pixels.shape[:2])
    crop = crop_and_resize if view.random_scale is None else crop_beyond
    return crop(pixels, box, flip, view.size, view.reading.nodata)


def _cropped_map(
    source: Source, index: int, view: View, reading: MapReading, draws: np.ndarray | None, size: tuple[int, int]
) -> np.ndarray:
    """Returns the label map of an image of this size, uint8 [h, w], cropped and mirrored as the image is.

    Raises:
        BadImageError, OSError: it cannot be used, or has another size.
    """
    classes = reading.read(source.read_map(index))  # type: ignore[attr-defined]
    if classes.shape != size:
        sizes = "{}×{} pixels, and the image {}×{}".format(*classes.shape, *size)
        raise BadImageError(f"its label map has {sizes}")
    return crop_map(classes, *_crop(view, draws, *size), view.size)


def _crop(view: View, draws: np.ndarray | None, height: int, width: int) -> tuple[Box, bool]:
    """Returns the region of an image of this size, and whether it is mirrored."""
    if draws is None:
        return central_box(height, width, view.size, view.central_share), False
    if view.random_scale is not None:
        return scaled_box(draws, height, width, view.random_scale, view.size), view.flip and is_flipped(draws)
    rows, columns = view.size
    if view.reading.read_as.spectrogram and view.scale[0] == 1 and width == columns and height >= rows:
        return random_rows(draws, height, width, rows), False
    return random_box(draws, height, width, view.scale, view.size), view.flip and is_flipped(draws)


def crops_note(source: Source, size: tuple[int, int]) -> str | None:
    """Returns a sentence if random crops leave out much of the images, judged by the middle one of a few.

    Args:
        source: the data set.
        size: (height, width) of the model.
    """
    shapes = [shape for index in evenly_spaced(source, 8, 1) if (shape := _shape(source, int(index)))]
    shapes.sort(key=lambda shape: shape[1] / shape[0])
    return unseen_note(shapes[len(shapes) // 2], size) if shapes else None


def _shape(source: Source, index: int) -> tuple[int, int] | None:
    """Returns the (height, width) of a sample, of a file by its header alone; None if it cannot be read."""
    try:
        data = source.read(index)
        if isinstance(data, np.ndarray):
            return data.shape[0], data.shape[1]
        size = read_header(data).size
        return size if min(size) else None
    except OSError:
        return None
