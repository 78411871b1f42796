"""Tar shards behind addresses: read by ranges, asked for again where that may help, and noticed when they change."""

import io
import logging
import re
import sys
import tarfile
import threading
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from fastmae.data import remote
from fastmae.data.fingerprint import difference, fingerprint
from fastmae.data.sources import open_train, open_val
from fastmae.errors import UserError

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
        self.url = f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        data = self.server.files.get(self.path.partition("?")[0])
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
    assert open_train(path).read(0) == bytes([1]) * 3000
    assert difference(fingerprint(open_train(path)), before) is not None


def test_what_cannot_be_read_is_refused_in_one_line(server, monkeypatch):
    server.files |= {"/x.tar": b"hello" * 999, "/x.parquet": b"PAR1"}
    for path, words in {
        "/none.tar": "cannot be read .*none.tar",
        "/x.tar": "not a tar file",
        "/x.parquet": "only tar shards are read from an address",
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
        assert difference(fingerprint(open_train("s3://images/part-{000..001}.tar")), before) is not None
    finally:
        bucket.stop()
