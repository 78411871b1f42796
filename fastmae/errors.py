"""The errors that the command line turns into a single line and exit status 2, and what their texts share."""

from __future__ import annotations

import enum
import os
import re
import reprlib
from typing import Any


class _NoValue(enum.Enum):
    """Stands for no value, in other processes too."""

    NO_VALUE = "no value"


NO_VALUE = _NoValue.NO_VALUE

_REPR = reprlib.Repr()
_REPR.maxlevel, _REPR.maxtuple, _REPR.maxlist, _REPR.maxdict = 2, 20, 20, 4
_REPR.maxstring = _REPR.maxother = _REPR.maxlong = 200


class UserError(Exception):
    """Something the user can mend. The message says what is wrong, where, and what to do, in one line."""

    status = 2
    """The exit status of the command that it ends."""
    is_said = False
    """Whether another rank shows it, so that this one ends without a word."""

    def as_on_the_command_line(self) -> str:
        """The message for somebody who gave flags."""
        return str(self)


class SettingError(UserError):
    """A setting has a value that cannot work.

    Its message names the setting as the caller knows it: ``str(error)`` as an argument of Python
    (``"keep=0: must be at least 1"``), ``as_on_the_command_line`` as a flag (``"--keep 0: must be at least 1"``).

    Args:
        name: of the setting.
        value: that it has; left out where none is to be shown.
        problem: what is wrong, and what to do. Other settings are written in it as flags, with ``=`` before a value:
            ``"must be left out with --masks"``, ``"must be given together with --parallel=hsdp"``.
        flag: what the command line calls the setting, where that is not ``--name``.
    """

    def __init__(self, name: str, value: Any = NO_VALUE, problem: str = "", flag: str | None = None) -> None:
        super().__init__(name, value, problem, flag)
        self.name, self.value, self.problem, self.flag = name, value, problem, flag

    def __str__(self) -> str:
        value = self.value[0] if isinstance(self.value, tuple) and len(self.value) == 1 else self.value
        shown = "" if value is NO_VALUE else f"={in_one_line(_REPR.repr(value))}"
        problem = re.sub(r"--([a-z]\w*)(?:=([^\s,;:)]+))?", _as_argument, self.problem)
        return f"{self.name}{shown}: {problem}"

    def as_on_the_command_line(self) -> str:
        values = self.value if isinstance(self.value, tuple) else (self.value,)
        value = " ".join(str(item) if isinstance(item, str | os.PathLike) else _REPR.repr(item) for item in values)
        shown = "" if self.value is NO_VALUE else f" {in_one_line(value)}"
        problem = re.sub(r"(--[a-z]\w*)=", r"\1 ", self.problem)
        return f"{self.flag or f'--{self.name}'}{shown}: {problem}"


def install_hint(extra: str) -> str:
    """The command that adds what an optional part needs, for the end of a message.

    pip takes fastmae as it is installed and only adds the extra's packages, so this works for a checkout and for a
    wheel, and asks no index for fastmae itself.
    """
    return f"pip install 'fastmae[{extra}]'"


def _as_argument(flag: re.Match[str]) -> str:
    name, value = flag.groups()
    if value is None:
        return name
    is_literal = re.fullmatch(r"-?[\d.]+(e[+-]?\d+)?|True|False|None", value) is not None
    return f"{name}={value if is_literal else repr(value)}"


def in_one_line(text: str, limit: int = 200) -> str:
    """Returns a text without line breaks, cut after ``limit`` characters."""
    text = text.replace("\r", " ").replace("\n", " ")
    return text if len(text) <= limit else f"{text[:limit]} …"
