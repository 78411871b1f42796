"""The settings of sweep, and the file that describes one: which settings are searched, and what for.

A file is checked as a whole before anything runs: every end and every value of what is searched makes a configuration
of the command.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import shlex
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from tyro.conf import Positional, arg

from fastmae.config.finetune import FinetuneConfig
from fastmae.config.load import current_settings, load_settings, read_file
from fastmae.config.pretrain import PretrainConfig
from fastmae.config.values import LARGEST, check_type, coerce, field_types, need, need_at_least_one
from fastmae.errors import SettingError, UserError

COMMANDS: dict[str, type] = {"pretrain": PretrainConfig, "finetune": FinetuneConfig}
METRICS = {
    "pretrain": {"linear": "maximize", "knn": "maximize", "held_out_loss": "minimize", "train_loss": "minimize"},
    "finetune": {"test_acc1": "maximize", "test_loss": "minimize", "train_loss": "minimize"},
}
"""What trials are compared by, as probe.json and log.txt call it, and which direction is better. The first is the
default."""
PROBES = ("linear", "knn")
CHANGE_THE_LOSS = (
    "mask_ratio", "masking", "masks", "norm_pix_loss", "patch_size", "input_size", "predict_ratio", "mean", "std",
    "value_range", "held_out", "smoothing", "mixup", "cutmix",
)  # fmt: skip
"""With another value of these, a loss is another quantity: a smaller one does not mean a better model."""
CHANGE_TRAINING_LOSS = ("mask_ratio_schedule",)
"""Of these, the loss of the training alone."""
OF_THE_SWEEP = ("output_dir", "resume")
KEYS = ("command", "config", "settings", "search", "metric", "direction", "trials", "seed", "startup", "pruner")


@dataclass(frozen=True, kw_only=True)
class SweepConfig:
    """Search settings of pretrain or finetune: train trials, each in a run folder of its own, propose their settings
    by what earlier trials reached, and stop those that fall behind. The same command goes on after a kill."""

    file: Annotated[str, Positional, arg(metavar="SWEEP", help="What is searched: a YAML, TOML or JSON file.")]
    output_dir: str | None = None
    """The folder of the sweep, in which each trial has its run folder. Default: the name of the file without its
    ending."""
    trials: int | None = None
    """How many trials there are to be in all, those of earlier calls among them. Default: as the file says."""
    launch: str = ""
    """What starts each trial, such as "torchrun --nproc_per_node 8". Default: one process."""

    def __post_init__(self) -> None:
        coerce(self)
        need_at_least_one(self, "trials")
        try:
            shlex.split(self.launch)
        except ValueError as error:
            raise SettingError("launch", self.launch, f"must be words of a shell ({error})") from error
        need(self, self.output_dir != "", "output_dir", "the name of a folder")


@dataclass(frozen=True)
class Parameter:
    """A setting that is searched: a range of numbers, or some values."""

    name: str
    low: float = 0.0
    high: float = 0.0
    log: bool = False
    """Whether numbers are drawn evenly by their logarithm."""
    step: float | None = None
    is_whole: bool = False
    values: tuple[Any, ...] = ()
    """The values that it may have; empty for a range."""

    def tried(self) -> tuple[Any, ...]:
        """The values that are checked before anything runs."""
        ends = (int(self.low), int(self.high)) if self.is_whole else (self.low, self.high)
        return self.values or ends


@dataclass(frozen=True)
class Pruner:
    """Successive halving: of the trials that reach min_epochs, min_epochs · factor, … epochs, one in factor goes on."""

    min_epochs: int
    factor: int = 4


@dataclass(frozen=True)
class Sweep:
    """What a file describes, checked."""

    command: str
    settings: dict[str, Any]
    """The settings that all trials share."""
    search: tuple[Parameter, ...]
    metric: str
    direction: Literal["maximize", "minimize"]
    trials: int
    seed: int = 0
    startup: int = 10
    """The first trials, whose settings are drawn evenly."""
    pruner: Pruner | None = None
    path: str = field(default="", compare=False)

    def described(self) -> dict[str, Any]:
        """What must be the same when a sweep goes on, as JSON has it."""
        described = dataclasses.asdict(self)
        del described["trials"], described["path"]
        return json.loads(json.dumps(described))


def load_sweep(path: str, trials: int | None = None) -> Sweep:
    """Reads and checks the file of a sweep.

    Args:
        trials: overrides those of the file.

    Raises:
        UserError: naming the file, the key and what it must be.
    """
    try:
        return _sweep(read_file(Path(path)), path, trials)
    except SettingError as error:
        raise UserError(f"{path}: {error}") from error


def _sweep(given: dict[str, Any], path: str, trials: int | None) -> Sweep:
    _known(given, KEYS, "")
    command = given.get("command", "pretrain")
    _need(isinstance(command, str) and command in COMMANDS, "command", command, "must be pretrain or finetune")
    metrics = METRICS[command]
    metric = given.get("metric", next(iter(metrics)))
    is_known = isinstance(metric, str) and metric in metrics
    _need(is_known, "metric", metric, f"must be one of {', '.join(metrics)} for {command}")
    direction = given.get("direction", metrics[metric])
    _need(direction == metrics[metric], "direction", direction, f"must be {metrics[metric]}, or left out, for {metric}")
    count = trials if trials is not None else given.get("trials")
    pruner = _pruner(given.get("pruner"))
    settings = _settings(given, command, metric, pruner)
    sweep = Sweep(
        command=command,
        settings=settings,
        search=_search(given.get("search"), command, metric),
        metric=metric,
        direction=metrics[metric],  # type: ignore[arg-type]
        trials=_whole("trials", count, 1),
        seed=_whole("seed", given.get("seed", 0), 0),
        startup=_whole("startup", given.get("startup", 10), 1),
        pruner=pruner,
        path=path,
    )
    _check_values(sweep)
    return sweep


def _settings(given: dict[str, Any], command: str, metric: str, pruner: Pruner | None) -> dict[str, Any]:
    """Returns the settings that all trials share: those of ``config``, and those of ``settings``, which override."""
    config_class, name = COMMANDS[command], given.get("config")
    _need(name is None or isinstance(name, str), "config", name, "must be a file of settings, or a run folder")
    settings = {} if name is None else load_settings(name, config_class)
    own = given.get("settings", {})
    _need(isinstance(own, dict), "settings", own, "must hold settings, as in `settings: {epochs: 20}`")
    settings = {n: v for n, v in settings.items() if n not in OF_THE_SWEEP and v is not None}
    settings |= _checked(own, config_class, "settings")
    for name in OF_THE_SWEEP:
        _need(name not in settings, f"settings.{name}", problem="is the sweep's; leave it out")
    _need(settings.get("epochs") is not None, "settings.epochs", problem="must be given: how long each trial trains")
    epochs: int = settings["epochs"]
    _need(epochs >= 1, "settings.epochs", epochs, "must be at least 1")
    if metric in PROBES:
        most = min(pruner.min_epochs, epochs) if pruner else epochs
        settings.setdefault("probe_freq", next(n for n in range(most, 0, -1) if epochs % n == 0))
        settings.setdefault("probe", False)
        freq = settings["probe_freq"]
        problem = f"must be at most {most}, and divide the {epochs} epochs, so that {metric} is measured after the last"
        holds = freq is not None and 1 <= freq <= most and epochs % freq == 0
        _need(holds, "settings.probe_freq", freq, problem)
    if metric == "held_out_loss":
        _need("held_out" in settings, "settings.held_out", problem="must be given for the metric held_out_loss")
    holds = pruner is None or pruner.min_epochs < epochs
    _need(holds, "pruner.min_epochs", pruner and pruner.min_epochs, f"must be below the {epochs} epochs of a trial")
    return settings


def _search(given: Any, command: str, metric: str) -> tuple[Parameter, ...]:
    example = "`search: {blr: {low: 1e-4, high: 1e-2, log: true}}`"
    _need(isinstance(given, dict) and bool(given), "search", problem=f"must name what is searched, as in {example}")
    config_class = COMMANDS[command]
    for name in given:
        _need(name not in OF_THE_SWEEP, f"search.{name}", problem="is the sweep's; leave it out")
        _need(name != "epochs", "search.epochs", problem="must be left out, as trials are compared after equal epochs")
        if metric.endswith("_loss"):
            others = " or ".join(other for other in METRICS[command] if not other.endswith("_loss"))
            problem = f"changes what {metric} measures, so trials cannot be compared by it; use metric {others}"
            refused = CHANGE_THE_LOSS + CHANGE_TRAINING_LOSS * (metric == "train_loss")
            _need(name not in refused, f"search.{name}", problem=problem)
    try:
        names = {name: next(iter(current_settings({name: None}, config_class))) for name in given}
    except SettingError as error:
        raise SettingError(f"search.{error.name}", problem=error.problem) from error
    return tuple(_parameter(f"search.{name}", names[name], given[name], config_class) for name in given)


def _parameter(key: str, name: str, given: Any, config_class: type) -> Parameter:
    either = "must be {low: …, high: …}, with log or step, or {values: [first, second, …]}"
    _need(isinstance(given, dict), key, given, either)
    _known(given, ("low", "high", "log", "step", "values"), f"{key}.")
    annotation = field_types(config_class)[name]
    kinds = set(get_args(annotation) or (annotation,)) & {int, float}
    if "values" in given:
        _need(set(given) == {"values"}, key, problem=either)
        values = given["values"]
        _need(isinstance(values, list) and bool(values), f"{key}.values", values, "must be a list of values")
        checked = []
        for value in values:
            try:
                checked.append(check_type(name, value, annotation))
            except SettingError as error:
                raise SettingError(f"{key}.values", value, error.problem) from error
        _need(len(set(map(repr, checked))) == len(checked), f"{key}.values", values, "must hold each value once")
        return Parameter(name, values=tuple(checked))
    _need(bool(kinds), key, problem="is no number; give {values: [first, second, …]}")
    _need({"low", "high"} <= set(given), key, problem=either)
    is_whole = kinds == {int}
    low, high = (_number(f"{key}.{end}", given[end], is_whole) for end in ("low", "high"))
    _need(low < high, f"{key}.low", given["low"], f"must be below high, which is {given['high']}")
    log, step = given.get("log", False), given.get("step")
    _need(isinstance(log, bool), f"{key}.log", log, "must be true or false")
    _need(not log or low > 0, f"{key}.low", given["low"], "must be positive with log")
    _need(not log or step is None, f"{key}.step", step, "must be left out with log")
    if step is not None:
        step = _number(f"{key}.step", step, is_whole)
        _need(step > 0, f"{key}.step", given["step"], "must be positive")
        fits = math.isclose((high - low) / step, round((high - low) / step), rel_tol=1e-9)
        _need(fits, f"{key}.step", given["step"], f"must divide the range from {given['low']} to {given['high']}")
    return Parameter(name, low, high, log, step, is_whole)


def _pruner(given: Any) -> Pruner | None:
    if given is None:
        return None
    _need(isinstance(given, dict), "pruner", given, "must be {min_epochs: …, factor: …}, or left out")
    _known(given, ("min_epochs", "factor"), "pruner.")
    least = _whole("pruner.min_epochs", given.get("min_epochs"), 1)
    return Pruner(least, _whole("pruner.factor", given.get("factor", Pruner.factor), 2))


def _check_values(sweep: Sweep) -> None:
    """Makes a configuration of each value that is searched, beside the first values of the others.

    Raises:
        SettingError: the command refuses one.
    """
    config_class = COMMANDS[sweep.command]
    first = sweep.settings | {one.name: one.tried()[0] for one in sweep.search}
    for one in sweep.search:
        for value in one.tried():
            try:
                config_class(**(first | {one.name: value}))
            except SettingError as error:
                is_searched = error.name in {other.name for other in sweep.search}
                key = f"{'search' if is_searched else 'settings'}.{error.name}"
                raise SettingError(key, error.value, error.problem) from error


def _checked(given: Mapping[Any, Any], config_class: type, key: str) -> dict[str, Any]:
    """Returns settings under their names of today, with values of their types."""
    known = field_types(config_class)
    try:
        current = current_settings(given, config_class)
        return {name: check_type(name, value, known[name]) for name, value in current.items()}
    except SettingError as error:
        raise SettingError(f"{key}.{error.name}", error.value, error.problem) from error


def _known(given: Mapping[Any, Any], keys: Iterable[str], prefix: str) -> None:
    for name in given:
        near = difflib.get_close_matches(str(name), list(keys), 1, 0.6)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(keys)}"
        _need(name in keys, f"{prefix}{name}", problem=f"no such key; {hint}")


def _whole(key: str, value: Any, least: int) -> int:
    _need(value is not None, key, problem=f"must be given: a whole number of at least {least}")
    number = _number(key, value, True)
    _need(least <= number < LARGEST, key, value, f"must be a whole number of at least {least}")
    return int(number)


def _number(key: str, value: Any, is_whole: bool) -> Any:
    try:
        return check_type(key, value, int if is_whole else float)
    except SettingError as error:
        raise SettingError(key, value, error.problem) from None


def _need(holds: bool, key: str, value: Any = None, problem: str = "") -> None:
    if not holds:
        raise SettingError(key, problem=problem) if value is None else SettingError(key, value, problem)
