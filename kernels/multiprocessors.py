"""How many programs a GPU runs at once, for kernels whose programs go through a run of rows each."""

from functools import lru_cache

import torch


@lru_cache
def multiprocessors(device: torch.device) -> int:
    """Returns the number of multiprocessors of a GPU; 2 for Triton's interpreter, on a CPU."""
    if device.type != "cuda":
        return 2
    return int(torch.cuda.get_device_properties(device).multi_processor_count)
