"""Segmenters for others: UPerNet as transformers has it, and programs."""

from functools import partial

import pytest
import torch
from torch import nn

from fastmae.cli import main
from fastmae.config import PretrainConfig
from fastmae.errors import SettingError
from fastmae.export.onnx import opened_onnx, save_onnx
from fastmae.export.program import opened_program, save_program
from fastmae.export.upernet import save_upernet
from fastmae.model.mae import MaskedAutoencoderViT
from fastmae.model.pixels import normalised
from fastmae.model.segmenter import HEADS, segmenter_of
from fastmae.train.pretrain import pretrain

transformers = pytest.importorskip("transformers")

TINY = dict(model="mae_vit_tiny_patch4", patch_size=(16, 16), batch_size=100, device="cpu", probe=False, tune="off")


def segmenter(head="upernet", depth=6, patch=(4, 4), **changes):
    torch.manual_seed(0)
    norm = partial(nn.LayerNorm, eps=1e-6)
    mae = MaskedAutoencoderViT((16, 16), patch, 3, 32, depth, 2, 32, 1, 2, norm_layer=norm, **changes)
    for name, parameter in mae.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter, std=0.5)  # that of the keys must not matter
    model = segmenter_of(mae, 3, head)
    for name, buffer in model.named_buffers():
        if name.endswith(("running_mean", "running_var")):
            buffer.uniform_(0.5, 1.5)
    return model.eval()


@torch.no_grad()
def test_transformers_opens_it_strictly_and_computes_the_same(tmp_path):
    model = segmenter()
    save_upernet(tmp_path / "out", model, ("ground", "tree", "sky"))
    other, info = transformers.UperNetForSemanticSegmentation.from_pretrained(
        tmp_path / "out", output_loading_info=True
    )
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    assert other.config.id2label == {0: "ground", 1: "tree", 2: "sky"}
    pixels = torch.randint(0, 256, (2, 16, 16, 3), dtype=torch.uint8)
    images = normalised(model, pixels)
    other.eval()
    maps = other.backbone(images).feature_maps
    ours = model.head.fpn([tokens.mT.unflatten(2, (4, 4)) for tokens in model.levels(pixels)])
    for mine, theirs in zip(ours, maps, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(model(pixels), other(images).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("made", "problem"),
    [
        (dict(head="pyramid"), "no pyramid head"),
        (dict(registers=1), "no registers"),
        (dict(patch=(4, 8)), "square patches, not 4×8"),
        (dict(depth=3), "four different blocks, and this encoder has 3"),
    ],
)
def test_what_it_cannot_hold_is_said(tmp_path, made, problem):
    with pytest.raises(SettingError, match=problem):
        save_upernet(tmp_path / "out", segmenter(**made))
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.parametrize("raw", [False, True])
@pytest.mark.parametrize("form", ["onnx", "pt2"])
@pytest.mark.parametrize("head", HEADS)
@torch.no_grad()
def test_programs_give_the_same_logits_for_any_number_of_images(tmp_path, head, form, raw):
    model, path = segmenter(head), tmp_path / f"out.{form}"
    save, opened = (save_onnx, opened_onnx) if form == "onnx" else (save_program, opened_program)
    save(path, model, "fp32", raw)
    program = opened(path)
    for count in (1, 3):
        pixels = torch.randint(0, 256, (count, 16, 16, 3), dtype=torch.uint8)
        found = program(pixels if raw else normalised(model, pixels))
        torch.testing.assert_close(found, model(pixels), rtol=1e-4, atol=1e-4)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run folder of a segmenter that was trained for a moment."""
    folder = tmp_path_factory.mktemp("segmenter")
    encoder = PretrainConfig(data_path="shapes", output_dir=str(folder / "mae"), epochs=1, **TINY)
    words = ["--epochs", "1", "--batch_size", "100", "--segmenter_head", "pyramid", "--output_dir", str(folder / "run")]
    assert pretrain(encoder) == 0
    assert main(["segment", str(folder / "mae"), "--data_path", "shapes", "--tune", "off", *words]) == 0
    return folder / "run"


@pytest.mark.slow
def test_the_command_exports_it_whole_or_its_encoder(run, tmp_path, capsys):
    assert main(["export", str(run), "--to", "onnx", "--output", str(tmp_path / "out.onnx")]) == 0
    assert "a segmenter of 5 classes, fp32" in " ".join(capsys.readouterr().out.split())
    assert main(["export", str(run), "--to", "hf", "--output", str(tmp_path / "hf")]) == 2
    assert "transformers has no pyramid head" in " ".join(capsys.readouterr().err.split())
    words = ["--to", "hf", "--part", "encoder", "--output", str(tmp_path / "encoder")]
    assert main(["export", str(run), *words]) == 0
    assert "its head of 5 classes of pixels is left out" in " ".join(capsys.readouterr().err.split())
