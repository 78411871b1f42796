"""Programs of models whose features are one latent: they give the features of the model, for any number of images."""

import pytest
import torch

from fastmae.checkpoint.load import Opened
from fastmae.config import ExportConfig
from fastmae.errors import UserError
from fastmae.export.onnx import opened_onnx
from fastmae.export.program import opened_program
from fastmae.export.run import export
from fastmae.facts import PixelFacts
from fastmae.model.conv import ConvMAE
from fastmae.model.mlp import MLPMAE
from fastmae.model.pixels import normalised

OPEN = {"onnx": opened_onnx, "torch-export": opened_program}
SUFFIX = {"onnx": ".onnx", "torch-export": ".pt2"}


def opened(fill="mean", family="mlp"):
    torch.manual_seed(0)
    facts = PixelFacts(dtype="float32")
    model = MLPMAE((1, 1), 6, widths=(5, 3), fill=fill, mean=(0.5,) * 6, std=(2.0,) * 6, pixels=facts)
    if family == "conv":
        model = ConvMAE((13, 10), mask_unit="pixel", widths=(4, 8), latent_dim=5)
    return Opened(model.eval(), {"model": f"mae_{family}"}, True)


@pytest.mark.parametrize("to", [pytest.param("onnx", marks=pytest.mark.slow), "torch-export"])
def test_a_program_gives_the_features_of_the_model_also_of_missing_numbers(to, tmp_path):
    path, checkpoint = tmp_path / f"x{SUFFIX[to]}", opened()
    line, _ = export(ExportConfig(checkpoint="run", output=str(path), to=to, input="float32"), checkpoint, 1)
    assert "differ by at most" in line
    images = torch.randn(7, 1, 1, 6)
    images[2, ..., 3] = float("nan")
    with torch.no_grad():
        torch.testing.assert_close(OPEN[to](path)(images), checkpoint.model.features(images), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("taken", ["uint8", "float"])
@pytest.mark.parametrize("to", [pytest.param("onnx", marks=pytest.mark.slow), "torch-export"])
def test_a_program_of_the_convolutional_model_takes_pixels_or_normalised_images(to, taken, tmp_path):
    path, checkpoint = tmp_path / f"x{SUFFIX[to]}", opened(family="conv")
    export(ExportConfig(checkpoint="run", output=str(path), to=to, input=taken), checkpoint, 1)
    images = torch.randint(0, 256, (7, 13, 10, 3), dtype=torch.uint8)
    given = images if taken == "uint8" else normalised(checkpoint.model, images).contiguous()
    with torch.no_grad():
        torch.testing.assert_close(OPEN[to](path)(given), checkpoint.model.features(images), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", ["mlp", "conv"])
@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"variant": "fp16"}, "variant='fp16': must be fp32 for"),
        ({"variant": "int8"}, "variant='int8': must be fp32 for"),
        ({"check": "digits"}, "check: is for models with tokens"),
        ({"input": "uint16"}, "input='uint16': must be"),
    ],
)
def test_what_a_program_of_latents_cannot_be_is_refused_in_one_line(family, changes, problem, tmp_path):
    path = tmp_path / "x.onnx"
    with pytest.raises(UserError, match=problem) as error:
        export(ExportConfig(checkpoint="run", output=str(path), to="onnx", **changes), opened(family=family), 1)
    assert "\n" not in str(error.value)
    assert not path.exists()


@pytest.mark.parametrize(("to", "suffix"), [("timm", ".pth"), ("hf", "")])
def test_libraries_without_such_a_model_are_named_with_what_to_use(to, suffix, tmp_path):
    with pytest.raises(UserError, match=r"has no such model as MLPMAE; export to onnx or torch-export"):
        export(ExportConfig(checkpoint="run", output=str(tmp_path / f"x{suffix}"), to=to), opened(), 1)
