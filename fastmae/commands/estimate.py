"""Prints how long a pretraining would take, what it would need, and what that rests on."""

from __future__ import annotations

import json
import os
from dataclasses import asdict

from rich.table import Table
from rich.text import Text

from fastmae.config import EstimateConfig
from fastmae.estimate import Constant, Estimate, Machine, estimate
from fastmae.screen import open_console

# Of the rates of a machine, whose names are those of the GPU and of the rate, such as "h200 copy".
UNITS = {"products": " FLOP/s", "copy": " bytes/s", "memory": " bytes", "link": " bytes/s", "network": " bytes/s"}


def run_estimate(config: EstimateConfig) -> int:
    """Prints tables, or one JSON object.

    Raises:
        UserError: settings that cannot work.
    """
    prediction = estimate(config, cpu_machine)
    if config.json:
        constants = {name: constant._asdict() for name, constant in prediction.constants.items()}
        print(json.dumps(asdict(prediction) | {"constants": constants}))
        return 0
    console = open_console()
    unit = "rank of this machine's CPU" if config.gpu == "cpu" else f"{config.gpu} GPU"
    who = f"1 {unit}" if config.gpus == 1 else f"{config.gpus:,} {unit.replace('rank', 'ranks').replace('GPU', 'GPUs')}"
    text = f": {config.epochs} epochs of {config.images:,.0f} images, {prediction.global_batch:,} images and "
    text += f"{prediction.step * 1e3:,.1f} ms per step"
    console.print(Text.assemble((f"{config.model} on {who}", "bold"), text))
    per_gpu = f" ({prediction.images_per_second / prediction.gpus:,.0f} each)" if prediction.gpus > 1 else ""
    console.print(
        f"{prediction.images_per_second:,.0f} images/s{per_gpu}, {prediction.hours:,.1f} hours without probes, "
        f"checkpoints and failures; the limit is {prediction.limit}; the products that the loss needs run at "
        f"{prediction.useful_share:.0%} of the rate of large products"
    )
    console.print(
        f"{prediction.parameters / 1e6:,.1f} M parameters, {prediction.gigaflops:,.1f} GFLOP for an image in training"
    )
    console.print(_classes(prediction))
    memory = ", ".join(f"{name} {size / 2**30:.1f}" for name, size in prediction.memory.items())
    console.print(f"memory each: {sum(prediction.memory.values()) / 2**30:.1f} GiB ({memory})")
    if not prediction.fits:
        console.print("This does not fit: lower --batch_size, or use --checkpointing selective or full.")
    for basis in ("measured", "datasheet", "counted", "assumed"):
        used = [_text(name, one) for name, one in prediction.constants.items() if one.basis == basis]
        if used:
            console.print(Text.assemble((f"{basis}:", "bold"), f" {'; '.join(used)}"))
    if config.gpu != "cpu":
        console.print("No GPU has run this. Every time rests on some of the assumed constants; expect ±15 % or more.")
    return 0


def _text(name: str, constant: Constant) -> str:
    """Returns a constant with its unit and its source. The units of shares and of counts are in their sources."""
    unit = UNITS.get(name.rpartition(" ")[2], "") if " " in name else ""
    return f"{name} {constant.value:.3g}{unit} ({constant.source})"


def _classes(prediction: Estimate) -> Table:
    table = Table(title="a step, by class of kernel", title_justify="left")
    for column in ("class", "ms", "of a step", ""):
        table.add_column(column, justify="right" if column in ("ms", "of a step") else "left")
    hidden = f"{1e3 * prediction.communication:.1f} ms with what backward hides" if prediction.gpus > 1 else ""
    rows = [(name, seconds, hidden if name == "communication" else "") for name, seconds in prediction.classes.items()]
    rows.append(("loading", prediction.loading, "beside the others: decoding"))
    rows.append(("host", prediction.host, "beside the others: launches, agreement on stopping"))
    for name, seconds, note in rows:
        table.add_row(name, f"{1e3 * seconds:.1f}", f"{seconds / prediction.step:.0%}", note)
    return table


def cpu_machine(ranks: int) -> Machine:
    """Measures the rates of this machine's processor for one of ``ranks`` ranks, which share its cores."""
    import torch

    from fastmae.benchmarks.harness import measure_ceilings

    before = torch.get_num_threads()
    threads = max(1, before // ranks)
    torch.set_num_threads(threads)
    try:
        ceilings = measure_ceilings(torch.device("cpu"), copied=256 << 20, rounds=5)
    finally:
        torch.set_num_threads(before)
    here = f"here, {threads} thread{'s' if threads > 1 else ''}"
    copy = Constant(ceilings.copy_bytes, "measured", f"{here}: a copy beyond the caches")
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / ranks
    return Machine(
        products=Constant(ceilings.matmul_flops["float32"], "measured", f"{here}: float32, 2048³"),
        copy=copy,
        memory=Constant(memory, "measured", "this machine's memory over its ranks"),
        link=copy,
        network=copy,
    )
