"""The settings of serve."""

from __future__ import annotations

import dataclasses
import ipaddress
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import yaml

from fastmae.config.evaluate import Pool
from fastmae.config.load import current_settings
from fastmae.config.shared import Checkpoint, Device, ReadingConfig, check_reading
from fastmae.config.values import check_type, coerce, field_types, need, need_at_least_one
from fastmae.errors import SettingError

TOKEN_VARIABLE = "FASTMAE_TOKEN"
"""The environment variable with the token, where no file is named."""


@dataclass(frozen=True, kw_only=True)
class ServeConfig(ReadingConfig):
    """Answer requests over HTTP with a trained model: features, search, reconstructions, classes. It needs the extra
    `serve`."""

    checkpoint: Checkpoint
    index: str | None = None
    """A file of `fastmae features` (.npz) in which similar images are searched. If it has labels, their classes are
    answered as well, by the vote of the nearest images."""
    pool: Pool = "mean"
    """What the features are: the mean of the patch tokens (mean), the class token (cls), or both side by side (both).
    It must be that of --index."""
    host: str = "127.0.0.1"
    """Where the service listens. Any other address than this machine's own (127.0.0.1) needs a token."""
    port: int = 8000
    """The port on which it listens."""
    token_file: str | None = None
    """A file whose first line is the token that requests must carry (Authorization: Bearer TOKEN). Default: the
    environment variable FASTMAE_TOKEN; if it is not set, no token is asked for."""
    replicas: int = 1
    """The smallest number of processes that answer, each with the model."""
    max_replicas: int | None = None
    """The largest number, to which it grows with the load. Default: as --replicas."""
    target_requests: int = 8
    """Requests in work in each replica, on average, beyond which one more is started, up to --max_replicas."""
    cpus: float = 1.0
    """Cores of each replica."""
    max_batch: int = 16
    """Images of several requests that are computed together, at most. 1: each alone."""
    batch_wait_ms: float = 5.0
    """How long the first image of a batch waits for others, at most, in milliseconds, where the batch before held
    several: until there are as many. 0: what came while the batch before was computed is computed together."""
    max_bytes: int = 20_000_000
    """The largest upload, in bytes."""
    max_pixels: int = 50_000_000
    """The largest image (height × width), by its header, before it is decoded."""
    max_requests: int = 64
    """Requests that a replica has in work at once. What comes beyond is told to come again (503)."""
    timeout: float = 30.0
    """Seconds for a request, its upload included."""
    drain: float = 30.0
    """Seconds that requests in work have to end when the service is stopped."""
    device: Device = None
    write: str | None = None
    """Write the file for `serve deploy`, a .yaml of Ray Serve, and end."""

    def __post_init__(self) -> None:
        coerce(self)
        check_serve(self)

    @property
    def is_local(self) -> bool:
        """Whether only this machine can reach the service."""
        try:
            return self.host == "localhost" or ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False


def check_serve(config: ServeConfig) -> None:
    """Refuses settings that cannot work, whatever the model.

    Raises:
        SettingError: naming the setting, its value and what it must be.
    """
    check_reading(config)
    need_at_least_one(config, "replicas", "max_replicas", "max_batch", "max_bytes", "max_pixels", "max_requests")
    need_at_least_one(config, "target_requests")
    need(config, 1 <= config.port <= 65535, "port", "from 1 to 65535")
    most = config.max_replicas
    need(config, most is None or most >= config.replicas, "max_replicas", f"at least --replicas={config.replicas}")
    is_reached = most is None or most == config.replicas or config.target_requests <= config.max_requests
    need(config, is_reached, "target_requests", f"at most --max_requests={config.max_requests}, or it is never reached")
    need(config, config.batch_wait_ms >= 0, "batch_wait_ms", "0 or more")
    for name in ("cpus", "timeout", "drain"):
        need(config, getattr(config, name) > 0, name, "a positive number")
    need(config, bool(config.host.strip()), "host", "an address, such as 127.0.0.1")
    if config.index is not None and not config.index.endswith(".npz"):
        raise SettingError("index", config.index, "must be a file that `fastmae features` wrote, which ends in .npz")
    if config.write is not None and not config.write.endswith((".yaml", ".yml")):
        raise SettingError("write", config.write, "must end in .yaml")


def settings_of(config: ServeConfig) -> dict[str, Any]:
    """Returns the settings that are not the defaults, by their names, from which a replica makes the same ones."""
    values = {field.name: getattr(config, field.name) for field in dataclasses.fields(config) if field.name != "write"}
    defaults = {field.name: field.default for field in dataclasses.fields(config)}
    return {name: value for name, value in values.items() if value != defaults[name]}


def with_whole_paths(config: ServeConfig) -> ServeConfig:
    """Returns the settings with whole paths, for processes that run in another folder."""
    paths = {
        name: os.path.abspath(os.path.expanduser(value))
        for name in ("checkpoint", "index", "token_file")
        if (value := getattr(config, name)) is not None
    }
    return dataclasses.replace(config, **paths)


def config_of(args: Mapping[str, Any]) -> ServeConfig:
    """Returns the settings of the ``args`` in a file for ``serve deploy``, or of the words ``NAME=VALUE`` of
    ``serve run``, whose values are texts.

    Raises:
        SettingError: naming the setting, its value and what it must be.
    """
    known, settings = field_types(ServeConfig), {}
    for name, value in current_settings(args, ServeConfig, besides=("write",)).items():
        try:
            settings[name] = check_type(name, value, known[name])
        except SettingError:
            if not isinstance(value, str):
                raise
            settings[name] = check_type(name, _number_of(value), known[name])
    if "checkpoint" not in settings:
        raise SettingError("checkpoint", problem="must be given: a run folder, one of its checkpoints, or a file")
    return ServeConfig(**settings)


def _number_of(text: str) -> Any:
    """Returns what a text means as YAML, or the text."""
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        return text
