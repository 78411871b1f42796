"""The classifier is the official one: its keys, its shapes, its encoder, and the weights that are trained."""

import math

import numpy as np
import pytest
import torch

from fastmae.model.classifier import (
    HEAD_STD,
    ClassificationLoss,
    Classifier,
    classifier_of,
    merge_lora,
    resized_positions,
    stochastic_depth_mask,
    tune,
)
from fastmae.model.presets import mae_vit_base_patch16, mae_vit_tiny_patch4
from fastmae.model.vit import sincos_positions

# What `timm.create_model("vit_base_patch16_224", global_pool="avg")` holds, as the published fine-tuned files do.
BLOCK = {
    "norm1": (768,), "attn.qkv": (2304, 768), "attn.proj": (768, 768), "norm2": (768,), "mlp.fc1": (3072, 768),
    "mlp.fc2": (768, 3072),
}  # fmt: skip
OUTSIDE = {
    "cls_token": (1, 1, 768), "pos_embed": (1, 197, 768), "patch_embed.proj.weight": (768, 3, 16, 16),
    "patch_embed.proj.bias": (768,), "fc_norm.weight": (768,), "fc_norm.bias": (768,), "head.weight": (1000, 768),
    "head.bias": (1000,),
}  # fmt: skip


def tiny(**changes):
    torch.manual_seed(0)
    return classifier_of(mae_vit_tiny_patch4(img_size=16, in_chans=1), 3, **changes)


def images(count=4, size=16):
    return torch.randint(0, 256, (count, size, size, 1), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def test_keys_and_shapes_are_those_of_the_official_fine_tuned_files():
    with torch.device("meta"):
        mae = mae_vit_base_patch16()
        model = Classifier((224, 224), (16, 16), 3, 768, 12, 12, 1000, mean=[0.5] * 3, std=[0.2] * 3)
    expected = dict(OUTSIDE)
    for number in range(len(mae.blocks)):
        for name, shape in BLOCK.items():
            expected |= {f"blocks.{number}.{name}.weight": shape, f"blocks.{number}.{name}.bias": shape[:1]}
    assert {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()} == expected


def test_timm_opens_the_weights_and_gives_the_same_logits():
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    shape = dict(img_size=32, patch_size=16, embed_dim=64, depth=2, num_heads=2)
    theirs = timm.models.vision_transformer.VisionTransformer(**shape, num_classes=5, global_pool="avg").eval()
    ours = Classifier((32, 32), (16, 16), 3, 64, 2, 2, 5, mean=[0.0] * 3, std=[1.0] * 3)
    torch.nn.init.normal_(ours.head.weight)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    floats = torch.randn(3, 3, 32, 32)
    torch.testing.assert_close(ours(floats), theirs(floats), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("global_pool", [True, False])
def test_the_encoder_is_the_pretrained_one(global_pool):
    torch.manual_seed(0)
    mae = mae_vit_tiny_patch4(img_size=16, in_chans=1)
    model = classifier_of(mae, 3, global_pool=global_pool)
    seen = {}
    model.blocks[-1].register_forward_hook(lambda block, inputs, output: seen.update(tokens=output))
    logits = model(images())
    torch.testing.assert_close(mae.norm(seen["tokens"]), mae.forward_features(images()), rtol=1e-6, atol=1e-6)
    pooled = seen["tokens"][:, 1:].mean(dim=1)
    features = model.fc_norm(pooled) if global_pool else mae.forward_features(images())[:, 0]
    torch.testing.assert_close(logits, model.head(features), rtol=1e-6, atol=1e-6)
    assert ("norm.weight" in model.state_dict()) != global_pool
    assert ("fc_norm.weight" in model.state_dict()) == global_pool


def test_float_images_that_are_normalised_give_the_same_logits_as_uint8():
    model = tiny()
    floats = (images().permute(0, 3, 1, 2) / 255 - model.mean[:, None, None]) / model.std[:, None, None]
    torch.testing.assert_close(model(floats), model(images()), rtol=1e-5, atol=1e-7)


def test_the_head_starts_near_zero():
    torch.manual_seed(0)
    head = Classifier((16, 16), (4, 4), 1, 128, 1, 4, 1000, mean=[0.5], std=[0.2]).head
    assert head.weight.std().item() == pytest.approx(HEAD_STD, rel=0.02)
    assert not head.bias.any()


def test_positions_for_another_size_keep_the_class_token_and_follow_the_image():
    old, new = sincos_positions(32, (4, 4))[None], sincos_positions(32, (8, 6), (4, 4))[None]
    resized = resized_positions(old, (4, 4), (8, 6))
    assert resized.shape == new.shape
    assert torch.equal(resized[:, :1], old[:, :1])
    inner = [1 + row * 6 + column for row in range(3, 5) for column in range(2, 4)]
    # Bicubic is not exact on waves this short; a transposed grid is off by more than 1.
    assert (resized - new)[:, inner].abs().max() < 0.25
    assert tiny(img_size=(32, 24))(torch.zeros(4, 32, 24, 1, dtype=torch.uint8)).shape == (4, 3)


def test_images_of_another_size_are_refused():
    with pytest.raises(ValueError, match=r"must have shape \[N, 16, 16, 1\]"):
        tiny()(images(size=20))
    with pytest.raises(ValueError, match="multiple of a patch"):
        tiny(img_size=(18, 16))


def test_the_loss_is_the_cross_entropy_with_soft_targets():
    model = tiny()
    torch.nn.init.normal_(model.head.weight)
    targets = torch.tensor([[0.7, 0.2, 0.1]]).repeat(4, 1)
    loss_of = ClassificationLoss(model)
    logits = loss_of(images())
    expected = -(targets * logits.log_softmax(dim=1)).sum(dim=1).mean()
    torch.testing.assert_close(loss_of(images(), targets), expected)


# --- drop path --------------------------------------------------------------------------------------------------------


def test_branches_are_skipped_at_a_rate_that_grows_with_depth_and_the_mean_stays():
    depth_mask = stochastic_depth_mask(0, np.arange(20_000), 0.3, 4)
    assert depth_mask.shape == (4, 2, 20_000)
    skipped = (depth_mask == 0).float().mean(dim=2)
    torch.testing.assert_close(skipped, torch.tensor([0, 0.1, 0.2, 0.3])[:, None].expand(4, 2), rtol=0, atol=0.015)
    torch.testing.assert_close(depth_mask.mean(dim=2), torch.ones(4, 2), rtol=0, atol=0.02)
    assert not torch.equal(depth_mask[3, 0], depth_mask[3, 1])


def test_what_is_skipped_depends_on_the_draw_alone():
    together, alone = stochastic_depth_mask(0, np.arange(8), 0.5, 4), stochastic_depth_mask(0, np.array([5]), 0.5, 4)
    assert torch.equal(together[:, :, 5:6], alone)
    assert not torch.equal(together, stochastic_depth_mask(1, np.arange(8), 0.5, 4))


@pytest.mark.parametrize("checkpointing", ["none", "full"])
def test_a_sample_without_branches_passes_through_unchanged(checkpointing):
    model = tiny()
    for block in model.blocks:
        block.checkpointing = checkpointing
    depth_mask = torch.ones(4, 2, 4)
    depth_mask[:, :, 0] = 0
    seen = []
    model.blocks[0].register_forward_pre_hook(lambda block, inputs: seen.append(inputs[0]))
    model.blocks[-1].register_forward_hook(lambda block, inputs, output: seen.append(output))
    logits = model(images(), depth_mask)
    before, after = seen
    assert torch.equal(before[0], after[0])
    assert not torch.allclose(before[1], after[1])
    torch.testing.assert_close(logits[1:], model(images())[1:])


# --- what is tuned ----------------------------------------------------------------------------------------------------

NEW = {"head.weight", "head.bias", "fc_norm.weight", "fc_norm.bias"}


def trained(model):
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_the_weights_that_were_asked_for_are_trained():
    everything = trained(tiny())
    assert "pos_embed" in everything
    models = {what: tiny() for what in ("full", "linear", "last-1", "last-4", "lora")}
    for what, model in models.items():
        tune(model, what, lora_rank=2)
    assert trained(models["full"]) == everything
    assert trained(models["linear"]) == NEW
    assert trained(models["last-1"]) == NEW | {name for name in everything if name.startswith("blocks.3.")}
    assert trained(models["last-4"]) == NEW | {name for name in everything if name.startswith("blocks.")}
    parts = [f"blocks.{i}.attn.{part}.lora_{ab}" for i in range(4) for part in ("qkv", "proj") for ab in "ab"]
    assert trained(models["lora"]) == NEW | set(parts)


def test_the_class_token_is_classified_with_the_pretrained_norm():
    model = tiny(global_pool=False)
    tune(model, "linear")
    assert trained(model) == {"head.weight", "head.bias"}
    model = tiny(global_pool=False)
    tune(model, "last-1")
    assert {"norm.weight", "norm.bias"} < trained(model)


def test_more_blocks_than_there_are_cannot_be_tuned():
    with pytest.raises(ValueError, match="has 4 blocks"):
        tune(tiny(), "last-5")


def test_updates_of_low_rank_change_nothing_at_first_and_are_merged_into_the_official_keys():
    model, plain = tiny(), tiny()
    tune(model, "lora", lora_rank=2)
    torch.nn.init.normal_(model.head.weight)
    plain.head.load_state_dict(model.head.state_dict())
    assert torch.equal(model(images()), plain(images()))
    for name, parameter in model.named_parameters():
        if "lora" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    assert not torch.allclose(model(images()), plain(images()))
    weights = merge_lora(model.state_dict())
    assert weights.keys() == plain.state_dict().keys()
    update = weights["blocks.0.attn.qkv.weight"] - plain.state_dict()["blocks.0.attn.qkv.weight"]
    assert torch.linalg.matrix_rank(update, atol=1e-4) == 2
    plain.load_state_dict(weights)
    torch.testing.assert_close(plain(images()), model(images()), rtol=1e-4, atol=1e-4)


def test_an_update_begins_with_a_random_and_a_zero_factor():
    model = tiny()
    tune(model, "lora", lora_rank=4)
    layer = model.blocks[0].attn.qkv
    assert (layer.lora_a.shape, layer.lora_b.shape) == ((4, 128), (384, 4))
    assert layer.lora_a.std().item() == pytest.approx(1 / math.sqrt(128), rel=0.2)
    assert not layer.lora_b.any()
