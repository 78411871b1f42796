"""Masks of every kind: exact, pure, the same for any split of the batch; and runs that train with them."""

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import assert_same_run, metrics, small_run
from hypothesis import given, settings
from hypothesis import strategies as st

import fastmae
from fastmae.checkpoint.manifest import manifest_text
from fastmae.cli import main
from fastmae.config import PretrainConfig
from fastmae.data import masks as module
from fastmae.data.masks import (
    MAX_BLOCKS,
    Masks,
    block_masks,
    choose_masks,
    grid_mask,
    masked_patches,
    open_masks,
    shuffled_ids,
)
from fastmae.errors import UserError
from fastmae.facts import exact_ratio
from fastmae.ops import random_masking
from fastmae.philox import STREAM_BLOCKS, STREAM_MASK, uniforms_numpy
from fastmae.train import pretrain as training
from fastmae.train.pretrain import pretrain

CPU = torch.device("cpu")
seeds = st.integers(0, 2**63 - 1)


@st.composite
def grids_and_counts(draw):
    """Grids of up to three words a line, and from one masked patch to all but one."""
    rows, columns = draw(st.integers(1, 20)), draw(st.integers(2, 140))
    return (rows, columns), draw(st.integers(1, rows * columns - 1))


def one_block_mask(draws, grid, count):
    """Makes a mask patch by patch, as it is defined, from 4 · (MAX_BLOCKS + 1) uniform numbers: a list of lists."""
    rows, columns = grid
    smallest = max(1, rows * columns * 16 / 196)
    masked = [[False] * columns for _ in range(rows)]
    for number in range(1, MAX_BLOCKS + 1):
        area, ratio, top, left = draws[4 * number : 4 * number + 4]
        still = count - sum(map(sum, masked))
        if not still:
            return masked
        area = smallest + area * (max(still, smallest) - smallest)
        ratio = math.exp(math.log(0.3) + ratio * (math.log(1 / 0.3) - math.log(0.3)))
        height, width = min(rows, round(math.sqrt(area * ratio))), min(columns, round(math.sqrt(area / ratio)))
        if number == MAX_BLOCKS:
            height, width = rows, columns
        top, left = int(top * (rows - height + 1)), int(left * (columns - width + 1))
        inside = [(y, x) for y in range(top, top + height) for x in range(left, left + width) if not masked[y][x]]
        # 0: down, then right; +1: along columns instead of rows; +2: from the right; +4: from below.
        way = int(draws[0] * 8)
        inside.sort(
            key=lambda yx: (-yx[0] if way & 4 else yx[0], -yx[1] if way & 2 else yx[1])[:: -1 if way & 1 else 1]
        )
        for y, x in inside[:still]:
            masked[y][x] = True
    return masked


def neighbours(masked):
    """Returns how many of the up to four neighbours of a masked patch are masked, on average."""
    padded = np.pad(masked, ((0, 0), (1, 1), (1, 1))).astype(int)
    count = padded[:, :-2, 1:-1] + padded[:, 2:, 1:-1] + padded[:, 1:-1, :-2] + padded[:, 1:-1, 2:]
    return count[masked].mean()


def random_masks(draw_ids, grid, count):
    keys = uniforms_numpy(0, STREAM_MASK, draw_ids, math.prod(grid))
    return (keys.argsort(axis=1).argsort(axis=1) < count).reshape(-1, *grid)


def saved(folder, masks, name="masks.npy"):
    np.save(folder / name, np.asarray(masks))
    return str(folder / name)


def halves(number=5, grid=(4, 4), seed=0):
    """Masks that mask half of the patches, no two of them the same."""
    return random_masks(np.arange(seed, seed + number), grid, math.prod(grid) // 2)


# --- blocks -----------------------------------------------------------------------------------------------------------


@settings(max_examples=150, deadline=None)
@given(grids_and_counts(), seeds, st.integers(0, 2**40))
def test_blocks_mask_exactly_as_many_patches_as_asked(grid_and_count, seed, first):
    grid, count = grid_and_count
    masked = block_masks(np.arange(first, first + 5), seed, grid, count)
    assert masked.shape == (5, *grid)
    assert (masked.sum(axis=(1, 2)) == count).all()


@settings(max_examples=40, deadline=None)
@given(grids_and_counts(), seeds)
def test_blocks_are_what_the_definition_says(grid_and_count, seed):
    grid, count = grid_and_count
    draw_ids = np.array([3, 2**35])
    draws = uniforms_numpy(seed, STREAM_BLOCKS, draw_ids, 4 * (MAX_BLOCKS + 1))
    expected = [one_block_mask(row, grid, count) for row in draws.tolist()]
    assert np.array_equal(block_masks(draw_ids, seed, grid, count), expected)


@pytest.mark.parametrize("count", [16, 78, 147])
def test_blocks_are_blocks(count):
    """In random masks the neighbours of a masked patch are masked as often as any patch; in blocks far more often."""
    draw_ids = np.arange(400)
    every = neighbours(np.ones((1, 14, 14), dtype=bool))
    at_random = neighbours(random_masks(draw_ids, (14, 14), count)) / every
    assert at_random == pytest.approx((count - 1) / 195, abs=0.01)
    assert neighbours(block_masks(draw_ids, 0, (14, 14), count)) / every > at_random + 0.6 * (1 - at_random)


@pytest.mark.parametrize("count", [78, 147])
def test_blocks_prefer_the_centre_but_no_side(count):
    """A rectangle has more places that cover the centre than a corner, so patches are not masked equally often."""
    share = block_masks(np.arange(12_000), 1, (14, 14), count).mean(axis=0)
    assert share.mean() == pytest.approx(count / 196)
    for view in (share[::-1], share[:, ::-1], share.T):
        assert np.abs(view - share).max() < 0.03  # 5 standard deviations of the difference
    assert share[6:8, 6:8].min() > share.mean() > share[[0, 0, -1, -1], [0, -1, 0, -1]].max()


BLOCKS = [
    "###.......",
    "###.......",
    "###.....##",
    "..########",
    "..######..",
    "..######..",
]


def test_a_block_mask_is_pinned():
    """Resuming a run relies on this never changing."""
    (mask,) = block_masks(np.array([3]), 0, (6, 10), 31)
    assert ["".join(".#"[int(patch)] for patch in line) for line in mask] == BLOCKS


# --- the others -------------------------------------------------------------------------------------------------------


def test_a_grid_keeps_the_top_left_of_every_2_by_2():
    assert grid_mask((4, 6)).tolist() == [[0, 1, 0, 1, 0, 1], [1] * 6, [0, 1, 0, 1, 0, 1], [1] * 6]


def test_every_draw_takes_one_of_the_masks_of_a_file(tmp_path):
    file = open_masks(saved(tmp_path, halves()), None)
    masks = Masks("file", 7, (4, 4), 8, file)
    drawn = masked_patches(np.arange(10_000), masks)
    which = (drawn[:, None] == halves()[None]).all(axis=(2, 3))
    assert (which.sum(axis=1) == 1).all()
    assert which.mean(axis=0) == pytest.approx(0.2, abs=0.02)
    assert not np.array_equal(drawn, masked_patches(np.arange(10_000), replace(masks, seed=8)))
    one = replace(masks, file=open_masks(saved(tmp_path, halves(1).astype(np.uint8), "one.npy"), 0.5))
    assert (masked_patches(np.arange(9), one) == halves(1)).all()


def every_kind(folder, seed=3):
    """Masks of every kind, half of 4×4 patches (of the grid three quarters)."""
    file = open_masks(saved(folder, halves()), None)
    visible = dict(random=8, block=8, grid=4, file=8)
    return [
        choose_masks(masking, file if masking == "file" else None, (4, 4), visible[masking], seed)
        for masking in ("random", "block", "grid", "file")
    ]


def test_masks_are_permutations_in_any_batch(tmp_path):
    draw_ids = torch.arange(2**33, 2**33 + 60)
    for masks in every_kind(tmp_path):
        ids = shuffled_ids(draw_ids, masks, CPU)
        assert (ids.dtype, ids.shape) == (torch.int32, (60, 16))
        assert (ids.sort(dim=1).values == torch.arange(16)).all()
        split = [shuffled_ids(part, masks, CPU) for part in draw_ids.split([1, 7, 40, 12])]
        assert torch.equal(torch.cat(split), ids)
        assert torch.equal(shuffled_ids(draw_ids.flip(0), masks, CPU).flip(0), ids)
        if masks.masking == "random":
            assert torch.equal(ids, random_masking(draw_ids, 3, 16))
            continue
        K = masks.visible
        masked = torch.ones(60, 16, dtype=torch.bool).scatter_(1, ids[:, :K].long(), False)
        assert np.array_equal(masked, masked_patches(draw_ids.numpy(), masks).reshape(60, 16))
        assert (ids[:, :K].diff() > 0).all()
        assert (ids[:, K:].diff() > 0).all()


def test_the_loss_does_not_depend_on_the_order_of_visible_and_of_masked_patches():
    torch.manual_seed(0)
    model = fastmae.mae_vit_tiny_patch4(img_size=16, in_chans=1)
    images = torch.randint(0, 256, (6, 16, 16, 1), dtype=torch.uint8)
    ids = shuffled_ids(torch.arange(6), Masks("block", 0, (4, 4), 6), CPU)
    other = torch.cat([ids[:, :6].flip(1), ids[:, 6:].roll(3, dims=1)], dim=1)
    losses = [model.training_loss(images, order, exact_ratio(6, 16)) for order in (ids, other)]
    torch.testing.assert_close(*losses, rtol=1e-6, atol=0)


@settings(max_examples=300, deadline=None)
@given(st.integers(2, 5000), st.data())
def test_the_ratio_of_a_file_gives_its_number_of_patches(patches, data):
    visible = data.draw(st.integers(1, patches - 1))
    ratio = exact_ratio(visible, patches)
    assert int(patches * (1 - ratio)) == visible
    assert ratio == pytest.approx(1 - visible / patches, abs=1e-12)


# --- what cannot work -------------------------------------------------------------------------------------------------


def uneven():
    masks = halves(4)
    masks[2, 0] = True
    return masks


WRONG = {
    "nothing there": (None, [], "no such file"),
    "a folder": ("folder", [], "not a file"),
    "an archive": (dict(a=halves()), [], "several arrays"),
    "floats": (halves().astype(np.float32), [], "holds float32"),
    "objects": (np.array([{}]), [], "Python objects"),
    "one mask without an axis": (halves()[0], [], r"has shape [4, 4]"),
    "no masks": (halves()[:0], [], r"has shape [0, 4, 4]"),
    "everything masked": (np.ones((2, 4, 4), bool), [], "masks 16 of 16 patches"),
    "nothing masked": (np.zeros((2, 4, 4), bool), [], "masks 0 of 16 patches"),
    "not all as many": (uneven(), [], f"mask 2 masks {uneven()[2].sum()} of 16 patches and mask 0 8, all must mask as"),
    "other numbers": (
        halves(3).astype(np.uint8) * np.array([1, 1, 255], np.uint8)[:, None, None],
        [],
        "mask 2 holds 255",
    ),
    "another grid": (halves(3, (2, 8)), [], "for 2×8 patches, the model has 4×4"),
    "another ratio": (halves(), ["--mask_ratio", "0.6"], "masks 8 of 16 patches; leave --mask_ratio out"),
    "two kinds": (halves(), ["--masking", "block"], "--masking block: must be file, or left out, with --masks"),
    "random is a kind": (halves(), ["--masking", "random"], "--masking random: must be file"),
}


@pytest.mark.parametrize("command", ["pretrain", "reconstruct"])
@pytest.mark.parametrize("case", WRONG)
def test_masks_that_cannot_work_are_one_line(case, command, blobs, finished, tmp_path, refusal):
    masks, words, expected = WRONG[case]
    path = tmp_path / "masks.npy"
    if isinstance(masks, dict):
        with open(path, "wb") as file:
            np.savez(file, **masks)
    elif isinstance(masks, str):
        path.mkdir()
    elif masks is not None:
        np.save(path, masks, allow_pickle=True)
    given_words = dict(
        pretrain=["--data_path", blobs, "--output_dir", str(tmp_path / "out")],
        reconstruct=[str(finished), "--images", blobs, "--output", str(tmp_path / "a.png")],
    )[command]
    line = refusal([command, *given_words, "--masks", str(path), *words])
    assert line.startswith("fastmae: --mask")
    assert expected in line
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "a.png").exists()


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--masking", "file"], "--masking file: must be given together with --masks FILE.npy"),
        (["--masking", "grid", "--mask_ratio", "0.5"], "--mask_ratio 0.5: must be 0.75 with --masking grid"),
        (["--masking", "grid", "--input_size", "20", "16"], "--masking grid: the model has 5×4 patches, not even"),
        (["--masking", "stripes"], "--masking"),
    ],
)
def test_other_flags_that_cannot_work_are_one_line(words, expected, blobs, tmp_path, refusal):
    given_words = ["pretrain", "--data_path", blobs, "--output_dir", str(tmp_path / "out"), *words]
    line = refusal(given_words)
    assert expected in line
    assert not (tmp_path / "out").exists()


def test_reconstruct_refuses_a_ratio_that_leaves_nothing(finished, blobs, tmp_path, refusal):
    for ratio in ("0.99", "1.5"):
        words = [str(finished), "--images", blobs, "--output", str(tmp_path / "a.png"), "--mask_ratio", ratio]
        line = refusal(["reconstruct", *words])
        assert f"--mask_ratio {ratio}: " in line


def test_a_damaged_file_is_refused_or_whole(tmp_path):
    """Cut anywhere, or with any byte of its header changed: never another error, never other masks unnoticed."""
    path = tmp_path / "damaged.npy"
    whole = Path(saved(tmp_path, halves().astype(np.uint8))).read_bytes()
    rng = np.random.default_rng(0)
    cut = [whole[:end] for end in range(0, len(whole), 7)]
    changed = []
    for position in range(128):
        data = bytearray(whole)
        data[position] ^= rng.integers(1, 256)
        changed.append(bytes(data))
    errors = []
    for data in cut + changed:
        path.write_bytes(data)
        try:
            file = open_masks(str(path), None)
        except UserError as error:
            errors.append(str(error))
        else:
            assert data not in cut
            assert (file.masked.sum(axis=(1, 2)) == file.count).all()
    assert len(errors) > len(cut) + 40
    assert all("\n" not in error and str(path) in error for error in errors)


def test_many_masks_are_checked_to_the_last(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "CHECKED_AT_ONCE", 64)  # four masks at a time
    masks = halves(11)
    path = saved(tmp_path, masks)
    assert open_masks(path, None).digest == open_masks(saved(tmp_path, np.asfortranarray(masks), "f.npy"), None).digest
    masks[10, 0] = ~masks[10, 0, 0]
    with pytest.raises(UserError, match="mask 10 masks"):
        open_masks(saved(tmp_path, masks), None)


def test_the_published_masks_stay_the_default():
    assert (PretrainConfig().masking, PretrainConfig().masks, PretrainConfig().mask_ratio) == (None, "", None)


# --- runs -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(blobs, tmp_path_factory):
    """A run of one epoch with random masks."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    assert pretrain(small_run(blobs, folder, epochs=1)) == 0
    return folder


def flags_of(masking, folder):
    if masking == "file":
        return dict(masks=saved(folder, halves()))
    return dict(masking=masking, **(dict(mask_ratio=0.6) if masking == "block" else {}))


@pytest.mark.parametrize("masking", ["block", "grid", "file"])
def test_a_run_uses_its_masks_shows_them_and_goes_on_exactly(masking, blobs, tmp_path, monkeypatch, capsys):
    seen, pictures = [], []
    take_step, draw = training.train_step, training.save_grid

    def recording_step(loss_of, optimizer, micro_batches, *rest):
        batches = list(micro_batches)
        seen.extend(ids.clone() for _, ids in batches)
        return take_step(loss_of, optimizer, iter(batches), *rest)

    def recording_grid(path, rows, title):
        pictures.append(rows)
        return draw(path, rows, title)

    monkeypatch.setattr(training, "train_step", recording_step)
    monkeypatch.setattr(training, "save_grid", recording_grid)
    config = small_run(blobs, tmp_path / "run", epochs=2, repeated_masks=2, **flags_of(masking, tmp_path))
    assert pretrain(config) == 0

    K = dict(block=6, grid=4, file=8)[masking]
    settings = json.loads((tmp_path / "run" / "config.json").read_text())
    assert (settings["masking"], int(16 * (1 - settings["mask_ratio"]))) == (masking, K)
    assert f"masks           {16 - K} of 16 patches" in capsys.readouterr().out

    # Both masks of the 72 images in 2 epochs are drawn with numbers of their own, and are what those give.
    file = open_masks(config.masks, None)
    expected = shuffled_ids(torch.arange(2 * 2 * 72), Masks(masking, 0, (4, 4), K, file), CPU)
    assert sorted(torch.cat(seen).tolist()) == sorted(expected.tolist())

    original, grayed, _ = pictures[-1]
    patches = [picture.view(-1, 4, 4, 4, 4).transpose(2, 3).reshape(-1, 16, 16) for picture in (original, grayed)]
    visible = torch.zeros(len(original), 16, dtype=torch.bool).scatter_(1, expected[: len(original), :K].long(), True)
    assert torch.equal(patches[0][visible], patches[1][visible])
    assert (patches[1][~visible].float() - 127.5).abs().max() <= 1

    shutil.copytree(tmp_path / "run", tmp_path / "again")
    shutil.rmtree(max((tmp_path / "again" / "checkpoints").iterdir()))
    assert pretrain(replace(config, output_dir=str(tmp_path / "again"), resume="auto")) == 0
    assert_same_run(tmp_path / "again", tmp_path / "run")


def test_a_run_is_not_continued_with_other_masks(blobs, finished, tmp_path):
    config = small_run(blobs, tmp_path / "run", epochs=2, resume=str(finished))
    with pytest.raises(UserError, match="was made with masking random, not block"):
        pretrain(replace(config, masking="block"))
    given_run = small_run(blobs, tmp_path / "given", epochs=1, masks=saved(tmp_path, halves()), resume="auto")
    assert pretrain(given_run) == 0
    other = replace(given_run, epochs=2, masks=saved(tmp_path, halves(seed=9), "other.npy"))
    with pytest.raises(
        UserError, match=r"was made with given_masks 5 masks of 4×4, 8 masked \(.*\), not 5 masks of 4×4"
    ):
        pretrain(other)
    # The same masks are the same wherever they lie and whatever their dtype.
    moved = replace(given_run, epochs=2, masks=saved(tmp_path, halves().astype(np.uint8), "moved.npy"))
    assert pretrain(replace(moved, mask_ratio=0.5)) == 0
    assert len(metrics(tmp_path / "given")) == 18


def test_a_run_from_before_masks_could_be_chosen_goes_on(blobs, finished, tmp_path):
    shutil.copytree(finished, tmp_path / "run")
    for path in (tmp_path / "run" / "checkpoints").glob("*/manifest.json"):
        manifest = json.loads(path.read_text())
        for name in ("masking", "masks", "given_masks"):
            del manifest["settings"][name]
        del manifest["sha256"]
        path.write_text(manifest_text(manifest))
    config = small_run(blobs, tmp_path / "run", epochs=2, resume="auto")
    with pytest.raises(UserError, match="was made with masking random, not grid"):
        pretrain(replace(config, masking="grid"))
    assert pretrain(config) == 0
    assert len(metrics(tmp_path / "run")) == 18


def test_reconstruct_draws_the_masks_that_are_asked_for(finished, blobs, tmp_path, monkeypatch):
    shown = []
    monkeypatch.setattr("fastmae.evaluate.reconstruct.save_grid", lambda path, rows, title: shown.append((rows, title)))
    words = ["reconstruct", str(finished), "--images", blobs, "--seed", "5"]
    for more in ([], ["--masking", "block"], ["--masking", "grid"], ["--masks", saved(tmp_path, halves())]):
        assert main([*words, *more]) == 0
    kinds = [("random", 4, 0.75), ("block", 4, 0.75), ("grid", 4, 0.75), ("file", 8, 0.5)]
    for (masking, K, ratio), ((original, grayed, _), title) in zip(kinds, shown, strict=True):
        file = open_masks(str(tmp_path / "masks.npy"), None) if masking == "file" else None
        ids = shuffled_ids(torch.arange(8), Masks(masking, 5, (4, 4), K, file), CPU)
        model = fastmae.mae_vit_tiny_patch4(img_size=16, in_chans=1)
        cut = [model.patchify(images.permute(0, 3, 1, 2).float()) for images in (original, grayed)]
        same = (cut[0] == cut[1]).all(dim=2)
        assert same.gather(1, ids[:, :K].long()).all()
        assert not same.gather(1, ids[:, K:].long()).any()
        assert title.startswith(f"{ratio:.0%}")
