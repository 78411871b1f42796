"""The adversarial term: gradients and steps against a plain loop, the same bits before it begins, resuming."""

import json
import math
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers import assert_same_run, final_state, metrics, small_run
from ranks import run_ranks, start_ranks
from torch import nn

import fastmae
from fastmae.checkpoint.restore import Restored
from fastmae.config import PretrainConfig, resolve
from fastmae.errors import UserError
from fastmae.facts import DataFacts, PixelFacts
from fastmae.model.conv import ConvMAE
from fastmae.model.convnext import ConvNeXtMAE
from fastmae.model.discriminator import Discriminator, adaptive_weight, pasted
from fastmae.model.family import blocks_of
from fastmae.model.pixels import register_pixels
from fastmae.report.figures import drawn_charts
from fastmae.report.run_folder import read_run
from fastmae.train.adversary import BETAS, TOLD, Adversary, make_adversary, make_optimizers
from fastmae.train.average import start_average
from fastmae.train.optim import make_optimizer
from fastmae.train.pretrain import pretrain
from fastmae.train.recovery import find_not_finite
from fastmae.train.schedule import Steps
from fastmae.train.step import Sides, TrainingLoss, train_step

SMALL = dict(img_size=16, in_chans=1, embed_dim=32, depth=2, num_heads=2)
SMALL |= dict(decoder_embed_dim=24, decoder_depth=1, decoder_num_heads=2)
N, WEIGHT, R1 = 6, 0.7, 3.0


def parts(kind="r1", norm_pix=False, dtype=torch.float64):
    torch.manual_seed(0)
    model = fastmae.mae_vit_tiny_patch4(**SMALL, norm_pix_loss=norm_pix).to(dtype)
    adversary = Adversary(Discriminator((16, 16), 1, spectral=kind == "spectral").to(dtype), kind, R1)
    return model, adversary


def batch(seed=0):
    images = torch.randint(0, 256, (N, 16, 16, 1), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    return images, fastmae.ops.random_masking(torch.arange(N), seed, 16)


def normalised(images):
    """Float64 [N, C, H, W], as pixels of 8 bits are normalised in float32."""
    return ((images.double() / 255 - 0.5) / 0.25).permute(0, 3, 1, 2)


def off():
    return torch.autocast("cpu", enabled=False)


def pasted_in_loops(real, pred, ids, norm_pix):
    """Square patches put into square images [N, 1, H, H] one by one."""
    rows, side = [], math.isqrt(pred.shape[2])
    grid = real.shape[2] // side
    for image, patches, numbers in zip(real, pred, ids.tolist(), strict=True):
        corners = {n: (n // grid * side, n % grid * side) for n in range(grid**2)}
        cells = {n: image[:, y : y + side, x : x + side] for n, (y, x) in corners.items()}
        for number, patch in zip(numbers, patches, strict=True):
            new = patch.view(1, side, side)
            if norm_pix:
                target = cells[number]
                new = new * (target.var() + 1e-6).sqrt() + target.mean()
            cells[number] = new
        lines = [torch.cat([cells[grid * row + column] for column in range(grid)], dim=2) for row in range(grid)]
        rows.append(torch.cat(lines, dim=1))
    return torch.stack(rows)


def plain_losses(model, discriminator, kind, images, ids):
    """Every loss written out, with graphs: (reconstruction, adversarial, λ, discriminator's)."""
    loss, pred = model.loss_and_prediction(images, ids, 0.75)
    real = (normalised(images).float() if images.dtype == torch.uint8 else images).clone().requires_grad_()
    fake = pasted_in_loops(real.detach(), pred, ids[:, ids.shape[1] // 4 :], model.norm_pix_loss)
    discriminator.eval()  # so that spectral norms stay where the adversary left them
    adversarial = -discriminator(fake).mean()
    last = model.last_layer.weight
    of_loss = torch.autograd.grad(loss, last, retain_graph=True)[0].norm()
    of_adversarial = torch.autograd.grad(adversarial, last, retain_graph=True)[0].norm()
    factor = min(of_loss / (of_adversarial + 1e-4), torch.tensor(1e4, dtype=pred.dtype))
    of_real, of_fake = discriminator(real), discriminator(fake.detach())
    hinge = ((1 - of_real).clamp(min=0).mean() + (1 + of_fake).clamp(min=0).mean()) / 2
    others = hinge
    if kind == "r1":
        (gradient,) = torch.autograd.grad(of_real.sum(), real, create_graph=True)
        per_logit = gradient.square().sum(dim=(1, 2, 3)).mean() / of_real[0].numel()
        others = hinge + R1 / 2 * per_logit
    return loss, adversarial, factor, hinge, others


# --- gradients and steps ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "norm_pix"), [("r1", False), ("spectral", True), ("none", True)])
def test_gradients_of_both_sides_are_those_of_losses_written_out_in_float64(kind, norm_pix):
    model, adversary = parts(kind, norm_pix)
    adversary.weight = WEIGHT
    images, ids = normalised(batch()[0]), batch()[1]
    value = TrainingLoss(model, 0.75, None, adversary)(images, ids)
    value.backward()
    got = {id(p): p.grad for p in (*model.parameters(), *adversary.parameters()) if p.requires_grad}
    loss, adversarial, factor, hinge, others = plain_losses(model, adversary.discriminator, kind, images, ids)
    assert torch.equal(value.detach(), loss.detach()), "what is logged is the reconstruction loss"
    told = adversary.take_told()
    torch.testing.assert_close([told[name].item() for name in TOLD], [x.item() for x in (hinge, adversarial, factor)])
    assert list(adversary.told) == []
    for side, total in ((model, loss + WEIGHT * factor * adversarial), (adversary, others)):
        weights = [p for p in side.parameters() if p.requires_grad]
        for weight, expected in zip(weights, torch.autograd.grad(total, weights, retain_graph=True), strict=True):
            torch.testing.assert_close(got[id(weight)], expected, rtol=1e-9, atol=1e-12)


FAMILIES = {
    "vit": lambda: fastmae.mae_vit_tiny_patch4(**SMALL),
    "convnext": lambda: ConvNeXtMAE(64, 1, (1, 1, 1, 1), (8, 8, 16, 16), True, decoder_embed_dim=8),
    "conv": lambda: ConvMAE(16, 4, 1, widths=(4, 8), latent_dim=6, loss_on="all", fill="noise"),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_of_each_family_in_float32_are_those_of_losses_written_out(family):
    """By the kernels of float32, whose backward pass at the last layer is called twice."""
    torch.manual_seed(1)
    model = FAMILIES[family]()
    height, width = model.img_size
    adversary = Adversary(Discriminator(model.img_size, 1), "r1", R1)
    adversary.weight = WEIGHT
    images = torch.randint(0, 256, (N, height, width, 1), dtype=torch.uint8)
    ids = fastmae.ops.random_masking(torch.arange(N), 0, model.num_patches)
    value = TrainingLoss(model, 0.75, None, adversary)(images, ids)
    value.backward()
    got = [p.grad for p in (*model.parameters(), *adversary.parameters()) if p.requires_grad]
    loss, adversarial, factor, _, others = plain_losses(model, adversary.discriminator, "r1", images, ids)
    assert value.item() == loss.item()
    totals = (model, loss + WEIGHT * factor.detach() * adversarial), (adversary, others)
    weights = [[p for p in side.parameters() if p.requires_grad] for side, _ in totals]
    expected = [
        gradient
        for one, (_, total) in zip(weights, totals, strict=True)
        for gradient in torch.autograd.grad(total, one, retain_graph=True)
    ]
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5 * (1 + other.abs().max().item()))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_last_layer_is_in_no_block_that_is_compiled_or_sharded_by_itself(family):
    """Gradients by it are taken after the forward pass of all blocks, with the graph kept."""
    model = FAMILIES[family]()
    assert blocks_of(model)
    assert not any(part is model.last_layer for block in blocks_of(model) for part in block.modules())


def test_a_gradient_of_the_discriminator_that_is_not_finite_is_found():
    model, adversary = parts(dtype=torch.float32)
    adversary.weight = WEIGHT
    loss_of = TrainingLoss(model, 0.75, None, adversary)
    adversary.discriminator.layers[2].bias.register_hook(lambda gradient: gradient * float("nan"))

    def losses():
        yield loss_of(*batch())

    found = find_not_finite(model, losses, lambda flag: flag, loss_of)
    assert found == "the gradient of discriminator.layers.2.bias"
    assert all(weight.grad is None for weight in loss_of.parameters())


def test_the_adversarial_gradient_of_the_last_layer_is_at_most_as_long_as_that_of_the_loss():
    gradient = torch.randn(5, 7, dtype=torch.float64)
    assert adaptive_weight(gradient, 1e3 * gradient) * (1e3 * gradient).norm() < gradient.norm()
    assert adaptive_weight(gradient, torch.zeros(5, 7)) == 1e4
    assert adaptive_weight(torch.zeros(5, 7), gradient) == 0


@pytest.mark.parametrize("steps", [4, pytest.param(20, marks=pytest.mark.slow)])
def test_steps_are_those_of_a_plain_loop_with_two_optimisers(steps):
    """Two micro-batches each, clipped; torch's own AdamW, one for each side."""
    model, adversary = parts()
    adversary.weight = WEIGHT
    loss_of = TrainingLoss(model, 0.75, None, adversary)
    rival = torch.optim.AdamW(adversary.parameters(), lr=1e-3, betas=BETAS, weight_decay=0.0, fused=True)
    sides = Sides(make_optimizer(model, 1e-3, 0.05), rival, adversary.take_told)
    other, its_adversary = parts()
    discriminator = its_adversary.discriminator
    one = torch.optim.AdamW(make_optimizer(other, 1e-3, 0.05).param_groups, lr=1e-3, betas=(0.9, 0.95), fused=False)
    two = torch.optim.AdamW(discriminator.parameters(), lr=1e-3, betas=BETAS, weight_decay=0.0, fused=False)
    for step in range(steps):
        micro = [(normalised(images), ids) for images, ids in (batch(2 * step), batch(2 * step + 1))]
        result = train_step(loss_of, sides, micro, 2, 1e-3, off(), 0.5)
        one.zero_grad()
        two.zero_grad()
        losses = []
        for images, ids in micro:
            loss, adversarial, factor, _, others = plain_losses(other, discriminator, "r1", images, ids)
            losses.append(loss.item())
            weights = [[p for p in side.parameters() if p.requires_grad] for side in (other, discriminator)]
            totals = (loss + WEIGHT * factor.detach() * adversarial) / 2, others / 2
            for side, total in zip(weights, totals, strict=True):
                for weight, gradient in zip(side, torch.autograd.grad(total, side, retain_graph=True), strict=True):
                    weight.grad = gradient if weight.grad is None else weight.grad + gradient
        for side in weights:
            nn.utils.clip_grad_norm_(side, 0.5)
        one.step()
        two.step()
        assert result.loss.item() == pytest.approx(np.mean(losses), rel=1e-7)
        assert result.told.keys() == set(TOLD)
    for side, expected in ((model, other), (adversary.discriminator, discriminator)):
        for (name, got), wanted in zip(side.state_dict().items(), expected.state_dict().values(), strict=True):
            torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-7, msg=name)


@pytest.mark.parametrize("culprit", ["discriminator", "model"])
def test_a_step_in_which_one_side_is_not_finite_changes_neither(culprit):
    model, adversary = parts(dtype=torch.float32)
    adversary.weight = WEIGHT
    loss_of = TrainingLoss(model, 0.75, None, adversary)
    rival = torch.optim.AdamW(adversary.parameters(), lr=1e-3, betas=BETAS, fused=True)
    sides = Sides(make_optimizer(model, 1e-3, 0.05), rival, adversary.take_told)

    def state():
        moments = [side.state_dict()["state"] for side in sides[:2]]
        tensors = [*loss_of.state_dict().values(), *(t for one in moments for s in one.values() for t in s.values())]
        return [tensor.clone() for tensor in tensors]

    def step(seed):
        return train_step(loss_of, sides, [batch(seed)], 1, 1e-3, off())

    assert step(0).skipped == 0
    before = state()
    weight = (adversary.discriminator.layers[0] if culprit == "discriminator" else model.norm).weight
    handle = weight.register_hook(lambda gradient: gradient * float("inf"))
    assert step(1).skipped == 1
    assert all(torch.equal(one, other) for one, other in zip(state(), before, strict=True))
    handle.remove()
    assert step(1).skipped == 0
    changed = [torch.equal(one, other) for one, other in zip(state(), before, strict=True)]
    assert changed.count(True) == 2, "the positions, which are no weights, alone stay"


def test_bf16_and_missing_pixels_train_both_sides():
    """A patch with a missing pixel is shown as it is: it moves neither the model nor the discriminator."""
    model, adversary = parts(dtype=torch.float32)
    register_pixels(model, 1, (0.5,), (0.25,), PixelFacts(dtype="uint8", nodata=7.0))
    adversary.weight = WEIGHT
    images, ids = batch()
    images[:, :4, :4] = 7
    seen = []
    adversary.discriminator.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].detach()))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = TrainingLoss(model, 0.75, None, adversary)(images, ids)
    loss.backward()
    real, fake = seen
    assert torch.equal(real[:, :, :4, :4], fake[:, :, :4, :4])
    assert not torch.equal(real, fake)
    for weight in (*model.parameters(), *adversary.parameters()):
        assert not weight.requires_grad or (weight.grad.isfinite().all() and weight.grad.abs().max() > 0)


# --- the discriminator ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(16, 16), (1, 96), (8, 8), (32, 224), (1, 1)])
def test_it_takes_images_of_any_size_and_larger_ones_and_judges_each_by_itself(size):
    discriminator = Discriminator(size, 3)
    larger = torch.randn(3, 3, *(2 * side if side > 1 else 1 for side in size))
    for images in (larger[:, :, : size[0], : size[1]], larger):
        logits = discriminator(images)
        assert logits.shape == (3, 1, *(-(-side // 8) for side in images.shape[2:]))
        torch.testing.assert_close(discriminator(images[1:2]), logits[1:2], rtol=1e-4, atol=1e-5)


def test_spectral_weights_have_a_largest_singular_value_of_one():
    discriminator = Discriminator((16, 16), 1, spectral=True)
    for _ in range(100):
        discriminator.judge(torch.zeros(1, 1, 16, 16), torch.ones(1, 1, 16, 16))
    for layer in discriminator.layers[::2]:
        assert torch.linalg.matrix_norm(layer.weight.flatten(1), 2).item() == pytest.approx(1, abs=1e-2)


@pytest.mark.parametrize("norm_pix", [False, True])
def test_patches_are_pasted_where_they_belong(norm_pix):
    real, pred = torch.randn(N, 1, 16, 16, dtype=torch.float64), torch.randn(N, 12, 16, dtype=torch.float64)
    ids = batch()[1][:, 4:]
    expected = pasted_in_loops(real, pred, ids, norm_pix)
    torch.testing.assert_close(pasted(real, pred, ids, (4, 4), norm_pix), expected, rtol=1e-12, atol=1e-12)
    assert torch.equal(pasted(real, pred, ids, (4, 4), norm_pix, torch.zeros(N, 12, dtype=torch.bool)), real)


# --- runs -------------------------------------------------------------------------------------------------------------

BLOBS = DataFacts(kind="npz", channels=1, size=(16, 16), labelled=True, length=72)
ADVERSARIAL = dict(adversarial=0.5, adversarial_start=1.0, adversarial_warmup=1.0)
SHORT = dict(epochs=2, save_freq=2, checkpoint_freq=7)


@pytest.fixture(scope="module")
def runs(blobs, tmp_path_factory):
    """A plain run, one with weight 0, and one with a discriminator after an epoch."""
    folder = tmp_path_factory.mktemp("runs")
    for name, more in (("plain", {}), ("zero", {"adversarial": 0.0}), ("adversarial", ADVERSARIAL | {"ema": 0.9})):
        assert pretrain(small_run(blobs, folder / name, **SHORT | more)) == 0
    return folder


def rows_of(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_with_weight_0_and_before_it_begins_a_run_is_a_plain_one_to_the_bit(runs):
    assert_same_run(runs / "plain", runs / "zero")
    plain, adversarial = metrics(runs / "plain"), metrics(runs / "adversarial")
    assert adversarial[:10] == plain[:10], "the loss of its first step comes before its first change"
    assert all(one != other for one, other in zip(adversarial[10:], plain[10:], strict=True))
    rows = rows_of(runs / "adversarial")
    assert not any(name in row for row in rows[:9] for name in TOLD)
    assert all(row[name] is not None for row in rows[9:] for name in TOLD)


def test_a_report_shows_both_sides_and_the_adaptive_weight(runs):
    titles = [chart["title"] for chart in drawn_charts([read_run(runs / "adversarial")])]
    assert {"Adversary", "Adaptive weight λ"} <= {*titles}
    assert not {"Adversary", "Adaptive weight λ"} & {c["title"] for c in drawn_charts([read_run(runs / "plain")])}


def test_a_checkpoint_has_all_of_the_adversary_and_an_official_file_nothing(runs):
    names = {name.split()[1] for name in final_state(runs / "adversarial")}
    assert {name.removeprefix("adversary.") for name in names if name.startswith("adversary.")} == {
        f"{kind}.layers.{layer}.{tensor}"
        for layer in (0, 2, 4, 6)
        for tensor in ("weight", "bias")
        for kind in ("model", "optimizer.step", "optimizer.exp_avg", "optimizer.exp_avg_sq")
    }
    files = [torch.load(runs / name / "checkpoint-1.pth", weights_only=True) for name in ("plain", "adversarial")]
    assert files[0]["model"].keys() == files[1]["model"].keys()
    assert len(files[0]["optimizer"]["state"]) == len(files[1]["optimizer"]["state"])


@pytest.mark.parametrize("kind", ["r1", pytest.param("spectral", marks=pytest.mark.slow)])
def test_a_run_that_goes_on_has_the_bits_of_one_that_never_stopped(kind, runs, blobs, tmp_path):
    config = small_run(blobs, tmp_path / "run", **SHORT, **ADVERSARIAL, ema=0.9)
    if kind == "r1":
        shutil.copytree(runs / "adversarial", tmp_path / "run")
        whole = runs / "adversarial"
    else:
        config, whole = replace(config, adversarial_regulariser=kind), tmp_path / "whole"
        assert pretrain(config) == 0
        shutil.copytree(tmp_path / "run", whole)
        assert any(name.endswith("layers.0.parametrizations.weight.0._u") for name in final_state(whole))
    shutil.rmtree(max((tmp_path / "run" / "checkpoints").glob("step-*")))
    assert pretrain(replace(config, resume="auto")) == 0
    assert_same_run(tmp_path / "run", whole)


OTHERS = {
    "conv": dict(model="mae_conv", widths=(4, 8), latent_dim=6),
    "convnext": dict(model="mae_convnextv2_atto", input_size=64),
}


@pytest.mark.parametrize("family", ["conv", pytest.param("convnext", marks=pytest.mark.slow)])
def test_a_run_of_another_family_goes_on_with_its_adversary(family, blobs, tmp_path):
    more = OTHERS[family] | dict(adversarial=1.0, adversarial_start=0.5, ema=0.9)
    config = small_run(blobs, tmp_path / "run", **{**SHORT, **more, "epochs": 1, "checkpoint_freq": 6})
    assert pretrain(config) == 0
    shutil.copytree(tmp_path / "run", tmp_path / "whole")
    assert any("adversary" in name for name in final_state(tmp_path / "whole"))
    shutil.rmtree(max((tmp_path / "run" / "checkpoints").glob("step-*")))
    assert pretrain(replace(config, resume="auto")) == 0
    assert_same_run(tmp_path / "run", tmp_path / "whole")


@pytest.mark.parametrize("own", ["training_loss", "forward_loss", "forward hook"])
def test_a_model_with_a_loss_of_its_own_takes_no_adversary(own, blobs, tmp_path):
    class Own(fastmae.MaskedAutoencoderViT):
        pass

    model = Own(**SMALL, patch_size=4)
    if own == "forward hook":
        model.register_forward_hook(lambda module, inputs, output: None)
    else:
        setattr(Own, own, lambda self, *arguments, **named: torch.zeros(()))  # after the model was made
    config = resolve(
        small_run(blobs, tmp_path, **SHORT | ADVERSARIAL), BLOBS, mean=(0.5,), std=(0.2,), ranks=1, num_workers=1
    )
    with pytest.raises(UserError, match=f"which a model with a {own} of its own does not give"):
        make_adversary(config, model, (16, 16), torch.clone)


def test_a_plain_run_goes_on_with_an_adversary_from_its_official_file(runs, blobs, tmp_path):
    config = small_run(blobs, tmp_path / "run", **SHORT, **ADVERSARIAL, resume=str(runs / "plain" / "checkpoint-0.pth"))
    assert pretrain(config) == 0
    assert metrics(tmp_path / "run") == metrics(runs / "adversarial")[9:]


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"adversarial": 0.25}, r"was made with adversarial 0\.5, not 0\.25"),
        (
            dict.fromkeys(("adversarial_start", "adversarial_warmup")) | {"adversarial": 0.0},
            r"adversarial 0\.5, not 0\.0",
        ),
        ({"adversarial_regulariser": "spectral"}, "was made with adversarial_regulariser r1, not spectral"),
    ],
)
def test_a_run_does_not_go_on_with_another_term(change, problem, runs, blobs):
    config = small_run(blobs, runs / "adversarial", **SHORT | ADVERSARIAL | change, ema=0.9, resume="auto")
    with pytest.raises(UserError, match=problem):
        pretrain(config)


def test_a_file_or_folder_of_weights_has_neither_an_adversary_nor_an_average(blobs, tmp_path, caplog):
    """Such as a folder of transformers, which is no checkpoint. That the discriminator begins anew is said."""
    model, adversary = parts(dtype=torch.float32)
    config = resolve(
        small_run(blobs, tmp_path, **SHORT | ADVERSARIAL), BLOBS, mean=(0.5,), std=(0.2,), ranks=1, num_workers=1
    )
    optimizer, steps = make_optimizer(model, 1e-3, 0.05), Steps(9, 18, 9)
    before = [weight.clone() for weight in adversary.parameters()]
    for step, said in ((9, False), (10, True)):
        caplog.clear()
        restored = Restored(step, None, str(tmp_path))
        optimizers = make_optimizers(optimizer, adversary, config, steps, restored)
        assert isinstance(optimizers(step), Sides)
        assert ("the discriminator begins anew with step 10" in caplog.text) == said
        assert all(map(torch.equal, before, adversary.parameters()))
        assert start_average(model, restored.checkpoint)


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        ("--adversarial -1", "--adversarial -1.0: must be 0 or more"),
        ("--adversarial_lr 1e-4", "--adversarial_lr 0.0001: must be given together with --adversarial"),
        ("--adversarial 1 --adversarial_lr 0", "--adversarial_lr 0.0: must be a positive number"),
        ("--adversarial 1 --adversarial_start -1", "--adversarial_start -1.0: must be 0 or more epochs"),
        ("--adversarial 1 --adversarial_regulariser spectral --adversarial_r1 1", "together with --adversarial_reg"),
        ("--adversarial 1 --model mae_conv --loss bce", "--loss bce: must be mse with --adversarial"),
        ("--adversarial 1 --model mae_mlp", "--adversarial 1.0: is for mae_vit_*, mae_convnextv2_*, mae_conv, not for"),
        ("--adversarial 1 --cuda_graph True", "--cuda_graph True: must be left out with --adversarial"),
        ("--adversarial 1 --compile model", "--compile model: must be off or block with --adversarial"),
    ],
)
def test_what_does_not_go_together_is_refused_in_a_line(words, problem, refusal, tmp_path):
    assert problem in refusal(["pretrain", "--output_dir", str(tmp_path), *words.split()])


def test_a_discriminator_that_would_never_take_part_is_refused():
    facts = DataFacts(kind="digits", channels=1, size=(8, 8), labelled=True, length=1438)
    config = PretrainConfig(adversarial=1.0, adversarial_start=2.0, epochs=2)
    with pytest.raises(UserError, match=r"^adversarial_start=2\.0: must be below the 2 of epochs"):
        resolve(config, facts, mean=(0.5,), std=(0.2,), ranks=1, num_workers=1)


# --- ranks and kills --------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["r1", "spectral", "conv"])
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_two_ranks_train_as_one(parallel, kind, blobs, tmp_path):
    """Also before it begins, where DistributedDataParallel waits for gradients of all weights."""
    of_kind = OTHERS["conv"] if kind == "conv" else {"adversarial_regulariser": kind}
    more = ADVERSARIAL | {"clip_grad": 1.0, "parallel": parallel} | of_kind
    assert pretrain(small_run(blobs, tmp_path / "one", **more)) == 0
    run_ranks(2, small_run(blobs, tmp_path / "two", **more | {"batch_size": 4}))
    np.testing.assert_allclose(metrics(tmp_path / "two"), metrics(tmp_path / "one"), rtol=1e-5)
    one, two = rows_of(tmp_path / "one")[9:], rows_of(tmp_path / "two")[9:]
    for name in TOLD:
        assert two[0][name] == pytest.approx(one[0][name], rel=2e-5), "before rounding has grown in training"
        np.testing.assert_allclose([row[name] for row in two], [row[name] for row in one], rtol=1e-3, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("settings", [{}, {"parallel": "fsdp", "adversarial_regulariser": "spectral"}], ids=str)
def test_killed_ranks_go_on_to_the_same_bits(settings, blobs, tmp_path):
    more = ADVERSARIAL | {"batch_size": 4, "checkpoint_freq": 3} | settings
    whole, killed = (small_run(blobs, tmp_path / name, **more) for name in ("whole", "killed"))
    run_ranks(2, whole)
    for kill_after in (14, 23, 30):
        ranks = start_ranks(2, replace(killed, resume="auto"))
        while ranks[0].process.is_alive() and ranks[0].journal().count("step ends") < kill_after % 9 + 2:
            ranks[0].process.join(0.02)
        for rank in ranks:
            rank.process.kill()
            rank.process.join()
    run_ranks(2, replace(killed, resume="auto"))
    assert_same_run(tmp_path / "whole", tmp_path / "killed")
