"""Uploads: from the bytes of an untrusted file to the pixels that a model takes, within limits."""

from __future__ import annotations

import hmac
import os
import stat
from pathlib import Path

import numpy as np
from PIL import Image

from fastmae.config.serve import TOKEN_VARIABLE, ServeConfig
from fastmae.data.decode import decode, refuse_by_header
from fastmae.data.headers import as_read, read_header
from fastmae.data.plan import central_share
from fastmae.data.reading import BadImageError, Reading
from fastmae.data.sample import View, prepared
from fastmae.errors import SettingError
from fastmae.messages import logger

SHORTEST_TOKEN = 16
OBLONG = 8
"""How many times longer than the other a side of a picture to segment may be."""


class RefusedError(Exception):
    """A request that cannot be answered: the status of HTTP, and one line that says what is wrong."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status, self.reason = status, " ".join(reason.split())


def size_of_upload(data: bytes, reading: Reading, max_pixels: int) -> tuple[int, int]:
    """Returns (height, width) of an image by its header. Nothing is decoded.

    Raises:
        RefusedError: no image, one that the model cannot take, or too many pixels.
    """
    if not data:
        raise RefusedError(400, "the upload is empty; send the bytes of an image file")
    try:
        header = as_read(read_header(data), reading.read_as)
        height, width = header.size
        if height * width > max_pixels:
            raise RefusedError(413, f"{width}×{height} pixels, over the limit of {max_pixels}; send a smaller image")
        refuse_by_header(data, reading)
    except (BadImageError, ValueError, OSError) as error:
        is_large = isinstance(error.__cause__, Image.DecompressionBombError)
        raise RefusedError(413 if is_large else 400, f"the image cannot be used: {error}") from error
    if height * width == 0:
        raise RefusedError(400, f"a {header.format} file whose header does not tell its size; send PNG, JPEG or TIFF")
    return height, width


def pixels_of_upload(data: bytes, reading: Reading, size: tuple[int, int], max_pixels: int) -> np.ndarray:
    """Returns the pixels [H, W, C] of an upload that a model of ``size`` takes: those of evaluation, bit for bit.

    Raises:
        RefusedError: as ``size_of_upload`` does, or the file is damaged.
    """
    size_of_upload(data, reading, max_pixels)
    view = View(size, reading, central_share=central_share("folder", size))
    try:
        return prepared(data, view, None)
    except (BadImageError, ValueError, OSError) as error:
        raise RefusedError(400, f"the image cannot be used: {error}") from error
    except MemoryError as error:
        raise RefusedError(413, "the image needs more memory than there is; send a smaller one") from error


def picture_of_upload(data: bytes, reading: Reading, max_pixels: int) -> np.ndarray:
    """Returns all pixels [H, W, C] of an upload, neither cropped nor resized.

    Raises:
        RefusedError: as ``pixels_of_upload`` does, or the picture is so oblong that windows over it would be many.
    """
    height, width = size_of_upload(data, reading, max_pixels)
    if max(height, width) > OBLONG * min(height, width):
        problem = f"{width}×{height} pixels, of which one side is over {OBLONG} times the other; send a part of it"
        raise RefusedError(413, problem)
    try:
        return decode(data, reading)
    except (BadImageError, ValueError, OSError) as error:
        raise RefusedError(400, f"the image cannot be used: {error}") from error
    except MemoryError as error:
        raise RefusedError(413, "the image needs more memory than there is; send a smaller one") from error


def read_token(config: ServeConfig) -> str | None:
    """Returns the token that requests must carry: that of the file, or of the environment; None if there is none.

    Raises:
        SettingError: the file cannot be read, the token is short or no ASCII, or there is none for a host that others
            reach.
    """
    if config.token_file is not None:
        name, value = "token_file", config.token_file
        try:
            mode = Path(value).expanduser().stat().st_mode
            lines = Path(value).expanduser().read_text(encoding="ascii").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            problem = getattr(error, "strerror", None) or "is no text in ASCII"
            raise SettingError(name, value, f"cannot be read ({problem}); name a file with the token") from error
        token = lines[0].strip() if lines else ""
        if mode & stat.S_IROTH:  # not refused: secrets of Kubernetes are such files
            logger.warning("%s: every user of this machine can read the token; `chmod 600` it", value)
    elif TOKEN_VARIABLE in os.environ:
        name, value = "token_file", None
        token = os.environ[TOKEN_VARIABLE].strip()
    elif not config.is_local:
        problem = f"needs a token, as others reach it; name a file by --token_file, or set {TOKEN_VARIABLE}"
        raise SettingError("host", config.host, problem)
    else:
        return None
    where = value or f"the variable {TOKEN_VARIABLE}"
    if len(token) < SHORTEST_TOKEN or not token.isascii() or not token.isprintable() or " " in token:
        problem = f"{where} must hold a token of at least {SHORTEST_TOKEN} letters and digits without spaces"
        raise SettingError(name, problem=f"{problem}; `openssl rand -hex 32` makes one")
    return token


def is_token(given: str, token: str) -> bool:
    """Compares a token with the right one, in a time that does not tell how much of it is right."""
    return hmac.compare_digest(given.encode("utf-8", "surrogateescape"), token.encode())
