"""Which kernels does a step consist of, and how long is each?

    python -m fastmae.benchmarks.profile_step --model mae_vit_base_patch16 --batch_size 256 --trace profile.json.gz

Prints the kernels of a step by their time. A trace is for ui.perfetto.dev.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from fastmae.benchmarks.harness import wait_for
from fastmae.benchmarks.step import STEP, Inputs, ours
from fastmae.config import PretrainConfig
from fastmae.model.presets import PRESETS
from fastmae.ops.random_masking import random_masking
from fastmae.train.parallel import DistContext, choose_device
from fastmae.train.precision import choose_precision

WARM_UP, STEPS, ROWS = 5, 3, 40


def main(words: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="mae_vit_base_patch16")
    parser.add_argument("--batch_size", type=int, default=256)
    parser.add_argument("--device")
    parser.add_argument("--compile", default="auto")
    parser.add_argument("--trace", help="a file for a Chrome trace of the steps")
    flags = parser.parse_args(words)
    device = choose_device(flags.device)
    precision = choose_precision("auto", device).name
    torch.manual_seed(0)
    model = PRESETS[flags.model]()
    images = torch.randint(0, 256, (flags.batch_size, *model.img_size, model.in_chans), dtype=torch.uint8)
    ids = random_masking(torch.arange(flags.batch_size), 0, model.num_patches)
    asked: dict[str, Any] = {"precision": precision, "compile": flags.compile}
    config = PretrainConfig(**asked)
    one = ours(flags.model, config, Inputs(images.to(device), ids.to(device), model), DistContext(0, 1, device))
    is_gpu = device.type == "cuda"
    for _ in range(WARM_UP if is_gpu else 1):
        one.go(STEP)
    wait_for(device)
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if is_gpu else [])]) as profiler:
        for _ in range(STEPS):
            one.go(STEP)
        wait_for(device)
    by = "self_device_time_total" if is_gpu else "self_cpu_time_total"
    print(profiler.key_averages().table(sort_by=by, row_limit=ROWS, max_name_column_width=100))
    if flags.trace:
        profiler.export_chrome_trace(flags.trace)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
