"""Files with the names, shapes and types of public weights: each is understood, and begins a pretraining.

The numbers are zeros: what the layouts compute is compared in test_contents.py and tests/export.
"""

import json

import pytest
import torch

from fastmae.checkpoint.huggingface import in_version_5, to_huggingface
from fastmae.checkpoint.start import begin_with, open_start
from fastmae.config import PretrainConfig
from fastmae.config.model import ModelSpec
from fastmae.model.build import build_model

WIDTHS = {"small": (384, 12, 6), "base": (768, 12, 12), "large": (1024, 24, 16)}


def encoder(size, patch, positions, *, scales=False):
    """The tensors of a vision transformer under timm's names, and its heads."""
    D, depth, _ = WIDTHS[size]
    shapes = {"cls_token": (1, 1, D), "pos_embed": (1, positions, D)}
    shapes |= {"patch_embed.proj.weight": (D, 3, patch, patch), "patch_embed.proj.bias": (D,)}
    for i in range(depth):
        shapes |= {f"blocks.{i}.{norm}.{leaf}": (D,) for norm in ("norm1", "norm2") for leaf in ("weight", "bias")}
        products = {"attn.qkv": (3 * D, D), "attn.proj": (D, D), "mlp.fc1": (4 * D, D), "mlp.fc2": (D, 4 * D)}
        for name, shape in products.items():
            shapes |= {f"blocks.{i}.{name}.weight": shape, f"blocks.{i}.{name}.bias": shape[:1]}
        if scales:
            shapes |= {f"blocks.{i}.ls1.gamma": (D,), f"blocks.{i}.ls2.gamma": (D,)}
    shapes |= {"norm.weight": (D,), "norm.bias": (D,)}
    return zeros(shapes)


def zeros(shapes):
    return {name: torch.zeros(shape, dtype=torch.float16) for name, shape in shapes.items()}


def official(size, folder):
    return {"model": encoder(size, 16, 197)}, folder / "mae_pretrain.pth"


def timm(size, folder):
    """With a head of ImageNet's 1,000 classes."""
    D = WIDTHS[size][0]
    return encoder(size, 16, 197) | zeros({"head.weight": (1000, D), "head.bias": (1000,)}), folder / "timm.pth"


def timm_dinov2_with_registers(size, folder):
    D = WIDTHS[size][0]
    return encoder(size, 14, 1369, scales=True) | zeros({"reg_token": (1, 4, D)}), folder / "timm.pth"


def dinov2(size, folder):
    D = WIDTHS[size][0]
    return encoder(size, 14, 1370, scales=True) | zeros({"mask_token": (1, D)}), folder / "dinov2.pth"


def dinov2_with_registers(size, folder):
    weights, path = dinov2(size, folder)
    return weights | zeros({"register_tokens": (1, 4, WIDTHS[size][0])}), path


def transformers(size, folder, kind, weights):
    """A folder as ``save_pretrained`` writes it."""
    settings = {"model_type": kind, "num_attention_heads": WIDTHS[size][2]}
    settings |= {"layer_norm_eps": 1e-6, "image_size": 518} if kind == "dinov2" else {"image_size": 224}
    (folder / "config.json").write_text(json.dumps(settings))
    return weights, folder / "pytorch_model.bin"


def transformers_vit(size, folder):
    return transformers(size, folder, "vit", to_huggingface(encoder(size, 16, 197)))


def transformers_5_vit(size, folder):
    renamed = {in_version_5(name): tensor for name, tensor in to_huggingface(encoder(size, 16, 197)).items()}
    return transformers(size, folder, "vit", renamed)


def transformers_dinov2(size, folder):
    named = {
        name.removeprefix("vit.").replace("layernorm_before", "norm1").replace("layernorm_after", "norm2")
        .replace("intermediate.dense", "mlp.fc1").replace("output.dense", "mlp.fc2")
        .replace("attention.mlp.fc2", "attention.output.dense"): tensor
        for name, tensor in to_huggingface(encoder(size, 14, 1370)).items()
    }  # fmt: skip
    D, depth, _ = WIDTHS[size]
    scales = {f"encoder.layer.{i}.layer_scale{n}.lambda1": (D,) for i in range(depth) for n in (1, 2)}
    named |= zeros(scales | {"embeddings.mask_token": (1, D)})
    return transformers(size, folder, "dinov2", named)


LAYOUTS = (
    official, timm, timm_dinov2_with_registers, dinov2, dinov2_with_registers, transformers_vit, transformers_5_vit,
    transformers_dinov2,
)  # fmt: skip


@pytest.mark.parametrize(
    "size", ["small", pytest.param("base", marks=pytest.mark.slow), pytest.param("large", marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.__name__)
def test_a_pretraining_begins_with_it(layout, size, tmp_path):
    weights, path = layout(size, tmp_path)
    torch.save(weights, path)
    given = str(path.parent if (path.parent / "config.json").exists() else path)
    flags, start = open_start(PretrainConfig(init=given, input_size=(112, 112)))
    D, depth, heads = WIDTHS[size]
    spec = ModelSpec(
        in_chans=3, **{name: getattr(flags, name) for name in ("model", "input_size", "patch_size", "registers")}
    )
    model = build_model(spec)
    registers = model.prefix_tokens - 1
    found = len(model.blocks), model.cls_token.shape[2], model.blocks[0].attn.num_heads, registers
    assert found == (depth, D, heads, 4 if "registers" in layout.__name__ else 0)
    account = " ".join(begin_with(model, start, given, fixed_positions=False))
    grid = "14×14" if flags.patch_size == (16, 16) else "37×37"
    assert f"positions interpolated {grid} → {112 // flags.patch_size[0]}×{112 // flags.patch_size[1]}" in account
    assert bool((model.blocks[-1].mlp.fc2.weight == 0).all())
    assert not bool((model.decoder_pred.weight == 0).all())
