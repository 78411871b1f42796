"""What the command line knows of each setting: the flag, the values that it takes, the default and the text.

All of it is read from the configuration's dataclass: types from the annotations, texts from the docstrings under the
fields. It knows nothing of what the settings mean.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import inspect
import sys
import types
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import tyro

REQUIRED = dataclasses.MISSING


@dataclass(frozen=True, kw_only=True)
class Flag:
    """A setting as the command line has it."""

    name: str
    kind: type
    """The type of one value: bool, int, float or str."""
    choices: tuple[str, ...] = ()
    """The values that one value may have; empty where any may be given."""
    words: tuple[str, ...] = ()
    """Words that may stand where otherwise a number is given."""
    least: int = 1
    """The smallest number of values."""
    most: int | None = 1
    """The largest number of values; None where there is no limit."""
    takes_none: bool = False
    """Whether ``None`` is a value, which leaves the setting open."""
    default: Any = REQUIRED
    text: str = ""
    """What the setting is, in one line."""
    metavar: str | None = None
    """The name of a positional argument; None for a flag."""
    rest: str | None = None
    """What stands for the words behind the positional arguments, if they are values of this flag."""
    rest_otherwise: str = ""
    """The setting that these words are for if this flag is given by its name as well."""


@functools.cache
def flags_of(config: type) -> tuple[Flag, ...]:
    """Returns the flags of a configuration's class, in the order of its fields.

    The fields of a configuration inside another one are flags as well, without a prefix.
    """
    hints, texts = get_type_hints(config, include_extras=True), field_texts(config)
    flags: list[Flag] = []
    for field in dataclasses.fields(config):
        annotation, extras = _without_extras(hints[field.name])
        if dataclasses.is_dataclass(annotation):
            flags += flags_of(annotation)  # type: ignore[arg-type]
            continue
        text = next((extra.help for extra in extras if getattr(extra, "help", None)), "")
        metavar = next((extra.metavar for extra in extras if getattr(extra, "metavar", None)), None)
        is_positional = tyro.conf.Positional in extras or metavar is not None
        flags.append(
            Flag(
                name=field.name,
                default=field.default,
                text=" ".join(str(text or texts.get(field.name, "")).split()),
                metavar=(metavar or field.name.upper()) if is_positional else None,
                rest=next((extra.shown for extra in extras if hasattr(extra, "otherwise")), None),
                rest_otherwise=next((extra.otherwise for extra in extras if hasattr(extra, "otherwise")), ""),
                **_values(annotation),
            )
        )
    return tuple(flags)


def _without_extras(annotation: Any) -> tuple[Any, tuple[Any, ...]]:
    """Returns the type inside ``Annotated``, and what was said about it."""
    if get_origin(annotation) is Annotated:
        return annotation.__origin__, annotation.__metadata__
    return annotation, ()


def _values(annotation: Any) -> dict[str, Any]:
    """Returns what a type says about the values of a flag, by the names of ``Flag``'s fields."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin in (Union, types.UnionType):
        members = [member for member in arguments if member is not types.NoneType]
        values = _values(members[-1])  # of `str | tuple[str, ...]` the tuple, which holds one as well
        if len(members) > 1:
            values["least"] = 1
            values["words"] = tuple(word for member in members[:-1] for word in _values(member).get("choices", ()))
        return values | {"takes_none": types.NoneType in arguments}
    if origin is Literal:
        return {"kind": str, "choices": tuple(map(str, arguments)), "least": 1, "most": 1}
    if origin is tuple:
        has_no_limit = arguments[-1] is Ellipsis
        counts = (0, None) if has_no_limit else (len(arguments), len(arguments))
        return {**_values(arguments[0]), "least": counts[0], "most": counts[1]}
    if annotation is bool:
        return {"kind": bool, "least": 0, "most": 1}
    return {"kind": annotation if annotation in (int, float) else str, "least": 1, "most": 1}


def field_texts(config: type) -> dict[str, str]:
    """Returns the docstrings under the fields of a class and of those that it inherits from, by the fields' names."""
    texts: dict[str, str] = {}
    for base in reversed(config.__mro__):
        if dataclasses.is_dataclass(base):
            texts |= _texts_in(base.__module__).get(base.__name__, {})
    return texts


@functools.cache
def _texts_in(module: str) -> dict[str, dict[str, str]]:
    """Returns the docstrings under the fields of each class of a module, read from its source and not executed."""
    tree = ast.parse(inspect.getsource(sys.modules[module]))
    return {
        node.name: {
            field.target.id: text.value.value
            for field, text in zip(node.body, node.body[1:], strict=False)
            if isinstance(field, ast.AnnAssign)
            and isinstance(field.target, ast.Name)
            and isinstance(text, ast.Expr)
            and isinstance(text.value, ast.Constant)
            and isinstance(text.value.value, str)
        }
        for node in tree.body
        if isinstance(node, ast.ClassDef)
    }
