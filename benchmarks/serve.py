"""Load on `fastmae serve` over loopback: requests a second, times, batches on and off, a killed replica, SIGTERM, and
hostile uploads, replicas that follow the load. It needs the extra `serve`, nothing of fastmae but the command, and for
`--part wrk` the load generator of that name (https://github.com/wg/wrk), whose connections stay open:

    python benchmarks/serve.py RUN IMAGE --seconds 15 --clients 16
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
import zlib
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

PORT = 8137
WAYS = (("--max_batch", "1"), ("--max_batch", "4"), ("--max_batch", "16"))
"""How many images are computed together, at most."""
PARTS = ("batch", "wrk", "kill", "stop", "hostile", "scale")
TRIES = 50
"""How often a client asks again for what a dying replica or a full service did not answer."""


@dataclass
class Load:
    """What clients saw."""

    seconds: list[float] = field(default_factory=list)
    statuses: Counter[int] = field(default_factory=Counter)
    retried: int = 0
    lost: int = 0

    def line(self, name: str, duration: float) -> str:
        times = sorted(self.seconds) or [0.0]
        p50, p99 = (1000 * times[min(len(times) - 1, int(len(times) * share))] for share in (0.5, 0.99))
        statuses = ", ".join(f"{count} × {status}" for status, count in sorted(self.statuses.items()))
        return (
            f"{name:<34} {len(self.seconds) / duration:7.1f} requests/s  p50 {p50:6.0f} ms  p99 {p99:6.0f} ms  "
            f"({statuses}; asked again {self.retried}, lost {self.lost})"
        )


async def ask(body: bytes, path: str = "/v1/embed", headers: str = "") -> tuple[int, bytes]:
    """Sends one request on a connection of its own; returns (status, answer). Status 0: the connection broke."""
    writer = None
    try:
        reader, writer = await asyncio.open_connection("127.0.0.1", PORT)
        head = f"POST {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: {len(body)}\r\n{headers}\r\n"
        writer.write(head.encode() + body)
        answer = await asyncio.wait_for(reader.read(), 60)
        return (int(answer.split(b" ", 2)[1]), answer) if answer.startswith(b"HTTP/") else (0, answer)
    except (TimeoutError, OSError, ValueError, IndexError):
        return 0, b""
    finally:
        if writer is not None:
            writer.close()


async def client(body: bytes, until: float, load: Load, *, retries: bool, stopping: list[float]) -> None:
    """Asks one request after the other; with ``retries`` again what was not answered, until it is."""
    while time.perf_counter() < until and not stopping:
        begun = time.perf_counter()
        for number in range(TRIES):
            sent_after_stop = bool(stopping)
            status, _ = await ask(body)
            load.statuses[status] += 1
            if status == 200:
                load.seconds.append(time.perf_counter() - begun)
                break
            if sent_after_stop or stopping:  # it may be refused then, not cut off
                load.lost += status not in (503, 404) and not sent_after_stop
                break
            if not retries or number == TRIES - 1:
                load.lost += 1
                break
            load.retried += 1
            await asyncio.sleep(0.05 + 0.05 * random.random())


async def under_load(body: bytes, seconds: float, clients: int, event: object = None) -> tuple[Load, float]:
    """Runs clients for a while; ``event`` is a function that is called in the middle, with the list that stops them."""
    load, begun = Load(), time.perf_counter()
    stopping: list[float] = []
    tasks = [
        asyncio.create_task(client(body, begun + seconds, load, retries=event is not None, stopping=stopping))
        for _ in range(clients)
    ]
    if callable(event):
        await asyncio.sleep(seconds / 2)
        event(stopping)
    await asyncio.gather(*tasks)
    return load, time.perf_counter() - begun


async def scaled(body: bytes, seconds: float, clients: int) -> None:
    """Says when the number of replicas changes, under a load and after it."""
    begun, last = time.perf_counter(), 0
    load = Load()
    until = begun + seconds
    tasks = [asyncio.create_task(client(body, until, load, retries=True, stopping=[])) for _ in range(clients)]
    while time.perf_counter() < until or (last > 1 and time.perf_counter() < until + 180):
        if len(replicas()) != last:
            last = len(replicas())
            print(f"  {time.perf_counter() - begun:5.1f} s  {last} replicas, {len(load.seconds)} answers", flush=True)
        await asyncio.sleep(0.5)
    await asyncio.gather(*tasks)
    print(load.line(f"1 to 2 replicas, {clients} clients", seconds))


def start(run: str, *flags: str) -> subprocess.Popen[str]:
    """Starts the service, and returns when it answers."""
    words = [sys.executable, "-m", "fastmae", "serve", run, "--port", str(PORT), *flags]
    service = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert service.stdout is not None
    line = service.stdout.readline()
    if "answers" not in line:
        sys.exit(f"the service did not start: {line}{service.stderr.read() if service.stderr else ''}")
    return service


def stop(service: subprocess.Popen[str]) -> int:
    """Ends the service by SIGTERM, and returns its exit status."""
    service.send_signal(signal.SIGTERM)
    return service.wait(120)


def by_wrk(image: str, path: str, clients: int, seconds: float) -> str:
    """Runs wrk on one thread; returns requests a second and times, as it says them."""
    with tempfile.NamedTemporaryFile("w", suffix=".lua") as script:
        script.write(
            f'local file = io.open("{Path(image).resolve()}", "rb")\nwrk.method = "POST"\nwrk.body = file:read("*a")\n'
        )
        script.flush()
        words = ["wrk", "-t1", f"-c{clients}", f"-d{seconds:g}s", "--latency", "--timeout", "30", "-s", script.name]
        said = subprocess.run([*words, f"http://127.0.0.1:{PORT}{path}"], capture_output=True, text=True, check=True)
    found = {line.split()[0]: " ".join(line.split()[1:]) for line in said.stdout.splitlines() if line.split()}
    wrong = found.get("Non-2xx", "")
    return f"{found['Requests/sec:']:>8} requests/s  p50 {found['50%']:>9}  p99 {found['99%']:>9}  {wrong}"


def replicas() -> list[int]:
    """Returns the processes of this machine that Ray names so."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if b"ServeReplica:fastmae" in (folder / "cmdline").read_bytes():
                found.append(int(folder.name))
        except OSError:
            continue
    return found


def hostile(image: bytes) -> dict[str, bytes]:
    """Uploads that must be refused."""
    claimed = bytearray(image)
    if image.startswith(b"\x89PNG"):
        claimed[16:24] = (60_000).to_bytes(4, "big") * 2
        claimed[29:33] = zlib.crc32(bytes(claimed[12:29])).to_bytes(4, "big")
    return {
        "empty": b"",
        "truncated": image[: len(image) // 2],
        "claims 60,000 × 60,000": bytes(claimed),
        "30 MB of zeros": bytes(30_000_000),
        "text": b"x" * 10_000,
        "a zip": b"PK\x03\x04" + bytes(1000),
        "PostScript": b"%!PS-Adobe-3.0 EPSF-3.0\n",
        "random bytes": os.urandom(100_000),
        "80,000 lines of a header": b"P6\n" + b"# x\n" * 80_000 + b"4 4\n255\n",
    }


async def attacked(image: bytes, token: str) -> None:
    """Sends hostile uploads, wrong tokens and broken requests, and then a good one."""
    right = f"Authorization: Bearer {token}\r\n"
    for name, body in hostile(image).items():
        begun = time.perf_counter()
        status, _ = await ask(body, headers=right)
        print(f"  {name:<28} {status}  {time.perf_counter() - begun:5.2f} s")
    many = "".join(f"x-{n}: y\r\n" for n in range(80_000))
    odd = {
        "no token": await ask(image), "a wrong token": await ask(image, headers="Authorization: Bearer nonsense\r\n"),
        "80,000 headers": await ask(image, headers=right + many),
        "a path with escapes": await ask(image, "/v1/..%2f..%2fetc%2fpasswd%00%1b[31m", right),
        "the right token": await ask(image, headers=right),
    }  # fmt: skip
    for name, (status, _) in odd.items():
        print(f"  {name:<28} {status or 'connection closed'}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run")
    parser.add_argument("image")
    parser.add_argument("--seconds", type=float, default=15)
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--part", choices=PARTS, action="append")
    parser.add_argument("--path", default="/v1/embed", help="what wrk asks for")
    asked = parser.parse_args()
    body, parts = Path(asked.image).read_bytes(), asked.part or ("batch", "kill", "stop", "hostile")
    if "batch" in parts:
        for way in WAYS:
            service = start(asked.run, *way)
            asyncio.run(under_load(body, 2, asked.clients))  # warm
            load, duration = asyncio.run(under_load(body, asked.seconds, asked.clients))
            print(load.line(f"{' '.join(way)}, {asked.clients} clients", duration), flush=True)
            load, duration = asyncio.run(under_load(body, asked.seconds / 3, 1))
            print(load.line(f"{' '.join(way)}, 1 client", duration), "exit", stop(service), flush=True)
    if "wrk" in parts:
        for way in WAYS:
            service = start(asked.run, *way)
            by_wrk(asked.image, asked.path, asked.clients, 2)  # warm
            for clients in (1, asked.clients):
                said = by_wrk(asked.image, asked.path, clients, asked.seconds)
                print(f"{' '.join(way):<20} {clients:3} clients {said}", flush=True)
            stop(service)
    if "scale" in parts:
        service = start(asked.run, "--max_replicas", "2", "--cpus", "0.5", "--target_requests", "4")
        asyncio.run(scaled(body, asked.seconds, asked.clients))
        print("scale: exit", stop(service), flush=True)
    if "kill" in parts:
        service = start(asked.run, "--replicas", "2", "--cpus", "0.5")
        killed: list[int] = []

        def kill(_: list[float]) -> None:
            killed.append(replicas()[0])
            os.kill(killed[0], signal.SIGKILL)

        load, duration = asyncio.run(under_load(body, asked.seconds, asked.clients, kill))
        print(load.line(f"one of 2 replicas killed ({killed[0]})", duration), "exit", stop(service), flush=True)
    if "stop" in parts:
        service = start(asked.run)

        def end(stopping: list[float]) -> None:
            service.send_signal(signal.SIGTERM)
            stopping.append(time.perf_counter())

        load, duration = asyncio.run(under_load(body, asked.seconds / 2, asked.clients, end))
        print(load.line("SIGTERM under load", duration), "exit", service.wait(120), flush=True)
    if "hostile" in parts:
        os.environ["FASTMAE_TOKEN"] = token = "a-token-of-this-benchmark"
        service = start(asked.run)
        asyncio.run(attacked(body, token))
        print("hostile uploads: exit", stop(service))


if __name__ == "__main__":
    main()
