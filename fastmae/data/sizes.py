"""Which size crops have in which epoch: the model's, or a smaller one that grows to it (progressive resizing).

Sizes are (height, width) in pixels and functions of the epoch alone, so that a resumed run goes on with the right one.
"""

from __future__ import annotations

from collections.abc import Sequence

Size = tuple[int, int]

MAX_SIZES = 8
"""In a run: each is compiled, and each starts the decoders anew."""


def growing_sizes(start: Size, full: Size, unit: Size) -> tuple[Size, ...]:
    """The sizes from ``start`` to ``full``, each larger than the one before and a multiple of ``unit``.

    A step adds a unit to the side that has the most to grow, and to the other in proportion, rounded down; where that
    would be more than ``MAX_SIZES`` sizes, so many are spread evenly.

    Raises:
        ValueError: ``start`` is no multiple, or not between a unit and ``full`` and smaller than it.
    """
    pairs = list(zip(start, full, unit, strict=True))
    if any(side % one for side, _, one in pairs):
        raise ValueError(f"must be a multiple of {_shown(unit)}")
    if start == full or any(not one <= side <= end for side, end, one in pairs):
        raise ValueError(f"must be from {_shown(unit)} to less than {_shown(full)}")
    missing = [(end - side) // one for side, end, one in pairs]
    steps = min(max(missing), MAX_SIZES - 1)
    grown = [
        [side + one * (units * step // steps) for (side, _, one), units in zip(pairs, missing, strict=True)]
        for step in range(steps)
    ]
    return (*((height, width) for height, width in grown), full)


def size_in(epoch: int, sizes: Sequence[Size], grow_epochs: int) -> Size:
    """The size in an epoch: the last of ``sizes`` from epoch ``grow_epochs`` on, the others for equal times before."""
    return sizes[min(epoch, grow_epochs) * (len(sizes) - 1) // grow_epochs] if grow_epochs else sizes[-1]


def describe_sizes(sizes: Sequence[Size], grow_epochs: int, epochs: int) -> str:
    """How many of a run's epochs have which size, for people."""
    if len(sizes) == 1:
        return f"{_shown(sizes[0])} in all epochs"
    of_epochs = [size_in(epoch, sizes, grow_epochs) for epoch in range(epochs)]
    counts = {size: of_epochs.count(size) for size in sizes}
    return ", then ".join(f"{_shown(size)} for {count}" for size, count in counts.items() if count) + " epochs"


def _shown(size: Size) -> str:
    return f"{size[0]}×{size[1]}"
