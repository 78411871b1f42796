"""Which software and hardware this is; kept with every run and shown by ``fastmae info``."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from typing import Any

import torch

PACKAGES = (
    "fastmae",
    "torch",
    "triton",
    "numpy",
    "nvidia-dali-cuda130",
    "pillow",
    "pyarrow",
    "safetensors",
    "scikit-learn",
    "simplejpeg",
    "tensorboard",
    "transformers",
    "tyro",
    "xformers",
)


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that matter; absent ones are left out."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def hardware() -> dict[str, Any]:
    """The processors: cores that this process may use, torch's threads, instruction set, and GPUs by name."""
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "machine": platform.machine(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cores": len(os.sched_getaffinity(0)),
        "torch_threads": torch.get_num_threads(),
        "gpus": gpus,
    }
