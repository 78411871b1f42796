"""The grid of patches that a table of positions belongs to, and tables for another grid.

A table of fixed sine-cosine positions tells its grid exactly: no two grids have the same one. A learnt table does not,
so its grid is said by somebody, or taken as square with a line.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from fastmae.model.classifier import resized_positions
from fastmae.model.vit import sincos_positions

Grid = tuple[int, int]

# Far below the difference of any two grids, and above the rounding of bfloat16.
_TOLERANCE = 1e-2
_MOST_PATCHES = 1 << 20


class UnknownGridError(Exception):
    """Nothing tells which grid a table belongs to; the message says what is known of it."""


@dataclass(frozen=True)
class Positions:
    """A table of positions and its grid."""

    table: torch.Tensor
    """[1, 1+L, D], class row first."""
    grid: Grid
    """(rows, columns) of patches."""
    is_fixed: bool
    """Whether it is the sine-cosine table of its grid, so that nothing but the table was needed to tell the grid."""
    notes: tuple[str, ...] = ()
    registers: torch.Tensor | None = None
    """[1, R, D], what the table adds to registers, as timm has it; None if it has no rows for them."""


def read_table(table: torch.Tensor, name: str, said: Grid | None, registers: int = 0) -> Positions:
    """Finds the grid of a table as a file holds it: [1, 1+L, D], also without its first axis or without a class row.

    Args:
        name: of the table, for the notes.
        said: the grid that somebody says. It is not needed for fixed positions.
        registers: R, if the encoder has any: the table may have rows for them after that of the class token.

    Raises:
        UnknownGridError: the positions are not fixed ones, the grid is not said and not square; or this is no table.
    """
    rows = table[None] if table.ndim == 2 else table
    if rows.ndim != 3 or rows.shape[0] != 1 or rows.shape[1] < 1:
        raise UnknownGridError(f"{name} is of another shape ({list(table.shape)} instead of [1, 1 + patches, width])")
    count = rows.shape[1]
    prefixes = [1, 0, *([1 + registers] if 0 < registers < count - 1 else [])]
    for prefix in prefixes:
        fixed = _fixed_grid(rows[0, prefix:])
        if fixed is not None:
            return _positions(rows, fixed, prefix, name, is_fixed=True)
    for grid in (said, *(square(count - prefix) for prefix in prefixes)):
        if grid is None or count - grid[0] * grid[1] not in prefixes:
            continue
        found = _positions(rows, grid, count - grid[0] * grid[1], name, is_fixed=False)
        if grid == said:
            return found
        note = f"{name} is learnt and does not tell its grid; taken as square, {_shown(grid)}; give input_size if not"
        return Positions(found.table, grid, False, (*found.notes, note), found.registers)
    raise UnknownGridError(f"{name} has {count} positions that are no fixed ones of any grid, and no square")


def _positions(rows: torch.Tensor, grid: Grid, prefix: int, name: str, *, is_fixed: bool) -> Positions:
    """Returns the positions of a table with ``prefix`` rows before those of the patches."""
    if prefix > 1:
        table = torch.cat([rows[:, :1], rows[:, prefix:]], dim=1)
        return Positions(table, grid, is_fixed, registers=rows[:, 1:prefix])
    if prefix == 1:
        return Positions(rows, grid, is_fixed)
    table = torch.cat([rows.new_zeros(1, 1, rows.shape[2]), rows], dim=1)
    note = f"{name} has no row for the class token, whose position is taken as zeros"
    return Positions(table, grid, is_fixed, (note,))


def made_table(width: int, grid: Grid, name: str) -> Positions:
    """Returns fixed positions for a table that a file lacks.

    Raises:
        UnknownGridError: so many patches that the size cannot be meant.
    """
    if grid[0] * grid[1] > _MOST_PATCHES:
        raise UnknownGridError(f"{name} is missing, and {_shown(grid)} patches are too many to make positions for")
    note = f"{name} is missing; fixed positions of {_shown(grid)} patches are taken"
    return Positions(sincos_positions(width, grid)[None], grid, True, (note,))


def for_grid(positions: Positions, new_grid: Grid) -> Positions:
    """Returns positions for another grid, so that one spot of an image has the same position in both.

    Fixed ones are computed, others are interpolated, as in the official code.
    """
    if positions.grid == new_grid:
        return positions
    table, grid = positions.table.float(), positions.grid
    if positions.is_fixed and not _is_swapped(table[0, 1:], grid):
        how, new = "computed", sincos_positions(table.shape[2], new_grid, grid)[None]
    else:
        how, new = "interpolated", resized_positions(table, grid, new_grid)
    note = f"positions {how} {_shown(grid)} → {_shown(new_grid)}"
    return Positions(new, new_grid, False, (*positions.notes, note))


def square(count: int) -> Grid | None:
    """Returns the square grid of so many patches, if there is one."""
    side = math.isqrt(max(0, count))
    return (side, side) if side and side * side == count else None


def _fixed_grid(table: torch.Tensor) -> Grid | None:
    """Returns the grid of fixed positions [L, D] without a class row; None for any others.

    Every factorisation of L is tried. Tables whose channels have the row before the column are known as well.
    """
    L, D = table.shape
    if D % 4 or not L:
        return None
    values = table.float()
    for rows in (rows for rows in range(1, L + 1) if L % rows == 0):
        grid = rows, L // rows
        column = torch.arange(grid[1], dtype=torch.float64).sin().float().repeat(rows)
        for candidate in (values, _swapped(values)):
            # The first sine of the column alone rules out most grids.
            if _near(candidate[:, 0], column) and _near(candidate, sincos_positions(D, grid)[1:]):
                return grid
    return None


def _is_swapped(table: torch.Tensor, grid: Grid) -> bool:
    """Whether fixed positions [L, D] have the channels of the row before those of the column."""
    fixed = sincos_positions(table.shape[1], grid)[1:]
    return float((table - fixed).abs().max()) > float((_swapped(table) - fixed).abs().max())


def _swapped(table: torch.Tensor) -> torch.Tensor:
    return torch.cat(table.chunk(2, dim=1)[::-1], dim=1)


def _near(one: torch.Tensor, other: torch.Tensor) -> bool:
    return torch.allclose(one, other, rtol=0, atol=_TOLERANCE)


def _shown(grid: Grid) -> str:
    return f"{grid[0]}×{grid[1]}"
