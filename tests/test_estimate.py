"""``fastmae estimate``: hand-worked figures, what moves them, what is refused, and a step of this machine."""

import dataclasses
import json
from time import perf_counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from fastmae.cli import main
from fastmae.config import EstimateConfig
from fastmae.config.shape import Shape
from fastmae.errors import UserError
from fastmae.estimate import CONSTANTS, MACHINES, ON_CPU, Constant, Machine, estimate
from fastmae.model.discriminator import Discriminator
from fastmae.model.flops import flops_per_image
from fastmae.model.presets import mae_vit_tiny_patch4
from fastmae.model.sizes import preset_sizes
from fastmae.train.adversary import Adversary

RATE = Constant(1e11, "measured", "a test")
CPU = Machine(RATE, RATE, RATE, RATE, RATE)


def of(**settings):
    return estimate(EstimateConfig(**settings), lambda ranks: CPU)


# Worked out by hand for an H200 with 256 images (images/s), before the command was written.
OF_0_1 = dict(compile="off", attention="sdpa", fused=False)
BY_HAND = [
    ("mae_vit_base_patch16", dict(compile="block", attention="triton", fused=False), 5690),
    ("mae_vit_large_patch16", dict(compile="block", attention="triton", fused=False), 3100),
    ("mae_vit_huge_patch14", dict(compile="block", attention="triton", fused=False), 1460),
    ("mae_vit_base_patch16", OF_0_1, 4630),
    ("mae_vit_large_patch16", OF_0_1, 2570),
    ("mae_vit_huge_patch14", OF_0_1, 1240),
]


@pytest.mark.parametrize(("model", "switches", "images_per_second"), BY_HAND)
def test_the_arithmetic_is_that_worked_out_by_hand(model, switches, images_per_second):
    found = of(model=model, batch_size=256, **switches)
    assert found.images_per_second == pytest.approx(images_per_second, rel=0.03)
    assert found.step == pytest.approx(sum(found.classes.values()))
    assert found.limit == "the GPU"


def test_fused_kernels_move_so_many_bytes_less():
    """(44 + 90) − (40 + 62) bytes per token and channel of a block, and 6 per weight; in bf16 24 more."""
    before, now = (of(batch_size=256, fused=fused) for fused in (False, True))
    less = before.classes["pointwise"] - now.classes["pointwise"]
    numbers = 256 * (12 * 50 * 768 + (7 * 197 + (197 + 147) / 2) * 512)
    assert less == pytest.approx(32 * numbers / 4.3e12 / 0.85)
    weights = preset_sizes("mae_vit_base_patch16").parameters
    assert before.classes["optimiser"] - now.classes["optimiser"] == pytest.approx(6 * weights / 4.3e12 / 0.85)
    again = of(batch_size=256, checkpointing="gelu")
    assert again.classes["pointwise"] - now.classes["pointwise"] == pytest.approx(8 * numbers / 4.3e12 / 0.85)
    bf16 = of(batch_size=256, residual="bf16")
    assert now.classes["pointwise"] - bf16.classes["pointwise"] == pytest.approx(24 * numbers / 4.3e12 / 0.85)


def test_casts_are_of_micro_steps_and_copies_of_a_step():
    saved = [of(accum_iter=n, fused=False).classes["optimiser"] - of(accum_iter=n).classes["optimiser"] for n in (1, 8)]
    assert saved[1] / saved[0] == pytest.approx((8 * 12 - 6) / (12 - 6))


def test_attention_by_default_is_triton_where_it_is_predicted_to_win():
    base, huge = ({"model": f"mae_vit_{name}", "batch_size": 256} for name in ("base_patch16", "huge_patch14"))
    assert of(**base).classes["attention"] == of(**base, attention="triton").classes["attention"]
    by_sdpa, by_triton = (of(**huge, attention=name).classes["attention"] for name in ("sdpa", "triton"))
    assert by_triton < of(**huge).classes["attention"] < by_sdpa  # its encoder's heads of 80 numbers are torch's


def test_hours_and_the_useful_share_follow_from_the_step():
    found = of(model="mae_vit_large_patch16", gpus=64, images=1.28e6, epochs=800)
    assert found.global_batch == 4096
    assert found.hours == pytest.approx(800 * 312 * found.step / 3600)
    flops = 3 * 64 * flops_per_image(preset_sizes("mae_vit_large_patch16"), 0.75)
    assert found.useful_share == pytest.approx(flops / found.step / 790e12)


def test_memory_is_counted_by_what_it_holds():
    found, full = of(batch_size=128), of(batch_size=128, checkpointing="full")
    weights = preset_sizes("mae_vit_base_patch16").parameters
    assert found.memory["weights"] == 6 * weights
    assert found.memory["gradients"] == 4 * weights
    assert found.memory["moments"] == 8 * weights
    tokens = 12 * 50 * 768 + 8 * 197 * 512
    assert found.memory["activations"] == 36 * 128 * tokens
    assert of(batch_size=128, checkpointing="gelu").memory["activations"] == 28 * 128 * tokens
    assert of(batch_size=8, gpu="cpu").memory["activations"] == 8 * (64 * tokens - 16 * 12 * 50 * 768)
    assert full.memory["activations"] == 128 * (4 * tokens + 36 * 197 * 512)
    assert full.step > found.step
    assert not of(gpu="l4", batch_size=1024).fits
    assert found.fits


def test_gradients_travel_unseen_but_for_the_last_ones():
    alone, shared = of(batch_size=256), of(batch_size=256, gpus=8)
    assert alone.communication == alone.classes["communication"] == 0
    assert 0 < shared.classes["communication"] < shared.communication
    slow = of(batch_size=16, gpu="rtx4090", gpus=8)
    assert slow.classes["communication"] > slow.communication / 2


def test_many_ranks_wait_for_their_agreement_and_few_cores_for_decoding():
    assert of(gpus=1024, model="mae_vit_large_patch16").limit == "the host"
    assert of(batch_size=512, cores=1).limit == "loading"


def test_micro_steps_repeat_all_but_the_optimiser():
    one, four = of(), of(accum_iter=4)
    assert four.classes["optimiser"] == one.classes["optimiser"]
    assert four.classes["matrix products"] == 4 * one.classes["matrix products"]
    assert four.global_batch == 4 * one.global_batch


@pytest.mark.parametrize("gpu", MACHINES)
def test_every_gpu_is_estimated_and_every_constant_says_where_it_is_from(gpu):
    found = of(gpu=gpu, gpus=2)
    assert found.images_per_second > 0
    for constant in found.constants.values():
        assert constant.value > 0
        assert constant.basis in ("measured", "datasheet", "counted", "assumed")
        assert constant.source
    assert (found.constants[f"{gpu} products"].basis == "measured") == (gpu == "h200")


def test_what_a_cpu_needs_is_in_the_table():
    assert {name for name in ON_CPU if name not in CONSTANTS} == {"attention_cpu", "gloo"}
    found = of(gpu="cpu", gpus=2, model="mae_vit_tiny_patch16")
    assert found.classes["communication"] == found.communication > 0
    assert found.memory["weights"] == 4 * preset_sizes("mae_vit_tiny_patch16").parameters


def test_the_command_prints_classes_and_says_what_is_assumed(capsys):
    assert main(["estimate", "--model", "mae_vit_large_patch16", "--gpu", "h200", "--gpus", "64"]) == 0
    out = capsys.readouterr().out
    for text in ("images/s", "hours", "GiB", "matrix products", "attention", "pointwise", "optimiser", "communication",
                 "loading", "measured:", "assumed:", "No GPU has run this"):  # fmt: skip
        assert text in out


def test_json_holds_every_figure_and_constant(capsys):
    assert main(["estimate", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found.keys() == {field.name for field in dataclasses.fields(of())}
    assert found["constants"]["optimiser"] == {
        "value": 32, "basis": "counted", "source": CONSTANTS["optimiser"].source,
    }  # fmt: skip


def test_a_step_of_this_machine_is_near_the_estimate(capsys):
    """Within a factor of three: a loaded machine's clock is no place for a narrow one. docs/estimate.md has figures."""
    from fastmae.commands.estimate import cpu_machine
    from fastmae.model.presets import PRESETS
    from fastmae.ops.random_masking import random_masking
    from fastmae.train.optim import make_optimizer

    config = EstimateConfig(gpu="cpu", model="mae_vit_tiny_patch16", batch_size=8)
    found = estimate(config, cpu_machine)
    model = PRESETS[config.model]()
    optimizer = make_optimizer(model, 1e-4, 0.05)
    images = torch.zeros(8, 224, 224, 3, dtype=torch.uint8)
    ids = random_masking(torch.arange(8), 0, model.num_patches)

    def step():
        optimizer.zero_grad()
        model.training_loss(images, ids, 0.75).backward()
        optimizer.step()

    step()
    samples = []
    for _ in range(3):
        begin = perf_counter()
        step()
        samples.append(perf_counter() - begin)
    assert min(samples) / 3 < found.step < 3 * min(samples)


WRONG = {
    "unknown model": (["--model", "vit"], "--model vit: unknown"),
    "unknown GPU": (["--gpu", "h900"], "h900"),
    "part of a machine": (["--gpus", "12"], "--gpus 12: must be up to 8"),
    "no GPU": (["--gpus", "0"], "--gpus 0: must be at least 1"),
    "no images": (["--images", "0"], "--images 0: must be at least 1"),
    "fewer images than a step": (["--images", "10"], "--images 10: fewer than the 64 of a step"),
    "all masked": (["--mask_ratio", "1"], "--mask_ratio 1: must be"),
    "none visible": (["--mask_ratio", "0.999"], "leaves none of 196 patches visible"),
    "part of a patch": (
        ["--input_size", "100"],
        "an image of 100×100 pixels is not a multiple of a patch of 16×16; choose another --input_size",
    ),
    "compiled CPU": (["--gpu", "cpu", "--compile", "block"], "--gpu cpu: takes none of"),
    "residual alone": (["--residual", "bf16", "--no-fused"], "--residual bf16: is counted for the fused"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_input_is_one_line_and_status_2(case, capsys):
    words, expected = WRONG[case]
    assert main(["estimate", *words]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert expected in line


def test_bench_scaling_names_its_successor(capsys):
    assert main(["bench", "scaling", "--gpus", "8"]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "fastmae estimate" in line


def test_any_shape_is_estimated():
    free = dict(embed_dim=512, depth=6, num_heads=8, registers=4, decoder_embed_dim=256, decoder_num_heads=4)
    found = of(**free)
    sizes = preset_sizes("mae_vit_base_patch16", given=Shape(**free))
    assert (found.parameters, found.gigaflops) == (sizes.parameters, 3 * flops_per_image(sizes, 0.75) / 1e9)
    assert found.memory["weights"] < of().memory["weights"]
    assert of(registers=8).memory["activations"] > of().memory["activations"]
    with pytest.raises(UserError, match="embed_dim=500: must be a multiple of the heads"):
        of(embed_dim=500)


class CountedConvolutions(TorchDispatchMode):
    """Counts the operations of convolutions and of their gradients; FlopCounterMode cannot be within two gradients."""

    flops = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        if "convolution" in func.__name__:
            self.flops += flop_registry[func.overloadpacket](*args, **(kwargs or {}), out_val=found)
        return found


@pytest.mark.parametrize("regulariser", ["r1", "spectral"])
def test_an_adversarial_term_is_counted_with_its_weights_and_passes(regulariser):
    settings = dict(model="mae_vit_tiny_patch4", batch_size=32, images=1e4, epochs=10)
    plain, both = of(**settings), of(**settings, adversarial=1.0, adversarial_regulariser=regulariser)
    discriminator = Discriminator((32, 32), 3)
    own = sum(weight.numel() for weight in discriminator.parameters())
    assert both.parameters - plain.parameters == own
    assert both.memory["moments"] - plain.memory["moments"] == 8 * own
    assert both.memory["activations"] > plain.memory["activations"]
    assert both.classes["discriminator"] > 0
    assert both.hours == pytest.approx(10 * (1e4 // 32) * (plain.step + both.step) / 2 / 3600)
    late = of(**settings, adversarial=1.0, adversarial_regulariser=regulariser, adversarial_start=9.0)
    assert plain.hours < late.hours < both.hours

    images, r1 = torch.randn(4, 3, 32, 32), 0.05 if regulariser == "r1" else 0.0
    with CountedConvolutions() as forward:
        discriminator(images)
    model = mae_vit_tiny_patch4(img_size=(32, 32), patch_size=(4, 4), in_chans=3)
    ids = torch.arange(64, dtype=torch.int32).expand(4, -1)
    pred = model.decoder_pred(torch.randn(4, 64, model.decoder_pred.in_features, requires_grad=True))
    adversary = Adversary(discriminator, "r1" if r1 else "none", r1)
    adversary.weight = 1.0
    with CountedConvolutions() as counted:
        adversary(pred.square().mean(), pred, images, ids, model).backward()
    passes = CONSTANTS[f"discriminator_{'r1_' if r1 else ''}passes"].value
    assert counted.flops / forward.flops == pytest.approx(passes, rel=0.1)
