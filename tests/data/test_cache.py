"""The cache: the same batches, order and errors as without one, each image read once, and never over the budget."""

import io
import math
import os
import sys
import tarfile
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from fastmae.benchmarks.images import make_jpeg
from fastmae.data import cache
from fastmae.data.cache import ENTRY_BYTES, CachedSource, available_memory, cached, describe_cache, memory_budget
from fastmae.data.decode import decode
from fastmae.data.loader import View, choose_decoder, load_batches
from fastmae.data.plan import plan_epoch
from fastmae.data.reading import Reading
from fastmae.data.sources import ArraySource, Concat, Subset, describe, open_train
from fastmae.data.statistics import measure
from fastmae.errors import UserError

CPU = torch.device("cpu")
PLENTY = 1 << 30
COUNT = 24
# Of different shapes, so that a mix-up of images shows in the sizes too.
JPEGS = [make_jpeg(0, i, height=30 + i, width=44) for i in range(COUNT)]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@dataclass(frozen=True)
class Counted:
    """A source that records which images were read."""

    source: object
    reads: list = field(default_factory=list)

    def __getattr__(self, name):
        return getattr(self.source, name)

    def __len__(self):
        return len(self.source)

    def read(self, index):
        self.reads.append(index)
        return self.source.read(index)


@dataclass(frozen=True)
class Files:
    """Image files in memory, for what needs no disk."""

    files: list
    kind: str = "folder"
    location: str = "in files"
    shards = None
    labels = None

    def __len__(self):
        return len(self.files)

    def read(self, index):
        return self.files[index]

    def name(self, index):
        return f"{index}.jpg"


def png(pixels):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def write_folder(path):
    path.mkdir()
    for i, data in enumerate(JPEGS[:-4]):
        (path / f"{i:02d}.jpg").write_bytes(data)
    # What Pillow decodes: gray and alpha.
    for i in range(4):
        channels = (1, 3, 4, 4)[i]
        pixels = np.random.default_rng(i).integers(0, 256, (33, 40, channels), dtype=np.uint8)
        (path / f"x{i}.png").write_bytes(png(pixels[..., 0] if channels == 1 else pixels))
    return path


def write_alpha(path):
    """A folder of images of four bands, which --in_chans 4 takes alone."""
    path.mkdir()
    for i in range(COUNT):
        pixels = np.random.default_rng(i).integers(0, 256, (20 + i % 7, 24, 4), dtype=np.uint8)
        (path / f"{i:02d}.png").write_bytes(png(pixels))
    return path


def write_tar(path):
    with tarfile.open(path, "w") as archive:
        for i, data in enumerate(JPEGS):
            member = tarfile.TarInfo(f"{i:04d}.jpg")
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return path


def write_array(path, channels):
    np.save(path, np.random.default_rng(1).integers(0, 256, (COUNT, 32, 36, channels), dtype=np.uint8))
    return path


@pytest.fixture
def opened(tmp_path):
    """Sources of every kind that is worth keeping, by name."""
    folder = open_train(str(write_folder(tmp_path / "folder")))
    tar = open_train(str(write_tar(tmp_path / "part.tar")))
    colour = open_train(str(write_array(tmp_path / "colour.npy", 3)))
    return {
        "folder": folder,
        "folder with alpha": open_train(str(write_alpha(tmp_path / "alpha"))),
        "tar": tar,
        "array": colour,
        "array of 4": open_train(str(write_array(tmp_path / "alpha.npy", 4))),
        "array of 5": open_train(str(write_array(tmp_path / "cells.npy", 5))),
        "concat": Concat((folder, tar, colour)),
        "subset": Subset(tar, np.arange(COUNT)[::-2].copy()),
    }


def batches(source, in_chans=3, epochs=2, decoder="threads", threads=3):
    view = View((16, 16), Reading(in_chans), seed=7, scale=(0.2, 1.0), flip=True)
    plans = [plan_epoch(0, epoch, len(source), 4, shards=source.shards) for epoch in range(epochs)]
    requests = (plan.batch(k) for plan in plans for k in range(len(plan)))
    return list(load_batches(source, requests, view, device=CPU, num_workers=threads, decoder=decoder))


def assert_same(ours, expected):
    assert len(ours) == len(expected) > 0
    for a, b in zip(ours, expected, strict=True):
        assert torch.equal(a.images, b.images)
        assert torch.equal(a.draw_ids, b.draw_ids)
        assert a.skipped == b.skipped


# --- the same as without ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "in_chans"),
    [
        ("folder", 3), ("folder", 1), ("folder with alpha", 4), ("tar", 3), ("tar", 1), ("array", 3), ("array", 1),
        ("array of 4", 3), ("array of 5", 5), ("concat", 3), ("subset", 3),
    ],
)  # fmt: skip
def test_batches_are_the_same_to_the_bit_and_every_image_is_read_once(opened, name, in_chans):
    source = opened[name]
    expected = batches(source, in_chans)
    for form in ("decoded", "encoded"):
        inner = Counted(source)
        ours = CachedSource(inner, Reading(in_chans), form, PLENTY, 0)
        assert_same(batches(ours, in_chans, epochs=1), expected[: len(expected) // 2])
        assert sorted(inner.reads) == list(range(len(source)))
        assert_same(batches(ours, in_chans), expected)
        assert len(inner.reads) == len(source)


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9])
def test_batches_are_the_same_where_only_some_images_fit(opened, share):
    source = opened["concat"]
    inner = Counted(source)
    ours = cached(inner, Reading(3), int(share * cached(source, Reading(3), PLENTY, "dali-cpu").estimate), "threads")
    inner.reads.clear()
    assert_same(batches(ours), batches(source))
    assert ours.cached_bytes <= ours.budget
    assert (len(inner.reads) == 2 * len(source)) == (share == 0)


def test_a_cached_source_has_the_properties_of_the_one_inside(opened):
    for source in opened.values():
        ours = cached(
            source, Reading(source.read(len(source) - 1).shape[-1] if source.kind == "array" else 3), PLENTY, "threads"
        )
        for what in ("kind", "location", "shards"):
            assert str(getattr(ours, what)) == str(getattr(source, what))
        assert (len(ours), ours.name(3)) == (len(source), source.name(3))
        assert measure(ours, ours.reading) == measure(source, Reading(ours.reading.in_chans))
        assert choose_decoder("threads", CPU, ours, Reading(3)) == choose_decoder("threads", CPU, source, Reading(3))
        assert describe(ours) == describe(source)
    arrays = opened["array"]
    labelled = ArraySource(arrays.images, np.arange(COUNT), "x")
    assert np.array_equal(cached(labelled, Reading(3), PLENTY, "threads").labels, np.arange(COUNT))


def test_unusable_images_are_reported_alike_in_every_pass_and_not_kept_decoded(tmp_path):
    folder = write_folder(tmp_path / "folder")
    (folder / "03.jpg").write_bytes(JPEGS[3][:900])
    (folder / "04.jpg").write_bytes(b"\xff\xd8\xff garbage")
    (folder / "05.jpg").write_bytes(b"")
    middle = JPEGS[6][: len(JPEGS[6]) // 2] + b"\xff\xd9" * 9 + JPEGS[6][-40:]
    (folder / "06.jpg").write_bytes(middle)
    source = open_train(str(folder))
    (folder / "09.jpg").unlink()
    expected = batches(source, epochs=3)
    reasons = {skipped.name: skipped.reason for batch in expected for skipped in batch.skipped}
    assert len(reasons) >= 4
    for form in ("decoded", "encoded"):
        ours = CachedSource(source, Reading(3), form, PLENTY, 0)
        assert_same(batches(ours, epochs=3), expected)
        if form == "decoded":
            unusable = {index for batch in expected for index in (skipped.index for skipped in batch.skipped)}
            assert {i for i in range(len(source)) if ours.holds(i)} == set(range(len(source))) - unusable


# --- what is kept -----------------------------------------------------------------------------------------------------


def test_decoded_images_are_kept_if_all_fit_and_files_otherwise():
    source = Files(JPEGS)
    decoded = sum(ENTRY_BYTES + decode(data, Reading(3)).nbytes for data in JPEGS)
    files = sum(ENTRY_BYTES + sys.getsizeof(data) for data in JPEGS)
    assert cached(source, Reading(3), decoded * 2, "threads").form == "decoded"
    assert cached(source, Reading(3), decoded * 2, "threads").estimate == decoded
    assert cached(source, Reading(1), decoded, "threads").form == "decoded"
    tight = cached(source, Reading(3), decoded, "threads")
    assert (tight.form, tight.estimate) == ("encoded", files)
    # Where pixels take less room than files, more of them fit.
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    assert cached(Files([png(noise)] * 9), Reading(1), 10_000, "threads").form == "decoded"


@pytest.mark.parametrize("decoder", ["dali-cpu", "dali-gpu"])
def test_dali_is_given_files(decoder):
    inner = Counted(Files(JPEGS))
    ours = cached(inner, Reading(3), PLENTY, decoder)
    assert ours.form == "encoded"
    assert [ours.read(i) for i in range(COUNT)] == JPEGS
    inner.reads.clear()
    assert [ours.read(i) for i in range(COUNT)] == JPEGS
    assert not inner.reads


def test_a_kept_array_is_read_only_contiguous_and_no_view(tmp_path):
    path = write_array(tmp_path / "alpha.npy", 4)
    source = open_train(str(path))
    np.save(tmp_path / "planes.npy", np.load(path).transpose(0, 3, 1, 2))
    planes = open_train(str(tmp_path / "planes.npy"))
    for ours in (
        cached(source, Reading(3), PLENTY, "threads"),
        cached(planes, Reading(4), PLENTY, "threads"),
        cached(Files(JPEGS), Reading(1), PLENTY, "threads"),
    ):
        for _ in range(2):
            pixels = ours.read(5)
            assert pixels.base is None
            assert pixels.flags.c_contiguous
            assert not pixels.flags.writeable
        assert pixels is ours.read(5)
        assert np.array_equal(pixels, decode(ours.source.read(5), ours.reading))
    assert cached(planes, Reading(4), PLENTY, "threads").read(0).strides != planes.read(0).strides


def test_arrays_that_lie_in_memory_are_not_kept_twice():
    source = ArraySource(np.zeros((9, 4, 4, 3), np.uint8), None, "x")
    ours = cached(source, Reading(3), PLENTY, "threads")
    assert np.shares_memory(ours.read(3), source.images)
    assert ours.cached_bytes == 0
    assert source.images.flags.writeable
    assert describe_cache(ours) == "nothing: the images are in memory already, or cannot be read"
    mixed = cached(Concat((source, Files(JPEGS))), Reading(3), PLENTY, "threads")
    assert_same(batches(mixed), batches(Concat((source, Files(JPEGS)))))
    assert mixed.cached_bytes == sum(ENTRY_BYTES + decode(data, Reading(3)).nbytes for data in JPEGS)


def test_memory_is_released_with_the_source(tmp_path):
    source = open_train(str(write_folder(tmp_path / "folder")))
    ours = cached(source, Reading(3), PLENTY, "threads")
    batches(ours)
    pixels = weakref.ref(ours.read(0))
    assert pixels() is not None
    del ours
    assert pixels() is None


@settings(max_examples=25, deadline=None)
@given(
    sizes=st.lists(st.integers(0, 3000), min_size=1, max_size=40),
    budget=st.integers(0, 40_000),
    seed=st.integers(0, 2**32 - 1),
)
def test_the_budget_is_never_exceeded_by_any_number_of_threads(sizes, budget, seed):
    source = Files([bytes([i % 256]) * size for i, size in enumerate(sizes)])
    ours = CachedSource(source, Reading(3), "encoded", budget, 0)
    order = np.random.default_rng(seed).integers(0, len(sizes), 4 * len(sizes)).tolist()

    def read(index):
        assert ours.read(index) == source.files[index]
        return ours.cached_bytes

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(4) as pool:
            assert max(pool.map(read, order)) <= budget
    finally:
        sys.setswitchinterval(interval)
    kept = {index for index in range(len(sizes)) if ours.holds(index)}
    assert ours.cached_bytes == sum(ENTRY_BYTES + sys.getsizeof(source.files[index]) for index in kept)
    # Nothing is missing that would still fit.
    for index in set(order) - kept:
        assert ours.cached_bytes + ENTRY_BYTES + sys.getsizeof(source.files[index]) > budget


class Slow(int):
    """A budget that lets other threads run while something is compared with it."""

    def __ge__(self, other):
        time.sleep(0.01)
        return int(self) >= other


@pytest.mark.parametrize("same", [True, False])
def test_threads_at_the_same_time_count_an_image_once_and_share_the_last_room(same):
    threads = 4
    meet = threading.Barrier(threads)

    class Meeting(Files):
        def read(self, index):
            data = super().read(index)
            meet.wait(30)  # all have read before the first one keeps
            return data

    size = ENTRY_BYTES + sys.getsizeof(bytes(1000))
    ours = CachedSource(Meeting([bytes(1000)] * threads), Reading(3), "encoded", Slow(2 * size if same else size), 0)
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(ours.read, [0] * threads if same else range(threads)))
    assert ours.cached_bytes == size


# --- what is said -----------------------------------------------------------------------------------------------------


def test_the_description_says_what_is_kept_and_what_is_not(tmp_path):
    source = Files([bytes(1 << 20)] * 40)
    every = 40 * (ENTRY_BYTES + sys.getsizeof(bytes(1 << 20)))
    for ours, line in (
        (
            cached(source, Reading(3), 2 << 30, "dali-cpu"),
            "encoded files in memory: about 40.0 MiB, of 2.0 GiB that it may take",
        ),
        (
            cached(source, Reading(3), every // 4, "dali-cpu"),
            "encoded files in memory, as many as fit: about 25 % of 40.0 MiB",
        ),
        (
            cached(source, Reading(3), 1 << 19, "dali-cpu"),
            "nothing: an image takes about 1.0 MiB, more than the cache may take; raise cache_gb",
        ),
    ):
        assert describe_cache(ours) == line
    assert describe_cache(cached(Files(JPEGS), Reading(3), PLENTY, "threads")).startswith(
        "decoded images in memory: about 134 KiB, of 1.0 GiB"
    )
    mapped = open_train(str(write_array(tmp_path / "x.npy", 3)))
    assert describe_cache(cached(mapped, Reading(3), PLENTY, "threads")).startswith("images in memory: about")
    assert describe_cache(cached(mapped, Reading(3), 40_000, "threads")).startswith(
        "images in memory, as many as fit: about 4"
    )


def test_a_budget_of_less_than_an_image_keeps_nothing():
    ours = cached(Files(JPEGS), Reading(3), 500, "threads")
    assert [ours.read(i) for i in range(COUNT)] == JPEGS
    assert (ours.budget, ours.cached_bytes) == (0, 0)


def test_the_estimate_reads_few_images_and_few_shards(tmp_path):
    many = Counted(Files(JPEGS[:1] * 5000))
    ours = cached(many, Reading(3), PLENTY, "threads")
    assert len(many.reads) == cache.SAMPLES
    assert (min(many.reads), max(many.reads)) == (0, 4999)
    assert ours.estimate == 5000 * (ENTRY_BYTES + decode(JPEGS[0], Reading(3)).nbytes)
    tar = open_train(str(write_tar(tmp_path / "part.tar")))
    runs = Counted(Concat((tar,) * 200))
    cached(runs, Reading(3), PLENTY, "threads")
    assert len(runs.reads) == cache.SAMPLES
    assert np.count_nonzero(np.diff(runs.reads) > 1) == cache.SAMPLES // cache.RUN - 1


# --- how much memory there is -----------------------------------------------------------------------------------------


def write_machine(root, files):
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


MEMINFO = {"proc/meminfo": "MemTotal:  8000 kB\nMemFree:  10 kB\nMemAvailable:    4000 kB\n"}


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, None),
        (MEMINFO, 4000 << 10),
        # Version 2: the tightest of the groups around this process counts, and the page cache can go.
        (
            MEMINFO
            | {
                "proc/self/cgroup": "0::/user/job\n",
                "sys/fs/cgroup/user/job/memory.max": "max\n",
                "sys/fs/cgroup/user/job/memory.current": "7\n",
                "sys/fs/cgroup/user/memory.max": "1000000\n",
                "sys/fs/cgroup/user/memory.current": "700000\n",
                "sys/fs/cgroup/user/memory.stat": "anon 5\ninactive_file 50000\nactive_file 9\n",
            },
            350_000,
        ),
        # Version 2 inside a container, where the path of the host is not there.
        (
            {
                "proc/self/cgroup": "0::/../elsewhere\n",
                "sys/fs/cgroup/memory.max": "1000\n",
                "sys/fs/cgroup/memory.current": "2000\n",
            },
            0,
        ),
        # Version 1, and a limit that is none.
        (
            MEMINFO
            | {
                "proc/self/cgroup": "9:name=systemd:/a\n4:cpu,memory:/docker/abc\n0::/\n",
                "sys/fs/cgroup/memory/docker/abc/memory.limit_in_bytes": "900000\n",
                "sys/fs/cgroup/memory/docker/abc/memory.usage_in_bytes": "300000\n",
                "sys/fs/cgroup/memory/docker/abc/memory.stat": "cache 1\ntotal_inactive_file 1000\n",
                "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
                "sys/fs/cgroup/memory/memory.usage_in_bytes": "400000\n",
            },
            601_000,
        ),
        (
            {
                "proc/self/cgroup": "4:memory:/\n",
                "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
                "sys/fs/cgroup/memory/memory.usage_in_bytes": "400000\n",
            },
            None,
        ),
    ],
)
def test_available_memory_is_what_the_tightest_limit_leaves(tmp_path, files, expected):
    assert available_memory(write_machine(tmp_path, files)) == expected


@pytest.mark.skipif(not os.path.exists("/proc/meminfo"), reason="Linux says so there")
def test_this_machine_has_some_memory():
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert 0 < available_memory() <= total


def test_the_budget_is_half_of_the_available_memory_or_what_was_asked_for(monkeypatch):
    monkeypatch.setattr(cache, "available_memory", lambda: 8 << 30)
    assert memory_budget(None, 1) == 4 << 30
    assert memory_budget(None, 4) == 1 << 30
    assert memory_budget(0.25, 4) == 1 << 28
    assert memory_budget(8, 1) == 8 << 30
    for asked, ranks, match in (
        (9, 1, r"cache_gb=9: only 8\.0 GiB are available; lower it"),
        (3, 4, r"cache_gb=3: only 2\.0 GiB are available for each of the 4 ranks here; lower it"),
        (0, 1, "cache_gb=0: must be over 0, in GiB"),
        (-1, 1, "cache_gb=-1: must be over 0"),
        (math.nan, 1, "cache_gb=nan: must be over 0"),
        (math.inf, 1, "cache_gb=inf: must be over 0"),
    ):
        with pytest.raises(UserError, match=match):
            memory_budget(asked, ranks)
    monkeypatch.setattr(cache, "available_memory", lambda: None)
    assert memory_budget(3, 1) == 3 << 30
    with pytest.raises(UserError, match=r"cache='ram': .* set cache_gb"):
        memory_budget(None, 1)
