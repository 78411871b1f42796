"""The loop of a sweep: a trial is chosen, trained, and recorded, one after another."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

from optuna.trial import FrozenTrial, TrialState

from fastmae.config.sweep import Sweep
from fastmae.errors import UserError
from fastmae.signals import EXIT_INTERRUPTED, StopSignals
from fastmae.sweep.propose import as_settings, pruned_after
from fastmae.sweep.record import Record, trial_folder
from fastmae.sweep.train import Train, reached

MOST_FAILED = 3
"""So many trials may fail before one trains; then the sweep ends, as all of them seem to fail."""
OVER = (TrialState.COMPLETE, TrialState.PRUNED)


def run_trials(
    sweep: Sweep,
    folder: Path,
    train: Train,
    began: Callable[[FrozenTrial], None],
    ended: Callable[[Record, FrozenTrial], None],
) -> tuple[Record, bool]:
    """Trains trials until there are as many as the sweep asks for.

    Args:
        folder: of the sweep.
        train: trains a trial.
        began, ended: are told of each trial.

    Returns:
        the record; and whether all trials are done. If not, a signal stopped the sweep.

    Raises:
        UserError: the folder cannot be used, or the first trials all failed.
    """
    with StopSignals() as stop:
        record, failed = Record(folder, sweep), []
        while stop.received is None:
            with record.next_trial() as trial:
                if trial is None:
                    return record, True
                began(trial)
                after = _trained(record, trial, train, stop)
            if after is None:
                return record, False
            ended(record, after)
            failed += [after] if after.state == TrialState.FAIL else []
            if len(failed) >= MOST_FAILED and not any(one.state in OVER for one in record.trials()):
                reason = after.user_attrs.get("reason", "")
                raise UserError(f"all of the first {MOST_FAILED} trials failed, the last with: {reason}")
    return record, False


def _trained(record: Record, trial: FrozenTrial, train: Train, stop: StopSignals) -> FrozenTrial | None:
    """Trains a trial to its end, and returns it as it is recorded then; None if it was stopped and goes on later."""
    sweep, folder = record.sweep, trial_folder(record.folder, trial)
    seen: dict[int, float] = {}
    stopped_after: int | None = None

    def is_enough() -> bool:
        """Looks at what the trial has reached. What decides is what is written, not when it was looked at."""
        nonlocal seen, stopped_after
        now = reached(folder, sweep.metric)
        if repr(now) != repr(seen):  # NaN is not itself
            seen = now
            others = [other.intermediate_values for other in record.trials() if other.number != trial.number]
            stopped_after = pruned_after(sweep, now, others)
            record.note(trial, [(n, value) for n, value in now.items() if n <= (stopped_after or n)])
        return stopped_after is not None

    if not is_enough():
        outcome = train(sweep, as_settings(sweep, trial.params), folder, stop, is_enough)
        is_enough()
    if stopped_after is not None:
        return record.end(trial, TrialState.PRUNED, seen[stopped_after])
    if outcome.status == EXIT_INTERRUPTED:
        return None
    if outcome.status != 0:
        return record.end(trial, TrialState.FAIL, None, outcome.reason)
    if not seen or math.isnan(value := seen[max(seen)]):
        reason = f"{sweep.metric} was not {'finite' if seen else f'measured; see {folder}/output.txt'}"
        return record.end(trial, TrialState.FAIL, None, reason)
    return record.end(trial, TrialState.COMPLETE, value)
