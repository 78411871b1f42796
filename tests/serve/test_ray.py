"""`fastmae serve` on Ray Serve (`make test-serve`): it answers, outlives a replica, loses nothing at SIGTERM."""

from __future__ import annotations

import contextlib
import io
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import numpy as np
import pytest
import torch
import yaml
from PIL import Image

pytest.importorskip("ray")
from prometheus_client.parser import text_string_to_metric_families

import fastmae
from fastmae.checkpoint.load import load_classifier, load_segmenter
from fastmae.cli import main
from fastmae.data import shapes
from fastmae.evaluate.segment import segment_picture

PORT = 8139
HERE = f"http://127.0.0.1:{PORT}"
TOKEN = "0123456789abcdef-token"
LISTENING = "0A"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run") / "run"
    fastmae.pretrain("digits", output_dir=folder, epochs=1, model="mae_vit_tiny_patch4", probe=False, autotune="off")
    return folder


@pytest.fixture(scope="module")
def classifier(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("classifier") / "run"
    fastmae.finetune("digits", output_dir=folder, finetune=run, epochs=1, warmup_epochs=0, autotune="off")
    return folder


@pytest.fixture(scope="module")
def segmenter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("segmenter")
    made = shapes.make_shapes(np.arange(10), 32)
    for number, (image, classes) in enumerate(zip(made.images, made.maps, strict=True)):
        for kind, pixels in (("images", image), ("annotations", classes)):
            (folder / kind).mkdir(exist_ok=True)
            Image.fromarray(pixels).save(folder / kind / f"{number:02}.png")
    words = dict(model="mae_vit_tiny_patch4", input_size=32, patch_size=8, batch_size=4, epochs=1, warmup_epochs=0)
    fastmae.segment(folder, output_dir=folder / "run", autotune="off", classes=shapes.CLASSES, **words)
    return folder / "run"


def png() -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (20, 20), np.uint8)).save(file, "PNG")
    return file.getvalue()


def reachable() -> set[str]:
    """The sockets of this machine that listen beyond 127.0.0.1."""
    lines = [line.split() for name in ("tcp", "tcp6") for line in Path("/proc/net", name).read_text().splitlines()[1:]]
    here = ("0100007F", "0000000000000000FFFF00000100007F", "00000000000000000000000001000000")
    return {line[1] for line in lines if line[3] == LISTENING and not line[1].startswith(here)}


class Service(NamedTuple):
    process: subprocess.Popen[str]
    first_line: str


@pytest.fixture
def service(request: pytest.FixtureRequest) -> Iterator[Service]:
    """What is started by a tuple: the fixture with the run, and flags."""
    kind, *flags = request.param
    words = [sys.executable, "-m", "fastmae", "serve", str(request.getfixturevalue(kind)), "--port", str(PORT), *flags]
    pipes: dict[str, Any] = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process = subprocess.Popen(words, **pipes, env={**os.environ, "FASTMAE_TOKEN": TOKEN})
    try:
        assert process.stdout is not None
        first = process.stdout.readline()
        assert "a token is asked for; only this machine can reach it" in first, process.communicate()
        yield Service(process, first)
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            process.wait(60)


def client() -> httpx.Client:
    return httpx.Client(base_url=HERE, headers={"authorization": f"Bearer {TOKEN}"}, timeout=60)


@pytest.mark.parametrize("service", [("run", "--replicas", "2", "--cpus", "0.5")], indirect=True)
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
        families = {family.name: family for family in text_string_to_metric_families(ask.get("/metrics").text)}
        counted = {one.labels["status"]: one.value for one in families["fastmae_requests"].samples if one.value}
        assert counted["200"] == 6 + answers.count(200)  # of both replicas, the killed one too
        assert families["fastmae_requests_in_work"].samples[0].value == 0


@pytest.mark.parametrize("service", [("run",)], indirect=True)
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
    service.process.send_signal(signal.SIGTERM)
    for thread in threads:
        thread.join()
    assert set(answers) <= {200, 503}
    assert 200 in answers
    assert service.process.wait(60) == 0


ALREADY = reachable()


@pytest.mark.parametrize("service", [("run",)], indirect=True)
def test_a_run_of_pretraining_reconstructs_and_says_what_else_it_would_need(run, service):
    assert "answers: embed, reconstruct, inpaint;" in service.first_line
    model = fastmae.load_model(run)
    with client() as ask:
        said = ask.post("/v1/reconstruct?show=original", content=png())
        assert np.array_equal(
            np.asarray(Image.open(io.BytesIO(said.content)).convert("L")), model.preprocess(png())[..., 0]
        )
        for task, needed in (("search", "--index"), ("classify", "run of finetune"), ("segment", "fastmae segment")):
            refused = ask.post(f"/v1/{task}", content=png())
            assert refused.status_code == 404
            assert needed in refused.json()["error"]


@pytest.mark.parametrize("service", [("classifier",)], indirect=True)
def test_a_finetuned_head_tells_classes(classifier, service):
    assert "answers: embed, classify;" in service.first_line
    model = load_classifier(classifier)
    pixels = fastmae.load_model(classifier).preprocess(png())
    with torch.inference_mode():
        right = model(pixels[None]).float().softmax(1)[0]
    with client() as ask:
        said = ask.post("/v1/classify?k=10", content=png()).json()
        assert said["by"] == "classifier"
        assert [one["class"] for one in said["classes"]] == [str(n) for n in right.argsort(descending=True).tolist()]
        np.testing.assert_allclose([one["share"] for one in said["classes"]], right.sort(descending=True)[0], atol=2e-4)
        assert ask.post("/v1/reconstruct", content=png()).status_code == 404


@pytest.mark.parametrize("service", [("segmenter",)], indirect=True)
def test_a_run_of_segment_tells_the_class_of_each_pixel(segmenter, service):
    assert "answers: embed, segment;" in service.first_line
    image = shapes.make_shapes(np.arange(40, 41), 48).images[0][:40]
    file = io.BytesIO()
    Image.fromarray(image).save(file, "PNG")
    right = segment_picture(load_segmenter(segmenter), image)
    with client() as ask:
        found = Image.open(io.BytesIO(ask.post("/v1/segment", content=file.getvalue()).content))
        assert (found.mode, found.size) == ("P", (48, 40))
        assert (np.asarray(found) == right).mean() > 0.99  # where two classes are alike, rounding decides
        assert ask.get("/v1/model").json()["classes_of_pixels"] == list(shapes.CLASSES)
    service.process.send_signal(signal.SIGTERM)
    assert service.process.stderr is not None
    assert "left out" not in service.process.stderr.read()


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


def waited_for(what: Callable[[], bool], seconds: float = 90) -> bool:
    """Whether something comes true in time."""
    until = time.monotonic() + seconds
    while not (found := what()) and time.monotonic() < until:
        time.sleep(0.5)
    return found


def replicas() -> int:
    count = 0
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            count += b"ServeReplica:fastmae" in path.read_bytes()
    return count


SCALING = ("run", "--max_replicas", "2", "--target_requests", "2", "--cpus", "0.5")


@pytest.mark.parametrize("service", [SCALING], indirect=True)
def test_a_second_replica_comes_with_the_load(service):
    assert replicas() == 1
    statuses: list[int] = []
    is_over = threading.Event()

    def keep_asking() -> None:
        with client() as ask:
            while not is_over.is_set():
                statuses.append(ask.post("/v1/embed", content=png()).status_code)

    threads = [threading.Thread(target=keep_asking) for _ in range(8)]
    for thread in threads:
        thread.start()
    has_come = waited_for(lambda: replicas() == 2)
    time.sleep(5)  # it opens its model, and answers
    is_over.set()
    for thread in threads:
        thread.join()
    assert has_come
    assert set(statuses) == {200}


def answers(port: int) -> bool:
    try:
        return httpx.get(f"http://127.0.0.1:{port}/ready", timeout=5).status_code == 200
    except httpx.HTTPError:
        return False


def test_serve_deploy_and_serve_run_start_it_on_a_cluster(run, tmp_path):
    """A cluster of one machine, with a secret of its own. On it the file of the command, and then ``serve run``."""
    secret = tmp_path / "secret"
    secret.touch(0o600)
    secret.write_text("0123456789abcdef" * 4)
    own = dict(
        RAY_AUTH_MODE="token", RAY_AUTH_TOKEN_PATH=str(secret), RAY_USAGE_STATS_ENABLED="0",
        RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER="0",
    )  # fmt: skip
    ways: dict[str, Any] = dict(env={**os.environ, **own}, text=True)
    scripts = Path(sys.executable).parent
    started = ["start", "--head", "--block", "--node-ip-address", "127.0.0.1", "--port", "6398", "--num-cpus", "2"]
    started += ["--dashboard-host", "127.0.0.1", "--dashboard-port", "8278", "--object-store-memory", "100000000"]
    cluster = subprocess.Popen([scripts / "ray", *started], **ways, stdout=subprocess.DEVNULL)
    at = "127.0.0.1:6398"
    running = None
    try:
        path = tmp_path / "serve.yaml"
        assert main(["serve", str(run), "--max_replicas", "2", "--port", str(PORT), "--write", str(path)]) == 0
        deploy = [scripts / "serve", "deploy", "--address", "http://127.0.0.1:8278", path]
        assert waited_for(lambda: subprocess.run(deploy, **ways).returncode == 0)
        assert waited_for(lambda: answers(PORT))
        model = fastmae.load_model(run)
        right = model.features(model.preprocess(png())[None])[0].tolist()
        found = httpx.post(f"{HERE}/v1/embed", content=png()).json()["features"]
        np.testing.assert_allclose(found, right, rtol=1e-4, atol=1e-5)
        down = [scripts / "serve", "shutdown", "-y", "--address", "http://127.0.0.1:8278"]
        assert subprocess.run(down, **ways).returncode == 0
        assert waited_for(lambda: not answers(PORT))
        words = ["run", "--address", at, "fastmae.serve.deployment:application"]
        refused = subprocess.run(
            [scripts / "serve", *words, f"checkpoint={run}", "replicas=0"], **ways, capture_output=True
        )
        assert refused.returncode != 0
        assert "replicas=0: must be at least 1" in refused.stderr + refused.stdout
        running = subprocess.Popen([scripts / "serve", *words, f"checkpoint={run}", "max_replicas=2"], **ways)
        assert waited_for(lambda: answers(8000))
        found = httpx.post("http://127.0.0.1:8000/v1/embed", content=png()).json()["features"]
        np.testing.assert_allclose(found, right, rtol=1e-4, atol=1e-5)
    finally:
        for process in filter(None, (running, cluster)):
            process.terminate()
            process.wait(60)


def test_the_example_and_an_app_of_ones_own_are_taken_by_ray_serve(run, tmp_path):
    from ray.serve.schema import ServeDeploySchema

    from fastmae.serve.deployment import application

    said = yaml.safe_load((Path(__file__).parents[2] / "examples" / "serve.yaml").read_text())
    ServeDeploySchema.model_validate(said)
    args = said["applications"][0]["args"]
    scaling = application(args)._bound_deployment._deployment_config.autoscaling_config
    assert (scaling.min_replicas, scaling.max_replicas, scaling.target_ongoing_requests) == (1, 8, 8)
    (tmp_path / "own.py").write_text(
        f"from fastmae.serve.deployment import application\napp = application({{'checkpoint': {str(run)!r}}})\n"
    )
    words = [
        Path(sys.executable).parent / "serve",
        "build",
        "--app-dir",
        tmp_path,
        "own:app",
        "-o",
        tmp_path / "x.yaml",
    ]
    subprocess.run(words, check=True)
    ServeDeploySchema.model_validate(yaml.safe_load((tmp_path / "x.yaml").read_text()))
