"""Checkpoint folders by themselves: what is written, what a failing disk leaves, what is refused."""

import json
import resource
from contextlib import contextmanager

import pytest
import torch

from fastmae.errors import UserError
from fastmae.model.official import build_model, save_official
from fastmae.train.checkpoint import find_checkpoint, load_checkpoint, load_model, prune_checkpoints, save_checkpoint
from fastmae.train.optim import make_optimizer

SETTINGS = dict(model="mae_vit_tiny_patch4", input_size=[16, 16], in_chans=1, norm_pix_loss=False, mean=None, std=None)
POSITION = {"settings": SETTINGS, "epoch_sums": {"loss": 0.5, "lr": 0.25, "steps": 2}}


@pytest.fixture
def trained():
    torch.manual_seed(0)
    model = build_model(SETTINGS)
    optimizer = make_optimizer(model, 1e-3, 0.05)
    images, ids = torch.randn(2, 1, 16, 16), torch.rand(2, 16).argsort(dim=1)
    model.training_loss(images, ids).backward()
    optimizer.step()
    return model, optimizer


@contextmanager
def full_disk(limit: int):
    """Files may not grow beyond ``limit`` bytes: writes fail half-way, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_what_is_saved_comes_back(tmp_path, trained):
    model, optimizer = trained
    path = save_checkpoint(tmp_path, 7, model, optimizer, POSITION)
    assert sorted(file.name for file in path.iterdir()) == ["manifest.json", "state.safetensors"]
    other = build_model(SETTINGS)
    restored = make_optimizer(other, 1e-3, 0.05)
    manifest = load_checkpoint(path, other, restored)
    assert manifest["step"] == 7
    assert manifest["epoch_sums"] == POSITION["epoch_sums"]
    for one, two in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(one, two)
        if one.requires_grad:
            assert all(torch.equal(optimizer.state[one][k], restored.state[two][k]) for k in optimizer.state[one])
    assert torch.equal(load_model(str(tmp_path)).cls_token, model.cls_token)


def test_a_full_disk_leaves_nothing_half_written(tmp_path, trained):
    model, optimizer = trained
    first = save_checkpoint(tmp_path, 1, model, optimizer, POSITION)
    for limit in (100, 100_000):
        with full_disk(limit), pytest.raises(UserError, match=r"could not be saved .*earlier ones are intact"):
            save_checkpoint(tmp_path, 2, model, optimizer, POSITION)
        with full_disk(limit), pytest.raises(UserError, match=r"could not be saved .*are intact"):
            save_official(tmp_path / "checkpoint-0.pth", model, optimizer, 0, {})
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000001"]
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoints"]
    assert find_checkpoint(tmp_path).path == first


def test_only_the_newest_stay_and_leftovers_of_a_kill_go(tmp_path, trained):
    for step in (1, 2, 30, 4):
        save_checkpoint(tmp_path, step, *trained, POSITION)
    (tmp_path / "checkpoints" / ".partial-step-00000003").mkdir()
    prune_checkpoints(tmp_path, 2)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step-00000004", "step-00000030"]


@pytest.mark.parametrize(
    "change",
    [
        lambda manifest: manifest.pop("settings"),
        lambda manifest: manifest.pop("files"),
        lambda manifest: manifest.update(files=[]),
        lambda manifest: manifest.update(settings={"model": "mae_vit_tiny_patch4"}),
        lambda manifest: manifest["settings"].update(model="resnet50"),
        lambda manifest: manifest["settings"].update(model="mae_vit_tiny_patch16"),
        lambda manifest: manifest["settings"].update(input_size=[20, 20]),
    ],
)
def test_a_manifest_that_was_tampered_with_is_refused_in_one_line(tmp_path, trained, change):
    path = save_checkpoint(tmp_path, 1, *trained, POSITION)
    manifest = json.loads((path / "manifest.json").read_text())
    change(manifest)
    (path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError) as caught:
        load_model(str(path))
    assert "\n" not in str(caught.value)
