"""The colours of runs, the same in charts, legends and tables."""

from __future__ import annotations

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#8a6d00", "#5b8ff9", "#7a5195", "#8d96a3")
"""In order; told apart by colour-blind people too (after Okabe and Ito)."""


def colour_of(number: int) -> str:
    """Returns the colour of a run by its number."""
    return COLOURS[number % len(COLOURS)]
