"""Packs data into tar shards, several at a time, and prints what was packed and what could not be."""

from __future__ import annotations

import dataclasses
import shlex
import shutil
import time
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from fastmae.config import PackConfig, read_as
from fastmae.data.loader import default_workers
from fastmae.data.memory import readable
from fastmae.data.pack import (
    MANIFEST,
    Packed,
    ShardPlan,
    done_before,
    enter,
    plan_shards,
    totals,
    write_manifest,
    write_shard,
)
from fastmae.data.sources import Source, open_train, open_val
from fastmae.data.stock import count_of
from fastmae.errors import UserError
from fastmae.screen import open_console, printable

SHOWN = 10
SIGNAL_TICK = 0.1
"""Seconds after which a wait for a shard looks for a signal."""


def run_pack(config: PackConfig) -> int:
    """Packs both parts of the data and returns the exit status: 0 if every image was packed, else 1.

    Raises:
        UserError: data that cannot be read, a folder with something else in it, or too little space.
    """
    console = open_console(soft_wrap=True)
    asked = read_as(config)
    parts: dict[str, Source] = {"train": open_train(config.data_path, asked)}
    val = open_val(config.data_path, asked)
    if val is not None:
        parts["val"] = val
    for part, source in parts.items():
        console.print(printable(f"{part:15} {count_of(len(source), 'images')} {source.location}"))
        for line in source.stock.lines():
            console.print(printable(f"  {'stock':13} {line}"))
    folder = Path(config.output).expanduser()
    reading = {name: list(v) if isinstance(v, tuple) else v for name, v in dataclasses.asdict(asked).items()}
    settings = {"shard_mb": config.shard_mb, "order": config.order, "seed": config.seed, "read_as": reading}
    if (folder / MANIFEST).exists():
        raise UserError(f"{folder}: a whole pack is there already; name another folder, or remove it")
    done, sizes = done_before(folder, parts, settings)
    seed, shard_bytes = config.seed if config.order == "shuffled" else None, config.shard_mb << 20
    plans = [
        plan for part, source in parts.items() for plan in plan_shards(part, source, sizes[part], shard_bytes, seed)
    ]
    left = [plan for plan in plans if plan.name not in done]
    need, free = sum(plan.bytes for plan in left), shutil.disk_usage(folder).free
    if free < need:
        raise UserError(f"{folder}: about {readable(need)} are to be written, {readable(free)} are free; make room")
    if done:
        console.print(f"resume          {len(done)} of {len(plans)} shards are there; {len(left)} are left")
    _write(folder, left, parts, done, config.num_workers or default_workers())
    write_manifest(folder, [done[plan.name] for plan in plans], parts, settings)
    images, size, left_out = totals(done.values())
    into = f"{count_of(len(plans), 'shards')} of {folder}, {readable(size)}, {MANIFEST}"
    console.print(printable(f"packed          {count_of(images, 'images')} into {into}"))
    if left_out:
        console.print(f"left out        {count_of(len(left_out), 'images')} that cannot be read, listed in {MANIFEST}:")
        for name, why in left_out[:SHOWN]:
            console.print(printable(f"  {name}: {why}"))
        if len(left_out) > SHOWN:
            console.print(f"  and {len(left_out) - SHOWN:,} more")
    console.print(printable(f"train on it     fastmae pretrain --data_path {shlex.quote(str(folder))}"))
    return 1 if left_out else 0


def _write(
    folder: Path,
    left: list[ShardPlan],
    parts: dict[str, Source],
    done: dict[str, Packed],
    num_workers: int,
) -> None:
    """Writes shards by several threads, and adds each to ``done`` and the log as soon as it is on the disk."""
    screen = open_console(soft_wrap=True)
    columns = (
        BarColumn(), MofNCompleteColumn(), TextColumn("shards, {task.fields[speed]} images/s", markup=False),
        TimeRemainingColumn(),
    )  # fmt: skip
    started, images = time.perf_counter(), 0
    with (
        ThreadPoolExecutor(num_workers, thread_name_prefix="fastmae-pack") as pool,
        Progress(*columns, console=screen, disable=not screen.is_terminal, transient=True) as bar,
    ):
        task = bar.add_task("pack", total=len(left), speed="–")
        waiting: set[Future[Packed]] = {pool.submit(write_shard, folder, plan, parts[plan.part]) for plan in left}
        try:
            while waiting:
                ready, waiting = wait(waiting, SIGNAL_TICK, FIRST_COMPLETED)
                for future in ready:
                    shard = future.result()
                    enter(folder, shard)
                    done[shard.name] = shard
                    images += shard.images
                    bar.update(task, advance=1, speed=f"{images / max(time.perf_counter() - started, 1e-9):,.0f}")
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
