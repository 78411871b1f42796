"""What the values of settings may be: a configuration is brought to its types, and refused, when it is made.

Every configuration calls ``coerce`` at the beginning of its ``__post_init__``, and then its own check of ranges and of
what does not go together. So a wrong setting is refused in the same words from Python, a file and the command line.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import os
import types
from collections.abc import Container
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from fastmae.errors import SettingError

T = TypeVar("T")

# What version 0.1 called some settings, and some of their values; and what a setting is called in another command.
OLD_NAMES = {"decoder": "image_decoder", "decoders": "image_decoders", "peers": "baselines", "autotune": "tune"}
OLD_VALUES = {
    "image_decoder": {"pool": "threads"},
    "image_decoders": {"pool": "threads"},
    "baselines": {"published": "official"},
    "ops": {"native": "cpu"},
    "attention": {"native": "cpu"},
}

# Where a command has both settings, the value tells which one is meant.
BY_VALUE = {("tune", "auto"): "autotune", ("tune", "off"): "autotune"}

_NAMES = {int: "a whole number", float: "a number", bool: "True or False", str: "a text", Path: "a path"}
_MANY = {int: "whole numbers", float: "numbers", bool: "values of True or False", str: "texts", Path: "paths"}
_COUNTS = ("no", "one", "two", "three", "four")


SMALLEST_STD = 1e-6
"""Dividing by less would leave float32."""
BEYOND_RANGE = 99.0
"""By how many times a value range its mean and deviation may exceed it."""
LARGEST = 2**63
"""No whole number that a setting has is as large."""


class _WrongTypeError(Exception):
    """A value has not the type that it must have."""


def coerce(config: Any) -> None:
    """Brings the fields of a frozen configuration to the types of their annotations, without losing anything.

    Where a tuple is wanted, a list, an array and a single value become one. Where a float is wanted, a whole number
    becomes one. Numbers of numpy become those of Python, paths become texts or the other way around, and values
    that had another name in version 0.1 get the name of today.

    Raises:
        SettingError: a value of another type, one that is not among the choices, or a number that is not finite.
    """
    for name, annotation in field_types(config.__class__).items():
        object.__setattr__(config, name, check_type(name, getattr(config, name), annotation))


def check_type(name: str, value: Any, annotation: Any) -> Any:
    """Returns the value of one setting as ``coerce`` makes it.

    Raises:
        SettingError: it has another type, or is not among the choices.
    """
    if isinstance(value, str):
        value = OLD_VALUES.get(name, {}).get(value, value)
    try:
        return _fit(value, annotation)
    except _WrongTypeError:
        raise SettingError(name, value, f"must be {_beyond(value) or describe(annotation)}") from None


def meant(name: str, value: Any, known: Container[str]) -> str:
    """Returns which of the ``known`` settings a value is for: with auto or off, finetune's ``tune`` is ``autotune``."""
    other = BY_VALUE.get((name, value), name) if isinstance(value, str) else name
    return other if other in known else name


@functools.cache
def field_types(config_class: type) -> dict[str, Any]:
    """The types of a configuration's fields by their names, without what is for the command line."""
    hints = get_type_hints(config_class)
    return {field.name: hints[field.name] for field in dataclasses.fields(config_class)}


def describe(annotation: Any) -> str:
    """What a value of this type is, in words: ``a whole number, or None``."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin in (Union, types.UnionType):
        named = [describe(one) for one in arguments if one is not types.NoneType]
        return " or ".join(named) + (", or None" if types.NoneType in arguments else "")
    if origin is Literal:
        *others, last = map(str, arguments)
        return f"{', '.join(others)} or {last}" if others else last
    if origin is tuple:
        if arguments[-1] is Ellipsis:
            return f"one or several {_many(arguments[0])}"
        return f"{_COUNTS[len(arguments)]} {_many(arguments[0])}"
    return _NAMES.get(annotation, f"a {getattr(annotation, '__name__', annotation)}")


def _many(annotation: Any) -> str:
    return _MANY.get(annotation, f"of {describe(annotation)}")


def _fit(value: Any, annotation: Any) -> Any:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if hasattr(value, "tolist"):  # a number or an array of numpy
        value = value.tolist()
    if origin in (Union, types.UnionType):
        return _fit_one(value, arguments)
    if origin is Literal:
        if isinstance(value, str) and value in arguments:
            return value
    elif origin is tuple:
        return _fit_tuple(value, arguments)
    elif annotation is types.NoneType:
        if value is None:
            return None
    elif annotation is bool:
        if isinstance(value, bool):
            return bool(value)
    elif annotation is int:
        if _is_number(value) and not _beyond(value) and abs(value) < LARGEST and int(value) == value:
            return int(value)
    elif annotation is float:
        if _is_number(value) and not _beyond(value):
            return float(value)
    elif annotation is str:
        if isinstance(value, str | os.PathLike):
            return str(os.fspath(value))
    elif annotation is Path:
        if isinstance(value, str | os.PathLike):
            return Path(value)
    elif isinstance(value, annotation):
        return value
    raise _WrongTypeError


def _fit_one(value: Any, annotations: tuple[Any, ...]) -> Any:
    for annotation in annotations:
        try:
            return _fit(value, annotation)
        except _WrongTypeError:
            continue
    raise _WrongTypeError


def _fit_tuple(value: Any, annotations: tuple[Any, ...]) -> tuple[Any, ...]:
    items = tuple(value) if isinstance(value, tuple | list | range) else (value,)
    if annotations[-1] is Ellipsis:
        annotations = (annotations[0],) * len(items)
    if len(items) != len(annotations):
        raise _WrongTypeError
    return tuple(map(_fit, items, annotations))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _beyond(value: Any) -> str | None:
    """Returns what a number, or the first of several, must be that is not finite or too large; None if all can be."""
    if isinstance(value, tuple | list):
        return next(filter(None, map(_beyond, value)), None)
    if isinstance(value, float) and not math.isfinite(value):
        return "a finite number"
    return "below 2**63" if isinstance(value, int) and abs(value) >= LARGEST else None


def given(value: T | None, default: T) -> T:
    """The value of a setting, or the default where none was given."""
    return default if value is None else value


def need(config: object, holds: bool, name: str, expected: str) -> None:
    """Refuses the value of a setting unless something holds.

    Args:
        expected: what the value must be; other settings are written in it as ``SettingError`` says.

    Raises:
        SettingError: it does not hold.
    """
    if not holds:
        raise SettingError(name, getattr(config, name), f"must be {expected}")


def need_utf8(config: object, name: str) -> None:
    """Refuses a path that is no UTF-8 where a library opens it that takes no other names.

    Raises:
        SettingError: naming the setting.
    """
    path = str(getattr(config, name))
    need(
        config,
        path == path.encode(errors="replace").decode(),
        name,
        "a path in UTF-8, as a library that opens it takes no other",
    )


def need_at_least_one(config: object, *names: str) -> None:
    """Refuses numbers below 1. A setting that is None, or that the configuration does not have, is right."""
    for name in names:
        values = getattr(config, name, None)
        for value in values if isinstance(values, tuple) else (values,):
            if value is not None and value < 1:
                raise SettingError(name, value, "must be at least 1")


def need_size(config: object, name: str) -> None:
    """Refuses what is neither a side in pixels nor height and width."""
    size = getattr(config, name)
    fits = size is None or (len(size) in (1, 2) and min(size) >= 1)
    need(config, fits, name, "one or two positive numbers of pixels")


def need_seed(config: object) -> None:
    """Refuses a seed that the counter-based generator has no place for."""
    seed = getattr(config, "seed", 0)
    need(config, 0 <= seed < LARGEST, "seed", "in [0, 2**63)")


def need_statistics(config: Any) -> None:
    """Refuses a ``mean`` or ``std`` that is no share of the value range, such as 127 of 255."""
    if config.columns is not None:  # of a table, whose numbers have units of their own
        need(config, all(map(math.isfinite, config.mean or ())), "mean", "finite numbers, one for each column")
        need(config, all(0 < value < math.inf for value in config.std or ()), "std", "above 0, one for each column")
        return
    hint = "a share of the value range: divide numbers from 0 to 255 by 255"
    # Of a range that was chosen, such as a window of a CT, the mean may lie outside; but not a thousand ranges away.
    beyond = 0.0 if config.value_range is None else BEYOND_RANGE
    for name, lowest in (("mean", 0.0 - beyond), ("std", SMALLEST_STD)):
        values = getattr(config, name)
        holds = values is None or all(lowest <= value <= 1 + beyond for value in values)
        need(config, holds, name, f"between {lowest:g} and {1 + beyond:g}, {hint}")
