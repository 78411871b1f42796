"""Stock-taking: what lies under a data path, what of it is used, and what is not, with the reason and a remedy.

Sources fill in a Stock when they are opened. The `data` line of a run, `fastmae verify` and the errors show it in the
same words, so a user reads the same sentence wherever data is not what was meant. This module opens nothing.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

EXAMPLES = 3
"""How many names of what is left out are shown."""
RUN_LINES = 8
"""How many lines of a stock a run begins with at most."""


@dataclass(frozen=True)
class LeftOut:
    """Some things of one unit that are not used, for one reason."""

    unit: str
    """What is counted: "files", "folders", "members" of tars, "rows", "pages", "bands" …"""
    count: int
    reason: str
    """Why, and what to do, as a phrase that goes on from "4 files left out: "."""
    examples: tuple[str, ...] = ()
    """The first names, at most ``EXAMPLES``."""

    def __str__(self) -> str:
        names = f" ({', '.join(self.examples)}{', …' if self.count > len(self.examples) else ''})"
        return f"{count_of(self.count, self.unit)} left out: {self.reason}{names if self.examples else ''}"


@dataclass(frozen=True)
class Stock:
    """What lies under a data path. For every unit, what is used and what is left out add up to what is there."""

    used: dict[str, int] = field(default_factory=dict)
    """How many of each unit are used: {"files": 3, "members": 300} for three tars of a hundred images each."""
    left_out: tuple[LeftOut, ...] = ()
    notes: tuple[str, ...] = ()
    """What else the owner may not expect of what is used, with numbers and a remedy, a sentence each."""

    def total(self, unit: str) -> int:
        """Returns how many of a unit are there."""
        return self.used.get(unit, 0) + sum(item.count for item in self.left_out if item.unit == unit)

    def lines(self, most: int | None = None) -> list[str]:
        """Returns what people should know of it, one line per reason and note. Empty when everything is used.

        Args:
            most: the number of lines from which on the last says how many more there are; None for all of them.
        """
        left_out, notes = [*map(str, self.left_out)], [*self.notes]
        more = 0 if most is None else len(left_out) + len(notes) - most
        if most is None or more <= 0:
            return [*left_out, *notes]
        # Notes stay, as far as they fit, because suffixes are what there are most of.
        shown = [*left_out[: max(1, most - 1 - len(notes))], *notes][: most - 1]
        return [*shown, f"and {more + 1} more; `fastmae verify` shows them"]


def joined(stocks: Iterable[Stock]) -> Stock:
    """Returns the sum of several stocks; what is left out for the same reason is counted together."""
    used: dict[str, int] = {}
    left_out: dict[tuple[str, str], LeftOut] = {}
    notes: dict[str, None] = {}
    for stock in stocks:
        for unit, count in stock.used.items():
            used[unit] = used.get(unit, 0) + count
        for item in stock.left_out:
            before = left_out.get((item.unit, item.reason), LeftOut(item.unit, 0, item.reason))
            left_out[item.unit, item.reason] = LeftOut(
                item.unit, before.count + item.count, item.reason, (before.examples + item.examples)[:EXAMPLES]
            )
        notes |= dict.fromkeys(stock.notes)
    return Stock(used, tuple(left_out.values()), tuple(notes))


def within(inside: Stock, folder: Stock | None) -> Stock:
    """Returns the stock of what is inside some files of a folder, with that of the folder, which counts its files."""
    if folder is None:
        return inside
    units = {unit: count for unit, count in inside.used.items() if unit != "files"}
    return joined((folder, Stock(units, inside.left_out, inside.notes)))


def count_of(count: int, unit: str) -> str:
    """Returns "1 file", "2,000 files": a number and its unit, which is given in the plural."""
    singular = unit.removesuffix("es") if unit.endswith("sses") else unit.removesuffix("s")
    return f"{count:,} {singular if count == 1 else unit}"
