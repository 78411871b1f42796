"""A segmenter with UPerNet as transformers has it: the same logits, and the same maps of the backbone."""

from functools import partial

import pytest
import torch
from torch import nn

from fastmae.errors import SettingError
from fastmae.export.upernet import save_upernet
from fastmae.model.mae import MaskedAutoencoderViT
from fastmae.model.pixels import normalised
from fastmae.model.segmenter import segmenter_of

transformers = pytest.importorskip("transformers")


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
