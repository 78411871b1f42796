"""What computes matrix products, attention and other calls of a run on a CPU: what was fastest here, or as before.

A run chooses once, when it begins. From then on the choice is in its checkpoints, and a run that goes on has it from
there, on whatever processor: other code adds up in another order, so that results would differ in their last bits. The
main rank decides, and all ranks take its choice. How is measured is the matter of fastmae/ops/tuning.py.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from fastmae.checkpoint.restore import Restored, on_main
from fastmae.environment import processor
from fastmae.errors import SettingError, UserError
from fastmae.ops.backends import asked_backends, set_backends
from fastmae.ops.choices import OF_0_1, TORCHS_OWN, Choices
from fastmae.ops.tuning import cached_here, describe, unmet
from fastmae.train.precision import Precision

VARIABLE = "FASTMAE_TUNE"
"""Says what a new run does where --tune is not given."""
KEY = "choices"
"""Of a manifest. One without it is of a version before there were choices."""

Measure = Callable[[bool], Choices]
"""Returns what is fastest on this machine; with True, nothing that was measured before is taken."""


def choose(
    tune: str | None,
    device: torch.device,
    precision: Precision,
    restored: Restored,
    measure: Measure,
    any_rank: Callable[[bool], bool],
) -> str:
    """Sets the choices of this process, the same on all ranks, until ``using(choices=…)`` ends. All ranks call it.

    Args:
        tune: as --tune says.
        device: of the model.
        precision: the number format of the step.
        restored: the position from which the run goes on.
        measure: is called by the main rank alone, if at all.
        any_rank: returns whether a flag is true on any rank.

    Returns:
        What was chosen, and why, in lines.

    Raises:
        UserError: what the run computed with is damaged or cannot run here, or nothing could be measured.
    """
    choices, why = on_main(lambda: _chosen(tune, device, restored, measure))
    set_backends(replace(asked_backends(), choices=choices))
    if device.type != "cpu":
        return why
    missing = unmet(choices)
    if any_rank(missing is not None):  # a rank has another processor than the main one
        error = SettingError("tune", problem=f"rank 0 chose {missing}; give --tune=off")
        error.is_said = missing is None
        raise error
    figures = describe(choices, precision.autocast or torch.float32) if choices.rules == "measured" else []
    return "\n".join([why, *figures])


def in_manifest() -> dict[str, Any]:
    """Returns the choices of this process as the manifest of a checkpoint has them."""
    return {KEY: asked_backends().choices.as_json()}


def known_here() -> dict[str, str]:
    """Returns what was measured on this machine as it is now, for people: lines by a name."""
    lines = cached_here() or ["nothing yet; a run on a CPU measures when it begins"]
    return {f"measured {number}": line for number, line in enumerate(lines, 1)} if lines[1:] else {"measured": lines[0]}


def _chosen(tune: str | None, device: torch.device, restored: Restored, measure: Measure) -> tuple[Choices, str]:
    """Returns the choices, and why they were made."""
    goes_on = restored.manifest is not None
    if asked_backends().choices != TORCHS_OWN:
        return asked_backends().choices, "as before the rollback"
    if device.type != "cpu":
        kept = _before(restored) if goes_on and tune is None else TORCHS_OWN
        return kept, "nothing is measured on a GPU, for which --attention auto has a table"
    if goes_on and tune is None:
        return _kept(restored)
    asked, by = (tune, f"--tune {tune}") if tune else _of_a_new_run()
    if asked == "off":
        choices, why = TORCHS_OWN, f"torch's own, and nothing is measured ({by})"
    elif asked_backends().ops == "reference":
        choices, why = TORCHS_OWN, "torch's own, as --ops reference has no other"
    else:
        choices, why = _measured(measure, anew=goes_on), "the fastest, as measured on this machine"
    return choices, why + (_since(choices, restored) if goes_on else "")


def _of_a_new_run() -> tuple[str, str]:
    """Returns what the environment says for runs without the flag, and how it says so."""
    value = os.environ.get(VARIABLE) or "auto"
    if value not in ("auto", "off"):
        raise UserError(f"{VARIABLE}={value}: must be auto or off; correct or unset it")
    return value, f"{VARIABLE}={value}"


def _measured(measure: Measure, *, anew: bool) -> Choices:
    """Measures, so that whatever goes wrong is one line, on all ranks."""
    try:
        return measure(anew)
    except UserError:
        raise
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise SettingError("tune", problem=f"nothing could be measured ({reason}); give --tune=off") from error


def _before(restored: Restored) -> Choices:
    """Returns the choices of the run that goes on.

    Raises:
        SettingError: they are not readable.
    """
    assert restored.manifest is not None
    if KEY not in restored.manifest:
        return OF_0_1
    try:
        return Choices.from_json(restored.manifest[KEY])
    except ValueError as error:
        problem = f"what it computed with cannot be read ({error}); choose anew with --tune=auto"
        raise SettingError("resume", restored.origin, problem) from error


def _kept(restored: Restored) -> tuple[Choices, str]:
    """Returns the choices of the run that goes on, which must be able to run here."""
    choices = _before(restored)
    missing = unmet(choices)
    if missing is not None:
        problem = f"computes with {missing}; choose anew with --tune=auto, with which results differ in their last bits"
        raise SettingError("resume", restored.origin, problem)
    if choices == OF_0_1:
        why = "by the rules of version 0.1, with which the run began; --tune auto measures what is fastest here"
    elif choices.rules == "measured" and choices.processor != processor():
        why = f"as the run began, measured on {choices.processor}; --tune auto measures what is fastest here"
    else:
        why = "as the run began (from the checkpoint)"
    return choices, why


def _since(choices: Choices, restored: Restored) -> str:
    """Says what a choice that was asked for changes in a run that goes on."""
    try:
        same = _taken(_before(restored)) == _taken(choices)
    except SettingError:
        same = False
    if same:
        return "; the same as before"
    return f"; not what the run began with, so results differ in their last bits from step {restored.step + 1} on"


def _taken(choices: Choices) -> tuple[str, frozenset[Any]]:
    """Returns what is taken for each call, without how fast it is."""
    return choices.rules, frozenset((entry.op, entry.shape, entry.dtype, entry.taken) for entry in choices.entries)
