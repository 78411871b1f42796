"""What the images of a data set are, as far as their owner may not expect it: depth, bands, pages, orientation.

`verify` surveys all images, the start of a run a few evenly spaced ones, and both say it in the same words, by a Stock.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from fastmae.data.convert import as_type, narrowest, pixel_type_of, refuse_wider
from fastmae.data.decode import BadImageError, decode, refuse_by_header
from fastmae.data.headers import PAGED, Header, as_read, read_header
from fastmae.data.reading import Reading
from fastmae.data.sources import IN_A_ROW, LOOKED_AT, Source, channels_of_files, evenly_spaced
from fastmae.data.stock import EXAMPLES, LeftOut, Stock, count_of, joined
from fastmae.errors import SettingError
from fastmae.facts import AS_STORED, ReadAs

DECODED = 8
"""Of how many of them the pixels are looked at."""
LEVELS = 64
"""Fewer of the 256 levels of 8 bits than this cannot be meant."""
SHARE = 0.1
"""Of what share of the images it cannot be."""
TURNED = "turned by EXIF or TIFF orientation, which a run does not do"
PAGES = "only the first page, frame or size of a file is used; save each as a file of its own to use all"
CHOICE_OF_PAGES = (
    "only the first page or frame of a file is used; set pages to all for each as an image, or to channels"
)
ALPHA = "alpha is used with in_chans 4 only"
FOURTH = "a band beside the colours is used with in_chans 4 only"
CHOSEN = "other bands than those that bands names are not used"
SECOND = "a band beside gray or a palette is not used; name both by bands to use it"


@dataclass
class Depth:
    """Images of one depth of more than 8 bits, of which a run uses the upper 8."""

    images: int = 0
    measured: int = 0
    """Of how many of them the pixels are known."""
    first: str = ""
    low: int = 255
    high: int = 0
    """The range of the upper 8 bits."""

    @property
    def levels(self) -> int:
        """How many of the 256 levels of 8 bits the range has."""
        return self.high - self.low + 1


@dataclass
class Survey:
    """What was found in usable image files. It takes little memory for any number of them."""

    images: int = 0
    kinds: Counter[str] = field(default_factory=Counter)
    """By format, colours and depth."""
    types: Counter[str] = field(default_factory=Counter)
    """By the type of their numbers as they are stored, as NumPy calls it."""
    nodata: Counter[float | None] = field(default_factory=Counter)
    """By the value of missing pixels that they state; None for none."""
    used: Counter[str] = field(default_factory=Counter)
    """How many pages and bands are used."""
    left_out: dict[tuple[str, str], tuple[int, tuple[str, ...]]] = field(default_factory=dict)
    """By unit and reason: how many are not used, and the names of the first images."""
    turned: tuple[int, str] = (0, "")
    """How many images a viewer would turn, and the first."""
    depths: dict[int, Depth] = field(default_factory=dict)
    """By bits per sample, of those with more than 8."""
    gray: int = 0
    """Images that are stored as gray."""
    gray_pixels: int = 0
    """Images stored in colour whose pixels are all gray."""
    measured: int = 0
    """Images whose pixels were looked at."""

    def see(self, header: Header, name: str, pixels: np.ndarray | None, reading: Reading) -> None:
        """Adds an image. Its pixels [H, W, in_chans], as they are read, may be left out."""
        in_chans, pages = reading.in_chans, header.pages
        header = as_read(header, reading.read_as)
        self.images += 1
        self.kinds[header.kind] += 1
        self.types[header.dtype] += 1
        self.nodata[header.nodata] += 1
        self.used["pages"] += 1 + pages - header.pages
        self._leave_out("pages", header.pages - 1, CHOICE_OF_PAGES if header.format in PAGED else PAGES, name)
        unused = header.unspecified + header.alpha if in_chans < 4 else 0  # of 4 none is used without all its bands
        chosen = reading.read_as.bands
        if chosen is not None:
            unused = header.bands - len({*chosen})
        self.used["bands"] += header.bands - unused
        if unused > 0:
            reason = (
                CHOSEN if chosen is not None else ALPHA if header.alpha else FOURTH if header.bands == 4 else SECOND
            )
            self._leave_out("bands", unused, reason, name)
        if header.is_turned:
            self.turned = self.turned[0] + 1, self.turned[1] or name
        if header.bits > 8 and reading.dtype == "uint8":
            depth = self.depths.setdefault(header.bits, Depth(first=name))
            depth.images += 1
            if pixels is not None:
                depth.measured += 1
                shown = pixels[..., :3]  # without alpha
                depth.low, depth.high = min(depth.low, int(shown.min())), max(depth.high, int(shown.max()))
        self.gray += header.is_gray
        if pixels is not None:
            self.measured += 1
            self.gray_pixels += not header.is_gray and in_chans == 3 and _is_gray(pixels)

    def see_array(self, kind: str, dtype: str) -> None:
        """Adds an image of an array, of which nothing but the type of its numbers can be unexpected."""
        self.images += 1
        self.kinds[kind] += 1
        self.types[dtype] += 1

    def _leave_out(self, unit: str, count: int, reason: str, name: str) -> None:
        if count > 0:
            before, names = self.left_out.get((unit, reason), (0, ()))
            self.left_out[unit, reason] = before + count, (*names, name)[:EXAMPLES]

    def add(self, later: Survey) -> None:
        """Adds what was found in images that follow."""
        self.images += later.images
        self.kinds.update(later.kinds)
        self.types.update(later.types)
        self.nodata.update(later.nodata)
        self.used.update(later.used)
        for key, (count, names) in later.left_out.items():
            before, earlier = self.left_out.get(key, (0, ()))
            self.left_out[key] = before + count, (earlier + names)[:EXAMPLES]
        self.turned = self.turned[0] + later.turned[0], self.turned[1] or later.turned[1]
        for bits, depth in later.depths.items():
            mine = self.depths.setdefault(bits, Depth(first=depth.first))
            mine.images, mine.measured = mine.images + depth.images, mine.measured + depth.measured
            mine.low, mine.high = min(mine.low, depth.low), max(mine.high, depth.high)
        self.gray, self.gray_pixels = self.gray + later.gray, self.gray_pixels + later.gray_pixels
        self.measured += later.measured

    def formats(self) -> str:
        """Returns how many images have which format, colours and depth, for people."""
        kinds = self.kinds.most_common()
        shares = (f"{kind} {count:,} ({100 * count / self.images:.3g} %)" for kind, count in kinds)
        return kinds[0][0] if len(kinds) == 1 else ", ".join(shares)

    def stock(self, reading: Reading, among: str = "") -> Stock:
        """Returns it as a stock.

        Args:
            reading: how the images are read.
            among: what was looked at if not all: "of 64 images sampled".
        """
        bracket = f" ({among})" if among else ""
        left_out = tuple(
            LeftOut(unit, count, reason + bracket, names) for (unit, reason), (count, names) in self.left_out.items()
        )
        return Stock(dict(self.used) if left_out else {}, left_out, tuple(self._notes(reading, bracket)))

    def _notes(self, reading: Reading, bracket: str) -> list[str]:
        in_chans = reading.in_chans
        notes = type_notes(self.types, reading, bracket)
        notes += [
            f"{_depth_text(bits, depth, bracket)}; scale them to 8 bits yourself if too few, first {depth.first}"
            for bits, depth in sorted(self.depths.items())
        ]
        notes += self._nodata_notes(reading, bracket)
        if self.turned[0]:
            notes.append(f"{count_of(self.turned[0], 'images')} {TURNED}{bracket}, first {self.turned[1]}")
        if in_chans == 3 and self.images:
            become = "become 3 equal channels, normalised and mirrored like colour photos"
            advice = "in_chans 1 takes one, measures its mean and std, and mirrors nothing"
            if self.gray == self.images:
                notes.append(f"all images{bracket} are gray and {become}; {advice}")
            elif self.gray_pixels == self.measured > 0:
                notes.append(f"all images{bracket} are stored in colour and hold gray: they {become}; {advice}")
        return notes

    def _nodata_notes(self, reading: Reading, bracket: str) -> list[str]:
        """Returns what is done with the values that files state for missing pixels."""
        stated = {value: count for value, count in self.nodata.items() if value is not None}
        if not stated or reading.read_as.nodata is not None:
            return []
        if len(self.nodata) == 1 and reading.dtype != "uint8":
            (value,) = stated
            return [f"all images{bracket} state that {value:g} marks missing pixels: nodata is {value:g}"]
        return [
            f"{count_of(count, 'images')}{bracket} of which {value:g} marks missing pixels: not used; set nodata to it"
            for value, count in stated.items()
        ]


def _depth_text(bits: int, depth: Depth, bracket: str) -> str:
    text = f"{count_of(depth.images, 'images')} of {bits} bits{bracket}: only the upper 8 bits are used"
    if depth.measured:
        unit = 1 << (bits - 8)
        values = f"their values lie between {depth.low * unit:,} and {(depth.high + 1) * unit - 1:,}"
        text += f"; {values}, so {depth.levels} of {depth.levels * unit:,} levels remain"
    return text


def type_notes(types: Mapping[str, int], reading: Reading, bracket: str = "") -> list[str]:
    """Returns what is done to numbers that are stored in other types than that of the pixels, a line each.

    Args:
        types: how many images are stored in which type, by its name in NumPy.
        reading: how they are read.
        bracket: behind the count, of which images.
    """
    converts, notes = reading.read_as.converts, []
    for name, count in sorted(types.items()):
        images = f"{count_of(count, 'images')} of {name}{bracket}"
        if name == reading.dtype or (name, reading.dtype) == ("uint16", "uint8"):  # of the latter the depth is told
            continue
        if not converts and pixel_type_of(name) == "float32" != reading.dtype:
            notes.append(f"{images} among those of {reading.dtype}: not used; pixel_type float32 uses all")
        elif (name, reading.dtype) == ("uint8", "uint16"):
            notes.append(f"{images} among those of uint16: multiplied by 257, so that 255 becomes 65535")
        elif reading.dtype == "float32" and len(types) > 1 and name in ("uint8", "uint16"):
            notes.append(f"{images} among other types: their numbers are kept as float32; scale them if they mean else")
        elif name == "float64" and converts and reading.dtype == "float32":
            notes.append(f"{images}: rounded to float32, as pixel_type says")
        else:
            notes.append(f"{images}: kept as {reading.dtype}, exactly; an image that does not fit is not used")
    return notes


def _is_gray(pixels: np.ndarray) -> bool:
    """Tells whether the three channels are equal; a few pixels show that of most images."""
    for part in (pixels[::16, ::16], pixels):
        if not (np.array_equal(part[..., 0], part[..., 1]) and np.array_equal(part[..., 1], part[..., 2])):
            return False
    return True


# --- the start of a run -----------------------------------------------------------------------------------------------


def take_stock(source: Source, in_chans: int | None, read_as: ReadAs = AS_STORED) -> Stock:
    """Returns the stock of a source, with what a few of its image files are.

    Args:
        source: the data set. Of arrays only the type of their numbers is added.
        in_chans: the channels of the model; by default 3 of image files, or all bands of such with more than 4.
        read_as: what the user asks for.

    Raises:
        UserError: none of the images can be used, or what they hold does not fit the type of the pixels.
    """
    if source.kind != "folder":
        return joined((source.stock, Stock(notes=tuple(_array_notes(source, read_as)))))
    survey, among = sample(source, in_chans, read_as)
    refuse_dark(survey, among)
    stock = survey.stock(reading_of(in_chans or 3, survey.types, read_as), among)
    formats = (f"formats: {survey.formats()}" + f" ({among})" * bool(among),) if survey.images else ()
    return joined((source.stock, Stock(stock.used, stock.left_out, (*formats, *stock.notes))))


def reading_of(in_chans: int, types: Mapping[str, int], read_as: ReadAs) -> Reading:
    """Returns how images of these types, by their names in NumPy, are read together."""
    dtype = narrowest(types) if read_as.pixel_type == "auto" else read_as.pixel_type
    return Reading(in_chans, dtype=dtype, nodata=read_as.nodata, read_as=read_as)


def _array_notes(source: Source, read_as: ReadAs) -> list[str]:
    """Returns what to know of the types of numbers in arrays.

    Raises:
        SettingError: numbers that do not fit, in all of a few images.
    """
    types: Counter[str] = Counter()
    problems, indices = [], evenly_spaced(source, DECODED, DECODED).tolist()
    images = [(index, source.read(index)) for index in indices]
    types.update(data.dtype.name for _, data in images if isinstance(data, np.ndarray))
    reading = reading_of(3, types, read_as)
    for index, data in images:
        try:
            as_type(data if isinstance(data, np.ndarray) else decode(data, reading), reading)
        except BadImageError as error:
            problems.append(f"{source.name(index)}: {error}")
    if len(problems) == len(indices) > 0:
        raise SettingError("pixel_type", problem=f"none of {len(indices)} images sampled can be used: {problems[0]}")
    return type_notes(types, reading, "")


def sample(source: Source, in_chans: int | None, read_as: ReadAs) -> tuple[Survey, str]:
    """Surveys at most ``LOOKED_AT`` images. Returns what was found, and of what if not of all, as a phrase.

    Raises:
        UserError: none of the images can be used.
    """
    survey, problems = Survey(), []
    indices = evenly_spaced(source, LOOKED_AT, IN_A_ROW).tolist()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="PIL")  # of images that it takes all the same
        for number, index in enumerate(indices):
            name = source.name(index)
            try:
                data = source.read(index)
                if isinstance(data, np.ndarray):
                    continue
                header = read_header(data)
                gives = as_read(header, read_as)
                channels = in_chans or channels_of_files([gives.bands], read_as)
                reading = reading_of(channels, {gives.dtype: 1}, read_as)
                if not read_as.converts:
                    refuse_wider(gives.dtype, reading.dtype)
                refuse_by_header(data, reading)
                depth = survey.depths.get(header.bits, Depth())
                wants_pixels = number % max(1, len(indices) // DECODED) == 0
                wants_pixels |= header.bits > 8 and depth.measured < DECODED
                pixels = decode(data, reading) if wants_pixels else None
            except (BadImageError, OSError) as error:
                problems.append(f"{name}: {error}")
                continue
            survey.see(header, name, pixels, reading)
    if problems and not survey.images and len(problems) == len(indices):
        looked_at = count_of(len(indices), "images") + " sampled" * (len(indices) < len(source))
        problem = f"none of {looked_at} can be used, the first is {problems[0]}"
        raise SettingError("data_path", problem=problem)
    return survey, f"of {len(indices)} images sampled" if len(indices) < len(source) else ""


def refuse_dark(survey: Survey, among: str = "") -> None:
    """Raises a UserError where the upper 8 bits of many images hold next to nothing."""
    for bits, depth in survey.depths.items():
        if depth.measured and depth.levels < LEVELS and depth.images > SHARE * survey.images:
            text = _depth_text(bits, depth, f" ({among})" * bool(among))
            remedy = f"leave pixel_type out to keep all bits, or scale them to 8 bits, first {depth.first}"
            problem = f"{text}, which cannot be meant; {remedy}"
            raise SettingError("data_path", problem=problem)
