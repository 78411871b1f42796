"""What a sweep decides, as functions of what is recorded and of nothing else: the settings of the next trial, and
whether a trial is stopped. So one process decides the same after a kill.

Each decision is taken by Optuna in a study in memory, into which the recorded trials are put.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.importance import FanovaImportanceEvaluator, get_param_importances
from optuna.pruners import SuccessiveHalvingPruner
from optuna.samplers import TPESampler
from optuna.trial import FrozenTrial, TrialState

from fastmae.config.sweep import Parameter, Pruner, Sweep

optuna.logging.set_verbosity(optuna.logging.WARNING)
NEEDED = 4
"""Completed trials from which on it is said which settings mattered."""
Values = Mapping[int, float]
"""What a trial reached, by the number of epochs after which it was measured."""


def distributions(sweep: Sweep) -> dict[str, BaseDistribution]:
    """Returns what is searched in the words of Optuna."""
    return {one.name: _distribution(one) for one in sweep.search}


def _distribution(one: Parameter) -> BaseDistribution:
    if one.values:
        return CategoricalDistribution([_as_choice(value) for value in one.values])
    if one.is_whole:
        return IntDistribution(int(one.low), int(one.high), log=one.log, step=int(one.step or 1))
    return FloatDistribution(one.low, one.high, log=one.log, step=one.step)


def _as_choice(value: Any) -> Any:
    """Returns a value as Optuna stores it: several values are a text."""
    return json.dumps(value) if isinstance(value, tuple) else value


def as_settings(sweep: Sweep, params: Mapping[str, Any]) -> dict[str, Any]:
    """Returns proposed values as settings of the command."""
    by_choice = {one.name: {_as_choice(value): value for value in one.values} for one in sweep.search}
    return {name: by_choice[name].get(value, value) for name, value in params.items()}


def propose(sweep: Sweep, number: int, trials: Sequence[FrozenTrial]) -> dict[str, Any]:
    """Proposes the values of a trial by the tree-structured Parzen estimator (TPE).

    Args:
        number: of the trial, from 0. Together with the seed of the sweep it is the seed of what is drawn.
        trials: those before it. Failed ones say nothing; those that still run, in other processes, are avoided.
    """
    seed = int(np.random.SeedSequence([sweep.seed, number]).generate_state(1)[0])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # older versions of Optuna call two of these experimental
        sampler = TPESampler(seed=seed, n_startup_trials=sweep.startup, multivariate=True, constant_liar=True)
    study = optuna.create_study(sampler=sampler, direction=sweep.direction)
    study.add_trials([trial for trial in trials if trial.state != TrialState.FAIL])
    return study.ask(distributions(sweep)).params


def pruned_after(sweep: Sweep, values: Values, others: Iterable[Values]) -> int | None:
    """Returns after how many epochs a trial is stopped by asynchronous successive halving; None if it goes on.

    Args:
        values: what the trial reached so far.
        others: what the trials before it reached.
    """
    if sweep.pruner is None:
        return None
    pruner = SuccessiveHalvingPruner(min_resource=sweep.pruner.min_epochs, reduction_factor=sweep.pruner.factor)
    study = optuna.create_study(direction=sweep.direction, pruner=pruner)
    for other in others:
        _replay(study, other, sweep.pruner)
    return _replay(study, values, sweep.pruner)


def _replay(study: optuna.Study, values: Values, pruner: Pruner) -> int | None:
    """Reports what a trial reached at each rung, and returns the first after which it is stopped."""
    trial, rung, stopped = study.ask(), pruner.min_epochs, None
    for epochs, value in sorted(values.items()):
        if epochs >= rung:
            trial.report(value, epochs)
            if trial.should_prune() and stopped is None:
                stopped = epochs
        while epochs >= rung:
            rung *= pruner.factor
    return stopped


def best_of(sweep: Sweep, trials: Iterable[FrozenTrial]) -> list[FrozenTrial]:
    """Returns the completed trials, the best first; of equal ones the earlier first."""
    done = [trial for trial in trials if trial.state == TrialState.COMPLETE]
    sign = -1 if sweep.direction == "maximize" else 1
    return sorted(done, key=lambda trial: (sign * (trial.value or 0.0), trial.number))


def importances(sweep: Sweep, trials: Iterable[FrozenTrial]) -> dict[str, float]:
    """Returns the share of the differences among completed trials that each setting accounts for, by fANOVA.

    It is empty for fewer than four trials, or where all reached the same.
    """
    done = [trial for trial in trials if trial.state == TrialState.COMPLETE]
    if len(done) < NEEDED or len({trial.value for trial in done}) == 1:
        return {}
    study = optuna.create_study(direction=sweep.direction)
    study.add_trials(done)
    return get_param_importances(study, evaluator=FanovaImportanceEvaluator(seed=0))
