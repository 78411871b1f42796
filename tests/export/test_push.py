"""`fastmae push` writes a folder that transformers opens, describes it, and uploads it only where that is asked."""

from __future__ import annotations

import json
import re
import shutil
import socket
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
import yaml
from run_folders import write_run

from fastmae.checkpoint.load import Opened
from fastmae.cli import main
from fastmae.commands import push as push_module
from fastmae.config import PushConfig
from fastmae.errors import SettingError
from fastmae.export.card import model_card
from fastmae.model.presets import mae_vit_tiny_patch4
from fastmae.report.run_folder import read_run

SETTINGS = {"mask_ratio": 0.5, "norm_pix_loss": True, "input_size": 16, "mean": [0.1], "std": [0.7], "seed": 3}
SETTINGS |= {"data_path": "/secret/photos", "output_dir": "/secret/run", "lr": 1.5e-4, "dataset_length": 1438}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run folder with one official file."""
    torch.manual_seed(0)
    model = mae_vit_tiny_patch4(img_size=16, in_chans=1, norm_pix_loss=True, mean=[0.1], std=[0.7])
    for parameter in model.parameters():
        parameter.data += 0.02 * torch.randn_like(parameter)
    folder = write_run(tmp_path_factory.mktemp("push") / "run", epochs=3, steps=2, **SETTINGS)
    args = {"model": "mae_vit_tiny_patch4", **SETTINGS}
    torch.save({"model": model.state_dict(), "epoch": 2, "args": args}, folder / "checkpoint-2.pth")
    return folder / "checkpoint-2.pth"


@pytest.fixture(autouse=True)
def _offline(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secretsecret")


def front_of(text):
    _, front, rest = text.split("---\n", 2)
    return yaml.safe_load(front), rest


def test_the_folder_has_the_model_its_card_facts_and_picture(run, tmp_path, capsys):
    folder = tmp_path / "mae-digits"
    assert main(["push", str(run), str(folder), "--license", "mit"]) == 0
    said = capsys.readouterr().out
    assert "the encoder and decoder for ViTMAEForPreTraining, with its card" in said
    assert float(re.search(r"differ by (\S+) of the largest", said)[1]) < 1e-5
    assert {path.name for path in folder.iterdir()} == {
        "model.safetensors", "config.json", "preprocessor_config.json", "README.md", "training.json",
        "reconstructions.png",
    }  # fmt: skip
    front, card = front_of((folder / "README.md").read_text())
    assert front["license"] == "mit"
    assert front["pipeline_tag"] == "image-feature-extraction"
    assert {"mae", "fastmae"} <= set(front["tags"])
    assert "# mae-digits" in card
    said = (
        "| images | 16×16 pixels, 1 channel |",
        "| `lr` | 0.00015 |",
        "| `dataset_length` | 1438 |",
        "| linear probe of the frozen encoder, on held-out images (%) | 62 |",
        "![Reconstructions](reconstructions.png)",
        "The licence of the weights is `mit`",
        "Trained with fastmae 0.1.0, torch 2.13.",
    )
    for line in said:
        assert line in card, line
    told = json.loads((folder / "training.json").read_text())
    assert told["settings"]["mask_ratio"] == 0.5
    assert told["figures"]["knn"] == 52
    assert not [path for path in folder.rglob("*") if b"secret" in path.read_bytes()]


def test_an_encoder_alone_is_for_vitmodel_and_a_licence_is_asked_for(run, tmp_path, capsys):
    assert main(["push", str(run), str(tmp_path / "encoder"), "--part", "encoder", "--name", "a name"]) == 0
    said = capsys.readouterr().out
    assert "the encoder for ViTModel, with its card" in said
    assert "no licence" not in said
    assert "licence         none is named" in said
    front, card = front_of((tmp_path / "encoder" / "README.md").read_text())
    assert "license" not in front
    assert "# a name" in card
    assert "No licence was named" in card
    assert "ViTModel.from_pretrained" in card


def test_what_transformers_computes_otherwise_is_not_written(run, tmp_path, refusal, monkeypatch):
    from fastmae.export import hf

    monkeypatch.setattr(hf, "EPS", 1e-3)
    line = refusal(["push", str(run), str(tmp_path / "wrong")])
    assert re.search(
        r"ViTMAEForPreTraining computes something else \(by \S+ of the largest\); nothing was written", line
    )
    assert list(tmp_path.iterdir()) == []


def test_figures_are_those_of_the_weights_that_are_shared(run, tmp_path, capsys):
    folder = run.parent
    for name in ("step-00000004", "step-00000006"):
        (folder / "checkpoints" / name).mkdir(parents=True)
    newest = ["", "checkpoint-2.pth", "checkpoint-2-ema.safetensors", "checkpoints/step-00000006"]
    earlier = ["checkpoint-0.pth", "checkpoints/step-00000004"]
    found = [push_module._run_of(folder / name) for name in newest + earlier]
    assert [is_newest for _, is_newest in found] == [True] * 4 + [False] * 2
    assert all(run is not None for run, _ in found)
    assert push_module._run_of(folder / "mine.pth") == push_module._run_of(tmp_path / "x" / "y") == (None, False)
    shutil.copy(run, folder / "checkpoint-1.pth")
    assert main(["push", str(folder / "checkpoint-1.pth"), str(tmp_path / "earlier"), "--part", "encoder"]) == 0
    assert f"figures         none, and no picture: what {folder} says of itself is of later" in capsys.readouterr().out
    assert "linear probe" not in (tmp_path / "earlier" / "README.md").read_text()


def test_what_transformers_has_no_class_for_is_for_export(run, tmp_path, refusal, monkeypatch):
    def refuse(*_):
        raise SettingError("to", "hf", "no registers; use --to=timm")

    monkeypatch.setattr(push_module, "save_for_transformers", refuse)
    line = refusal(["push", str(run), str(tmp_path / "x")])
    assert line == f"fastmae: {run}: no registers; use --to=timm, a flag of `fastmae export`"


def test_a_card_takes_anybodys_text_as_text():
    opened = Opened(mae_vit_tiny_patch4(img_size=16, in_chans=1), {}, True)
    evil = "x | <script>\n---\n\x1b[31m"
    card = model_card(evil, opened, "full", "ViTMAEForPreTraining", None, {"masking": evil}, {}, {"torch": evil}, None)
    assert card.count("x \\| &lt;script&gt;\\n---\\n\\x1b[31m") == 3
    assert "<script>" not in card
    assert len(card.split("---\n")) == 3


def test_what_a_run_says_of_itself_may_be_damaged(run, tmp_path, caplog):
    folder = write_run(tmp_path / "run", epochs=1, steps=1)
    (folder / "environment.jsonl").write_text('{"versions": ["torch"]}\n')
    (folder / "reconstructions" / "epoch-0007.png").symlink_to(run)
    config = PushConfig(checkpoint=str(run), output=str(tmp_path / "out"))
    opened = Opened(mae_vit_tiny_patch4(img_size=16, in_chans=1), {}, True)
    (tmp_path / "out").mkdir()
    push_module._describe(tmp_path / "out", config, opened, "full", read_run(folder))
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"README.md", "training.json"}
    assert caplog.messages == [f"{folder}/reconstructions/epoch-0007.png: cannot be read (no picture), and left out"]


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--repo", "me"], "--repo me: must be USER/NAME"),
        (["--private"], "--private True: must be given together with --repo"),
        (["--license", "My own!"], "--license My own!: must be an identifier in small letters"),
        (["--licence", "mit"], "--licence: no such flag; did you mean --license?"),
    ],
)
def test_wrong_words_are_refused_before_anything_is_read(words, line, refusal):
    assert refusal(["push", "no-run", "dest", *words]).startswith(f"fastmae: {line}")


# --- the hub ----------------------------------------------------------------------------------------------------------


class Hub(BaseHTTPRequestHandler):
    """As much of the hub as an upload of small files asks for."""

    asked: list[tuple[str, bytes]]

    def log_message(self, *_):
        """Says nothing."""

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.asked.append((self.path, self.headers["Authorization"], body))
        if self.server.refuses:
            return self.answer(403, {"error": "You are not allowed to, hf_secretsecret"})
        if self.path == "/api/repos/create":
            return self.answer(200, {"url": f"{self.here}/me/digits", "id": "me/digits", "name": "me/digits"})
        if "/preupload/" in self.path:
            names = [file["path"] for file in json.loads(body)["files"]]
            files = [{"path": name, "uploadMode": "regular", "shouldIgnore": False, "oid": None} for name in names]
            return self.answer(200, {"files": files})
        if "/commit/" in self.path:
            url = f"{self.here}/me/digits/commit/1"
            return self.answer(200, {"commitOid": "1", "commitUrl": url, "hookOutput": "", "success": True})
        return self.answer(200, {})

    def do_GET(self):
        self.answer(200, {"id": "me/digits", "sha": "0", "siblings": [], "name": "me"})

    @property
    def here(self):
        return f"http://127.0.0.1:{self.server.server_port}"

    def answer(self, status, content):
        data = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


def at(endpoint, monkeypatch):
    """Names the hub, as the environment of a process does before the library is loaded."""
    monkeypatch.setenv("HF_ENDPOINT", endpoint)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", endpoint)


@pytest.fixture
def hub(monkeypatch):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.asked, server.refuses = [], False
    threading.Thread(target=server.serve_forever, daemon=True).start()
    at(f"http://127.0.0.1:{server.server_port}", monkeypatch)
    yield server
    server.shutdown()
    server.server_close()


def push(run, folder):
    return ["push", str(run), str(folder), "--part", "encoder", "--repo", "me/digits", "--private"]


def test_the_whole_folder_is_uploaded_where_that_is_asked(run, tmp_path, hub, capsys):
    assert main(push(run, tmp_path / "digits")) == 0
    said = capsys.readouterr()
    assert "uploaded        " in said.out
    assert "secret" not in said.out + said.err
    assert {authorization for _, authorization, _ in hub.asked} == {"Bearer hf_secretsecret"}
    created = json.loads(hub.asked[0][2])
    assert "private" in (created.get("visibility"), *created)  # of the library's versions, the newer or the older word
    (commit,) = [body for path, _, body in hub.asked if "/commit/" in path]
    rows = [json.loads(line) for line in commit.splitlines()]
    assert {row["value"]["path"] for row in rows if row["key"] == "file"} == {
        path.name for path in (tmp_path / "digits").iterdir()
    }


def test_a_hub_that_refuses_or_does_not_answer_is_one_line_without_the_token(run, tmp_path, hub, refusal, monkeypatch):
    hub.refuses = True
    line = refusal(push(run, tmp_path / "digits"))
    assert re.search(r"--repo me/digits: http://\S+ did not take it \(.*403", line)
    assert line.endswith(f"it is in {tmp_path / 'digits'}: `hf upload me/digits {tmp_path / 'digits'}`")
    assert "secret" not in line
    assert (tmp_path / "digits" / "model.safetensors").exists()
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        at(f"http://127.0.0.1:{unused.getsockname()[1]}", monkeypatch)
        assert "did not take it (ConnectError" in refusal(push(run, tmp_path / "again"))
