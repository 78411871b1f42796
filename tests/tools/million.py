"""How long a run takes to its first step, and what it keeps in memory, with a million images.

    python tests/tools/million.py make  /tmp/million [COUNT]   # hard links, tars, Parquet and a list: about 2.5 GB
    python tests/tools/million.py time  /tmp/million KIND...   # folder, list.csv, tar, parquet: cold, then warm
    python tests/tools/million.py memory /tmp/million KIND...

Remove the folder afterwards. Images are a few hundred bytes: it is the start that is measured, not the reading.
"""

import io
import os
import shutil
import subprocess
import sys
import tarfile
import time
from pathlib import Path

SOURCES = 32
"""Different images; each is linked less than 65,000 times, which is what ext4 allows."""


def make(root: Path, count: int) -> None:
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq
    from PIL import Image

    root.mkdir()
    images = []
    for number in range(SOURCES):
        buffer = io.BytesIO()
        pixels = np.random.default_rng(number).integers(0, 256, (4, 4, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((16, 16)).save(buffer, "JPEG", quality=50)
        images.append(buffer.getvalue())
        (root / f"{number}.jpg").write_bytes(images[-1])
    shards = max(1, count // 100_000)
    with open(root / "list.csv", "w") as listing:
        listing.write("path,label\n")
        for number in range(count):
            folder = f"folder/class-{number * 1000 // count:04d}"
            if number * 1000 % count < 1000:
                (root / folder).mkdir(parents=True, exist_ok=True)
            path = f"{folder}/IMG_{number:08d}.jpg"
            os.link(root / f"{number % SOURCES}.jpg", root / path)
            listing.write(f"{path},{number * 1000 // count}\n")
    for kind in ("tar", "parquet"):
        (root / kind).mkdir()
    each = count // shards
    for shard in range(shards):
        with tarfile.open(root / "tar" / f"part-{shard:03d}.tar", "w", format=tarfile.USTAR_FORMAT) as archive:
            for number in range(shard * each, (shard + 1) * each):
                member = tarfile.TarInfo(f"{number:08d}.jpg")
                member.size = len(images[number % SOURCES])
                archive.addfile(member, io.BytesIO(images[number % SOURCES]))
        rows = [{"bytes": images[number % SOURCES], "path": None} for number in range(each)]
        labels = [number * 1000 // count for number in range(shard * each, (shard + 1) * each)]
        table = pa.table({"image": pa.array(rows, pa.struct([("bytes", pa.binary()), ("path", pa.string())])),
                          "label": labels})  # fmt: skip
        pq.write_table(table, root / "parquet" / f"train-{shard:05d}-of-{shards:05d}.parquet", row_group_size=1000)
    for folder, _, _ in os.walk(root):  # as if it had lain there for long, so that listings are kept
        os.utime(folder, (1_600_000_000, 1_600_000_000))
    for path in (root / "list.csv", *root.glob("tar/*"), *root.glob("parquet/*")):
        os.utime(path, (1_600_000_000, 1_600_000_000))


def first_step(root: Path, kind: str, cache: Path) -> float:
    """Seconds from the start of the command to the first step in metrics.jsonl."""
    run = root / "run"
    shutil.rmtree(run, ignore_errors=True)
    words = f"pretrain --data_path {root / kind} --output_dir {run} --model mae_vit_tiny_patch4 --input_size 16 "
    words += "--batch_size 32 --epochs 1 --warmup_epochs 0 --log_freq 1 --probe False --device cpu --tune off"
    started = time.perf_counter()
    with subprocess.Popen(
        [sys.executable, "-m", "fastmae", *words.split()],
        env={**os.environ, "XDG_CACHE_HOME": str(cache)},
        stdout=subprocess.DEVNULL,
    ) as process:
        metrics = run / "metrics.jsonl"
        while process.poll() is None and not (metrics.exists() and metrics.stat().st_size):
            time.sleep(0.02)
        seconds = time.perf_counter() - started
        process.kill()
    return seconds if metrics.exists() and metrics.stat().st_size else float("nan")


def drop_caches() -> str:
    try:
        os.sync()
        Path("/proc/sys/vm/drop_caches").write_text("3")
    except OSError:
        return "page cache warm"
    return "page cache dropped"


def measure_time(root: Path, kinds: list[str]) -> None:
    for kind in kinds:
        cache = root / "cache"
        shutil.rmtree(cache, ignore_errors=True)
        for index in root.glob("tar/.fastmae-*"):
            index.unlink()
        how = drop_caches()
        cold = first_step(root, kind, cache)
        warm = [first_step(root, kind, cache) for _ in range(2)]
        print(f"{kind:10} first step after {cold:6.1f} s cold ({how}), {min(warm):5.1f} s warm", flush=True)


def measure_memory(root: Path, kinds: list[str]) -> None:
    """Prints what is kept per image, by the resident memory of a process before and after."""
    for kind in kinds:
        code = f"""
import gc, os, resource, time
import torch, numpy as np
from fastmae.data.sources import open_train
from fastmae.data.fingerprint import fingerprint
from fastmae.data.plan import plan_epoch
import pyarrow.parquet
def resident(): return int(open("/proc/self/statm").read().split()[1]) * 4096
before, started = resident(), time.perf_counter()
source = open_train({str(root / kind)!r})
opened = time.perf_counter() - started
started = time.perf_counter()
fingerprint(source)
hashed = time.perf_counter() - started
plan = plan_epoch(0, 0, len(source), 32, shards=source.shards)
source.labels
gc.collect()
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
print(f"{kind:10} {{len(source):,}} images: {{(resident() - before) / len(source):.0f}} bytes an image kept, "
      f"{{(peak - before) / len(source):.0f}} at most; opened in {{opened:.2f}} s, fingerprint in {{hashed:.2f}} s")
"""
        subprocess.run(
            [sys.executable, "-c", code], env={**os.environ, "XDG_CACHE_HOME": str(root / "cache")}, check=True
        )


if __name__ == "__main__":
    what, where, *rest = sys.argv[1:]
    if what == "make":
        make(Path(where), int(rest[0]) if rest else 1_000_000)
    else:
        {"time": measure_time, "memory": measure_memory}[what](
            Path(where), rest or ["folder", "list.csv", "tar", "parquet"]
        )
