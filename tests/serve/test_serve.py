"""The service answers what the model computes, and refuses what it must, each with its status and one line."""

from __future__ import annotations

import asyncio
import io
import os
import re
import socket
import struct
import subprocess
import sys
import threading
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import save_file

import fastmae
from fastmae.config import ServeConfig
from fastmae.config.serve import config_of, settings_of
from fastmae.data import shapes
from fastmae.errors import SettingError, UserError
from fastmae.evaluate.features import mark_of
from fastmae.evaluate.inpaint import Inpainting, inpaint_picture
from fastmae.evaluate.segment import segment_picture
from fastmae.model.build import classifier_of
from fastmae.model.segmenter import segmenter_of
from fastmae.serve.answers import Ask, Service, open_index, open_service
from fastmae.serve.batches import in_batches
from fastmae.serve.uploads import is_token, read_token

pytest.importorskip("fastapi")
from prometheus_client.parser import text_string_to_metric_families
from starlette.testclient import TestClient

from fastmae.serve.app import Answer, alone, make_app

TOKEN = "0123456789abcdef-token"


def png(height: int = 40, width: int = 30, seed: int = 0, **options: Any) -> bytes:
    rng = np.random.default_rng(seed)
    file = io.BytesIO()
    Image.fromarray(rng.integers(0, 255, (height, width, 3), np.uint8)).save(
        file, options.pop("format", "PNG"), **options
    )
    return file.getvalue()


def white(height: int, width: int, rows: int) -> bytes:
    mask = np.zeros((height, width), np.uint8)
    mask[:rows] = 255
    file = io.BytesIO()
    Image.fromarray(mask).save(file, "PNG")
    return file.getvalue()


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def bomb(side: int) -> bytes:
    """A PNG of few bytes that claims side² pixels, and holds them all, black."""
    rows = zlib.compress(bytes(side // 8 + 1) * min(side, 4096), 9)
    header = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


@pytest.fixture(scope="module")
def model() -> Any:
    torch.manual_seed(0)
    return fastmae.mae_vit_tiny_patch4(img_size=16, in_chans=3).eval()


def served(model: Any, tmp_path: Path | None = None, has_decoder: bool = True, **settings: Any) -> Service:
    config = ServeConfig(checkpoint="x", **settings)
    index = None if config.index is None else open_index(config.index, mark_of(model, config.pool))
    return Service(config, model, has_decoder, None, (), index)


def client_of(service: Service, answer: Answer | None = None, **options: Any) -> TestClient:
    return TestClient(make_app(service, answer or alone(service), **options), raise_server_exceptions=False)


@pytest.fixture(scope="module")
def client(model: Any) -> TestClient:
    return client_of(served(model, max_bytes=100_000, max_pixels=10_000))


@pytest.fixture
def index(model: Any, tmp_path: Path) -> str:
    pixels = model.preprocess.batch([png(seed=seed) for seed in range(6)])
    with torch.no_grad():
        features = model.features(pixels).numpy()
    names = np.array([f"{seed}.png" for seed in range(6)])
    words = dict(features=features, names=names, classes=np.array(["even", "odd"] * 3))
    np.savez(tmp_path / "index.npz", **words, mark=mark_of(model, "mean").numpy())
    return str(tmp_path / "index.npz")


def test_features_are_those_of_the_model_bit_for_bit_by_body_and_by_form(client, model):
    data = png()
    with torch.no_grad():
        right = model.features(model.preprocess(data)[None])[0].tolist()
    by_body = client.post("/v1/embed", content=data)
    by_form = client.post("/v1/embed", files={"image": ("../../../etc/pass\nwd\x1b[31m", data, "text/html")})
    assert by_body.status_code == by_form.status_code == 200
    assert by_body.json() == by_form.json() == {"pool": "mean", "features": right}


def test_a_batch_answers_each_as_if_it_were_alone(model):
    service = served(model)
    pixels = [model.preprocess(png(seed=seed)).numpy() for seed in range(5)]
    asks = [
        Ask("embed", pixels[0]), Ask("reconstruct", pixels[1], seed=3), Ask("embed", pixels[2]),
        Ask("reconstruct", pixels[3], seed=4), Ask("reconstruct", pixels[4], seed=3, mask_ratio=0.5),
    ]  # fmt: skip
    together, apart = service.answer(asks), [service.answer([ask])[0] for ask in asks]
    for one, other, ask in zip(together, apart, asks, strict=True):
        if ask.task == "embed":
            np.testing.assert_allclose(one["features"], other["features"], rtol=1e-4, atol=1e-5)
        else:
            pictures = [np.asarray(Image.open(io.BytesIO(data))).astype(int) for data in (one, other)]
            assert abs(pictures[0] - pictures[1]).max() <= 1  # a level, where rounding falls the other way


def numbered(count: int) -> list[Ask]:
    return [Ask("embed", np.zeros((1, 1, 1), np.uint8), seed=number) for number in range(count)]


def test_what_waits_is_computed_together_and_each_gets_its_own_answer():
    sizes: list[int] = []
    go = threading.Event()

    def compute(asks: Any) -> list[int]:
        go.wait(30)
        return [ask.seed for ask in asks]

    async def all_at_once() -> list[int]:
        answer = in_batches(compute, 4, 0.0, sizes.append)
        first = asyncio.create_task(answer(numbered(1)[0]))
        await asyncio.sleep(0.05)  # it is in work, and waits for nobody
        others = [asyncio.create_task(answer(ask)) for ask in numbered(10)]
        await asyncio.sleep(0)
        others[5].cancel()  # as a request whose time is over
        go.set()
        return await asyncio.gather(first, *others[:5], *others[6:])

    assert asyncio.run(all_at_once()) == [0, 0, 1, 2, 3, 4, 6, 7, 8, 9]
    assert sizes == [1, 4, 3, 2]


def test_a_batch_waits_for_as_many_as_the_last_one_held_and_who_is_alone_does_not():
    sizes: list[int] = []

    async def in_turns() -> list[int]:
        answer = in_batches(lambda asks: [ask.seed for ask in asks], 3, 30.0, sizes.append)
        asks = numbered(9)
        alone = [await answer(ask) for ask in asks[:2]]  # with a wait of 30 seconds
        together = await asyncio.gather(*map(answer, asks[2:5]))
        tasks = []
        for ask in asks[5:8]:  # each comes a moment later
            tasks.append(asyncio.create_task(answer(ask)))
            await asyncio.sleep(0.005)
        return [*alone, *together, *await asyncio.gather(*tasks)]

    assert asyncio.run(asyncio.wait_for(in_turns(), 20)) == list(range(8))
    assert sizes == [1, 1, 3, 3]

    async def after_many() -> int:
        answer = in_batches(lambda asks: [ask.seed for ask in asks], 3, 0.01, sizes.append)
        await asyncio.gather(*map(answer, numbered(3)))
        return await answer(numbered(3)[2])  # it waits once, not for ever

    assert asyncio.run(asyncio.wait_for(after_many(), 20)) == 2
    assert sizes[4:] == [3, 1]


def test_one_that_fails_takes_no_other_of_its_batch_with_it():
    def compute(asks: Any) -> list[int]:
        if any(ask.seed == 2 for ask in asks):
            raise RuntimeError("2 cannot be answered")
        return [ask.seed for ask in asks]

    async def all_at_once() -> list[Any]:
        answer = in_batches(compute, 8, 0.0)
        return await asyncio.gather(*map(answer, numbered(5)), return_exceptions=True)

    first = asyncio.run(all_at_once())
    assert [one for one in first if not isinstance(one, RuntimeError)] == [0, 1, 3, 4]
    assert isinstance(first[2], RuntimeError)


def test_search_finds_the_image_itself_first_and_its_class(model, index):
    client = client_of(served(model, index=index))
    found = client.post("/v1/search?k=3", content=png(seed=4)).json()["found"]
    assert [len(found), found[0]["name"], found[0]["class"]] == [3, "4.png", "even"]
    assert found[0]["cosine"] == pytest.approx(1, abs=1e-3)
    said = client.post("/v1/classify", content=png(seed=4)).json()
    assert {one["class"] for one in said["classes"]} == {"even", "odd"}
    assert sum(one["share"] for one in said["classes"]) == pytest.approx(1, abs=1e-3)


def test_a_reconstruction_keeps_visible_pixels_and_follows_from_its_seed(client, model):
    ask = "/v1/reconstruct?mask_ratio=0.5&show={}&seed={}"
    pictures = {
        name: np.asarray(Image.open(io.BytesIO(client.post(ask.format(name, 1), content=png()).content)))
        for name in ("original", "masked", "reconstructed")
    }
    assert np.array_equal(pictures["original"], model.preprocess(png()).numpy())
    visible = (pictures["masked"] == pictures["original"]).all(-1)
    assert 0.4 < visible.mean() < 0.6
    assert np.array_equal(pictures["reconstructed"][visible], pictures["original"][visible])
    again, other = (client.post(ask.format("masked", seed), content=png()).content for seed in (1, 2))
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(again))), pictures["masked"])
    assert not np.array_equal(np.asarray(Image.open(io.BytesIO(other))), pictures["masked"])


def test_inpainting_changes_only_what_the_mask_touches(client, model):
    files = {"image": png(32, 32), "mask": white(32, 32, 12)}
    answer = client.post("/v1/inpaint", files=files)
    filled, original = np.asarray(Image.open(io.BytesIO(answer.content))), model.preprocess(png(32, 32)).numpy()
    changed = (filled != original).any(-1)
    assert changed[:4].any()
    assert not changed[8:].any()


def test_a_whole_picture_is_filled_where_the_mask_is_white_and_nowhere_else(client, model):
    picture, hole = png(40, 30, seed=3), white(40, 30, 12)
    pixels = np.asarray(Image.open(io.BytesIO(picture)))
    files = {"image": picture, "mask": hole}
    answer = client.post("/v1/inpaint?show=whole&rounds=2&seed=5", files=files)
    filled = np.asarray(Image.open(io.BytesIO(answer.content)))
    assert filled.shape == pixels.shape
    assert np.array_equal(filled[12:], pixels[12:])
    masked = np.asarray(Image.open(io.BytesIO(hole))) > 0
    right = inpaint_picture(model, pixels, masked, Inpainting(model.usual_ratio, 2, seed=5))
    assert np.array_equal(filled, right)
    refused = {
        413: [client.post("/v1/inpaint?show=whole&rounds=32", files={"image": png(96, 96), "mask": white(96, 96, 90)})],
        400: [
            client.post("/v1/inpaint?show=whole", files={"image": picture, "mask": white(40, 30, 40)}),
            client.post("/v1/inpaint?show=whole", files={"image": picture, "mask": white(40, 30, 0)}),
            client.post("/v1/inpaint?show=whole", files={"image": picture, "mask": white(30, 30, 9)}),
            client.post("/v1/inpaint?show=whole", files={"image": picture, "mask": b"no picture"}),
            client.post("/v1/inpaint?show=whole", files={"image": png(64, 64), "mask": white(64, 64, 40)}),
        ],
        422: [client.post("/v1/inpaint?show=whole&rounds=99", files=files)],
    }
    for status, answers in refused.items():
        for one in answers:
            assert one.status_code == status, one.text
            assert "\n" not in one.json()["error"]


HOSTILE = {
    "nothing": (b"", 400),
    "text": (b"hello, this is no image", 400),
    "a web page": (b"<!doctype html><html></html>", 400),
    "a truncated PNG": (png()[:1500], 400),
    "a truncated JPEG": (png(format="JPEG")[:900], 400),
    "zeros": (bytes(50_000), 400),
    "a bomb": (bomb(60_000), 413),
    "a JPEG of a damaged size": (b"\xff\xd8\xff\xc0\x00\x11\x08\xff\xff\xff\xff\x03" + bytes(20), 413),
    "many pixels": (png(101, 101), 413),
    "an array": (b"\x93NUMPY" + bytes(100), 400),
    "a zip": (b"PK\x03\x04" + bytes(100), 400),
    "an SVG": (b"<svg xmlns='http://www.w3.org/2000/svg'><image href='file:///etc/passwd'/></svg>", 400),
    "PostScript": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", 400),
    "80,000 lines of a header": (b"P6\n" + b"# x\n" * 20_000 + b"4 4\n255\n", 400),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_what_is_no_usable_image_is_refused_in_one_line(client, name):
    data, status = HOSTILE[name]
    answer = client.post("/v1/embed", content=data)
    assert (answer.status_code, "\n" in answer.json()["error"]) == (status, False), answer.text


def test_requests_that_mean_nothing_are_refused(client):
    post = client.post
    form = {"image": png(32, 32), "mask": white(32, 32, 12)}
    refused = {
        404: [
            post("/v1/search", content=png()), post("/v1/classify", content=png()), post("/v1/nothing"),
            client.get("/../x"),
        ],
        431: [post("/v1/embed", content=png(), headers={f"x-{n}": "y" for n in range(200)})],
        405: [client.get("/v1/embed"), client.delete("/v1/embed")],
        413: [post("/v1/embed", content=bytes(100_001)), post("/v1/embed", files={"image": bytes(100_001)})],
        415: [
            post("/v1/embed", json={"image": "x"}),
            post("/v1/embed", content=b"x", headers={"content-type": "text/csv"}),
            post("/v1/inpaint", content=png()),
        ],
        422: [
            post("/v1/reconstruct?mask_ratio=1", content=png()),
            post("/v1/reconstruct?mask_ratio=0.999", content=png()),
            post("/v1/reconstruct?seed=-1", content=png()),
            post("/v1/reconstruct?show=x", content=png()),
        ],
        400: [
            post("/v1/embed", data={"image": "x"}),
            post("/v1/embed", files={"picture": png()}), post("/v1/inpaint", files={"image": png()}),
            post("/v1/inpaint", files=form | {"mask": white(32, 30, 12)}),
            post("/v1/inpaint", files=form | {"mask": white(32, 32, 0)}),
            post("/v1/inpaint", files=form | {"mask": white(32, 32, 32)}),
            post("/v1/inpaint", files=form | {"mask": b"no picture"}),
            post("/v1/embed", files=[("image", png())] * 9),
            post("/v1/embed", content=b"x", headers={"content-type": "multipart/form-data"}),
            post("/v1/embed", content=b"x", headers={"content-type": "multipart/form-data; boundary=y"}),
        ],
    }  # fmt: skip
    for status, answers in refused.items():
        for answer in answers:
            assert answer.status_code == status, (status, answer.request.url, answer.text)
            assert answer.json()["error"]


def test_a_form_with_thousands_of_headers_is_refused(client):
    lines = b"".join(b"x-%d: y\r\n" % n for n in range(5_000))
    body = (
        b'--b\r\nContent-Disposition: form-data; name="image"; filename="x"\r\n'
        + lines
        + b"\r\n"
        + png()
        + b"\r\n--b--\r\n"
    )
    answer = client.post("/v1/embed", content=body, headers={"content-type": "multipart/form-data; boundary=b"})
    assert answer.status_code == 400


def test_a_body_without_a_length_is_cut_at_the_limit(client):
    sent = []

    def pieces() -> Iterator[bytes]:
        for number in range(1000):
            sent.append(number)
            yield bytes(10_000)

    assert client.post("/v1/embed", content=pieces()).status_code == 413


def test_only_the_right_token_is_let_in(model):
    client = client_of(served(model), token=TOKEN)
    given = {None: 401, "": 401, TOKEN[:-1]: 401, TOKEN + "x": 401, TOKEN.upper(): 401, TOKEN: 200}
    for token, status in given.items():
        headers = {} if token is None else {"authorization": f"Bearer {token}"}
        assert client.post("/v1/embed", content=png(), headers=headers).status_code == status, token
        assert client.get("/v1/model", headers=headers).status_code == status
        assert client.get("/metrics", headers=headers).status_code == status
    assert client.post("/v1/embed", content=png(), headers={"authorization": f"Basic {TOKEN}"}).status_code == 401
    for path in ("/health", "/ready", "/", "/openapi.json"):
        assert client.get(path).status_code == 200
    assert not is_token("é\udcff", TOKEN)


def test_without_a_token_only_this_machine_is_answered_wherever_http_listens(model):
    """As in a file for ``serve deploy`` that somebody wrote by hand."""
    for address, status in {"127.0.0.1": 200, "::1": 200, "::ffff:127.0.0.1": 200, "10.0.0.7": 403, "::7": 403}.items():
        client = TestClient(make_app(served(model), alone(served(model))), client=(address, 5000))
        assert client.get("/v1/model").status_code == client.get("/metrics").status_code == status, address
        assert client.get("/health").status_code == 200
    app = make_app(served(model), alone(served(model)), token=TOKEN)
    headers = {"authorization": f"Bearer {TOKEN}"}
    assert TestClient(app, client=("10.0.0.7", 5000)).get("/v1/model", headers=headers).status_code == 200


def test_a_wrong_token_is_told_before_the_upload_is_read(model):
    """Otherwise anybody could make the service hold their bytes."""
    read = []
    app = make_app(served(model), alone(served(model)), token=TOKEN)

    async def receive() -> dict[str, Any]:
        read.append(1)
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: Any) -> None:
        said.append(message)

    said: list[Any] = []
    scope = {
        "type": "http", "method": "POST", "path": "/v1/embed", "raw_path": b"/v1/embed", "query_string": b"",
        "headers": [], "http_version": "1.1", "scheme": "http", "server": ("x", 1), "client": ("y", 2), "root_path": "",
    }  # fmt: skip
    asyncio.run(app(scope, receive, send))
    assert said[0]["status"] == 401
    assert not read


def test_too_many_requests_and_slow_ones_are_told_so(model):
    begun, go = threading.Event(), threading.Event()

    async def wait(ask: Ask) -> Any:
        begun.set()
        await asyncio.to_thread(go.wait, 30)
        return {}

    answers = []
    client = client_of(served(model, max_requests=1), wait)
    with client:
        first = threading.Thread(target=lambda: answers.append(client.post("/v1/embed", content=png())))
        first.start()
        begun.wait(30)
        busy = client.post("/v1/embed", content=png())
        assert (busy.status_code, busy.headers["retry-after"]) == (503, "1")
        assert client.get("/health").status_code == 200
        go.set()
        first.join()
    assert answers[0].status_code == 200

    async def never(ask: Ask) -> Any:
        await asyncio.sleep(1000)

    slow = client_of(served(model, timeout=0.05), never).post("/v1/embed", content=png())
    assert slow.status_code == 504


def test_a_service_that_stops_is_not_ready_and_takes_nothing_new(model):
    client = client_of(served(model), is_stopping=lambda: True)
    assert [client.get("/ready").status_code, client.post("/v1/embed", content=png()).status_code] == [503, 503]
    assert client.get("/health").status_code == 200


def test_an_error_of_the_model_is_one_line_without_its_details(model):
    async def fail(ask: Ask) -> Any:
        raise RuntimeError("a secret of the inside")

    answer = client_of(served(model), fail).post("/v1/embed", content=png())
    assert answer.status_code == 500
    assert "secret" not in answer.text


def test_prometheus_reads_what_was_answered_and_refused(model):
    client = client_of(served(model))
    client.post("/v1/embed", content=png())
    client.post("/v1/embed", content=b"x")
    client.post("/v1/" + "x" * 99, content=b"x")
    text = client.get("/metrics").text
    for line in (
        'fastmae_requests_total{status="200",task="embed"} 1.0',
        'fastmae_requests_total{status="400",task="embed"} 1.0',
        'fastmae_requests_total{status="404",task="other"} 1.0', 'fastmae_request_seconds_count{task="embed"} 2.0',
        "fastmae_requests_in_work 0.0",
    ):  # fmt: skip
        assert line in text, text


def test_what_a_killed_replica_had_in_work_is_in_work_no_more(tmp_path):
    program = (
        "import os; os.environ['PROMETHEUS_MULTIPROC_DIR'] = os.getcwd();"
        "from fastmae.serve.metrics import Metrics; metrics = Metrics(); metrics.in_work.inc();"
        "print(metrics.text().decode())"
    )
    for _ in range(2):
        text = subprocess.run(
            [sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=True
        ).stdout
        assert "fastmae_requests_in_work 1.0" in text, text


def test_alerts_name_figures_that_there_are(model):
    """Those of the page, and what Prometheus reads, parsed as Prometheus does."""
    page = (Path(__file__).parents[2] / "docs" / "serving.md").read_text()
    text = next(text for text in re.findall(r"```yaml\n(.*?)```", page, re.DOTALL) if "alert:" in text)
    rules = [rule for group in yaml.safe_load(text)["groups"] for rule in group["rules"]]
    client = client_of(served(model))
    client.post("/v1/embed", content=png())
    answer = client.get("/metrics")
    assert answer.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    families = list(text_string_to_metric_families(answer.text))
    assert {(family.name, family.type) for family in families} >= {
        ("fastmae_requests", "counter"), ("fastmae_request_seconds", "histogram"),
        ("fastmae_requests_in_work", "gauge"), ("fastmae_batch_images", "histogram"),
    }  # fmt: skip
    assert all(family.documentation for family in families)
    labels: dict[str, set[str]] = {}
    for sample in (sample for family in families for sample in family.samples):
        labels.setdefault(sample.name, set()).update(sample.labels)
    assert len(rules) == 4
    for rule in rules:
        assert set(rule) == {"alert", "expr", "for", "annotations"}
        asked = re.findall(r"(fastmae_\w+)(?:\{(\w+)[=!]~?\"[^\"]*\"\})?", rule["expr"])
        assert asked
        for name, label in asked:
            assert name in labels, name
            assert not label or label in labels[name], (name, label)
        assert "by (le)" not in rule["expr"] or "le" in labels[asked[0][0]]
    named = set(re.findall(r"`(fastmae_\w+)(?:\{[\w,]+\})?`", page))
    assert named <= labels.keys() | {family.name for family in families}


def test_the_interface_is_described_and_the_page_asks_nobody_else(client):
    described = client.get("/openapi.json").json()
    assert {"/v1/embed", "/v1/search", "/v1/classify", "/v1/reconstruct", "/v1/inpaint", "/health", "/ready"} <= {
        *described["paths"]
    }
    assert described["components"]["securitySchemes"]
    page = client.get("/")
    assert "//" not in page.text.replace("<!doctype", "").replace("http://www.w3", "").split("<script>")[0]
    assert "default-src 'none'" in page.headers["content-security-policy"]


# --- settings ---------------------------------------------------------------------------------------------------------


def test_nobody_else_reaches_a_service_without_a_token(tmp_path, monkeypatch):
    monkeypatch.delenv("FASTMAE_TOKEN", raising=False)
    for host in ("127.0.0.1", "localhost", "::1", "127.8.8.8"):
        assert read_token(ServeConfig(checkpoint="x", host=host)) is None
    for host in ("0.0.0.0", "::", "10.0.0.1", "example.org", "127.0.0.1.example.org"):
        with pytest.raises(SettingError, match="needs a token"):
            read_token(ServeConfig(checkpoint="x", host=host))
    (tmp_path / "token").write_text(f"{TOKEN}\n")
    assert read_token(ServeConfig(checkpoint="x", host="::", token_file=str(tmp_path / "token"))) == TOKEN
    monkeypatch.setenv("FASTMAE_TOKEN", TOKEN + "2")
    assert read_token(ServeConfig(checkpoint="x", host="::")) == TOKEN + "2"
    for wrong in ("", "short", "ä" * 20, "with a space in it"):
        monkeypatch.setenv("FASTMAE_TOKEN", wrong)
        with pytest.raises(UserError, match="at least 16"):
            read_token(ServeConfig(checkpoint="x"))
    with pytest.raises(UserError, match="cannot be read"):
        read_token(ServeConfig(checkpoint="x", token_file=str(tmp_path / "nowhere")))


@pytest.mark.parametrize(
    "settings",
    [
        {"port": 0}, {"port": 65536}, {"replicas": 0}, {"replicas": 3, "max_replicas": 2}, {"max_batch": 0},
        {"batch_wait_ms": -1}, {"max_bytes": 0}, {"max_pixels": 0}, {"timeout": 0}, {"drain": -1}, {"cpus": 0},
        {"max_replicas": 2, "max_requests": 7, "target_requests": 8}, {"target_requests": 0},
        {"index": "x.csv"}, {"write": "x.json"}, {"host": ""}, {"pool": "tokens"},
    ],
)  # fmt: skip
def test_settings_that_cannot_work_are_refused_by_name(settings):
    with pytest.raises(SettingError, match=next(reversed(settings))):
        ServeConfig(checkpoint="x", **settings)


def test_a_replica_makes_the_same_settings_from_what_it_is_told():
    config = ServeConfig(checkpoint="x", port=9000, mean=(0.5,), write="x.yaml", max_replicas=3)
    told = settings_of(config)
    assert told == {"checkpoint": "x", "port": 9000, "mean": (0.5,), "max_replicas": 3}
    assert settings_of(ServeConfig(**told)) == told


def test_words_of_serve_run_become_settings():
    """They are texts, as ``serve run`` knows no types."""
    told = {"checkpoint": "7", "port": "9000", "mean": "[0.5]", "max_replicas": "3", "batch_wait_ms": "2", "cpus": 0.5}
    right = ServeConfig(
        checkpoint="7", port=9000, mean=(0.5,), max_replicas=3, batch_wait_ms=2, cpus=0.5
    )  # fmt: skip
    assert config_of(told) == right
    wrong = {"port": "many", "prt": "1", "replicas": "0", "timeout": "[: ", "token_file": 3}
    for name, value in wrong.items():
        with pytest.raises(SettingError, match=name):
            config_of({"checkpoint": "x", name: value})
    with pytest.raises(SettingError, match="checkpoint: must be given"):
        config_of({})


def test_an_index_of_another_model_or_pool_is_refused(model, index, tmp_path, caplog):
    mark = mark_of(model, "mean")
    assert len(open_index(index, mark).names) == 6
    open_index(index, mark * 1.01)  # as on a machine that rounds otherwise
    torch.manual_seed(1)
    other = fastmae.mae_vit_tiny_patch4(img_size=16, in_chans=3).eval()
    for wrong in (mark_of(other, "mean"), mark_of(model, "cls")):
        with pytest.raises(SettingError, match="holds features of another model"):
            open_index(index, wrong)
    with pytest.raises(SettingError, match="holds features of"):
        open_index(index, mark_of(model, "both"))
    for content in (b"", b"PK\x03\x04no", os.urandom(300)):
        (tmp_path / "wrong.npz").write_bytes(content)
        with pytest.raises(SettingError, match="cannot be read"):
            open_index(str(tmp_path / "wrong.npz"), mark)
    np.savez(tmp_path / "wrong.npz", features=np.array([{}], dtype=object), names=np.array(["x"]))
    with pytest.raises(SettingError, match="cannot be read"):
        open_index(str(tmp_path / "wrong.npz"), mark)
    assert not caplog.records
    np.savez(tmp_path / "old.npz", features=np.ones((2, len(mark)), np.float32), names=np.array(["x", "y"]))
    open_index(str(tmp_path / "old.npz"), mark)
    assert "does not say of which model it is" in caplog.text


def test_a_token_that_everybody_can_read_is_told(tmp_path, caplog):
    file = tmp_path / "token"
    file.write_text(TOKEN)
    file.chmod(0o600)
    config = ServeConfig(checkpoint="x", token_file=str(file))
    assert read_token(config) == TOKEN
    assert not caplog.records
    file.chmod(0o644)
    assert read_token(config) == TOKEN
    assert "every user of this machine can read the token" in caplog.text


def test_the_command_says_what_it_lacks(refusal, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    assert "pip install 'fastmae[serve]'" in refusal(["serve", "x"])


def test_a_port_of_another_program_is_refused():
    from fastmae.commands.serve import _require_port

    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(SettingError, match=f"port={port}: cannot be listened at"):
            _require_port(ServeConfig(checkpoint="x", port=port))
    _require_port(ServeConfig(checkpoint="x", port=port))
    for host in ("192.0.2.77", "no.such.host.invalid"):
        with pytest.raises(SettingError, match=f"host='{host}': is no address of this machine"):
            _require_port(ServeConfig(checkpoint="x", host=host, port=port))


def test_a_segmenter_tells_the_class_of_each_pixel_of_a_picture_of_any_size(model: Any) -> None:
    segmenter = segmenter_of(model, 3, "linear").eval()
    service = Service(ServeConfig(checkpoint="x"), model, False, None, ("ground", "tree", "sky"), None, segmenter)
    assert service.tasks == ("embed", "segment")
    client, picture = client_of(service), png(40, 30)
    pixels = np.asarray(Image.open(io.BytesIO(picture)))
    answer = client.post("/v1/segment", content=picture)
    assert answer.status_code == 200
    found = Image.open(io.BytesIO(answer.content))
    assert (found.mode, found.size) == ("P", (30, 40))
    assert np.array_equal(np.asarray(found), segment_picture(segmenter, pixels))
    over = Image.open(io.BytesIO(client.post("/v1/segment?show=overlay", content=picture).content))
    assert (over.mode, over.size) == ("RGB", (30, 40))
    assert client.post("/v1/segment?show=other", content=picture).status_code == 422
    assert client.post("/v1/segment", content=png(400, 20)).status_code == 413
    assert client.post("/v1/segment", content=picture[:60]).status_code == 400
    assert client.get("/v1/model").json()["classes_of_pixels"] == ["ground", "tree", "sky"]
    refused = client_of(served(model)).post("/v1/segment", content=picture)
    assert refused.status_code == 404
    assert "serve a run of fastmae segment" in refused.json()["error"]


def test_a_run_of_segment_is_opened_with_its_head_and_its_own_pixels(tmp_path: Path, caplog: Any) -> None:
    made = shapes.make_shapes(np.arange(5), 16)
    for number, (image, classes) in enumerate(zip(made.images, made.maps, strict=True)):
        for kind, pixels in (("images", image), ("maps", classes)):
            (tmp_path / kind).mkdir(exist_ok=True)
            Image.fromarray(pixels).save(tmp_path / kind / f"{number}.png")
    words: dict[str, Any] = dict(model="mae_vit_tiny_patch4", input_size=16, patch_size=8, batch_size=4, epochs=1)
    fastmae.segment(tmp_path, output_dir=tmp_path / "run", warmup_epochs=0, autotune="off", device="cpu", **words)
    caplog.clear()
    service = open_service(ServeConfig(checkpoint=str(tmp_path / "run"), device="cpu"))
    assert service.tasks == ("embed", "segment")
    assert "left out" not in caplog.text
    with pytest.raises(SettingError, match=r"input_size.*must be left out for a run of segment"):
        open_service(ServeConfig(checkpoint=str(tmp_path / "run"), device="cpu", input_size=32))
    fastmae.load_model(tmp_path / "run")
    assert "its head of 5 classes of pixels is left out" in caplog.text


def test_a_classifier_is_of_the_size_that_is_asked_for(model: Any, tmp_path: Path) -> None:
    save_file(classifier_of(model, 3).state_dict(), tmp_path / "classifier.safetensors")
    words: dict[str, Any] = dict(checkpoint=str(tmp_path / "classifier.safetensors"), num_heads=4, device="cpu")
    service = open_service(ServeConfig(**words, input_size=32))
    assert service.tasks == ("embed", "classify")
    said = client_of(service).post("/v1/classify", content=png()).json()
    assert [one["class"] for one in said["classes"]] != []
    assert sum(one["share"] for one in said["classes"]) == pytest.approx(1, abs=1e-3)
