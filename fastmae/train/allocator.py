"""Settings of the C library's memory allocator."""

from __future__ import annotations

import ctypes

# Parameters of mallopt(3), from glibc's malloc.h, and the largest value that it takes.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
LARGEST_INT = 2**31 - 1
LARGEST_FROM_THE_HEAP = 32 << 20


def keep_freed_memory() -> bool:
    """Lets malloc keep freed memory at the end of its heap. Returns whether this C library can do it.

    A training step on a CPU allocates and frees the same gigabytes each time. By default glibc returns the end of its
    heap to the system, which clears every page when it is allocated again: up to 100,000 page faults and 8 % of a step
    of ViT-B. With this setting the process keeps its largest size, which it needs in the next step anyway.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    # Larger pieces are still mapped one by one, as by default: in the heap they would leave holes.
    return bool(mallopt(M_MMAP_THRESHOLD, LARGEST_FROM_THE_HEAP)) and bool(mallopt(M_TRIM_THRESHOLD, LARGEST_INT))
