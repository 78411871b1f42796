"""`fastmae serve` on Ray Serve (`make test-serve`): it answers, outlives a replica, loses nothing at SIGTERM."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest
import yaml
from PIL import Image

pytest.importorskip("ray")

import fastmae
from fastmae.cli import main

PORT = 8139
HERE = f"http://127.0.0.1:{PORT}"
TOKEN = "0123456789abcdef-token"
LISTENING = "0A"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run") / "run"
    fastmae.pretrain("digits", output_dir=folder, epochs=1, model="mae_vit_tiny_patch4", probe=False, autotune="off")
    return folder


def png() -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (20, 20), np.uint8)).save(file, "PNG")
    return file.getvalue()


def reachable() -> set[str]:
    """The sockets of this machine that listen beyond 127.0.0.1."""
    lines = [line.split() for name in ("tcp", "tcp6") for line in Path("/proc/net", name).read_text().splitlines()[1:]]
    here = ("0100007F", "0000000000000000FFFF00000100007F", "00000000000000000000000001000000")
    return {line[1] for line in lines if line[3] == LISTENING and not line[1].startswith(here)}


@pytest.fixture
def service(run: Path, request: pytest.FixtureRequest) -> Iterator[subprocess.Popen[str]]:
    words = [sys.executable, "-m", "fastmae", "serve", str(run), "--port", str(PORT), *request.param]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True, env={**os.environ, "FASTMAE_TOKEN": TOKEN})
    try:
        assert process.stdout is not None
        assert "a token is asked for; only this machine can reach it" in process.stdout.readline()
        yield process
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            process.wait(60)


def client() -> httpx.Client:
    return httpx.Client(base_url=HERE, headers={"authorization": f"Bearer {TOKEN}"}, timeout=60)


@pytest.mark.parametrize("service", [("--replicas", "2", "--cpus", "0.5")], indirect=True)
def test_it_answers_alike_from_each_replica_and_outlives_one(run, service):
    assert httpx.post(f"{HERE}/v1/embed", content=png()).status_code == 401
    model = fastmae.load_model(run)
    right = model.features(model.preprocess(png())[None])[0].tolist()
    with client() as ask:
        for _ in range(6):
            np.testing.assert_allclose(
                ask.post("/v1/embed", content=png()).json()["features"], right, rtol=1e-4, atol=1e-5
            )
        found = [
            int(path.name)
            for path in Path("/proc").glob("[0-9]*")
            if path.stat().st_uid == os.getuid() and b"ServeReplica:fastmae" in (path / "cmdline").read_bytes()
        ]
        assert len(found) == 2
        os.kill(found[0], signal.SIGKILL)
        answers = []
        for _ in range(40):
            answers.append(ask.post("/v1/embed", content=png()).status_code)
            time.sleep(0.05)
        assert set(answers) <= {200, 500, 503}
        assert answers[-10:] == [200] * 10


@pytest.mark.parametrize("service", [()], indirect=True)
def test_a_signal_loses_no_request_and_nobody_else_reaches_a_port(service):
    assert not reachable() - ALREADY
    answers: list[int] = []

    def ask_once() -> None:
        with client() as ask:
            answers.append(ask.post("/v1/reconstruct", content=png()).status_code)

    threads = [threading.Thread(target=ask_once) for _ in range(12)]
    for thread in threads:
        thread.start()
    while not answers:  # then some others are in work, and some on their way: none is cut off
        time.sleep(0.01)
    service.send_signal(signal.SIGTERM)
    for thread in threads:
        thread.join()
    assert set(answers) <= {200, 503}
    assert 200 in answers
    assert service.wait(60) == 0


ALREADY = reachable()


def test_the_file_for_a_cluster_is_one_of_ray_serve(run, tmp_path, capsys):
    from ray.serve.schema import ServeDeploySchema

    path = tmp_path / "serve.yaml"
    assert main(["serve", str(run), "--max_replicas", "8", "--write", str(path)]) == 0
    assert f"serve deploy {path}" in capsys.readouterr().out
    said = yaml.safe_load(path.read_text())
    schema = ServeDeploySchema.model_validate(said)
    assert schema.http_options.host == "127.0.0.1"
    assert said["applications"][0]["args"]["checkpoint"] == str(run)
    assert TOKEN not in path.read_text()
