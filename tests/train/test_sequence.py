"""The trainer does what a plain loop around the plain model does, and the published recipe is the one it follows."""

import math

import numpy as np
import pytest
import torch
from helpers import metrics, small_run

from fastmae.config.model import ModelSpec
from fastmae.data.loader import View, load_batches
from fastmae.data.plan import plan_epoch
from fastmae.data.reading import Reading
from fastmae.data.sources import open_train
from fastmae.data.statistics import measure
from fastmae.model.build import build_model
from fastmae.model.reference import ReferenceMAE
from fastmae.ops import random_masking
from fastmae.train.optim import make_optimizer
from fastmae.train.pretrain import pretrain
from fastmae.train.schedule import learning_rate

SETTINGS = dict(model="mae_vit_tiny_patch4", input_size=16, in_chans=1)
TINY = dict(embed_dim=128, depth=4, num_heads=4, decoder_embed_dim=96, decoder_depth=2, decoder_num_heads=3)


@pytest.mark.parametrize("norm_pix", [False, True])
def test_twenty_steps_are_those_of_a_plain_loop(blobs, tmp_path, norm_pix):
    """Same data, same masks, same start; the plain loop's optimiser, groups and schedule are spelled out here."""
    config = small_run(blobs, tmp_path, epochs=3, blr=0.02, norm_pix_loss=norm_pix, seed=11)
    assert pretrain(config) == 0

    source = open_train(blobs)
    measured = measure(source, Reading(1))
    mean, std = measured.mean, measured.std
    torch.manual_seed(11)
    start = build_model(ModelSpec(**SETTINGS, norm_pix_loss=norm_pix, mean=mean, std=std))
    model = ReferenceMAE((16, 16), (4, 4), 1, **TINY, norm_pix_loss=norm_pix)
    model.load_state_dict(start.state_dict())
    decayed, plain = [], []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            (plain if name.endswith("bias") or "norm" in name else decayed).append(parameter)
    groups = [{"params": plain, "weight_decay": 0.0}, {"params": decayed, "weight_decay": 0.05}]
    optimizer = torch.optim.AdamW(groups, lr=1.0, betas=(0.9, 0.95), foreach=False, fused=False)
    peak = 0.02 * 8 / 256
    expected = []
    for epoch in range(3):
        plan = plan_epoch(11, epoch, 72, 8)
        view = View((16, 16), Reading(1), seed=11, scale=(0.2, 1.0))
        requests = (plan.batch(k) for k in range(9))
        for k, batch in enumerate(load_batches(source, requests, view, device=torch.device("cpu"), num_workers=1)):
            now = epoch + k / 9
            lr = peak * now if now < 1 else peak * 0.5 * (1 + math.cos(math.pi * (now - 1) / 2))
            for group in optimizer.param_groups:
                group["lr"] = lr
            images = ((batch.images / 255 - mean[0]) / std[0]).permute(0, 3, 1, 2)
            ids = random_masking(batch.draw_ids, 11, 16).long()
            loss, _, _ = model(images, ids, 0.75)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            expected.append((len(expected) + 1, epoch, loss.item(), lr))
    logged = metrics(tmp_path)
    assert len(logged) == 27
    np.testing.assert_allclose(logged, expected, rtol=1e-4)
    assert abs(logged[-1][2] - logged[0][2]) > 0.05, "nothing was learnt, so nothing was compared"


def test_accumulation_is_a_larger_batch(blobs, tmp_path):
    assert pretrain(small_run(blobs, tmp_path / "whole", batch_size=24)) == 0
    assert pretrain(small_run(blobs, tmp_path / "parts", batch_size=8, accum_iter=3)) == 0
    np.testing.assert_allclose(metrics(tmp_path / "whole"), metrics(tmp_path / "parts"), rtol=1e-5)


def test_learning_rate_follows_the_published_schedule():
    settings = dict(lr=2.0, min_lr=0.5, warmup_epochs=40, epochs=100)
    assert learning_rate(0, **settings) == 0
    assert learning_rate(10, **settings) == 0.5
    assert learning_rate(40, **settings) == 2.0
    assert learning_rate(70, **settings) == pytest.approx(1.25)
    assert learning_rate(100, **settings) == pytest.approx(0.5)
    assert learning_rate(0, **{**settings, "warmup_epochs": 0}) == 2.0


def test_groups_are_the_published_ones_in_the_published_order():
    model = build_model(ModelSpec(**SETTINGS))
    optimizer = make_optimizer(model, 1.0, 0.05)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    plain, decayed = ([names[id(p)] for p in group["params"]] for group in optimizer.param_groups)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.0, 0.05]
    assert [group["betas"] for group in optimizer.param_groups] == [(0.9, 0.95)] * 2
    assert decayed[:4] == ["cls_token", "mask_token", "patch_embed.proj.weight", "blocks.0.attn.qkv.weight"]
    assert plain[:3] == ["patch_embed.proj.bias", "blocks.0.norm1.weight", "blocks.0.norm1.bias"]
    assert all(name.endswith("bias") or "norm" in name for name in plain)
    assert not [name for name in decayed if name.endswith("bias") or "norm" in name or "pos_embed" in name]
    assert len(plain) + len(decayed) == sum(p.requires_grad for p in model.parameters())
