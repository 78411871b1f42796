"""Writes photograph-like JPEGs to read and decode, when no data set is at hand.

python tests/tools/make_images.py --folder DIR --count 1000 --kind folder    # or tar, parquet
"""

from __future__ import annotations

import sys

import tyro

from fastmae.benchmarks.images import ImagesConfig, write_images
from fastmae.errors import UserError


def main() -> int:
    """Reads the command line; 0, or 2 for what is wrong with it."""
    try:
        write_images(tyro.cli(ImagesConfig, prog="make_images.py"))
    except (UserError, OSError) as error:
        print(f"make_images.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
