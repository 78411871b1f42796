"""Arrays in HDF5 files and Zarr stores are read as h5py and zarr read them, by any thread, and refused in one line."""

import json
import shutil
import struct
import threading
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from fastmae import _C
from fastmae.data import chunks, codecs
from fastmae.data.chunks import ChunkedImages, choose_keys
from fastmae.data.codecs import inflate, unshuffle, zstd_size
from fastmae.data.fingerprint import difference, fingerprint
from fastmae.data.formats import hdf5
from fastmae.data.openfile import OpenFile
from fastmae.data.plan import plan_epoch
from fastmae.data.sources import describe, open_train, open_val
from fastmae.errors import UserError
from fastmae.facts import ReadAs

h5py = pytest.importorskip("h5py")
zarr = pytest.importorskip("zarr")
numcodecs = pytest.importorskip("numcodecs")

RNG = np.random.default_rng(0)
VALUES = {
    "8 bits": np.arange(256).astype(np.uint8),
    "12 bits": np.arange(4096).astype(">i2"),
    "16 bits": np.arange(65536).astype(np.uint16),
    "float32": RNG.integers(0, 2**32, 6000, dtype=np.uint32).view(np.float32),
    "bool": np.arange(300) % 3 == 0,
}


def images_of(kind, *, side=(7, 9, 2)):
    values = VALUES[kind]
    count = -(-len(values) // int(np.prod(side)))
    return np.resize(values, (max(count, 11), *side))


def content(source):
    return np.stack([source.read(index) for index in range(len(source))])


def expect(source, images):
    """Compares bits, as there are NaNs."""
    read = content(source).reshape(images.shape)
    expected = images.astype(np.uint8) * 255 if images.dtype == bool else images.astype(images.dtype.newbyteorder("="))
    assert read.dtype == expected.dtype
    assert read.tobytes() == expected.tobytes()


def write_h5(path, images, **options):
    with h5py.File(path, "w") as file:
        file.create_dataset("images", data=images, **options)
        file["labels"] = np.arange(len(images)) % 3
    return str(path)


H5 = {
    "in one piece": {},
    "chunks that divide nothing": {"chunks": (4, 3, 5, 1)},
    "all filters of its own": {"chunks": (4, 7, 9, 1), "compression": "gzip", "shuffle": True, "fletcher32": True},
    "a checksum before": {"chunks": (1, 7, 9, 2), "fletcher32": True},
    "a filter that h5py undoes": {"chunks": (3, 7, 9, 2), "compression": "lzf"},
}


@pytest.mark.parametrize("kind", VALUES)
def test_every_value_of_an_hdf5_file_is_what_h5py_reads(tmp_path, kind):
    images = images_of(kind)
    for options in H5.values():
        path = write_h5(tmp_path / "x.h5", images, **options)
        with h5py.File(path) as file:
            stored = file["images"][()]
        source = open_train(path)
        expect(source, stored)
        assert source.labels.tolist() == [number % 3 for number in range(len(images))]
        assert (source.shards is None) == (options.get("chunks", (1,))[0] == 1)
        shutil.move(path, tmp_path / "moved.h5")
        assert difference(fingerprint(open_train(str(tmp_path / "moved.h5"))), fingerprint(source)) is None


def codecs_of(version):
    if version == 3:
        return {
            "": {}, "plain": {"compressors": None}, "gzip": {"compressors": zarr.codecs.GzipCodec()},
            "blosc": {"compressors": zarr.codecs.BloscCodec()}, "shards": {"shards": (400, 8, 10, 2)},
        }  # fmt: skip
    plain = [numcodecs.GZip(), numcodecs.Zlib(), numcodecs.LZ4(), numcodecs.Zstd(), numcodecs.BZ2(), None]
    each = {str(codec): {"compressors": codec} for codec in plain}
    return {**each, "Fortran": {"compressors": numcodecs.Blosc(), "order": "F"}}


@pytest.mark.filterwarnings("ignore")  # zarr's, of codecs that version 3 does not know
@pytest.mark.parametrize("version", [2, 3])
@pytest.mark.parametrize("kind", VALUES)
def test_every_value_of_a_zarr_store_is_what_zarr_reads(tmp_path, kind, version):
    images = images_of(kind)
    for name, options in codecs_of(version).items():
        if kind != "16 bits" and name not in ("", "Fortran"):
            continue
        store = tmp_path / f"x{len(list(tmp_path.iterdir()))}.zarr"
        group = zarr.open_group(store, mode="w", zarr_format=version)
        array = group.create_array("a/images", shape=images.shape, chunks=(200, 4, 5, 1), dtype=images.dtype, **options)
        array[:] = images
        source = open_train(str(store))
        expect(source, zarr.open_array(store, path="a/images", mode="r")[:])
        assert source.name(3) == f"{store}::a/images[3]"
        alone = open_train(f"{store}/a/images")
        expect(alone, images)
        fingerprint(source)


def test_what_was_never_written_is_told_and_is_the_fill_value(tmp_path):
    with h5py.File(tmp_path / "x.h5", "w") as file:
        data = file.create_dataset("images", (8, 4, 4), np.uint16, chunks=(2, 4, 4), fillvalue=7)
        data[:2] = 9
    source = open_train(str(tmp_path / "x.h5"))
    assert content(source)[..., 0, 0, 0].tolist() == [9, 9, 7, 7, 7, 7, 7, 7]
    assert "3 chunks were never written and hold 7" in source.stock.notes[0]
    array = zarr.create_array(tmp_path / "x.zarr", shape=(8, 4, 4), chunks=(2, 4, 4), dtype="uint16", fill_value=7)
    array[:2] = 9
    source = open_train(str(tmp_path / "x.zarr"))
    assert content(source)[..., 0, 0, 0].tolist() == [9, 9, 7, 7, 7, 7, 7, 7]
    assert "3 of 4 chunks are not stored, and hold 7" in source.stock.notes[0]
    array[:] = 3
    source = open_train(str(tmp_path / "x.zarr"))
    assert not source.stock.notes
    (tmp_path / "x.zarr" / "c" / "1" / "0" / "0").unlink()
    with pytest.raises(OSError, match="was there when the store was opened"):
        source.read(2)


def test_a_chunk_is_unpacked_once_while_the_order_stays_with_it(tmp_path, monkeypatch):
    images = RNG.integers(0, 4096, (400, 8, 8), dtype=np.uint16)
    monkeypatch.setattr(chunks, "HELD_BYTES", 4 * 20 * 128)  # four chunks of twenty images
    path = write_h5(tmp_path / "x.h5", images, chunks=(20, 8, 8), compression="gzip")
    unpacked = []
    unpack = hdf5.unpack
    monkeypatch.setattr(hdf5, "unpack", lambda data, *rest: (unpacked.append(1), unpack(data, *rest))[1])
    source = open_train(path)
    assert isinstance(source.images, ChunkedImages)
    assert (len(source.shards.starts), source.shards.window) == (21, 80)
    for epoch in range(3):
        order = plan_epoch(0, epoch, 400, 1, shards=source.shards).order
        unpacked.clear()
        assert all(np.array_equal(source.read(index)[..., 0], images[index]) for index in order.tolist())
        assert len(unpacked) <= 20 + 5  # those that are scattered past the end are opened twice


def test_threads_read_the_same(tmp_path):
    images = RNG.integers(0, 4096, (60, 16, 16), dtype=np.uint16)
    store = zarr.create_array(tmp_path / "x.zarr", shape=images.shape, chunks=(8, 16, 16), dtype="uint16")
    store[:] = images
    paths = [write_h5(tmp_path / "x.h5", images, chunks=(8, 16, 16), compression="gzip"), str(tmp_path / "x.zarr")]
    paths.append(write_h5(tmp_path / "y.h5", images, chunks=(8, 16, 16), compression="lzf"))
    for source in map(open_train, paths):
        wrong = []

        def read(seed, source=source, wrong=wrong):
            for index in np.random.default_rng(seed).permutation(60).tolist():
                if not np.array_equal(source.read(index)[..., 0], images[index]):
                    wrong.append(index)

        threads = [threading.Thread(target=read, args=(seed,)) for seed in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not wrong


# --- which array ------------------------------------------------------------------------------------------------------

IMAGES, NUMBERS, FLOATS = (np.dtype("u2"), (9, 4, 4)), (np.dtype("i8"), (9,)), (np.dtype("f4"), (9, 5))
CHOSEN = {
    "one alone": ({"scans": IMAGES, "ages": NUMBERS}, None, ("scans", None), None),
    "with labels": ({"images": IMAGES, "labels": NUMBERS}, None, ("images", "labels"), None),
    "parts by names": (
        {"x_train": IMAGES, "y_train": NUMBERS, "x_test": IMAGES, "y_test": NUMBERS}, None,
        ("x_train", "y_train"), ("x_test", "y_test"),
    ),
    "parts by groups": (
        {"train/images": IMAGES, "train/labels": NUMBERS, "val/images": IMAGES, "val/labels": NUMBERS}, None,
        ("train/images", "train/labels"), ("val/images", "val/labels"),
    ),
    "by key": ({"a": IMAGES, "b": IMAGES, "c": NUMBERS}, "b", ("b", None), None),
    "by keys": ({"a": IMAGES, "b": IMAGES, "c": NUMBERS}, "b,c", ("b", "c"), None),
    "by four keys": ({"a": IMAGES, "b": IMAGES, "c": NUMBERS}, "/b,c,a,", ("b", "c"), ("a", None)),
    "no labels": ({"images": IMAGES, "labels": NUMBERS}, "images,", ("images", None), None),
}  # fmt: skip


@pytest.mark.parametrize("case", CHOSEN)
def test_the_arrays_of_images_and_labels_are_found_or_named(case):
    listed, asked, train, val = CHOSEN[case]
    for split, expected in (("train", train), ("val", val)):
        keys = choose_keys(listed, asked, split, "x.h5")
        assert (None if keys is None else (keys.images, keys.labels)) == expected


@pytest.mark.parametrize(
    ("listed", "asked", "words"),
    [
        ({"a": IMAGES, "b": IMAGES}, None, r"several arrays can be its images: a uint16 \[9, 4, 4\], b uint16"),
        ({"a": NUMBERS, "b": FLOATS}, None, r"no array of images; it has a int64 \[9\], b float32 \[9, 5\]"),
        ({"a": IMAGES}, "c", r"has no array 'c'; it has a uint16 \[9, 4, 4\]"),
        ({"a": IMAGES}, ",b", "give `::images`"),
        ({}, None, "it has no arrays"),
    ],
)
def test_what_cannot_be_chosen_is_listed(listed, asked, words):
    with pytest.raises(UserError, match=words) as caught:
        choose_keys(listed, asked, "train", "x.h5")
    assert "\n" not in str(caught.value)


def test_keys_in_the_data_path_name_arrays_and_the_rest_is_counted(tmp_path):
    with h5py.File(tmp_path / "x.h5", "w") as file:
        for name in ("a", "b/c"):
            file[name] = RNG.integers(0, 9, (6, 4, 4, 3)).astype(np.uint8)
        file["kinds"], file["b/names"] = np.arange(6) % 2, np.array([b"x"] * 6)
        file["soft"] = h5py.SoftLink("/b/c")
    source = open_train(f"{tmp_path}/x.h5::b/c,kinds,a")
    assert (source.labels.tolist(), len(open_val(f"{tmp_path}/x.h5::b/c,kinds,a"))) == ([0, 1, 0, 1, 0, 1], 6)
    assert source.stock.used == {"images": 6, "files": 1, "arrays": 2}
    assert np.array_equal(content(open_train(f"{tmp_path}/x.h5::soft")), content(source))
    left_out = open_train(f"{tmp_path}/x.h5::a").stock.left_out
    assert (left_out[0].count, left_out[0].examples) == (2, ("b/c", "kinds"))
    planes = open_train(f"{tmp_path}/x.h5::b/c", ReadAs(layout="chw"))
    assert describe(planes).size == (4, 3)
    with pytest.raises(UserError, match="only HDF5 files and Zarr stores have keys"):
        open_train(f"{tmp_path}::a")


# --- what is refused --------------------------------------------------------------------------------------------------


def test_nothing_outside_of_a_file_is_read(tmp_path):
    other = write_h5(tmp_path / "other.h5", RNG.integers(0, 9, (6, 4, 4)))
    (tmp_path / "raw").write_bytes(bytes(6 * 16))
    with h5py.File(tmp_path / "x.h5", "w") as file:
        file["link"] = h5py.ExternalLink(other, "/images")
        file["soft"] = h5py.SoftLink("/link")
        file["round"] = h5py.SoftLink("/round")
        layout = h5py.VirtualLayout((6, 4, 4), np.int64)
        layout[:] = h5py.VirtualSource(other, "images", (6, 4, 4))
        file.create_virtual_dataset("virtual", layout)
        file.create_dataset("raw", (6, 4, 4), np.uint8, external=[(str(tmp_path / "raw"), 0, 96)])
        file.create_dataset("words", (6,), h5py.string_dtype())
    for key, words in {
        "link": "a link to the file .*other.h5; give", "soft": "a link to the file", "round": "lead in a circle",
        "virtual": "a virtual dataset", "raw": "its numbers lie in the file", "words": "which are no numbers",
    }.items():  # fmt: skip
        with pytest.raises(UserError, match=words) as caught:
            open_train(f"{tmp_path}/x.h5::{key}")
        assert "\n" not in str(caught.value)


def test_a_file_that_this_process_has_open_is_read_all_the_same(tmp_path):
    path = write_h5(tmp_path / "x.h5", images_of("8 bits"), chunks=(3, 7, 9, 2), compression="lzf")
    with h5py.File(path) as file:
        expect(open_train(path), file["images"][()])


def test_a_changed_file_ends_the_run_and_a_damaged_chunk_costs_its_images(tmp_path):
    images = RNG.integers(0, 4096, (12, 16, 16), dtype=np.uint16)
    path = tmp_path / "x.h5"
    write_h5(path, images, chunks=(4, 16, 16), compression="gzip", fletcher32=True)
    with h5py.File(path) as file:
        offset = file["images"].id.get_chunk_info(1).byte_offset
    damaged = bytearray(path.read_bytes())
    damaged[offset + 50] ^= 1
    path.write_bytes(damaged)
    source = open_train(str(path))
    assert np.array_equal(source.read(0)[..., 0], images[0])
    with pytest.raises(OSError, match=r"the chunk \[1, 0, 0\] is damaged"):
        source.read(5)
    path.write_bytes(damaged + b"x")
    with pytest.raises(UserError, match="changed during the run"):
        source.read(11)


def test_hostile_hdf5_files_are_refused_in_one_line(tmp_path):
    images = np.zeros((64, 64, 64), np.uint8)
    whole = tmp_path / "x.h5"
    write_h5(whole, images, chunks=(64, 64, 64), compression="gzip")
    data = whole.read_bytes()
    with h5py.File(whole) as file:
        info = file["images"].id.get_chunk_info(0)
    # A chunk that unpacks to a thousand times what it must hold.
    bomb = zlib.compress(bytes(64 << 20))
    with h5py.File(tmp_path / "bomb.h5", "w") as file:
        file.create_dataset("images", (64, 64, 64), np.uint8, chunks=(64, 64, 64), compression="gzip")
        file["images"].id.write_direct_chunk((0, 0, 0), bomb)
    source = open_train(str(tmp_path / "bomb.h5"))
    with pytest.raises(OSError, match="unpacks to more than its 262144 bytes"):
        source.read(0)
    with h5py.File(tmp_path / "huge.h5", "w") as file:
        file.create_dataset("images", (1 << 40, 64, 64), np.uint8, chunks=(1, 64, 64), compression="gzip")
    with h5py.File(tmp_path / "wide.h5", "w") as file:
        data_set = file.create_dataset("images", (9, 1 << 17, 1 << 17), np.uint8, chunks=(1, 1 << 15, 1 << 15))
        data_set.id.write_direct_chunk((0, 0, 0), b"x" * 10)
    cases = {
        "cut.h5": (data[: info.byte_offset + 10], "cannot be read"),
        "empty.h5": (b"", "does not begin"), "text.h5": (b"hello", "does not begin"),
        "head.h5": (data[:8] + bytes(400), "cannot be read"),
        "huge.h5": ((tmp_path / "huge.h5").read_bytes(), "in a file of"),
        "wide.h5": ((tmp_path / "wide.h5").read_bytes(), "that are stored in 10"),
    }  # fmt: skip
    for name, (start, words) in cases.items():
        (tmp_path / name).write_bytes(start)
        with pytest.raises(UserError, match=words) as caught:
            open_train(str(tmp_path / name))
        assert "\n" not in str(caught.value)
        assert str(tmp_path / name) in str(caught.value)


def test_hostile_zarr_stores_are_refused_in_one_line(tmp_path):
    def store(name, **change):
        array = zarr.create_array(tmp_path / name, shape=(6, 4, 4), chunks=(2, 4, 4), dtype="uint16")
        array[:] = 3
        metadata = json.loads((tmp_path / name / "zarr.json").read_text())
        (tmp_path / name / "zarr.json").write_text(json.dumps({**metadata, **change}))
        return str(tmp_path / name)

    grid = {"name": "regular", "configuration": {"chunk_shape": [1 << 20, 1 << 20, 1 << 20]}}
    for path, words in (
        (store("chunks.zarr", chunk_grid=grid), r"says \[6, 4, 4\] uint16 in chunks of \[1048576"),
        (store("type.zarr", data_type="object"), "cannot be read"),
        (store("codec.zarr", codecs=[{"name": "pickle"}]), "cannot be read"),
        (store("text.zarr", shape="x"), "cannot be read"),
    ):
        with pytest.raises(UserError, match=words) as caught:
            open_train(path)
        assert "\n" not in str(caught.value)
    path = tmp_path / "cut.zarr"
    source = open_train(store("cut.zarr"))
    chunk = path / "c" / "0" / "0" / "0"
    data = chunk.read_bytes()
    for damaged in (data[:-3], b"", numcodecs.Zstd().encode(bytes(32 << 20)), b"\x00" * 20):
        chunk.write_bytes(damaged)
        with pytest.raises(OSError, match="is damaged"):
            source.read(0)
    assert source.read(5).max() == 3


def test_claims_of_compressed_data_are_read_before_they_are_unpacked():
    for size in (1, 255, 256, 300, 70_000):
        assert zstd_size(bytes(numcodecs.Zstd().encode(bytes(size)))) == size
    with pytest.raises(ValueError, match="does not begin"):
        zstd_size(struct.pack("<IB", 1, 0))
    packed, out = zlib.compress(bytes(1000)), np.ones(1001, np.uint8)
    inflate(packed, out[:1000])
    assert not out[:1000].any()
    assert out[1000] == 1
    for size in (999, 1001):
        with pytest.raises(ValueError, match="than its"):
            inflate(packed, out[:size])


@pytest.mark.parametrize("with_imagecodecs", [True, False])
def test_what_deflate_refuses_is_refused_with_and_without_libdeflate(monkeypatch, with_imagecodecs):
    if not with_imagecodecs:
        monkeypatch.setattr(codecs, "_fast_inflate", lambda wbits: None)
    data = RNG.integers(0, 9, 5000).astype(np.uint8)
    for wbits in (zlib.MAX_WBITS, zlib.MAX_WBITS + 16):
        packer = zlib.compressobj(wbits=wbits)
        packed = packer.compress(data) + packer.flush()
        out = np.empty(5000, np.uint8)
        inflate(np.frombuffer(packed, np.uint8), out, wbits)
        assert np.array_equal(out, data)
        for damaged in (packed[:-9], packed[:40] + b"\xff" * 40 + packed[80:], b"", b"no deflate"):
            with pytest.raises(ValueError, match=r"."):
                inflate(damaged, out, wbits)


@pytest.mark.parametrize("itemsize", [1, 2, 4, 8, 16])
def test_shuffled_bytes_are_put_back_as_numcodecs_does(itemsize):
    for count in (0, 1, 7, 70_001):
        data = RNG.integers(0, 256, count * itemsize, dtype=np.uint8)
        shuffled = np.frombuffer(numcodecs.Shuffle(itemsize).encode(data), np.uint8) if itemsize > 1 else data
        out = np.full(len(data) + 4, 77, np.uint8)  # with a checksum, which is left where it is
        unshuffle(np.append(shuffled, np.uint8([1, 2, 3, 4])), out, itemsize if itemsize > 4 else 1)
        assert out[-4:].tolist() == [1, 2, 3, 4]
        unshuffle(shuffled, out[:-4], itemsize)
        assert np.array_equal(out[:-4], data)
    with pytest.raises(ValueError, match="bytes instead of"):
        unshuffle(data, out, itemsize)


@pytest.mark.parametrize(
    ("data", "out", "reason"),
    [
        (np.zeros((2, 5), np.int32), np.zeros((5, 2), np.uint8), "data must be uint8"),
        (np.zeros((2, 5), np.uint8), np.zeros((2, 5), np.uint8), r"out must have shape \[n, B\]"),
        (np.zeros(10, np.uint8), np.zeros((5, 2), np.uint8), "data must have shape"),
        (np.zeros((2, 8), np.uint8)[:, :5], np.zeros((5, 2), np.uint8), "no gaps"),
        (np.zeros((2, 5), np.uint8), np.zeros((5, 4), np.uint8)[:, ::2], "out must be contiguous"),
    ],
)
def test_the_extension_refuses_what_it_cannot_put_back(data, out, reason):
    with pytest.raises(ValueError, match=reason):
        _C.unshuffle(data, out)


def test_numbers_of_every_width_and_order_of_filters_are_what_h5py_reads(tmp_path):
    path = tmp_path / "x.h5"
    types = [f"{order}{kind}{size}" for order in "<>" for kind, sizes in (("u", (2, 4, 8)), ("f", (2, 4, 8)))
             for size in sizes]  # fmt: skip
    with h5py.File(path, "w") as file:
        for name in types:
            images = RNG.integers(0, 60000, (9, 5, 6)).astype(name)
            for before in (False, True):
                plist = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
                plist.set_chunk((4, 5, 3))
                if before:  # the checksum is shuffled and packed as well
                    plist.set_fletcher32()
                plist.set_shuffle()
                plist.set_deflate(6)
                if not before:
                    plist.set_fletcher32()
                space = h5py.h5s.create_simple(images.shape)
                kind = h5py.h5t.py_create(np.dtype(name))
                key = f"{name}{before}".replace("<", "little ").replace(">", "big ").encode()
                h5py.h5d.create(file.id, key, kind, space, plist).write(h5py.h5s.ALL, h5py.h5s.ALL, images)
    with h5py.File(path) as file:
        for key in file:
            stored = hdf5._stored(h5py, file, key, OpenFile(path))
            read = stored.read(0, 9)
            assert read.dtype == file[key].dtype
            assert read.tobytes() == file[key][()].tobytes(), key
            assert stored.read(2, 7).tobytes() == file[key][2:7].tobytes()


def test_bytes_that_were_shuffled_once_packed_are_what_h5py_reads(tmp_path):
    images = np.repeat(RNG.integers(0, 60000, (9, 5, 1), np.uint16), 6, axis=2)
    plist = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    plist.set_chunk((4, 5, 6))
    plist.set_deflate(6)
    plist.set_shuffle()
    with h5py.File(tmp_path / "x.h5", "w") as file:
        space = h5py.h5s.create_simple(images.shape)
        h5py.h5d.create(file.id, b"x", h5py.h5t.NATIVE_UINT16, space, plist).write(h5py.h5s.ALL, h5py.h5s.ALL, images)
    source = open_train(str(tmp_path / "x.h5"))
    assert np.array_equal(np.stack([source.read(number)[..., 0] for number in range(9)]), images)


def test_threads_do_not_share_the_memory_that_they_unpack_into(tmp_path):
    """Chunks of different sizes in turns, by several threads: the memory of each is its own, and grows."""
    paths = []
    for number, side in enumerate((4, 40, 9)):
        images = RNG.integers(0, 65536, (64, side, side), dtype=np.uint16)
        options = {"compression": "gzip", "shuffle": True, "fletcher32": number == 1}
        paths.append((images, write_h5(tmp_path / f"{number}.h5", images, chunks=(2, side, side), **options)))
    sources = [(images, open_train(path)) for images, path in paths]

    def read(number):
        images, source = sources[number % 3]
        return np.array_equal(source.read(number // 3)[..., 0], images[number // 3])

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(read, range(192)))


def test_a_missing_library_is_one_line_with_the_command(tmp_path, monkeypatch):
    import sys

    path = write_h5(tmp_path / "x.h5", images_of("8 bits"))
    zarr.create_array(tmp_path / "x.zarr", shape=(6, 4, 4), chunks=(2, 4, 4), dtype="uint16")
    for module, name in (("h5py", path), ("zarr", str(tmp_path / "x.zarr"))):
        monkeypatch.setitem(sys.modules, module, None)
        with pytest.raises(UserError, match=rf"need {module}; run pip install 'fastmae\[science\]'"):
            open_train(name)
