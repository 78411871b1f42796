"""Continual pretraining: shares of joined paths, and an encoder that is held near the weights that it began with."""

import json
import shutil

import numpy as np
import pytest
import torch
from helpers import assert_same_run, metrics, small_run
from hypothesis import given, settings
from hypothesis import strategies as st
from ranks import run_ranks

from fastmae.checkpoint.load import load_model
from fastmae.config import PretrainConfig
from fastmae.data.plan import drawn_samples, plan_epoch, shares_of
from fastmae.errors import SettingError
from fastmae.facts import Shares
from fastmae.train.anchor import in_checkpoint, pull_back, start_anchor
from fastmae.train.pretrain import pretrain

PATHS = st.lists(st.tuples(st.integers(1, 40), st.floats(0.01, 10)), min_size=2, max_size=4)


@settings(deadline=None, max_examples=60)
@given(PATHS, st.integers(0, 9), st.integers(0, 2**64 - 1))
def test_an_epoch_has_all_of_the_first_path_and_the_share_of_each_other(paths, epoch, seed):
    images, weights = zip(*paths, strict=True)
    shares = shares_of(images, weights)
    assert shares.draws[0] == images[0]
    for draws, weight in zip(shares.draws, weights, strict=True):
        assert draws == max(1, round(images[0] * weight / weights[0]))
    drawn = drawn_samples(seed, epoch, shares)
    ends = np.cumsum((0, *images))
    for path, draws in enumerate(shares.draws):
        assert ((drawn >= ends[path]) & (drawn < ends[path + 1])).sum() == draws
    assert np.array_equal(drawn, drawn_samples(seed, epoch, shares))


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 30), st.integers(1, 70), st.integers(0, 99))
def test_every_image_is_drawn_before_one_is_drawn_again(images, draws, seed):
    shares = Shares(images=(5, images), draws=(5, draws))
    epochs = -(-3 * images // draws)
    drawn = np.concatenate([drawn_samples(seed, epoch, shares)[5:] - 5 for epoch in range(epochs)])
    for start in range(0, len(drawn) - images + 1, images):
        assert sorted(drawn[start : start + images]) == list(range(images))
    counts = np.bincount(drawn, minlength=images)
    assert counts.max() - counts.min() <= 1


def test_ranks_share_the_draws_of_an_epoch_and_no_two_have_the_same_draw_id():
    shares = Shares(images=(12, 5), draws=(12, 8))
    (alone,) = [[plan_epoch(3, 2, 17, 4, 0, 1, None, shares).batch(i) for i in range(5)]]
    halves = [plan_epoch(3, 2, 17, 2, rank, 2, None, shares) for rank in range(2)]
    together = [np.concatenate([half.batch(i)[0] for half in halves]) for i in range(5)]
    assert all(np.array_equal(a[0], b) for a, b in zip(alone, together, strict=True))
    ids = np.concatenate([ids for _, ids in alone])
    assert sorted(ids) == list(range(40, 60))  # of epoch 2, of 20 draws each
    assert sorted(np.concatenate([indices for indices, _ in alone])) == sorted(drawn_samples(3, 2, shares))


@pytest.mark.parametrize(
    ("flags", "name"),
    [
        (dict(data_weights=(1.0,)), "data_weights"),
        (dict(data_path=("a", "b"), data_weights=(1.0, 2.0, 3.0)), "data_weights"),
        (dict(data_path=("a", "b"), data_weights=(1.0, 0.0)), "data_weights"),
        (dict(data_path=("a", "b"), data_weights=(1.0, float("nan"))), "data_weights"),
        (dict(l2sp=0.1), "l2sp"),
        (dict(l2sp=-0.1, init="x"), "l2sp"),
        (dict(l2sp=2e3, lr=1e-3, init="x"), "l2sp"),
    ],
)
def test_what_cannot_be_meant_is_refused(flags, name):
    with pytest.raises(SettingError) as refused:
        PretrainConfig(**flags)
    assert refused.value.name == name


@pytest.fixture(scope="module")
def old_and_new(tmp_path_factory):
    """Two arrays of labelled images of 16×16, and a run that was trained on the first."""
    folder = tmp_path_factory.mktemp("continual")
    rng = np.random.default_rng(0)
    for name, count, tone in (("old", 60, 60), ("new", 72, 160)):
        labels = np.arange(count) % 3
        images = rng.integers(0, 60, (count, 16, 16, 1)) + tone + 20 * labels[:, None, None, None]
        np.save(folder / f"{name}.npy", images.astype(np.uint8))
        np.save(folder / f"{name}_labels.npy", labels)
    assert pretrain(small_run(folder / "old.npy", folder / "first", epochs=1)) == 0
    return folder


def going_on(folder, output, **changes):
    both = (str(folder / "new.npy"), str(folder / "old.npy"))
    chosen = dict(
        data_weights=(0.8, 0.2), init=str(folder / "first"), l2sp=0.5, epochs=2, checkpoint_freq=6, keep=9, probe=True
    )
    return small_run(both, output, **{**chosen, **changes})


@pytest.fixture(scope="module")
def run(old_and_new):
    assert pretrain(going_on(old_and_new, old_and_new / "run")) == 0
    return old_and_new / "run"


def test_the_run_says_what_it_draws_and_measures_each_path_after_every_epoch(old_and_new, run):
    config = json.loads((run / "config.json").read_text())
    assert config["dataset_length"] == 72 + 18
    probes = json.loads((run / "probe.json").read_text())
    assert [{"knn_path_1", "knn_path_2"} <= probes["epochs"][str(epoch)].keys() for epoch in (1, 2)] == [True] * 2
    assert {"knn_path_1", "knn_path_2"} <= probes["before"].keys() & probes["after"].keys()
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "knn_path_2" in row] == [len(rows) // 2 * epoch for epoch in (1, 2)]


def test_a_run_that_was_stopped_goes_on_to_the_same_bits_without_the_first_run(old_and_new, run, tmp_path):
    stopped, first = shutil.copytree(run, tmp_path / "run"), old_and_new / "first"
    for newer in sorted((stopped / "checkpoints").glob("step-*"))[1:]:
        shutil.rmtree(newer)
    first.rename(tmp_path / "away")
    try:
        assert pretrain(going_on(old_and_new, stopped, resume="auto")) == 0
    finally:
        (tmp_path / "away").rename(first)
    assert_same_run(run, stopped)


@pytest.mark.parametrize("changes", [dict(data_weights=(0.5, 0.5)), dict(l2sp=0.25), dict(data_weights=None)])
def test_a_run_does_not_go_on_with_other_shares(old_and_new, run, tmp_path, changes):
    stopped = shutil.copytree(run, tmp_path / "run")
    with pytest.raises(SettingError) as refused:
        pretrain(going_on(old_and_new, stopped, resume="auto", epochs=4, **changes))
    assert f"was made with {next(iter(changes))} " in refused.value.problem


def test_the_encoder_stays_nearer_to_its_first_weights(old_and_new, tmp_path):
    unmeasured = dict(epochs=1, probe=False, data_weights=None, checkpoint_freq=99)
    assert pretrain(going_on(old_and_new, tmp_path / "free", l2sp=0.0, **unmeasured)) == 0
    assert pretrain(going_on(old_and_new, tmp_path / "held", l2sp=3000.0, **unmeasured)) == 0
    first = load_model(old_and_new / "first").state_dict()

    def distance(folder):
        weights = load_model(folder).state_dict()
        names = [name for name in first if not name.startswith(("decoder_", "mask_token"))]
        return sum(float((weights[name] - first[name]).square().sum()) for name in names) ** 0.5

    assert distance(tmp_path / "held") < 0.8 * distance(tmp_path / "free")


def test_steps_are_those_of_a_plain_loop():
    """AdamW, then w ← w + lr · α · (w⁰ − w) for the encoder alone; a skipped step changes nothing."""
    torch.manual_seed(0)
    model = torch.nn.ModuleDict({"blocks": torch.nn.Linear(5, 5), "decoder_embed": torch.nn.Linear(5, 3)}).double()
    plain = torch.nn.ModuleDict({"blocks": torch.nn.Linear(5, 5), "decoder_embed": torch.nn.Linear(5, 3)}).double()
    plain.load_state_dict(model.state_dict())
    anchor = start_anchor(model, 0.3, None)
    assert in_checkpoint(anchor).keys() == {"anchor.blocks.weight", "anchor.blocks.bias"}
    first = {name: weight.detach().clone() for name, weight in plain.named_parameters()}
    ours, theirs = (torch.optim.AdamW(one.parameters(), lr=0.1, weight_decay=0.05) for one in (model, plain))
    for step in range(20):
        x = torch.randn(7, 5, dtype=torch.float64)
        for one, optimizer in ((model, ours), (plain, theirs)):
            optimizer.zero_grad()
            one["decoder_embed"](one["blocks"](x)).square().mean().backward()
            optimizer.step()
        pull_back(anchor, model, 0.1 * 0.3, torch.zeros([], dtype=torch.float64))
        with torch.no_grad():
            for name, weight in plain.named_parameters():
                if name.startswith("blocks"):
                    weight += 0.1 * 0.3 * (first[name] - weight)
        if step == 10:
            before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
            pull_back(anchor, model, 0.1 * 0.3, torch.ones([]))
            assert all(torch.equal(before[name], weight) for name, weight in model.named_parameters())
    for (name, weight), other in zip(model.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(weight, other, rtol=1e-12, atol=1e-12, msg=name)


def test_nothing_is_held_without_a_strength():
    model = torch.nn.Linear(2, 2)
    assert start_anchor(model, 0.0, None) == {}


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_two_ranks_are_one(old_and_new, run, tmp_path, parallel):
    run_ranks(2, going_on(old_and_new, tmp_path / "run", batch_size=4, parallel=parallel))
    np.testing.assert_allclose(metrics(tmp_path / "run"), metrics(run), rtol=1e-5)
