"""Which software and hardware this is; kept with every run and shown by ``fastmae info``."""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import platform
import re
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
    "timm",
    "torchao",
    "transformers",
    "tyro",
    "wandb",
    "xformers",
)


# Variables that libraries pass over in silence where they cannot read them: pattern, and what then happens.
NUMBERS = (r"\s*\d+\s*(,\s*\d+\s*)*", "is no number of threads, so libraries take all cores")
DEVICES = (r"|-1|none|void|NoDevFiles|((\d+|(GPU|MIG)-[\w/-]+)(,|$))+", "names no GPUs, so none is seen")
VARIABLES = {"OMP_NUM_THREADS": NUMBERS, "MKL_NUM_THREADS": NUMBERS, "CUDA_VISIBLE_DEVICES": DEVICES}


def malformed_variables() -> list[str]:
    """Returns a line about each environment variable that libraries cannot read."""
    values = {name: os.environ[name] for name in VARIABLES if name in os.environ}
    return [
        f"{name}={value}: {VARIABLES[name][1]}; correct or unset it"
        for name, value in values.items()
        if re.fullmatch(VARIABLES[name][0], value, re.IGNORECASE) is None
    ]


def versions() -> dict[str, str]:
    """Returns the versions of Python and of the packages that matter and are installed."""
    versions_by_name = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            versions_by_name[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions_by_name


def hardware() -> dict[str, Any]:
    """Returns the processors: the cores that this process may use, torch's threads, instruction set, names of GPUs."""
    import torch  # here, as versions are wanted even where it cannot be loaded

    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "machine": platform.machine(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cores": len(os.sched_getaffinity(0)),
        "torch_threads": torch.get_num_threads(),
        "gpus": gpus,
    }


def processor() -> str:
    """The maker's name of this machine's processor, such as ``AMD EPYC 9R14``.

    Hypervisors hide names, and instructions that double the speed: a name without a number gets the model's number, as
    in ``Intel Xeon model 207``, and one that can compute with tiles of bfloat16 gets ``AMX``.
    """
    facts = _processor_facts()
    shown = facts.get("model name", platform.machine()).split("@")[0]
    words = re.sub(r"\((R|TM)\)|\bCPU\b|\bProcessor\b|\d+-Core\b", " ", shown).split()
    if "model" in facts and not any(character.isdigit() for word in words for character in word):
        words += ["model", facts["model"]]
    if "amx_bf16" in facts.get("flags", "").split():
        words.append("AMX")
    return " ".join(words)


def processor_details() -> str:
    """A short hash of what tells this processor from others: its family, model, stepping and instructions."""
    facts = _processor_facts()
    names = ("vendor_id", "cpu family", "model", "model name", "stepping", "flags", "Features")
    return hashlib.sha256("\n".join(facts.get(name, "") for name in names).encode()).hexdigest()[:16]


def _processor_facts() -> dict[str, str]:
    """What the system says of its first processor, by its own names; nothing if it does not say."""
    facts: dict[str, str] = {}
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            name, _, value = line.partition(":")
            facts.setdefault(name.strip(), value.strip())
    return facts


@dataclass(frozen=True)
class CoreTimes:
    """Seconds since some moment: by the clock, of the cores at work for anybody, and for this process."""

    clock: float
    at_work: float
    own: float
    cores: int
    """The number of cores that this process may use; no others are counted."""


def core_times() -> CoreTimes | None:
    """Reads how much the cores of this process have worked so far; None if the system does not say (Linux does)."""
    try:
        cores = {f"cpu{number}" for number in os.sched_getaffinity(0)}
        rows = [line.split() for line in Path("/proc/stat").read_text().splitlines()]
        of_cores = [[int(ticks) for ticks in row[1:9]] for row in rows if row and row[0] in cores]
        # Of user, nice, system, idle, iowait, irq, softirq and steal, the fourth and fifth are rest.
        ticks = sum(sum(row) - row[3] - row[4] for row in of_cores)
        return CoreTimes(time.perf_counter(), ticks / os.sysconf("SC_CLK_TCK"), time.process_time(), len(of_cores))
    except (OSError, AttributeError, ValueError, IndexError):
        return None


def used_by_others(before: CoreTimes | None, after: CoreTimes | None) -> float | None:
    """Returns the share of the cores that other programs used in between, from 0 to 1; None if it is not known."""
    if before is None or after is None or before.cores != after.cores or after.cores == 0:
        return None
    elapsed = after.clock - before.clock
    if elapsed < 0.5:  # the system counts hundredths of a second
        return None
    others = (after.at_work - before.at_work) - (after.own - before.own)
    return round(min(1.0, max(0.0, others / elapsed / after.cores)), 3)


# Peaks of dense bf16 matrix products in TFLOP/s, from the vendor's data sheets, by words of the device's name. NVL
# boards and slices of a GPU (MIG) have other peaks and are not in the table.
PEAK_TFLOPS = (
    ({"H100", "PCIe"}, 756),
    ({"A100"}, 312),
    ({"H100"}, 989),
    ({"H200"}, 989),
    ({"GH200"}, 989),
    ({"B200"}, 2250),
)


def peak_flops(device_name: str) -> float | None:
    """Returns the bf16 peak of a GPU in FLOP/s; None for a GPU that is not in the table, and for a CPU."""
    words = set(device_name.replace("-", " ").split())
    if words & {"MIG", "NVL"}:
        return None
    return next((tera * 1e12 for name_words, tera in PEAK_TFLOPS if name_words <= words), None)
