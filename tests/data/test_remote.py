"""Tars, Parquet files and lists behind addresses: read by ranges, asked for again, and noticed when they change."""

import io
import logging
import re
import sys
import tarfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import torch
from PIL import Image

from fastmae.data import remote
from fastmae.data.fingerprint import difference, fingerprint
from fastmae.data.loader import load_batches
from fastmae.data.reading import Reading
from fastmae.data.sample import View
from fastmae.data.sources import open_train, open_val
from fastmae.errors import UserError
from fastmae.facts import ReadAs

pytest.importorskip("fsspec")
pytest.importorskip("aiohttp")


def tar_of(first, last, size=3000):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for number in range(first, last):
            for name, data in ((f"{number}.jpg", bytes([number]) * size), (f"{number}.cls", b"%d" % (number % 3))):
                member = tarfile.TarInfo(name)
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
    return buffer.getvalue()


class Server(ThreadingHTTPServer):
    """Files by their paths, with ranges; answers an error instead as often as ``failures`` says."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files, self.failures, self.status, self.ranges, self.asked = {}, 0, 503, True, []
        self.latency = 0.0
        self.url = f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        data = self.server.files.get(self.path.partition("?")[0])
        time.sleep(self.server.latency)
        given = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        self.server.asked.append(given and (int(given[1]), int(given[2])))
        if data is None or self.server.failures:
            self.server.failures -= data is not None
            self.send_response(404 if data is None else self.server.status)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        body = data[int(given[1]) : int(given[2]) + 1] if given and self.server.ranges else data
        self.send_response(206 if given and self.server.ranges else 200)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("ETag", f'"{hash(data)}"')
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    do_HEAD = do_GET  # noqa: N815

    def log_message(self, *words):
        pass


@pytest.fixture
def server(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(remote, "WAITS", (0.0, 0.0, 0.0))
    with Server() as server:
        server.files = {"/a/part-000.tar": tar_of(0, 20), "/a/part-001.tar": tar_of(20, 30)}
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def contents(source):
    with ThreadPoolExecutor(4) as pool:
        return [*pool.map(source.read, range(len(source)))]


def test_shards_are_read_by_ranges_and_their_index_is_kept(server):
    path = server.url + "/a/part-{000..001}.tar"
    source = open_train(path)
    assert contents(source) == [bytes([number]) * 3000 for number in range(30)]
    assert source.labels.tolist() == [number % 3 for number in range(30)]
    assert source.name(20) == f"{server.url}/a/part-001.tar:20.jpg"
    assert source.shards.starts.tolist() == [0, 20, 30]
    assert open_val(path) is None
    server.asked.clear()
    again = open_train(path)
    assert not any(server.asked), "the headers are not read again"
    assert (again.names, again.labels.tolist()) == (source.names, source.labels.tolist())
    assert difference(fingerprint(again), fingerprint(source)) is None
    again.read(3)
    assert [asked for asked in server.asked if asked][-1][1] - [asked for asked in server.asked if asked][-1][0] == 2999


def test_large_shards_are_indexed_in_large_ranges(server, monkeypatch):
    monkeypatch.setattr(remote, "BLOCK", 8192)
    server.files["/b.tar"] = tar_of(0, 60, size=5000)
    server.files["/c.tar"] = tar_of(0, 3, size=100_000)
    source = open_train(server.url + "/b.tar")
    assert contents(source) == [bytes([number]) * 5000 for number in range(60)]
    ranges = [asked for asked in server.asked if asked]
    assert len(ranges) - 60 < 70
    assert contents(open_train(server.url + "/c.tar")) == [bytes([number]) * 100_000 for number in range(3)]


def test_what_fails_is_asked_for_again_and_told(server, caplog):
    source = open_train(server.url + "/a/part-000.tar")
    source.read(4)
    server.failures = 2
    with caplog.at_level(logging.WARNING, "fastmae"):
        assert source.read(5) == bytes([5]) * 3000
    assert len(caplog.messages) == 2
    assert re.fullmatch(r"http.*/a/part-000.tar: ClientResponseError: 503.*; asking again in 0 s", caplog.messages[0])
    server.failures = 99
    with pytest.raises(OSError, match="503"):
        source.read(6)
    server.failures, server.status = 99, 403
    caplog.clear()
    with pytest.raises(OSError, match="403"):
        source.read(7)
    assert not caplog.messages, "a link that has expired is not asked for again"


def test_an_object_that_changes_is_noticed(server, monkeypatch):
    path = server.url + "/a/part-000.tar"
    source, before = open_train(path), fingerprint(open_train(path))
    monkeypatch.setattr(remote, "CHECK_SECONDS", 0.0)
    assert source.read(0) == bytes(3000)
    server.files["/a/part-000.tar"] = tar_of(1, 21)
    with pytest.raises(OSError, match="has changed since it was indexed; start again"):
        source.read(1)
    monkeypatch.setattr(remote, "CHECK_SECONDS", 60.0)
    with pytest.raises(OSError, match="has changed since it was indexed; start again"):
        source.read(2)  # within the minute in which its server is not asked again
    assert open_train(path).read(0) == bytes([1]) * 3000
    assert difference(fingerprint(open_train(path)), before) is not None


def test_what_cannot_be_read_is_refused_in_one_line(server, monkeypatch):
    server.files |= {"/x.tar": b"hello" * 999, "/x.parquet": b"PAR1"}
    for path, words in {
        "/none.tar": "cannot be read .*none.tar",
        "/x.tar": "not a tar file",
        "/x.parquet": "cannot be read .*x.parquet",
        "/x.zip": "no tars or Parquet files alone, and no list of paths",
        "/{x.tar,y.parquet}": "no tars or Parquet files alone, and no list of paths",
        "/none.csv": "cannot be read .*none.csv",
        "/x.tar.gz": "a compressed tar cannot be read in place",
    }.items():
        with pytest.raises(UserError, match=words) as raised:
            open_train(server.url + path)
        assert "\n" not in str(raised.value)
    with pytest.raises(UserError, match="no kind of address that fsspec knows"):
        open_train("nowhere://a/b.tar")
    monkeypatch.setitem(sys.modules, "s3fs", None)
    with pytest.raises(UserError, match="another package; run pip install s3fs"):
        open_train("s3://bucket/b.tar")
    server.failures = 4
    assert len(open_train(server.url + "/a/part-001.tar")) == 10
    server.ranges = False
    with pytest.raises(UserError, match="gives whole files and no ranges"):
        open_train(server.url + "/a/part-001.tar?x=1")


def parquet_of(first, last, group=4, **columns):
    """A Parquet file of images of one byte each, repeated, and labels, in row groups of four."""
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    rows = [{"bytes": bytes([number]) * 3000, "path": f"{number}.jpg"} for number in range(first, last)]
    table = pa.table({"image": rows, "label": [number % 3 for number in range(first, last)], **columns})
    buffer = io.BytesIO()
    pq.write_table(table, buffer, row_group_size=group)
    return buffer.getvalue()


def test_parquet_files_are_read_by_row_groups(server, monkeypatch):
    """A row group is one request for the bytes of its images, and is kept as long as it is in use."""
    server.files = {"/d/train-0.parquet": parquet_of(0, 10), "/d/train-1.parquet": parquet_of(10, 18)}
    path = server.url + "/d/train-{0..1}.parquet"
    source = open_train(path)
    assert source.labels.tolist() == [number % 3 for number in range(18)]
    assert source.shards.starts.tolist() == [0, 4, 8, 10, 14, 18]
    assert open_val(path) is None
    source._group(0)
    server.asked.clear()
    assert contents(source) == [bytes([number]) * 3000 for number in range(18)]
    assert len([asked for asked in server.asked if asked]) == 4, "all groups but the first, which is held"
    assert source.name(11) == f"{server.url}/d/train-1.parquet[1]"
    before = fingerprint(source)
    assert difference(fingerprint(open_train(path)), before) is None
    monkeypatch.setattr(remote, "CHECK_SECONDS", 0.0)
    server.files["/d/train-0.parquet"] = parquet_of(1, 11)
    changed = open_train(server.url + "/d/train-1.parquet")
    server.files["/d/train-1.parquet"] = parquet_of(0, 8)
    with pytest.raises(OSError, match="has changed since it was opened; start again"):
        changed.read(5)
    server.files["/d/train-1.parquet"] = parquet_of(10, 19)
    assert difference(fingerprint(open_train(path)), before) is not None


def test_a_list_behind_an_address_names_files_beside_it_and_elsewhere(server, tmp_path):
    """Labels and parts are as those of a list on a disk. A file that is not there is an unusable image."""
    server.files = {f"/set/img/{number}.jpg": bytes([number]) * 9 for number in range(6)} | {"/else/7.jpg": b"7"}
    rows = [f"img/{number}.jpg,{'ab'[number % 2]},{'train' if number < 4 else 'val'}" for number in range(6)]
    more = [f"{server.url}/else/7.jpg,a,train", "/else/7.jpg,b,train", "img/none.jpg,b,train"]
    server.files["/set/list.csv"] = "\n".join(["path,label,split", *rows, *more]).encode()
    source, val = open_train(server.url + "/set/list.csv?key=1"), open_val(server.url + "/set/list.csv")
    assert [source.read(index) for index in range(6)] == [bytes([number]) * 9 for number in range(4)] + [b"7", b"7"]
    assert source.labels.tolist() == [0, 1, 0, 1, 0, 1, 1]
    assert source.classes == ("a", "b")
    assert source.location == "listed in list.csv, rows of train, of 2 classes"
    assert [*val.paths] == [f"{server.url}/set/img/4.jpg", f"{server.url}/set/img/5.jpg"]
    with pytest.raises(OSError, match=r"FileNotFoundError.*none\.jpg"):
        source.read(6)
    on_disk = tmp_path / "list.txt"
    on_disk.write_text("img/0.jpg\nimg/1.jpg\n")
    there = open_train(str(on_disk), ReadAs(root=server.url + "/set/"))
    assert contents(there) == [bytes(9), b"\1" * 9]
    assert difference(fingerprint(there), fingerprint(there)) is None


def test_rows_of_paths_are_files_beside_the_parquet_file(server):
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    rows = [{"bytes": None, "path": f"img/{number}.jpg"} for number in range(3)]
    buffer = io.BytesIO()
    pq.write_table(pa.table({"image": pa.array(rows, kind)}), buffer)
    server.files = {f"/p/img/{number}.jpg": bytes([number]) for number in range(3)} | {
        "/p/x.parquet": buffer.getvalue()
    }
    assert contents(open_train(server.url + "/p/x.parquet")) == [b"\0", b"\1", b"\2"]


def test_what_is_asked_of_files_on_a_disk_is_done_behind_addresses_or_refused(server, tmp_path):
    """Pages would have to be counted in every file, so one line says so; sounds become spectrograms."""
    server.files |= {"/d/x.parquet": parquet_of(0, 4), "/s/list.txt": b"0.wav\n1.wav\n"}
    on_disk = tmp_path / "list.txt"
    on_disk.write_text(f"{server.url}/a.tif\n")
    for path in (server.url + "/a/part-000.tar", server.url + "/d/x.parquet", str(on_disk)):
        with pytest.raises(UserError, match=r"pages.*behind addresses are not read page by page; copy them to a disk"):
            open_train(path, ReadAs(pages="all"))
    soundfile = pytest.importorskip("soundfile")
    for number in range(2):
        sound = io.BytesIO()
        soundfile.write(sound, np.full(4000, number / 2, np.float32), 16000, format="WAV")
        server.files[f"/s/{number}.wav"] = sound.getvalue()
    assert open_train(server.url + "/s/list.txt", ReadAs(spectrogram=16)).read(1).shape == (23, 128, 1)


def test_many_images_are_asked_for_at_the_same_time(server):
    """More than decode; each is asked for once, one that fails is replaced, and all threads end with the batches."""
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, "PNG")
    server.files = {f"/{number}.png": buffer.getvalue() for number in range(24)}
    server.files["/x.txt"] = "\n".join(f"{number}.png" for number in range(24)).encode()
    server.files["/7.png"] = b"no image"
    source = open_train(server.url + "/x.txt")
    waiting, most, read = set(), [0], source.read

    def slow(index):
        waiting.add(threading.get_ident())
        most[0] = max(most[0], len(waiting))
        time.sleep(0.02)
        waiting.discard(threading.get_ident())
        return read(index)

    server.asked.clear()
    counted = Counted(source, slow)
    indices = np.arange(24)
    requests = [(indices[:12], indices[:12]), (indices[12:], indices[12:])]
    batches = [*load_batches(counted, requests, View((8, 8), Reading(3)), device=torch.device("cpu"), num_workers=1)]
    assert most[0] > 4
    assert [[bad.index for bad in batch.skipped] for batch in batches] == [[7], []]
    assert len(server.asked) == 25, "the image that stands in for the one which fails is asked for again"
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("fastmae-")]


class Counted:
    """A source whose reading is counted."""

    def __init__(self, source, read):
        self.source, self.read = source, read

    def __len__(self):
        return len(self.source)

    def __getattr__(self, name):
        return getattr(self.source, name)


@pytest.mark.slow
def test_shards_in_a_bucket(tmp_path, monkeypatch):
    moto = pytest.importorskip("moto.server")
    s3fs = pytest.importorskip("s3fs")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "testing")
    bucket = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    bucket.start()
    try:
        host, port = bucket.get_host_and_port()
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        files = s3fs.S3FileSystem(skip_instance_cache=True)
        files.mkdir("images")
        for number in range(2):
            files.pipe(f"images/part-{number:03d}.tar", tar_of(10 * number, 10 * number + 10))
        source = open_train("s3://images/part-{000..001}.tar")
        assert contents(source) == [bytes([number]) * 3000 for number in range(20)]
        before = fingerprint(source)
        monkeypatch.setattr(remote, "CHECK_SECONDS", 0.0)
        files.pipe("images/part-000.tar", tar_of(5, 15))
        with pytest.raises(OSError, match="has changed since it was indexed"):
            source.read(0)
        files.pipe("images/t.parquet", parquet_of(0, 9))
        assert contents(open_train("s3://images/t.parquet")) == [bytes([number]) * 3000 for number in range(9)]
        files.pipe("images/sub/1.jpg", b"1")
        files.pipe("images/list.txt", b"sub/1.jpg\ns3://images/sub/1.jpg")
        assert contents(open_train("s3://images/list.txt")) == [b"1", b"1"]
        assert difference(fingerprint(open_train("s3://images/part-{000..001}.tar")), before) is not None
    finally:
        bucket.stop()
