"""Settings in files: YAML, TOML or JSON that a user wrote, and the config.json and config.yaml of runs.

What is read are plain settings by their names of today, checked against a class of configurations. It knows nothing of
the command line: there, and in Python, what is given besides the file overrides it.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import logging
import math
import os
import re
import tomllib
from collections.abc import Callable, Iterable, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import yaml

from fastmae.config.groups import GROUPS
from fastmae.config.trainings import TRAININGS, AnyResolved, command_of
from fastmae.config.values import OLD_NAMES, check_type, field_types, meant
from fastmae.errors import SettingError, UserError
from fastmae.launch import is_first

Config = TypeVar("Config")

MAX_BYTES = 1 << 20
COMPUTED = ("in_chans", "mean", "std", "global_batch", "dataset_length", "order", "given_masks", "class_names")
"""What the config.json of a run holds besides its settings: it follows from them, from the data and from the ranks.
Some of it can be given as a setting, too."""

log = logging.getLogger("fastmae")


def load_settings(path: str | PathLike[str], config_class: type) -> dict[str, Any]:
    """Reads the settings of a file, or of a run folder.

    What a run computed, which only its config.json holds, is ignored with a line that counts it.

    Args:
        path: of a .yaml, .yml, .toml or .json file; of a run folder, its config.yaml is read, or its config.json.
        config_class: the configuration that the settings are for, such as ``PretrainConfig``.

    Raises:
        UserError: no such file, too large, not readable, not a setting, or a value of another type.
    """
    path = Path(path)
    if path.is_dir():
        path = next((file for file in (path / "config.yaml", path / "config.json") if file.exists()), path)
    settings = read_file(path)
    known = field_types(config_class)
    computed = [name for name in COMPUTED if name in settings and name not in known]
    if computed and is_first(os.environ):  # otherwise every rank would say so
        log.warning("%s: ignored %d values that a run computes (%s)", path, len(computed), ", ".join(computed))
    try:
        settings = current_settings(as_given(settings), config_class, besides=computed)
        return {name: check_type(name, value, known[name]) for name, value in settings.items()}
    except SettingError as error:
        raise UserError(f"{path}: {error}") from error


def make_config(
    config_class: type[Config], settings: Mapping[str, Any], path: str | PathLike[str] | None = None
) -> Config:
    """Makes a configuration of the settings in a file, if one is named, and of others, which override them.

    Args:
        settings: by their names of today or of earlier versions.
        path: as for ``load_settings``.

    Raises:
        UserError: the file cannot be read; a name is no setting, or a value cannot work.
    """
    in_file = {} if path is None else load_settings(path, config_class)
    return config_class(**(in_file | current_settings(settings, config_class)))


def current_settings(settings: Mapping[str, Any], config_class: type, besides: Iterable[str] = ()) -> dict[str, Any]:
    """Gives settings their names of today.

    Args:
        besides: names that are left out.

    Raises:
        SettingError: a name is not that of a setting, or two names are of the same.
    """
    known = field_types(config_class)
    current: dict[str, Any] = {}
    for given_name, value in settings.items():
        if given_name in besides:
            continue
        name = str(given_name).replace("-", "_")
        name = meant(name if name in known else OLD_NAMES.get(name, name), value, known)
        if name not in known:
            near = difflib.get_close_matches(name, known, 1, 0.6)
            hint = f"did you mean --{near[0]}?" if near else "leave it out"
            raise SettingError(str(given_name), value, f"no such setting; {hint}")
        if name in current:
            raise SettingError(str(given_name), problem=f"is another name of --{name}, which is given as well")
        current[name] = value
    return current


def as_given(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a run as they are to be given for the same run, where a run writes them in another way.

    A learning rate that follows from ``blr`` and the global batch is left open, so that it follows from others as well.
    """
    given = dict(settings)
    lr, blr, global_batch = (given.get(name) for name in ("lr", "blr", "global_batch"))
    if isinstance(blr, int | float) and isinstance(global_batch, int) and lr == blr * global_batch / 256:
        given["lr"] = None
    if global_batch is not None and given.get("grow_epochs") == 0 and given.get("start_size") is None:
        given["grow_epochs"] = None
    return given


def settings_as_yaml(config: AnyResolved, remarks: Sequence[str] = ()) -> str:
    """The settings of a run as the text of its config.yaml, in the groups of the help, with remarks for people."""
    command = command_of(config)
    config_class = TRAININGS[command]
    settings, known = as_given(dataclasses.asdict(config)), field_types(config_class)
    lines = [
        "# The settings of this run. The same run in another folder:",
        f"#   fastmae {command} --config config.yaml --output_dir OTHER",
    ]
    for title, names in GROUPS.items():
        lines += ["", f"# {title}", dump_yaml({name: settings[name] for name in names if name in known}).rstrip()]
    lines += ["", *(f"# {remark}" for remark in remarks)] if remarks else []
    return "\n".join(lines) + "\n"


def settings_as_words(settings: Mapping[str, Any], config_class: type) -> list[str]:
    """Settings as the words of a command line that gives them."""
    defaults = {field.name: field.default for field in dataclasses.fields(config_class)}
    words: list[str] = []
    for name, value in settings.items():
        if value == defaults[name] and value is None:
            continue
        words += [f"--{name}", *map(str, value)] if isinstance(value, tuple) else [f"--{name}={value}"]
    return words


def dump_yaml(settings: dict[str, Any]) -> str:
    """Settings as YAML, one per line; ``load_settings`` reads the same values."""
    return yaml.dump(settings, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=math.inf)


# --- the three formats ------------------------------------------------------------------------------------------------


def read_file(path: Path) -> dict[str, Any]:
    """Reads a YAML, TOML or JSON file as plain values by their names, which nothing has checked yet.

    Raises:
        UserError: no such file, too large, or not readable.
    """
    parsers: dict[str, Callable[[str], Any]] = {
        ".json": _parse_json, ".toml": tomllib.loads, ".yaml": _parse_yaml, ".yml": _parse_yaml,
    }  # fmt: skip
    parse = parsers.get(path.suffix)
    if parse is None:
        raise UserError(f"{path}: not a file of settings; give a .yaml, .toml or .json file, or a run folder")
    try:
        if path.exists() and not path.is_file():
            raise UserError(f"{path}: no regular file; give a file of settings")
        size = path.stat().st_size
        if size > MAX_BYTES:
            raise UserError(f"{path}: has {size} bytes, and settings have at most {MAX_BYTES}; give another file")
        settings = parse(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); give a file of settings") from error
    except (ValueError, RecursionError, yaml.YAMLError) as error:  # of all three formats, and of UTF-8
        raise UserError(f"{path}: not readable ({' '.join(str(error).split())}); correct the file") from error
    if settings is None:
        return {}
    if not isinstance(settings, dict):
        raise UserError(f"{path}: holds no settings; write one per line, as in `batch_size: 64`")
    return settings


def _parse_json(text: str) -> Any:
    return json.loads(text, object_pairs_hook=_without_duplicates)


def _without_duplicates(pairs: Iterable[tuple[Any, Any]]) -> dict[Any, Any]:
    settings: dict[Any, Any] = {}
    for name, value in pairs:
        if name in settings:
            raise ValueError(f"{name} is given twice")
        settings[name] = value
    return settings


def _parse_yaml(text: str) -> Any:
    return yaml.load(text, _Loader)


class _Loader(yaml.SafeLoader):
    """Safe, and with YAML 1.2's plain values: `off` is a text, and `1e-3` a number. `None` is null as on the command
    line, and a name may be given once.
    """

    yaml_implicit_resolvers: ClassVar[dict[str, Any]] = {}


def _mapping(loader: _Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    pairs = ((loader.construct_object(key), loader.construct_object(value, deep=True)) for key, value in node.value)
    return _without_duplicates((str(name), value) for name, value in pairs)


class _Dumper(yaml.SafeDumper):
    """Puts quotes around texts that ``_Loader``, or a loader of YAML 1.1, would take for something else."""


def _sequence(dumper: _Dumper, values: Iterable[Any]) -> yaml.Node:
    return dumper.represent_sequence("tag:yaml.org,2002:seq", values, flow_style=True)


_Loader.add_constructor("tag:yaml.org,2002:map", _mapping)
_Dumper.add_representer(tuple, _sequence)
_Dumper.add_representer(list, _sequence)
for _tag, _pattern in {
    "null": r"~|null|Null|NULL|None|",
    "bool": r"true|True|TRUE|false|False|FALSE",
    "int": r"[-+]?\d+",
    "float": r"[-+]?(\.\d+|\d+(\.\d*)?)([eE][-+]?\d+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
}.items():
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(rf"^(?:{_pattern})$"), None)
