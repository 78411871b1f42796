"""Encoders as ViTDet backbones: transformers opens them strictly, and computes what is written out here."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from helpers import small_run
from torch import nn

from fastmae.cli import main
from fastmae.config import ExportConfig
from fastmae.errors import SettingError
from fastmae.export.vitdet import save_vitdet
from fastmae.model.mae import MaskedAutoencoderViT
from fastmae.model.pixels import normalised
from fastmae.train.pretrain import pretrain

transformers = pytest.importorskip("transformers")


def mae(size=(32, 32), patch=(4, 4), channels=3, depth=5, **changes):
    torch.manual_seed(0)
    norm = partial(nn.LayerNorm, eps=1e-6)
    model = MaskedAutoencoderViT(size, patch, channels, 32, depth, 2, 32, 1, 2, norm_layer=norm, **changes)
    nn.init.normal_(model.pos_embed, std=0.1)
    return model.double().eval()


def opened(folder):
    """The backbone, and what was missing or left over when its weights were read."""
    model, info = transformers.VitDetBackbone.from_pretrained(folder, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    return model.double().eval()


def written_out(model, images, window, everywhere, rel=None):
    """The features of a ViTDet, plainly: ``rel`` maps a block to its tables of relative positions along y and x."""
    w = model.state_dict()
    x = F.conv2d(images, w["patch_embed.proj.weight"], w["patch_embed.proj.bias"], stride=model.patch_size)
    rows, columns = x.shape[2:]
    positions = w["pos_embed"][:, 1:].reshape(1, *model.grid_size, -1).permute(0, 3, 1, 2)
    if model.grid_size != (rows, columns):
        positions = F.interpolate(positions, size=(rows, columns), mode="bicubic", align_corners=False)
    x = (x + positions).permute(0, 2, 3, 1)
    D, heads = x.shape[3], model.blocks[0].attn.num_heads

    def attention(block, tokens):  # [n, h, w, D]
        n, h, wide, _ = tokens.shape
        qkv = tokens @ w[f"blocks.{block}.attn.qkv.weight"].T + w[f"blocks.{block}.attn.qkv.bias"]
        q, k, v = qkv.reshape(n, h * wide, 3, heads, D // heads).permute(2, 0, 3, 1, 4)
        scores = q @ k.mT * (D // heads) ** -0.5
        if rel is not None:
            table_y, table_x = rel[block]
            for i in range(h * wide):
                for j in range(h * wide):
                    dy, dx = i // wide - j // wide, i % wide - j % wide
                    scores[:, :, i, j] += q[:, :, i] @ (table_y[dy + h - 1] + table_x[dx + wide - 1])
        found = (scores.softmax(3) @ v).transpose(1, 2).reshape(n, h, wide, D)
        return found @ w[f"blocks.{block}.attn.proj.weight"].T + w[f"blocks.{block}.attn.proj.bias"]

    def norm(name, tokens):
        return F.layer_norm(tokens, (D,), w[f"{name}.weight"], w[f"{name}.bias"], 1e-6)

    for block in range(len(model.blocks)):
        tokens = norm(f"blocks.{block}.norm1", x)
        if block in everywhere or not window:
            tokens = attention(block, tokens)
        else:
            padded = F.pad(tokens, (0, 0, 0, -columns % window, 0, -rows % window))
            for top in range(0, rows, window):
                for left in range(0, columns, window):
                    place = padded[:, top : top + window, left : left + window]
                    padded[:, top : top + window, left : left + window] = attention(block, place.clone())
            tokens = padded[:, :rows, :columns]
        x = x + tokens
        tokens = norm(f"blocks.{block}.norm2", x)
        tokens = F.gelu(tokens @ w[f"blocks.{block}.mlp.fc1.weight"].T + w[f"blocks.{block}.mlp.fc1.bias"])
        x = x + tokens @ w[f"blocks.{block}.mlp.fc2.weight"].T + w[f"blocks.{block}.mlp.fc2.bias"]
    return x.permute(0, 3, 1, 2)


@pytest.mark.parametrize(("size", "window"), [((32, 32), 3), ((24, 40), 4), ((32, 32), 0)])
@torch.no_grad()
def test_features_are_those_of_the_published_backbone(tmp_path, size, window):
    model = mae()
    said = save_vitdet(tmp_path / "out", model.float(), window=window, image_size=size, relative=True)
    backbone, model = opened(tmp_path / "out"), model.double()
    images = torch.randn(2, 3, *size, dtype=torch.float64)
    everywhere = (0, 1, 2, 4) if window else range(5)
    assert said.startswith("blocks 0 1 2 4 see all" if window else "all blocks see all")
    expected = written_out(model, images, window, everywhere)
    torch.testing.assert_close(backbone(images).feature_maps[-1], expected, rtol=1e-5, atol=1e-5)
    for layer in backbone.encoder.layer:  # and what training makes of the relative positions is computed as published
        assert not layer.attention.rel_pos_h.any()
        nn.init.normal_(layer.attention.rel_pos_h)
        nn.init.normal_(layer.attention.rel_pos_w)
    rel = [(layer.attention.rel_pos_h, layer.attention.rel_pos_w) for layer in backbone.encoder.layer]
    expected = written_out(model, images, window, everywhere, rel)
    torch.testing.assert_close(backbone(images).feature_maps[-1], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("size", "patch", "channels"), [((32, 32), (4, 4), 3), ((28, 28), (7, 7), 1), ((16, 32), (4, 8), 5)]
)
@torch.no_grad()
def test_with_global_attention_it_is_the_encoder_without_its_class_token(tmp_path, size, patch, channels):
    model = mae(size, patch, channels)
    save_vitdet(tmp_path / "out", model.float(), window=0, image_size=size, relative=True)
    backbone, model = opened(tmp_path / "out"), model.double()
    pixels = torch.randint(0, 256, (2, *size, channels), dtype=torch.uint8)
    tokens = model._embed_all(pixels)[:, 1:]
    for block in model.blocks:
        tokens = block(tokens)
    features = backbone(normalised(model, pixels).double()).feature_maps[-1]
    torch.testing.assert_close(features.flatten(2).mT, tokens, rtol=1e-5, atol=1e-5)


def test_without_relative_positions_there_are_no_tables(tmp_path):
    save_vitdet(tmp_path / "out", mae().float(), window=4, image_size=(32, 32), relative=False)
    assert not any("rel_pos" in name for name in opened(tmp_path / "out").state_dict())


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        (dict(registers=2), "no registers"),
        (dict(size=(32, 16)), "a square of patches, not of 8×4"),
        (dict(mlp_ratio=2.5), "a whole mlp_ratio, not 2.5"),
    ],
)
def test_what_it_cannot_hold_is_said(tmp_path, changes, problem):
    with pytest.raises(SettingError, match=problem):
        save_vitdet(tmp_path / "out", mae(**changes).float(), window=4, image_size=(32, 32), relative=True)
    assert not (tmp_path / "out").exists()


def test_the_images_are_whole_patches(tmp_path):
    with pytest.raises(SettingError, match=r"multiple of the patches of 4×4"):
        save_vitdet(tmp_path / "out", mae().float(), window=4, image_size=(30, 32), relative=True)


@pytest.mark.parametrize(
    "flags",
    [dict(window_size=7), dict(image_size=(64,)), dict(relative_positions=False)],
    ids=lambda flags: next(iter(flags)),
)
def test_its_settings_go_with_it_alone(flags):
    with pytest.raises(SettingError, match="left out"):
        ExportConfig(checkpoint="x", to="hf", output="y", **flags)
    ExportConfig(checkpoint="x", to="vitdet", output="y", **flags)


def test_the_command_says_what_it_wrote(blobs, tmp_path, capsys):
    assert pretrain(small_run(blobs, tmp_path / "run", epochs=1)) == 0
    words = ["export", str(tmp_path / "run"), "--to", "vitdet", "--output", str(tmp_path / "out"), "--window_size", "2"]
    assert main(words) == 0
    assert "as VitDetBackbone of transformers has it: " in " ".join(capsys.readouterr().out.split())
    opened(tmp_path / "out")
