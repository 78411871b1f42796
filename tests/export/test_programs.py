"""The encoder as a program of its own gives fastmae's features, for any number of images, in every form."""

import re
import subprocess
import sys

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import nn

from fastmae.cli import main
from fastmae.data.sources import train_and_val
from fastmae.errors import UserError
from fastmae.export.encoder import Encoder
from fastmae.export.measure import as_taken, measure, sample_difference
from fastmae.export.onnx import opened_onnx, save_onnx
from fastmae.export.program import opened_program, save_program
from fastmae.model.mae import MaskedAutoencoderViT
from fastmae.model.presets import mae_vit_tiny_patch4

EXACT = 1e-5
# The largest difference of features that are normalised, so of the order of 1: what these formats round.
ROUNDED = {"fp16": 2e-2, "bf16": 2e-1, "int8": 3e-1}


@pytest.fixture(scope="module")
def model():
    """A small one, oblong, with three channels."""
    torch.manual_seed(0)
    sizes = dict(embed_dim=32, depth=2, num_heads=4, decoder_embed_dim=16, decoder_depth=1, decoder_num_heads=2)
    model = MaskedAutoencoderViT((8, 24), (4, 8), norm_layer=lambda width: nn.LayerNorm(width, eps=1e-6), **sizes)
    for parameter in model.parameters():
        parameter.data += 0.02 * torch.randn_like(parameter)
    return model.eval()


def batch(model, count, uint8):
    pixels = torch.randint(0, 256, (count, *model.img_size, 3), dtype=torch.uint8)
    return as_taken(model, pixels, uint8)


def assert_same_features(model, encode, uint8, tolerance):
    with torch.no_grad():
        for count in (1, 2, 5):
            images = batch(model, count, uint8)
            tokens = encode(images)
            assert tokens.dtype == torch.float32
            torch.testing.assert_close(tokens, model.forward_features(images), rtol=0, atol=tolerance)


@pytest.mark.parametrize("uint8", [False, True])
def test_a_convolution_and_torchs_own_operations_give_the_same_features(model, uint8):
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    encoder = Encoder(model, torch.float32, uint8)
    assert_same_features(model, encoder, uint8, EXACT)
    encoder.half()
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in before.items())


@pytest.mark.parametrize(("variant", "uint8"), [("fp32", True), ("fp16", False), ("int8", False)])
def test_onnx_gives_the_same_features_for_any_number_of_images(model, tmp_path, variant, uint8):
    path = tmp_path / "encoder.onnx"
    save_onnx(path, model, variant, uint8)
    assert [file.name for file in tmp_path.iterdir()] == ["encoder.onnx"]
    graph = onnx.load(path)
    onnx.checker.check_model(graph)
    assert {opset.domain for opset in graph.opset_import} <= {"", "ai.onnx.ml"}, "no operations but ONNX's own"
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (images,), (tokens,) = session.get_inputs(), session.get_outputs()
    assert (images.name, tokens.name) == ("images", "tokens")
    assert images.shape == (["batch", 8, 24, 3] if uint8 else ["batch", 3, 8, 24])
    facts = session.get_modelmeta().custom_metadata_map
    assert facts["mean"] == "[0.485, 0.456, 0.406]"
    assert ("uint8" in facts["images"]) == uint8
    assert_same_features(model, opened_onnx(path), uint8, ROUNDED.get(variant, EXACT))
    if variant != "fp32":  # something was rounded
        assert sample_difference(model, opened_onnx(path), uint8)[0] > EXACT


@pytest.mark.parametrize(("variant", "uint8"), [("fp32", False), ("bf16", True), ("fp16", True)])
def test_torch_export_gives_the_same_features_for_any_number_of_images(model, tmp_path, variant, uint8):
    path = tmp_path / "encoder.pt2"
    save_program(path, model, variant, uint8)
    assert [file.name for file in tmp_path.iterdir()] == ["encoder.pt2"]
    names = {str(node.target) for node in torch.export.load(path).graph.nodes if node.op == "call_function"}
    assert not [name for name in names if "fastmae" in name or "mkldnn" in name]
    assert_same_features(model, opened_program(path), uint8, ROUNDED.get(variant, EXACT))


def test_a_program_of_torch_runs_without_fastmae(model, tmp_path):
    save_program(tmp_path / "encoder.pt2", model, "fp32", True)
    code = "import sys, torch; program = torch.export.load(sys.argv[1]).module();"
    code += "print(tuple(program(torch.zeros(3, 8, 24, 3, dtype=torch.uint8)).shape), 'fastmae' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "encoder.pt2")], capture_output=True, text=True, cwd="/", check=True
    )
    assert done.stdout.strip() == "(3, 7, 32) False"


def test_an_export_that_fails_leaves_the_file_that_was_there(model, tmp_path, monkeypatch):
    path = tmp_path / "encoder.pt2"
    path.write_bytes(b"before")

    def full(*words, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch.export, "save", full)
    with pytest.raises(UserError, match="No space left"):
        save_program(path, model, "fp32", False)
    assert path.read_bytes() == b"before"
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("package", ["onnx", "onnxscript", "onnxruntime"])
def test_a_package_that_is_not_installed_is_named(model, tmp_path, monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(
        UserError, match=rf"ONNX needs {package}, which is not installed; pip install 'fastmae\[export\]'"
    ):
        save_onnx(tmp_path / "encoder.onnx", model, "fp32", False)


def test_figures_are_measured_as_probe_does(blobs):
    """One encoder that is the model itself, one that has forgotten everything, one that is off by a number."""
    from fastmae.evaluate.probe import probe

    torch.manual_seed(0)
    model = mae_vit_tiny_patch4(img_size=16, in_chans=1).eval()
    train, test = train_and_val(blobs)
    encoders = {
        "same": model.forward_features,
        "blind": lambda images: torch.ones(len(images), 17, 128),
        "shifted": lambda images: model.forward_features(images) + 0.5,
    }
    worth = measure(model, encoders, train, test, raw=True, num_workers=1)
    wanted = probe(model, train, test, num_workers=1)
    assert (round(worth["same"].knn, 2), round(worth["same"].linear, 2)) == (wanted["knn"], wanted["linear"])
    assert worth["same"].difference == 0.0
    assert worth["shifted"].difference == pytest.approx(0.5, abs=1e-5)
    assert worth["shifted"].linear == pytest.approx(worth["same"].linear, abs=5)
    assert worth["blind"].knn == worth["blind"].linear == pytest.approx(100 / 3)
    assert all(of_one.images_per_second > 0 for of_one in worth.values())


def test_the_command_tells_what_a_variant_costs(blobs, tmp_path, capsys):
    torch.manual_seed(0)
    model = mae_vit_tiny_patch4(img_size=16, in_chans=1)
    torch.save({"model": model.state_dict(), "args": {"input_size": 16}}, tmp_path / "a.pth")
    words = ["--to", "torch-export", "--variant", "bf16", "--input", "uint8", "--output", str(tmp_path / "a.pt2")]
    assert main(["export", str(tmp_path / "a.pth"), *words, "--check", blobs]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert float(re.search(r"differ by at most (\S+) from", out)[1]) > 1e-3
    for name in ("fastmae", "fp32 in torch", "bf16 in torch"):
        assert re.search(rf"│ {name} │ \S+ │ \S+ % │ \S+ % │ \d+ │", out), out


def test_weights_of_over_2_gb_lie_beside_the_graph_and_come_along(model, tmp_path, monkeypatch):
    """The exporter is told to put any weights there, so that the test need not make so many."""
    whole = torch.onnx.ONNXProgram.save
    monkeypatch.setattr(torch.onnx.ONNXProgram, "save", lambda program, path: whole(program, path, external_data=True))
    for variant in ("fp32", "int8"):
        path = tmp_path / variant / "encoder.onnx"
        save_onnx(path, model, variant, False)
        assert sorted(file.name for file in path.parent.iterdir()) == ["encoder.onnx", "encoder.onnx.data"]
        assert_same_features(model, opened_onnx(path), False, ROUNDED.get(variant, EXACT))


def test_the_encoder_reads_pixels_as_the_ops_do():
    """The class token and the norms hide a shift of all pixels: it is looked at in the projection itself."""
    model = mae_vit_tiny_patch4(img_size=16, in_chans=1, mean=[0.3], std=[0.2])
    pixels = torch.from_numpy(np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1))
    encoder = Encoder(model, torch.float32, True)
    seen = []
    encoder.tokens.projection.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    encoder(pixels)
    torch.testing.assert_close(seen[0][0, 0], ((pixels[0, :, :, 0] / 255) - 0.3) / 0.2)
