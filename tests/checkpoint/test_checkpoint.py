"""Checkpoint folders by themselves: what is written, what a failing disk leaves, what is refused."""

import copy
import errno
import json
import os
import random
import resource
import shutil
from contextlib import contextmanager

import pytest
import torch
from helpers import soak

from fastmae import torch_compat
from fastmae.checkpoint import load, manifest
from fastmae.checkpoint import save as saving
from fastmae.checkpoint.load import load_model
from fastmae.checkpoint.manifest import (
    NewestCheckpoint,
    find_checkpoint,
    manifest_text,
    newest_first,
    read_manifest,
    set_aside_newer,
)
from fastmae.checkpoint.official import write_training_file, write_weights_file
from fastmae.checkpoint.restore import load_checkpoint
from fastmae.checkpoint.save import CannotSaveError, Saver, prune_checkpoints, save_checkpoint, training_tensors
from fastmae.config.model import ModelSpec
from fastmae.errors import UserError
from fastmae.model.build import build_model
from fastmae.model.mae import MaskedAutoencoderViT
from fastmae.train.optim import make_optimizer

SETTINGS = dict(model="mae_vit_tiny_patch4", input_size=[16, 16], in_chans=1, norm_pix_loss=False, mean=None, std=None)
FILE = "shard-00001-model-00001-of-00001.safetensors"
POSITION = {"settings": SETTINGS, "epoch_sums": {"loss": 0.5, "lr": 0.25, "steps": 2}}


@pytest.fixture
def trained():
    torch.manual_seed(0)
    model = build_model(ModelSpec.from_json(SETTINGS))
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
    path = save_checkpoint(tmp_path, 7, training_tensors(model, optimizer), POSITION)
    assert sorted(file.name for file in path.iterdir()) == ["manifest.json", FILE]
    other = build_model(ModelSpec.from_json(SETTINGS))
    restored = make_optimizer(other, 1e-3, 0.05)
    manifest = read_manifest(path)
    load_checkpoint(path, other, restored)
    assert manifest["step"] == 7
    assert manifest["epoch_sums"] == POSITION["epoch_sums"]
    for one, two in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(one, two)
        if one.requires_grad:
            assert all(torch.equal(optimizer.state[one][k], restored.state[two][k]) for k in optimizer.state[one])
    assert torch.equal(load_model(str(tmp_path)).cls_token, model.cls_token)


def test_a_full_disk_leaves_nothing_half_written(tmp_path, trained):
    model, optimizer = trained
    tensors = training_tensors(model, optimizer)
    first = save_checkpoint(tmp_path, 1, tensors, POSITION)
    for limit in (100, 100_000):
        with full_disk(limit), pytest.raises(UserError, match=r"could not be saved .*earlier ones are intact"):
            save_checkpoint(tmp_path, 2, tensors, POSITION)
        with full_disk(limit), pytest.raises(UserError, match=r"could not be saved .*are intact"):
            write_training_file(tmp_path / "checkpoint-0.pth", model.state_dict(), optimizer.state_dict(), 0, {})
        with full_disk(limit), pytest.raises(UserError, match=r"could not be saved .*are intact"):
            write_weights_file(tmp_path / "checkpoint-0.safetensors", model.state_dict(), 0, {})
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000001"]
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoints"]
    assert find_checkpoint(tmp_path).path == first


def test_only_the_newest_stay_and_leftovers_of_a_kill_go(tmp_path, trained):
    for step in (1, 2, 30, 4):
        save_checkpoint(tmp_path, step, training_tensors(*trained), POSITION)
    (tmp_path / "checkpoints" / ".partial-step-00000003").mkdir()
    prune_checkpoints(tmp_path, 2)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step-00000004", "step-00000030"]


def test_every_so_many_steps_a_checkpoint_stays_for_ever(tmp_path, trained):
    for step in (10, 20, 25, 30, 40, 50):
        save_checkpoint(tmp_path, step, training_tensors(*trained), POSITION)
        prune_checkpoints(tmp_path, 2, 20)
    assert [int(path.name[5:]) for path in sorted((tmp_path / "checkpoints").iterdir())] == [20, 40, 50]


@pytest.mark.parametrize("background", [True, False])
def test_training_goes_on_while_a_copy_is_written(tmp_path, trained, background):
    model, optimizer = trained
    expected, position = model.cls_token.detach().clone(), copy.deepcopy(POSITION)
    with Saver(tmp_path, keep=2, keep_every=None, background=background) as saver:
        saver.save(1, training_tensors(model, optimizer), position)
        with torch.no_grad():
            model.cls_token.zero_()
        position["epoch_sums"]["loss"] = 7.0
        saver.save(2, training_tensors(model, optimizer), position)
        saver.finish()
    first, second = sorted((tmp_path / "checkpoints").iterdir())
    assert torch.equal(load_model(str(first)).cls_token, expected)
    assert read_manifest(first)["epoch_sums"] == POSITION["epoch_sums"]
    assert not load_model(str(second)).cls_token.any()


def test_a_save_that_fails_is_told_at_once_and_the_next_one_tries_again(tmp_path, trained, capsys):
    tensors = training_tensors(*trained)
    with Saver(tmp_path, keep=1, keep_every=None, background=True) as saver:
        saver.save(1, tensors, POSITION)
        saver.finish()
        with full_disk(100_000):
            saver.save(2, tensors, POSITION)
            assert "step-00000002 could not be saved" in saver.wait()
        said = capsys.readouterr().err
        assert len(said.splitlines()) == 1
        assert "the run goes on" in said
        with pytest.raises(UserError, match=r"step-00000002 could not be saved .*earlier ones are intact"):
            saver.finish()
        assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000001"]
        saver.save(3, tensors, POSITION)
        saver.finish()
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000003"]


def test_weights_that_were_never_trained_come_back_too(tmp_path):
    """As when every step so far was skipped: AdamW has no moments yet."""
    model = build_model(ModelSpec.from_json(SETTINGS))
    path = save_checkpoint(tmp_path, 1, training_tensors(model, make_optimizer(model, 1e-3, 0.05)), POSITION)
    restored = make_optimizer(model, 1e-3, 0.05)
    load_checkpoint(path, model, restored)
    assert all(state["step"] == 0 and not state["exp_avg"].any() for state in restored.state.values())


def test_a_flip_of_any_bit_is_caught_and_names_the_file(tmp_path, trained, record_property):
    older = save_checkpoint(tmp_path, 1, training_tensors(*trained), POSITION)
    newest = save_checkpoint(tmp_path, 2, training_tensors(*trained), POSITION)
    dice, flips, files = random.Random(os.getpid()), soak(5, 2000), sorted(newest.iterdir())
    for file in files:
        whole = file.read_bytes()
        for _ in range(flips):
            data, place = bytearray(whole), dice.randrange(len(whole))
            data[place] ^= 1 << dice.randrange(8)
            file.write_bytes(data)
            found = find_checkpoint(tmp_path)
            assert found.path == older, f"byte {place} of {file.name}"
            assert file.name in found.refused[0]
        file.write_bytes(whole)
    assert find_checkpoint(tmp_path).path == newest
    record_property("flipped bits", flips * len(files))


def test_a_file_that_is_not_in_the_manifest_is_refused(tmp_path, trained):
    path = save_checkpoint(tmp_path, 1, training_tensors(*trained), POSITION)
    (path / "shard-00002-model-00001-of-00001.safetensors").write_bytes((path / FILE).read_bytes())
    with pytest.raises(UserError, match=r"shard-00002\S* is not in manifest.json"):
        load_model(str(path))


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
    path = save_checkpoint(tmp_path, 1, training_tensors(*trained), POSITION)
    manifest = json.loads((path / "manifest.json").read_text())
    del manifest["sha256"]
    change(manifest)
    (path / "manifest.json").write_text(manifest_text(manifest))
    with pytest.raises(UserError) as caught:
        load_model(str(path))
    assert "\n" not in str(caught.value)


def test_a_newer_checkpoint_that_somebody_put_there_does_not_cost_the_run_its_own(tmp_path, trained):
    save_checkpoint(tmp_path, 999, training_tensors(*trained), POSITION)
    with Saver(tmp_path, keep=1, keep_every=None, background=False) as saver:
        for step in (1, 2):
            saver.save(step, training_tensors(*trained), POSITION)
    assert [path.name for path in newest_first(tmp_path)] == ["step-00000999", "step-00000002"]


@pytest.mark.parametrize("background", [True, False])
def test_one_save_that_fails_ends_a_run_that_wants_it_so_and_success_starts_the_count_again(
    tmp_path, trained, monkeypatch, background
):
    tensors, refuses = training_tensors(*trained), []

    def seal(*words):
        if refuses:
            raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))
        return real(*words)

    real = saving._seal
    monkeypatch.setattr(saving, "_seal", seal)
    with Saver(tmp_path, keep=9, keep_every=None, background=background, max_failed=3) as saver:
        for step, fails in enumerate([1, 1, 0, 1, 1, 0], 1):
            refuses[:] = [step] * fails
            saver.save(step, tensors, POSITION)
            saver.wait()
    refuses[:] = [1]
    with (
        Saver(tmp_path, keep=9, keep_every=None, background=background, max_failed=1) as saver,
        pytest.raises(CannotSaveError, match=r"^1 save failed, .*Disk quota exceeded") as caught,
    ):
        [saver.save(step, tensors, POSITION) for step in (7, 8)]
    assert caught.value.status == 1


# --- exact names, and readers of a live run ---------------------------------------------------------------------------

FOREIGN = (
    "step-00000100-copy", "step-100", "step-0000100", "step-000000100", "step-00000100 (1)", "step-٠٠٠٠٠٠٠٣", "step-",
    "step-99999999999999999999999999x", "STEP-00000100", "best", ".partial-mine", "superseded-step-00000100-mine",
)  # fmt: skip


def test_only_names_that_a_run_gives_are_checkpoints_and_nothing_else_is_touched(tmp_path, trained):
    model, optimizer = trained
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "precious").write_text("kept")
    folder = tmp_path / "run" / "checkpoints"
    save_checkpoint(tmp_path / "run", 1, training_tensors(model, optimizer), POSITION)
    for name in FOREIGN:
        (folder / name).mkdir()
        (folder / name / "mine").write_text("kept")
    (folder / "step-00000099").write_text("a file")
    (folder / "step-00000098").symlink_to(outside, target_is_directory=True)
    (folder / ".partial-step-00000097").symlink_to(outside, target_is_directory=True)
    (folder / ".partial-step-00000096").mkdir()
    assert [path.name for path in newest_first(tmp_path / "run")] == ["step-00000001"]
    assert set_aside_newer(tmp_path / "run", 1) == []
    second = save_checkpoint(tmp_path / "run", 2, training_tensors(model, optimizer), POSITION)
    prune_checkpoints(tmp_path / "run", 1)
    ours = {"step-00000002", "step-00000099", "step-00000098"}
    assert {path.name for path in folder.iterdir()} == {*FOREIGN, *ours}
    assert all((folder / name / "mine").read_text() == "kept" for name in FOREIGN)
    assert (outside / "precious").read_text() == "kept"
    assert find_checkpoint(tmp_path / "run") == NewestCheckpoint(second, read_manifest(second), ())


def test_a_checkpoint_after_so_many_steps_that_its_name_is_longer_is_the_newest(tmp_path, trained):
    for step in (99_999_999, 100_000_000):
        save_checkpoint(tmp_path, step, training_tensors(*trained), POSITION)
    assert find_checkpoint(tmp_path).path.name == "step-100000000"


def test_a_copy_under_a_name_of_another_step_is_refused(tmp_path, trained):
    first = save_checkpoint(tmp_path, 1, training_tensors(*trained), POSITION)
    shutil.copytree(first, first.with_name("step-00000005"))
    found = find_checkpoint(tmp_path)
    assert found.path == first
    assert found.refused[0].endswith("step-00000005: its manifest.json is that of step 1")


def test_what_is_set_aside_twice_under_one_name_is_kept_twice(tmp_path, trained):
    for _ in range(3):
        save_checkpoint(tmp_path, 5, training_tensors(*trained), POSITION)
        set_aside_newer(tmp_path, 4)
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == ["superseded-step-00000005", "superseded-step-00000005-2", "superseded-step-00000005-3"]


@pytest.mark.parametrize("moment", ["before it is verified", "after it was verified"])
def test_a_reader_of_a_live_run_takes_the_newer_checkpoint_when_the_one_that_it_found_is_deleted(
    tmp_path, trained, monkeypatch, moment
):
    tensors = training_tensors(*trained)
    save_checkpoint(tmp_path, 1, tensors, POSITION)
    module, name = (manifest, "read_manifest") if moment == "before it is verified" else (load, "load_checkpoint")
    real, opened = getattr(module, name), []

    def train_on_meanwhile(path, *words):
        opened.append(path.name)
        if len(opened) < 4:
            save_checkpoint(tmp_path, len(opened) + 1, tensors, POSITION)
            prune_checkpoints(tmp_path, 1)
        return real(path, *words)

    monkeypatch.setattr(module, name, train_on_meanwhile)
    assert isinstance(load_model(tmp_path), MaskedAutoencoderViT)
    assert opened == [f"step-{step:08d}" for step in (1, 2, 3, 4)]


@pytest.mark.parametrize("moment", ["read_manifest", "stored_tensors", "load_shards"])
def test_a_reader_says_in_one_line_that_a_checkpoint_was_deleted_under_its_hands(
    tmp_path, trained, monkeypatch, caplog, moment
):
    path = save_checkpoint(tmp_path, 1, training_tensors(*trained), POSITION)
    module = load if moment == "read_manifest" else torch_compat
    real = getattr(module, moment)

    def deleted(path, *words):
        shutil.rmtree(path)
        return real(path, *words)

    monkeypatch.setattr(module, moment, deleted)
    with pytest.raises(UserError, match="step-00000001: was deleted while it was read, as training goes on"):
        load_model(path)
    assert not [record for record in caplog.records if record.name == "root"], "a traceback would be shown"
