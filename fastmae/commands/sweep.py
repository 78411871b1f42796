"""``fastmae sweep``: trains trials, says how each ended, and what came of all of them."""

from __future__ import annotations

import csv
import importlib.util
import io
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastmae.config.sweep import Sweep, SweepConfig, load_sweep
from fastmae.errors import UserError, install_hint
from fastmae.files import write_text
from fastmae.screen import say, show_table
from fastmae.signals import EXIT_INTERRUPTED

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial

    from fastmae.sweep.record import Record

TABLE = "trials.csv"
SHOWN = 10


def run_sweep(config: SweepConfig) -> int:
    """Trains the trials of a sweep, or goes on with it, and prints the best ones.

    Returns:
        0 when all trials are done; 75 when a signal stopped the sweep, which goes on with the same command.

    Raises:
        UserError: the file, the folder or the settings cannot work.
    """
    sweep = load_sweep(config.file, config.trials)
    if importlib.util.find_spec("optuna") is None:
        raise UserError(f"fastmae sweep: needs optuna; {install_hint('sweep')}")
    from fastmae.sweep.run import run_trials
    from fastmae.sweep.train import train_in_a_process

    folder = Path(config.output_dir or Path(config.file).with_suffix(""))
    if folder == Path(config.file):
        raise UserError(f"{folder}: is the file of the sweep; name a folder with --output_dir")
    goal = f"{sweep.metric}, {'higher' if sweep.direction == 'maximize' else 'lower'} is better"
    say(f"sweep           {sweep.trials} trials of fastmae {sweep.command} in {folder}; {goal}")

    def began(trial: FrozenTrial) -> None:
        say(f"trial {trial.number:<9} {_shown(trial.params)}")

    def ended(record: Record, trial: FrozenTrial) -> None:
        trials = write_table(record)
        say(f"trial {trial.number:<9} {_how(sweep, trial, trials)}")

    record, is_done = run_trials(sweep, folder, train_in_a_process(config.launch), began, ended)
    if not is_done:
        say(f"stopped         by a signal; continue with: {_again(config)}")
        return EXIT_INTERRUPTED
    _show(sweep, folder, write_table(record))
    return 0


def write_table(record: Record) -> list[FrozenTrial]:
    """Writes trials.csv, and returns the trials. Other processes of the sweep wait, as they write it too."""
    with record.alone():
        trials = record.trials()
        write_text(record.folder / TABLE, _csv(record.sweep, trials))
    return trials


def _shown(params: dict[str, Any]) -> str:
    return "  ".join(f"{name} {_number(value)}" for name, value in params.items())


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _how(sweep: Sweep, trial: FrozenTrial, trials: list[FrozenTrial]) -> str:
    """Says how a trial ended."""
    from fastmae.sweep.propose import best_of

    state = trial.state.name
    if state == "FAIL":
        return f"failed: {trial.user_attrs.get('reason', '')}"
    after = max(trial.intermediate_values)
    reached = f"{sweep.metric} {_number(trial.value)} after {after} epoch{'s' if after > 1 else ''}"
    if state == "PRUNED":
        return f"stopped early: {reached}"
    best = best_of(sweep, trials)[0]
    return f"{reached}, {'the best so far' if best.number == trial.number else f'the best is trial {best.number}'}"


def _seconds(trial: FrozenTrial) -> float | None:
    return None if trial.duration is None else round(trial.duration.total_seconds(), 1)


def _csv(sweep: Sweep, trials: list[FrozenTrial]) -> str:
    """Returns the trials as a table for other programs: one line each."""
    text = io.StringIO()
    names = [one.name for one in sweep.search]
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["trial", "state", sweep.metric, "epochs", "seconds", *names, "reason"])
    for trial in trials:
        epochs = max(trial.intermediate_values, default=None)
        row = [trial.number, trial.state.name.lower(), trial.value, epochs, _seconds(trial)]
        writer.writerow([*row, *(trial.params[name] for name in names), trial.user_attrs.get("reason", "")])
    return text.getvalue()


def _show(sweep: Sweep, folder: Path, trials: list[FrozenTrial]) -> None:
    """Prints the best trials, which settings mattered, and what to do with the best."""
    from fastmae.sweep.propose import best_of, importances
    from fastmae.sweep.record import trial_folder

    best = best_of(sweep, trials)
    counts = {name: sum(trial.state.name == name for trial in trials) for name in ("PRUNED", "FAIL", "RUNNING")}
    others = [
        f"{count} {what}"
        for count, what in zip(
            counts.values(), ("stopped early", "failed", "in training by other processes"), strict=True
        )
        if count
    ]
    names = [one.name for one in sweep.search]
    rows = [[trial.number, _number(trial.value), *(_number(trial.params[name]) for name in names)] for trial in best]
    title = f"{len(best)} trials are done{''.join(f', {other}' for other in others)}"
    show_table({"trial": "right", sweep.metric: "right", **dict.fromkeys(names, "right")}, rows[:SHOWN], title)
    shares = importances(sweep, trials)
    if shares:
        shown = ", ".join(f"{name} {share:.0%}" for name, share in shares.items())
        say(f"mattered        {shown} (fANOVA)")
    say(f"table           {folder / TABLE}")
    if best:
        command = ["fastmae", sweep.command, "--config", str(trial_folder(folder, best[0])), "--output_dir"]
        say(f"best            trial {best[0].number}; train it in full: {shlex.join(command)} … --epochs …")


def _again(config: SweepConfig) -> str:
    words = ["fastmae", "sweep", config.file]
    words += ["--output_dir", config.output_dir] if config.output_dir else []
    words += ["--trials", str(config.trials)] if config.trials else []
    words += ["--launch", config.launch] if config.launch else []
    return shlex.join(words)
