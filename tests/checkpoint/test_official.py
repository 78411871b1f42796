"""Official files: written so that the published tools read them, read whatever the published tools wrote."""

import argparse
import json
import pickle

import pytest
import torch
from helpers import metrics, small_run
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from fastmae.checkpoint.load import load_model
from fastmae.checkpoint.official import model_of_file, read_official
from fastmae.cli import main
from fastmae.errors import UserError
from fastmae.model.presets import mae_vit_tiny_patch4
from fastmae.train.optim import make_optimizer
from fastmae.train.pretrain import pretrain


@pytest.fixture(scope="module")
def finished(blobs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("official") / "run"
    assert pretrain(small_run(blobs, folder, epochs=2, ema=0.9)) == 0
    return folder


def published(model, optimizer):
    """A file as the published script writes it, with its Namespace."""
    args = argparse.Namespace(model="mae_vit_tiny_patch4", input_size=16, norm_pix_loss=True, lr=1e-3, output_dir="x")
    scaler = torch.amp.GradScaler("cpu").state_dict()
    return dict(model=model.state_dict(), optimizer=optimizer.state_dict(), epoch=3, scaler=scaler, args=args)


def test_our_file_loads_with_weights_only_and_has_the_published_keys(finished):
    content = torch.load(finished / "checkpoint-1.pth", weights_only=True)
    assert content.keys() == {"model", "optimizer", "epoch", "scaler", "args"}
    assert content["epoch"] == 1
    assert content["args"]["mask_ratio"] == 0.75
    torch.amp.GradScaler("cpu").load_state_dict(content["scaler"])
    model = mae_vit_tiny_patch4(img_size=16, in_chans=1)
    model.load_state_dict(content["model"], strict=True)
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [[p for p in parameters if p.ndim == 1], [p for p in parameters if p.ndim > 1]]
    theirs = torch.optim.AdamW([{"params": group} for group in groups])
    theirs.load_state_dict(content["optimizer"])
    assert all(theirs.state[p]["exp_avg"].shape == p.shape for p in parameters)


@pytest.mark.parametrize("name", ["checkpoint-0", "checkpoint-1", "checkpoint-1-ema"])
def test_beside_it_lie_its_weights_alone_without_a_pickle(finished, name):
    content = torch.load(finished / f"{name}.pth", weights_only=True)
    weights = load_file(finished / f"{name}.safetensors")
    assert weights.keys() == content["model"].keys()
    for key, tensor in content["model"].items():
        assert weights[key].dtype == torch.float32
        assert torch.equal(weights[key], tensor)
    with safe_open(finished / f"{name}.safetensors", "pt") as file:
        metadata = file.metadata()
    assert metadata.keys() == {"format", "epoch", "settings"}
    assert (metadata["format"], int(metadata["epoch"])) == ("pt", content["epoch"])
    assert json.loads(metadata["settings"]) == content["args"]


def test_weights_alone_are_taken_where_the_training_file_is(blobs, finished, tmp_path, monkeypatch, capsys):
    alone, whole = (str(finished / f"checkpoint-1.{suffix}") for suffix in ("safetensors", "pth"))
    torch.save({"model": torch.load(whole, weights_only=True)["model"]}, tmp_path / "weights.pth")
    for source, folder in ((alone, "a"), (str(tmp_path / "weights.pth"), "b")):
        assert pretrain(small_run(blobs, tmp_path / folder, epochs=1, resume=source)) == 0
    assert metrics(tmp_path / "a") == metrics(tmp_path / "b")
    assert metrics(tmp_path / "a")[0][0] == 1

    found = []
    for source in (alone, whole):
        assert main(["reconstruct", source, "--images", blobs, "--output", str(tmp_path / "grid.png")]) == 0
        capsys.readouterr()
        assert main(["probe", source, "--data_path", blobs, "--json"]) == 0
        found.append(((tmp_path / "grid.png").read_bytes(), json.loads(capsys.readouterr().out)))
    assert found[0] == found[1]


@pytest.mark.parametrize("age", ["new", "old"])
def test_a_published_training_file_resumes(blobs, tmp_path, age):
    """Also one of the torch of 2021, which counted steps in integers and knew fewer settings of a group."""
    torch.manual_seed(0)
    model = mae_vit_tiny_patch4(img_size=16, in_chans=1)
    optimizer = make_optimizer(model, 1e-3, 0.05)
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 0.01)
    optimizer.step()
    content = published(model, optimizer)
    if age == "old":
        known = ("params", "lr", "betas", "eps", "weight_decay", "amsgrad")
        groups = [{key: group[key] for key in known} for group in content["optimizer"]["param_groups"]]
        state = {i: {**moments, "step": 1} for i, moments in content["optimizer"]["state"].items()}
        content["optimizer"] = {"state": state, "param_groups": groups}
    torch.save(content, tmp_path / "checkpoint-3.pth")
    with pytest.raises(pickle.UnpicklingError):
        torch.load(tmp_path / "checkpoint-3.pth", weights_only=True)
    file = read_official(tmp_path / "checkpoint-3.pth")
    assert file.args["norm_pix_loss"] is True
    config = small_run(blobs, tmp_path / "run", epochs=5, resume=str(tmp_path / "checkpoint-3.pth"))
    assert pretrain(config) == 0
    steps = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert len(steps) == 9
    assert '"step": 37, "epoch": 4' in steps[0]


def test_moments_of_another_model_are_refused(blobs, tmp_path):
    model = mae_vit_tiny_patch4(img_size=16, in_chans=1)
    content = published(model, make_optimizer(model, 1e-3, 0.05))
    for state in ({}, {i: {"step": 1, "exp_avg": torch.zeros(3), "exp_avg_sq": torch.zeros(3)} for i in range(90)}):
        content["optimizer"]["state"] = state
        torch.save(content, tmp_path / "checkpoint-3.pth")
        with pytest.raises(UserError, match="optimiser does not fit"):
            pretrain(small_run(blobs, tmp_path / "run", epochs=5, resume=str(tmp_path / "checkpoint-3.pth")))


@pytest.mark.parametrize("kind", ["wrapped", "bare", "legacy"])
def test_weights_alone_load(tmp_path, kind):
    model = mae_vit_tiny_patch4(img_size=16)
    encoder = {k: v for k, v in model.state_dict().items() if not k.startswith(("decoder_", "mask_token"))}
    content = encoder if kind == "bare" else {"model": encoder}
    torch.save(content, tmp_path / "e.pth", _use_new_zipfile_serialization=kind != "legacy")
    file = read_official(tmp_path / "e.pth")
    assert not file.has_decoder
    with pytest.raises(UserError, match="holds the encoder alone"):
        load_model(str(tmp_path / "e.pth"), needs_decoder=True)
    # Such a file does not say its image size: it is square, as its positions are.
    found = load_model(str(tmp_path / "e.pth"))
    assert found.img_size == (16, 16)
    assert all(torch.equal(found.state_dict()[key], tensor) for key, tensor in encoder.items())


def test_a_file_that_says_its_size_gives_the_same_features(finished):
    images = torch.randint(0, 256, (4, 16, 16, 1), dtype=torch.uint8)
    from_file, from_run = load_model(str(finished / "checkpoint-1.pth")), load_model(str(finished))
    assert torch.equal(from_file.forward_features(images), from_run.forward_features(images))
    assert torch.equal(from_file.mean, from_run.mean)


class Bomb:
    """Creates a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


@pytest.fixture(scope="module")
def hostile(tmp_path_factory):
    """A folder of files that are not what they should be."""
    tmp_path = tmp_path_factory.mktemp("hostile")
    state = mae_vit_tiny_patch4(img_size=16).state_dict()
    extra, missing, reshaped = dict(state), dict(state), dict(state)
    extra["head.weight"] = torch.zeros(2)
    del missing["blocks.0.norm1.bias"]
    reshaped["norm.weight"] = torch.zeros(5)
    args = {"model": "mae_vit_tiny_patch4", "input_size": 16}
    contents = {
        "bomb": {"model": state, "args": Bomb(tmp_path / "went off")},
        "no model": {"weights": 3},
        "not tensors": {"model": {"a": 1}},
        "unknown key": {"model": extra, "args": args},
        "missing key": {"model": missing, "args": args},
        "other shape": {"model": reshaped, "args": args},
        "not a MAE": {"model": {"conv1.weight": torch.zeros(2)}},
        "unknown preset": {"model": state, "args": {"model": "resnet50"}},
        "absurd size": {"model": state, "args": {"model": "mae_vit_tiny_patch4", "input_size": 15}},
    }
    for name, content in contents.items():
        torch.save(content, tmp_path / f"{name}.pth")
    settings = {"model": "mae_vit_tiny_patch4", "input_size": [16, 16]}
    for name, tensors, changes in (
        (
            "shard",
            {f"{part}.{key}": t.clone() for key, t in state.items() for part in ("model", "optimizer.exp_avg")},
            {},
        ),
        ("missing key", missing, {}),
        ("other shape", reshaped, {}),
        ("no tensors", {}, {}),
        ("far too large", state, {"input_size": [4 << 20, 4 << 20]}),
        ("no size", state, {"input_size": None}),
        ("no mean", state, {"mean": "gray"}),
    ):
        metadata = {"format": "pt", "settings": json.dumps(settings | changes)}
        save_file(tensors, tmp_path / f"{name}.safetensors", metadata)
    save_file(state, tmp_path / "no settings.safetensors", {"settings": "[1]"})
    save_file(state, tmp_path / "no epoch.safetensors", {"epoch": "last"})
    for suffix in ("pth", "safetensors"):
        whole = (tmp_path / f"missing key.{suffix}").read_bytes()
        (tmp_path / f"truncated.{suffix}").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "long header.safetensors").write_bytes(b"\xff" * 8 + whole[8:])
    (tmp_path / "empty.safetensors").write_bytes(b"")
    return tmp_path
    (tmp_path / "empty.pth").write_bytes(b"")
    (tmp_path / "text.pth").write_bytes(b"hello")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("bomb.pth", "could run code"),
        ("no model.pth", "holds no model"),
        ("not tensors.pth", "holds no model"),
        ("unknown key.pth", "1 tensors are unknown"),
        ("missing key.pth", "1 tensors are missing"),
        ("other shape.pth", "1 tensors are of another shape"),
        ("not a MAE.pth", "not a checkpoint of a masked autoencoder"),
        ("unknown preset.pth", "model='resnet50': unknown"),
        ("absurd size.pth", "not a multiple"),
        ("truncated.pth", "not a readable checkpoint"),
        ("empty.pth", "not a readable checkpoint"),
        ("text.pth", "not a readable checkpoint"),
        (
            "shard.safetensors",
            "one rank's part of a checkpoint; give the folder .*it is not a checkpoint of a masked autoencoder",
        ),
        ("missing key.safetensors", "1 tensors are missing"),
        ("other shape.safetensors", "1 tensors are of another shape"),
        ("no tensors.safetensors", "holds no model"),
        ("far too large.safetensors", "of another shape"),
        ("no size.safetensors", "input_size None"),
        ("no mean.safetensors", "its settings make no model"),
        ("no settings.safetensors", "not a readable checkpoint"),
        ("no epoch.safetensors", "not a readable checkpoint"),
        ("truncated.safetensors", "not a readable checkpoint"),
        ("long header.safetensors", "not a readable checkpoint"),
        ("empty.safetensors", "not a readable checkpoint"),
    ],
)
def test_hostile_and_foreign_files_are_refused_in_one_line(hostile, name, words):
    with pytest.raises(UserError, match=words) as caught:
        model_of_file(read_official(hostile / name), None)
    assert "\n" not in str(caught.value)
    assert not (hostile / "went off").exists()
