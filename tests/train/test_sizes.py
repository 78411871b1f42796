"""Crops that grow during a run: positions keep their meaning, and neither restarts nor ranks change anything."""

import shutil

import numpy as np
import pytest
import torch
from helpers import assert_same_run, metrics, small_run
from ranks import run_ranks

from fastmae.errors import UserError
from fastmae.model.flops import flops_per_image
from fastmae.model.presets import MODELS, mae_vit_tiny_patch4
from fastmae.model.vit import sincos_positions
from fastmae.ops.random_masking import random_masking
from fastmae.train.pretrain import pretrain
from fastmae.train.step import TrainingLoss

# 8×8 pixels in two epochs, 12×12 in one, 16×16 in the last; the last step of an epoch is a multiple of 9.
GROWING = dict(start_size=(8,), input_size=(16,), save_freq=4, checkpoint_freq=3, keep=12)


def sizes_of(monkeypatch) -> list[tuple[int, int]]:
    """Collects the size of every batch that the loss is computed of."""
    seen, right = [], TrainingLoss.forward

    def forward(self, images, ids_shuffle):
        seen.append(tuple(images.shape[1:3]))
        return right(self, images, ids_shuffle)

    monkeypatch.setattr(TrainingLoss, "forward", forward)
    return seen


# --- the model --------------------------------------------------------------------------------------------------------


def test_the_full_grid_has_the_published_positions_to_the_bit():
    for grid in ((14, 14), (16, 16), (3, 7), (24, 10)):
        assert torch.equal(sincos_positions(64, grid, grid), sincos_positions(64, grid))


@pytest.mark.parametrize(("grid", "full"), [((7, 7), (14, 14)), ((4, 3), (8, 9)), ((5, 6), (5, 12)), ((4, 4), (12, 4))])
def test_a_patch_of_a_small_grid_lies_in_the_middle_of_the_patches_that_it_covers(grid, full):
    """The mean of sin(w·x) over k neighbours is that of their centre, times sin(k·w/2) / (k·sin(w/2)); so for cos."""
    dim, (rows, columns) = 32, grid
    across, down = full[1] // columns, full[0] // rows
    whole = sincos_positions(dim, full)[1:].double().view(rows, down, columns, across, dim).mean(dim=(1, 3))
    w = 10000.0 ** -(torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    smoothed = [(torch.sin(k * w / 2) / (k * torch.sin(w / 2))).repeat(2) for k in (across, down)]
    small = sincos_positions(dim, grid, full)
    assert torch.equal(small[0], torch.zeros(dim)), "the class token has no place"
    torch.testing.assert_close(small[1:].double() * torch.cat(smoothed), whole.flatten(0, 1), rtol=0, atol=1e-6)


@pytest.mark.parametrize("decoder", ["self", "cross"])
@pytest.mark.parametrize("size", [(8, 16), (12, 12)])
def test_the_loss_of_a_small_image_is_that_of_a_small_model_with_these_positions(size, decoder):
    def model(size):
        return MODELS[decoder](size, 4, 1, 32, 2, 2, 16, 2, 2, norm_pix_loss=True)

    torch.manual_seed(0)
    full = model((16, 24))
    names = set(full.state_dict())
    full.allow_sizes([size])
    assert set(full.state_dict()) == names
    assert not any(buffer.shape == (1, 9, 16) for buffer in full.buffers())
    small = model(size)
    tables = {"pos_embed": 32, "decoder_pos_embed": 16}
    positions = {name: sincos_positions(dim, small.grid_size, full.grid_size)[None] for name, dim in tables.items()}
    small.load_state_dict(full.state_dict() | positions)
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(0, 256, (3, *size, 1), dtype=torch.uint8, generator=generator)
    ids = random_masking(torch.arange(3), 0, small.num_patches)
    losses = [one.training_loss(images, ids, 0.5) for one in (full, small)]
    assert torch.equal(*losses)
    for loss in losses:
        loss.backward()
    for (name, one), other in zip(full.named_parameters(), small.parameters(), strict=True):
        assert one.grad is None if name in tables else torch.equal(one.grad, other.grad), name
    assert torch.equal(full.forward_features(images), small.forward_features(images))
    assert flops_per_image(full, 0.5, small.num_patches) == flops_per_image(small, 0.5)


def test_a_size_that_was_not_announced_is_refused():
    model = mae_vit_tiny_patch4(img_size=16, in_chans=1)
    model.allow_sizes([(8, 8)])
    with pytest.raises(ValueError, match=r"must have shape \[N, 16, 16, 1\], got \[2, 12, 12, 1\]"):
        model.training_loss(torch.zeros(2, 12, 12, 1, dtype=torch.uint8), random_masking(torch.arange(2), 0, 9))


# --- runs -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def grown(blobs, tmp_path_factory):
    """36 steps in one go."""
    folder = tmp_path_factory.mktemp("grown") / "run"
    with pytest.MonkeyPatch.context() as patch:
        seen = sizes_of(patch)
        assert pretrain(small_run(blobs, folder, **GROWING)) == 0
    assert seen == [(8, 8)] * 18 + [(12, 12)] * 9 + [(16, 16)] * 9
    return folder


def stopped_after(step, run, target):
    """A run folder as it was when the checkpoint of ``step`` was the newest."""
    shutil.copytree(run, target)
    for path in (target / "checkpoints").iterdir():
        if path.name > f"step-{step:08d}":
            shutil.rmtree(path)
    return target


@pytest.mark.parametrize("step", [3, 15, 18, 24, 33])
def test_stopped_in_any_epoch_or_between_two_sizes_it_goes_on_as_if_nothing_had_happened(blobs, grown, tmp_path, step):
    run = stopped_after(step, grown, tmp_path / "run")
    assert pretrain(small_run(blobs, run, **GROWING, resume="auto", num_workers=1)) == 0
    assert_same_run(run, grown)


def test_growth_is_part_of_what_a_run_is_and_more_epochs_do_not_move_it(blobs, grown, tmp_path, monkeypatch, capsys):
    run = stopped_after(33, grown, tmp_path / "run")
    for changes, named in (
        (dict(epochs=6, grow_epochs=4), "grow_epochs 3, not 4"),
        (dict(start_size=(12,)), r"start_size \[8, 8\]"),
    ):
        with pytest.raises(UserError, match=f"was made with {named}"):
            pretrain(small_run(blobs, run, **{**GROWING, **changes}, resume="auto"))
    seen = sizes_of(monkeypatch)
    assert pretrain(small_run(blobs, run, **GROWING, epochs=6, resume="auto")) == 0
    assert seen == [(16, 16)] * (54 - 33)
    assert "8×8 for 2, then 12×12 for 1, then 16×16 for 3 epochs" in capsys.readouterr().out


def test_a_step_that_is_looked_at_again_has_the_size_that_it_had(blobs, tmp_path, monkeypatch):
    seen = sizes_of(monkeypatch)
    with pytest.raises(UserError, match=r"not finite at step \d"):
        pretrain(small_run(blobs, tmp_path, **{**GROWING, "checkpoint_freq": 4}, lr=1e30, max_skipped=1))
    assert len(seen) > 4, "four steps, and one of them again"
    assert set(seen) == {(8, 8)}


@pytest.mark.parametrize("masking", ["block", "grid"])
def test_other_masks_grow_with_the_crops(blobs, tmp_path, monkeypatch, masking):
    """A grid by two patches at a time: it needs even numbers."""
    seen = sizes_of(monkeypatch)
    assert pretrain(small_run(blobs, tmp_path / "run", **GROWING, epochs=3, masking=masking)) == 0
    middle = (8, 8) if masking == "grid" else (12, 12)
    assert seen == [(8, 8)] * 9 + [middle] * 9 + [(16, 16)] * 9


def test_dali_grows_too_and_goes_on_where_it_was_stopped(image_folder, tmp_path, monkeypatch):
    pytest.importorskip("nvidia.dali", reason="DALI is not installed (the extra `dali`)")
    seen = sizes_of(monkeypatch)
    flags = dict(start_size=(8, 12), input_size=(16, 24), model="mae_vit_tiny_patch4", epochs=3, checkpoint_freq=1)
    flags |= dict(save_freq=4, keep=9, image_decoder="dali-cpu", num_workers=1)
    assert pretrain(small_run(str(image_folder), tmp_path / "whole", **flags)) == 0
    assert seen == [(8, 12)] * 3 + [(8, 16)] * 3 + [(16, 24)] * 3
    run = stopped_after(4, tmp_path / "whole", tmp_path / "run")
    assert pretrain(small_run(str(image_folder), run, **flags, resume="auto")) == 0
    assert_same_run(run, tmp_path / "whole")


def test_two_ranks_see_the_losses_of_one(blobs, grown, tmp_path):
    ways = ("ddp", "fsdp")
    run_ranks(2, *(small_run(blobs, tmp_path / way, **GROWING, batch_size=4, parallel=way) for way in ways))
    for way in ways:
        np.testing.assert_allclose(metrics(tmp_path / way), metrics(grown), rtol=1e-5)


def test_each_size_is_compiled_once_though_that_is_more_than_torch_expects(blobs, grown, tmp_path, monkeypatch):
    from torch._dynamo.testing import CompileCounterWithBackend

    counter, compile_anything = CompileCounterWithBackend("aot_eager"), torch.compile
    monkeypatch.setattr(torch, "compile", lambda *args, **rest: compile_anything(*args, **rest, backend=counter))
    torch.compiler.reset()
    with torch._dynamo.config.patch(recompile_limit=8):  # and back to what it was
        assert pretrain(small_run(blobs, tmp_path / "run", **GROWING, compile="block")) == 0
    assert counter.frame_count == 3 * 3 > 8
    np.testing.assert_allclose(metrics(tmp_path / "run"), metrics(grown), rtol=1e-6)
    torch.compiler.reset()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (dict(start_size=(10,)), "start_size=(10, 10): must be a multiple of 4×4"),
        (dict(start_size=(16,)), "start_size=(16, 16): must be from 4×4 to less than 16×16"),
        (dict(start_size=(8, 20)), "start_size=(8, 20): must be from 4×4 to less than 16×16"),
        (dict(start_size=(4,)), "start_size=(4, 4): mask ratio 0.75 leaves 0 of 1 patches visible"),
        (dict(start_size=(12,), masking="grid"), "start_size=(12, 12): must be a multiple of 8×8"),
        (dict(start_size=(8, 8, 8)), "start_size=(8, 8, 8): must be one or two positive numbers"),
        (dict(start_size=(8,), masks="m.npy"), "start_size=8: must be left out with masks"),
        (dict(start_size=(8,), grow_epochs=4), "grow_epochs=4: must be below the 4 of epochs"),
        (dict(start_size=(8,), grow_epochs=0), "grow_epochs=0: must be at least 1"),
        (dict(grow_epochs=2), "grow_epochs=2: must be given together with start_size"),
        (dict(start_size=(8,), epochs=1), "grow_epochs=1: must be below the 1 of epochs"),
    ],
    ids=str,
)
def test_growth_that_cannot_be_is_refused_by_name(blobs, tmp_path, flags, words):
    with pytest.raises(UserError) as refused:
        pretrain(small_run(blobs, tmp_path / "run", **flags))
    assert str(refused.value).startswith(words)
    assert not (tmp_path / "run").exists()
