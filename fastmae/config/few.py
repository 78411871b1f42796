"""The settings of training and probing with few labels: how many of the labelled images are taken, and how often."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fastmae.config.values import LARGEST, need, need_at_least_one
from fastmae.errors import SettingError

SEEDS = 5
"""How many draws of the labelled images the probe takes, if nothing is said."""


@dataclass(frozen=True, kw_only=True)
class FewLabelsConfig:
    """Which of the labelled images are learnt from."""

    shots: tuple[int, ...] | None = None
    """Learn from this many images of each class alone. Several numbers are tried one after another. The images follow
    from the seed, and those of a smaller number are among those of a larger one."""
    label_share: tuple[float, ...] | None = None
    """As --shots, but this share of the images of each class, such as 0.01; at least one of each."""
    seeds: tuple[int, ...] | None = None
    """How many draws of the labelled images are tried, of the seeds 0, 1, 2 and so on; several numbers are the seeds
    themselves. Results are means with their standard deviation."""


def check_few(config: Any) -> None:
    """Refuses numbers of labelled images that cannot work, whatever the data.

    Raises:
        SettingError: naming the setting, its value and what it must be.
    """
    need_at_least_one(config, "shots")
    for share in config.label_share or ():
        if not 0 < share <= 1:
            raise SettingError("label_share", share, "must be above 0 and at most 1, a share of the images of a class")
    for name in ("shots", "label_share", "seeds"):
        values = getattr(config, name)
        need(config, values != (), name, "one or several numbers")
        need(config, values is None or len(set(values)) == len(values), name, "numbers that differ")
    if config.seeds is not None and len(config.seeds) == 1:
        need(config, config.seeds[0] >= 1, "seeds", "at least 1, how many there are, or several numbers")
    for seed in config.seeds or ():
        if not 0 <= seed < LARGEST:
            raise SettingError("seeds", seed, "must be in [0, 2**63)")


def amounts_of(config: FewLabelsConfig) -> tuple[int | float, ...]:
    """Returns how many labelled images are tried: whole numbers are images of each class, others shares of them."""
    return (*(config.shots or ()), *(config.label_share or ()))


def seeds_of(seeds: tuple[int, ...]) -> tuple[int, ...]:
    """Returns the seeds that ``--seeds`` means: one number says how many there are."""
    return tuple(range(seeds[0])) if len(seeds) == 1 else seeds
