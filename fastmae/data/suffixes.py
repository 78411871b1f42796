"""Suffixes of file names: which are of images, which of shards, and what to do with the others."""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import re

from PIL import Image

from fastmae.errors import install_hint

SHARD_SUFFIXES = (".tar", ".parquet", ".arrow")
SOUND_SUFFIXES = (".wav", ".flac", ".ogg", ".oga", ".opus", ".mp3", ".aif", ".aiff", ".au", ".caf", ".w64")

# Formats of Pillow's that are programs (EPS, WMF), that it knows by name alone (MPEG, HDF5, GRIB, BUFR), whose scale it
# does not apply (FITS), or that hold icons, brushes or drawn animations.
_NOT_PHOTOS = frozenset(
    "EPS WMF PDF MPEG HDF5 GRIB BUFR FITS IPTC ICO CUR ICNS GBR PALM FLI".split()  # noqa: SIM905
)


# What is read beside Pillow's formats, by the library that reads it.
_BY_LIBRARY = {
    "pydicom": (".dcm", ".dicom", ".ima"),
    "tifffile": (".lsm", ".btf", ".tf8", ".tf2"),
    "imagecodecs": (".jxl", ".jpc"),
}


def _image_suffixes() -> frozenset[str]:
    """Returns the suffixes of what is decoded here, in lower case: by Pillow and by what is installed of the extras."""
    with contextlib.suppress(ImportError, AttributeError):
        importlib.import_module("pillow_heif").register_heif_opener()
    registered = Image.registered_extensions()
    readable = {*Image.OPEN, "MPO"} - _NOT_PHOTOS  # an MPO is opened as the JPEG that it begins with
    more = [suffix for name, own in _BY_LIBRARY.items() if importlib.util.find_spec(name) for suffix in own]
    return frozenset([*(suffix for suffix, name in registered.items() if name in readable), *more])


IMAGE_SUFFIXES = _image_suffixes()

# The first bytes of JPEG, PNG, GIF, WebP, TIFF, BMP, JPEG 2000, AVIF, HEIC, JPEG XL, DICOM, and PNM.
IMAGE_STARTS = re.compile(
    rb"\xff\xd8\xff|\x89PNG\r\n\x1a\n|GIF8[79]a|RIFF....WEBP|II[*+]\0|MM\0[*+]|BM....\0\0\0\0|\0\0\0\x0cjP  "
    rb"|....ftyp(?:avi[fs]|hei[cxms]|hev[cmsx]|mif1|msf1)|\0\0\0\x0cJXL |\xff\x4f\xff\x51|.{128}DICM|P[1-6]\s+\d",
    re.DOTALL,
)
START_BYTES = 132

_SUFFIX = re.compile(r"\.(?=.*[a-z])[a-z0-9_+~-]{1,12}")


def suffix_of(name: str) -> str:
    """Returns the suffix of a file name in lower case; empty without one, as in "IMG 12.05" or "a cat. sitting"."""
    stem, dot, suffix = name[name.rfind("/") + 1 :].rpartition(".")
    return _suffix(dot + suffix) if stem.strip(".") else ""


@functools.lru_cache(1024)
def _suffix(ending: str) -> str:
    suffix = ending.lower()
    return suffix if _SUFFIX.fullmatch(suffix) else ""


def _by_suffix(texts: dict[str, str]) -> dict[str, str]:
    return {suffix: text for suffixes, text in texts.items() for suffix in suffixes.split()}


_REMEDIES = _by_suffix({
    ".feather .mat":
        "which fastmae does not read; write the images to files, tar shards, Parquet or .npy",
    ".lmdb .mdb": "LMDB, which has no common layout and may hold pickles, so it is never read; write its images to tar "
        "shards, as docs/containers.md shows",
    ".tfrecord .tfrecords": "TFRecord, which fastmae does not read; write its images to tar shards, as "
        "docs/containers.md shows",
    ".rec": "RecordIO, which fastmae does not read; write its images to tar shards, as docs/containers.md shows",
    ".beton": "FFCV's, which fastmae does not read; give the images that it was made from, or write them to .npy, as "
        "docs/containers.md shows",
    ".pkl .pickle .pt .pth": "which may run code when it is opened, so it never is; write its images to .npy, as "
        "docs/containers.md shows",
    ".zip": "an archive; give its own path",
    ".7z .rar .gz .tgz .bz2 .xz .zst .lz4": "which is compressed; unpack it",
    ".npy .npz .bin": "an array, which is not read from a folder of images; give its own path",
    ".h5 .hdf5 .hdf .he5": "a file of arrays; give its own path, with ::KEY behind it if it holds several",
    ".nii": "a volume, which is not read from a folder of images; give its own path",
    ".csv .tsv .jsonl": "a list or a table; if it names the images, give its own path",
    ".tar .parquet .arrow": "a shard beside image files; give its own path",
    ".heic .heif .hif": "which needs pillow-heif; run pip install pillow-heif",
    ".avif .avifs": "which this Pillow cannot decode; run pip install -U pillow",
    ".dcm .dicom .ima": f"which needs pydicom; run {install_hint('science')}",
    ".lsm .btf .tf8 .tf2": f"which needs tifffile; run {install_hint('science')}",
    ".jxl .jpc": f"which needs imagecodecs; run {install_hint('science')}",
    ".jxr .webp2 .dng .cr2 .cr3 .nef .arw .orf .rw2 .raf .pef .srw":
        "which Pillow does not decode; convert it to PNG, TIFF or JPEG",
    ".mha .mhd .nrrd .nd2 .czi .lif .oib .oif .vsi .svs .ndpi .mrxs .fits .fit .nc .hgt":
        "which fastmae does not read; convert it to PNG, TIFF or .npy",
    ".mp4 .m4v .avi .mov .mkv .webm .mpg .mpeg .wmv .flv": "a video; write its frames to image files",
    " ".join(SOUND_SUFFIXES): "a sound; give --spectrogram 1024 to train on spectrograms",
    ".svg .eps .ps .pdf .ai .wmf .emf": "a drawing; render it to PNG",
    ".ico .cur .icns .gbr .palm .fli .flc .iim": "which holds no photographs; convert it to PNG to use it",
})  # fmt: skip


def why_not(suffix: str) -> str:
    """Returns why files of this suffix are not used beside image files, as a phrase: ".zip, which is compressed; …"."""
    if not suffix:
        return "no suffix, and no image by their first bytes"
    return f"{suffix}, {remedy_for(suffix) or 'no image'}"


def remedy_for(suffix: str) -> str | None:
    """Returns what to do with files of a suffix that may hold images but not as fastmae reads them; None for others."""
    return _REMEDIES.get(suffix)
