"""The record of a sweep in its folder: Optuna's journal, a file of JSON lines, and who trains which trial.

Each change is one line that is synced, so that a kill loses nothing, and on a network file system too. Nothing in it is
pickled. Programs for Optuna, such as its dashboard, open it.
"""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Generator, Iterable
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

from optuna.exceptions import OptunaError
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend, JournalFileSymlinkLock
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState, create_trial

from fastmae.config.sweep import Sweep
from fastmae.errors import UserError
from fastmae.sweep.propose import distributions, propose

JOURNAL = "journal.log"
LOCK = "sweep.lock"
"""Held while a trial is chosen; in the folder of a trial, by the process that trains it."""
STUDY = "fastmae"
DESCRIBED = "sweep"


def trial_folder(folder: Path, trial: FrozenTrial) -> Path:
    """Returns the run folder of a trial."""
    return folder / f"trial-{trial.number:04d}"


class Record:
    """The trials of a sweep, as all of its processes see them.

    Args:
        folder: of the sweep, which is made if it is not there.
        sweep: its description.

    Raises:
        UserError: the folder cannot be written, or holds the record of another sweep or a damaged one.
    """

    def __init__(self, folder: Path, sweep: Sweep) -> None:
        self.folder, self.sweep = folder, sweep
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with locked(folder / LOCK):
                _end_torn_line(folder / JOURNAL)
                self._storage = JournalStorage(JournalFileBackend(str(folder / JOURNAL)))
                self._study = self._opened()
        except OSError as error:
            problem = f"cannot be written ({error.strerror}); name another folder with --output_dir"
            raise UserError(f"{folder}: {problem}") from error
        except (ValueError, KeyError, TypeError, AssertionError, OptunaError) as error:
            problem = f"is damaged ({' '.join(str(error).split()) or type(error).__name__})"
            raise UserError(
                f"{folder / JOURNAL}: {problem}; restore it, or begin in another folder with --output_dir"
            ) from error

    def _opened(self) -> int:
        described = self.sweep.described()
        studies = {study.study_name: study for study in self._storage.get_all_studies()}
        if STUDY not in studies:
            names = [name for name in os.listdir(self.folder) if name not in (JOURNAL, LOCK)]
            if names:
                raise UserError(f"{self.folder}: holds {sorted(names)[0]} and no sweep; name another with --output_dir")
            direction = StudyDirection.MAXIMIZE if self.sweep.direction == "maximize" else StudyDirection.MINIMIZE
            study_id = self._storage.create_new_study([direction], STUDY)
            self._storage.set_study_user_attr(study_id, DESCRIBED, described)
            return study_id
        before = studies[STUDY].user_attrs.get(DESCRIBED)
        if before is None:  # killed between the two lines
            self._storage.set_study_user_attr(self._storage.get_study_id_from_name(STUDY), DESCRIBED, described)
        elif before != described:
            changed = ", ".join(sorted(name for name in described if described[name] != before.get(name)))
            problem = f"differs in {changed} from the sweep in {self.folder}; only trials may change"
            raise UserError(f"{self.sweep.path}: {problem}: undo it, or name another folder with --output_dir")
        return self._storage.get_study_id_from_name(STUDY)

    def alone(self) -> AbstractContextManager[None]:
        """Keeps the other processes of the sweep from choosing a trial, or from coming in here, while entered."""
        return locked(self.folder / LOCK)

    def trials(self) -> list[FrozenTrial]:
        """Returns all trials in order of their numbers."""
        return sorted(self._storage.get_all_trials(self._study), key=lambda trial: trial.number)

    @contextmanager
    def next_trial(self) -> Generator[FrozenTrial | None]:
        """Gives the trial that is to be trained, and keeps it for this process while entered; None if there is none.

        That is one whose process was killed or stopped, or else a new one. All of a new trial is one line of the
        record: it exists with its settings, or not at all.
        """
        with self.alone():
            trial, claim = self._claimed()
        try:
            yield trial
        finally:
            if claim is not None:
                os.close(claim)

    def _claimed(self) -> tuple[FrozenTrial | None, int | None]:
        trials = self.trials()
        for trial in trials:
            if trial.state == TrialState.RUNNING:
                claim = self._claim(trial)
                if claim is None:
                    continue
                if self.trials()[trial.number].state == TrialState.RUNNING:
                    return trial, claim
                os.close(claim)  # its process ended it meanwhile
        if len(trials) >= self.sweep.trials:
            return None, None
        params = propose(self.sweep, len(trials), trials)
        template = create_trial(state=TrialState.RUNNING, params=params, distributions=distributions(self.sweep))
        trial = self._storage.get_trial(self._storage.create_new_trial(self._study, template))
        return trial, self._claim(trial)

    def _claim(self, trial: FrozenTrial) -> int | None:
        folder = trial_folder(self.folder, trial)
        folder.mkdir(exist_ok=True)
        return take_lock(folder / LOCK, wait=False)

    def note(self, trial: FrozenTrial, values: Iterable[tuple[int, float]]) -> None:
        """Adds what a trial reached, by the number of epochs, where it is not noted yet."""
        noted = self._storage.get_trial(self._id(trial)).intermediate_values
        for epochs, value in values:
            if epochs not in noted:
                self._storage.set_trial_intermediate_value(self._id(trial), epochs, value)

    def end(self, trial: FrozenTrial, state: TrialState, value: float | None, reason: str = "") -> FrozenTrial:
        """Ends a trial, and returns it as it is recorded."""
        if reason:
            self._storage.set_trial_user_attr(self._id(trial), "reason", reason)
        self._storage.set_trial_state_values(self._id(trial), state, None if value is None else [value])
        return self._storage.get_trial(self._id(trial))

    def _id(self, trial: FrozenTrial) -> int:
        return self._storage.get_trial_id_from_study_id_trial_number(self._study, trial.number)


def _end_torn_line(path: Path) -> None:
    """Cuts off the end of a line that a power cut left, which the journal could not be read with."""
    if not path.exists():
        return
    lock = JournalFileSymlinkLock(str(path))
    lock.acquire()
    try:
        with open(path, "r+b") as file:
            data = file.read()
            if not data.endswith(b"\n"):
                file.truncate(data.rfind(b"\n") + 1)
    finally:
        lock.release()


# --- locks of the kernel, which end with their process ----------------------------------------------------------------


def take_lock(path: Path, *, wait: bool) -> int | None:
    """Takes a lock on a file, and returns its descriptor, which is closed to release it; None if another holds it."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError as error:
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            os.close(descriptor)
            return None
        # The file system has no locks: one process is safe, and the page about sweeps says so.
    return descriptor


@contextmanager
def locked(path: Path) -> Generator[None]:
    """Holds a lock while entered; waits for it."""
    descriptor = take_lock(path, wait=True)
    try:
        yield
    finally:
        if descriptor is not None:
            os.close(descriptor)
