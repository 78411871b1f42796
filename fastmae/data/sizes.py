"""The size of crops in each epoch, which may grow to that of the model (progressive resizing), and the visible patches.

Sizes are (height, width) in pixels. All depend on the epoch alone, so that a resumed run continues with the right one.
"""

from __future__ import annotations

from collections.abc import Sequence

Size = tuple[int, int]

MAX_SIZES = 8
"""The most sizes in a run, because each of them is compiled and each starts the decoders again."""


def growing_sizes(start: Size, full: Size, unit: Size) -> tuple[Size, ...]:
    """Returns the sizes from ``start`` to ``full``, each larger than the one before and a multiple of ``unit``.

    A step adds one unit to the side that has the most to grow, and to the other side in proportion, rounded down. If
    that takes more than ``MAX_SIZES`` sizes, ``MAX_SIZES`` evenly spaced ones are returned.

    Raises:
        ValueError: ``start`` is no multiple of ``unit``, is below ``unit``, or is not smaller than ``full``.
    """
    sides = list(zip(start, full, unit, strict=True))
    if any(first % step for first, _, step in sides):
        raise ValueError(f"must be a multiple of {_shown(unit)}")
    if start == full or any(not step <= first <= last for first, last, step in sides):
        raise ValueError(f"must be from {_shown(unit)} to less than {_shown(full)}")
    units = [(last - first) // step for first, last, step in sides]
    count = min(max(units), MAX_SIZES - 1)
    (height, _, row), (width, _, column) = sides
    grown = ((height + row * (units[0] * i // count), width + column * (units[1] * i // count)) for i in range(count))
    return (*grown, full)


def size_in(epoch: int, sizes: Sequence[Size], grow_epochs: int) -> Size:
    """Returns the size in an epoch: the last one from ``grow_epochs`` on, the others for equal times before."""
    return sizes[min(epoch, grow_epochs) * (len(sizes) - 1) // grow_epochs] if grow_epochs else sizes[-1]


def describe_sizes(sizes: Sequence[Size], grow_epochs: int, epochs: int) -> str:
    """Returns how many epochs of a run have which size, as a phrase for people."""
    if len(sizes) == 1:
        return f"{_shown(sizes[0])} in all epochs"
    size_per_epoch = [size_in(epoch, sizes, grow_epochs) for epoch in range(epochs)]
    counts = {size: size_per_epoch.count(size) for size in sizes}
    return ", then ".join(f"{_shown(size)} for {count}" for size, count in counts.items() if count) + " epochs"


def visible_counts(first: int, last: int, epochs: int) -> tuple[int, ...]:
    """Returns the numbers of visible patches from ``first`` to ``last``, evenly spaced and all different, a step each.

    There are at most ``MAX_SIZES``, and no more than epochs; of one epoch it is the first.
    """
    count = min(MAX_SIZES, epochs, abs(last - first) + 1)
    return tuple(first + round((last - first) * i / max(1, count - 1)) for i in range(count))


def visible_in(epoch: int, counts: Sequence[int], epochs: int) -> int:
    """Returns the number of visible patches in an epoch of a run of so many: each of ``counts`` for equal times."""
    return counts[min(epoch, epochs - 1) * len(counts) // epochs]


def _shown(size: Size) -> str:
    return f"{size[0]}×{size[1]}"
