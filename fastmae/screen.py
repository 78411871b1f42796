"""The screen: lines and tables whose names come from files, and streams that may be closed, full or blocked.

It knows how to show text, and nothing of what the text is about.
"""

from __future__ import annotations

import codecs
import contextlib
import errno
import io
import os
import select
import sys
from collections.abc import Generator, Iterable, Mapping, Sequence
from typing import Any, Literal, TextIO

from rich.console import Console
from rich.table import Table

PATIENCE = 2.0
"""Seconds for which a run waits for a blocked screen, once; then it shows nothing until the screen takes text again."""
PIECE = 1024
"""Characters that are written at a time: a pipe that is ready takes 4096 bytes without waiting."""
PLAIN = {
    "×": "x", "–": "-", "—": "-", "…": "...", "·": "-", "→": "->", "≤": "<=", "≥": ">=", "±": "+-", "²": "^2",
    "³": "^3", "│": "|", "─": "-", "━": "-", "“": '"', "”": '"',
}  # fmt: skip
"""What fastmae's own signs become on a screen that knows ASCII alone."""


def _as_plain(error: UnicodeError) -> tuple[str, int]:
    assert isinstance(error, UnicodeEncodeError)
    signs = error.object[error.start : error.end]
    return "".join(PLAIN.get(sign) or _escaped(sign) for sign in signs), error.end


codecs.register_error("fastmae.plain", _as_plain)


def printable(text: object) -> str:
    """Returns the text as one line that a screen can show: what is not printable is escaped, as Python would write it.

    Names of files hold line breaks, escape sequences that colour or clear a terminal, marks that turn the direction of
    writing, and bytes that are no UTF-8 (``\\xff``). Everything else stays as it is, brackets and backslashes too.
    """
    text = str(text)
    return text if text.isprintable() else "".join(sign if sign.isprintable() else _escaped(sign) for sign in text)


def _escaped(sign: str) -> str:
    if "\udc80" <= sign <= "\udcff":  # a byte of a name that is no UTF-8, as os.fsdecode keeps it
        return f"\\x{ord(sign) - 0xDC00:02x}"
    return sign.encode("unicode_escape").decode()


# --- lines and tables -------------------------------------------------------------------------------------------------


def say(line: object) -> None:
    """Prints a line on stdout. What is not printable is escaped."""
    print(printable(line), flush=True)


def complain(line: object) -> None:
    """Prints a line ``fastmae: …`` on stderr. A stderr that is gone is none of the caller's business."""
    Stream(sys.stderr).write(f"fastmae: {printable(line)}\n")


def open_console(**options: Any) -> Console:
    """Returns a console of rich on stdout that takes every text as it is: brackets are no markup.

    In a notebook lines are text as anywhere else, where rich would make an output of its own of each.
    """
    stream = sys.stdout if isinstance(sys.stdout, Stream) else Stream(sys.stdout)
    plain: dict[str, Any] = {"markup": False, "emoji": False, "highlight": False, "force_jupyter": False}
    return Console(**{"file": stream, **plain, **options})


def show_table(
    columns: Mapping[str, Literal["left", "right"]],
    rows: Iterable[Sequence[object] | None],
    title: str | None = None,
    *,
    header: bool = True,
) -> None:
    """Prints a table on stdout. Cells are folded where they do not fit, and what is not printable in them is escaped.

    Args:
        columns: the titles of the columns, and to which side their cells are set.
        rows: the cells; None for a line between rows.
        title: of the table.
        header: whether the titles of the columns are shown.
    """
    table = Table(title=title and printable(title), show_header=header)
    for name, side in columns.items():
        table.add_column(printable(name), justify=side, overflow="fold")
    for row in rows:
        if row is None:
            table.add_section()
        else:
            table.add_row(*map(printable, row))
    open_console().print(table)


# --- streams ----------------------------------------------------------------------------------------------------------


class OutputLostError(Exception):
    """stdout takes no more, so that what a command prints is lost."""

    def __init__(self, reason: OSError | ValueError) -> None:
        super().__init__(reason)
        self.reader_left = isinstance(reason, BrokenPipeError)
        """Whether the reader of a pipe has closed it, as ``head`` does when it has seen enough."""

    def __str__(self) -> str:
        reason = self.args[0]
        return f"stdout takes no more ({getattr(reason, 'strerror', None) or reason})"


class Stream(io.TextIOBase):
    """stdout or stderr, which may be closed, full, gone with its terminal, or blocked.

    Every text is written at once. A stream that fails stays silent from then on. One that is blocked (a stopped
    terminal, a pipe that nobody reads) shows nothing until it takes text again. Signs that its encoding lacks are
    replaced.

    Args:
        stream: what is written to; None if there is nothing.
        must_show: raise OutputLostError instead, and wait while it is blocked: what is printed is the result.
    """

    def __init__(self, stream: TextIO | None, *, must_show: bool = False) -> None:
        self._stream, self._must_show = stream, must_show
        self._lost: OSError | ValueError | None = None
        self._is_blocked = False
        self.shown = True
        """Whether the text that was written last was shown."""
        if stream is None:
            self._lost = OSError(errno.EBADF, os.strerror(errno.EBADF))

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return getattr(self._stream, "encoding", None) or "utf-8"

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def isatty(self) -> bool:
        try:
            return self._stream is not None and self._stream.isatty()
        except ValueError:  # it is closed
            return False

    def fileno(self) -> int:
        if self._stream is None:
            raise io.UnsupportedOperation("fileno")
        return self._stream.fileno()

    def writable(self) -> bool:
        return True

    def flush(self) -> None:
        """Does nothing: every text is written at once."""

    def write(self, text: str) -> int:
        """Writes a text, if that is possible.

        Raises:
            OutputLostError: it is not, and it must be shown.
        """
        if self._lost is None:
            try:
                self.shown = self._put(text)
            except (OSError, ValueError) as error:
                self._lost = error
        if self._lost is not None:
            self.shown = False
            if self._must_show:
                raise OutputLostError(self._lost) from None
        return len(text)

    def _put(self, text: str) -> bool:
        assert self._stream is not None
        text = text.encode(self.encoding, "fastmae.plain").decode(self.encoding)
        for start in range(0, len(text), PIECE):
            if not self._is_ready():
                return False
            try:
                self._stream.write(text[start : start + PIECE])
                self._stream.flush()
            except BlockingIOError:  # it does not wait by itself; what is left is written with the next text
                self._is_blocked = not self._must_show
        return True

    def _is_ready(self) -> bool:
        """Waits until the stream takes text or has failed; with a run not for ever."""
        try:
            waiting = select.poll()
            waiting.register(self.fileno(), select.POLLOUT)
        except (OSError, ValueError, AttributeError):  # no file: a stream in memory, or of a notebook
            return True
        patience = None if self._must_show else 0 if self._is_blocked else 1000 * PATIENCE
        self._is_blocked = not waiting.poll(patience)
        return not self._is_blocked


@contextlib.contextmanager
def safe_streams(*, must_show: bool) -> Generator[None]:
    """Puts a ``Stream`` before stdout and stderr while entered, for everything that prints, libraries too.

    Afterwards a stream that failed leads nowhere, so that the end of Python does not try again to write what is left.

    Args:
        must_show: whether stdout is the result, so that losing it raises OutputLostError.
    """
    before = sys.stdout, sys.stderr
    after = Stream(before[0], must_show=must_show), Stream(before[1])
    sys.stdout, sys.stderr = after
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before
        for stream in before:
            _settle(stream)


def _settle(stream: TextIO | None) -> None:
    if stream is None:
        return
    try:
        stream.flush()
    except (OSError, ValueError):
        with contextlib.suppress(OSError, ValueError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, stream.fileno())
            os.close(nowhere)


def hold_standard_files() -> None:
    """Opens what is closed of the descriptors 0, 1 and 2, so that no other file gets their numbers.

    Otherwise a checkpoint could be opened as descriptor 2, and a library's notice be written into it. What is opened
    here gives nothing and takes nothing.
    """
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDONLY)  # the lowest number that is free
