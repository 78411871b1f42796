"""A run with a model of no preset's sizes: it is trained, resumed, exported and read like any other."""

import json
import shutil
from functools import partial

import pytest
import torch
from helpers import assert_same_run, small_run
from safetensors.torch import load_file

from fastmae.checkpoint.load import load_classifier, load_model, open_checkpoint
from fastmae.cli import main
from fastmae.config import FinetuneConfig
from fastmae.config.shape import SHAPE
from fastmae.errors import UserError
from fastmae.export.onnx import opened_onnx
from fastmae.export.program import opened_program
from fastmae.model.classifier import Classifier
from fastmae.model.pixels import normalised
from fastmae.model.sizes import sizes_of
from fastmae.train.classify import finetune
from fastmae.train.pretrain import pretrain

ENCODER = dict(embed_dim=48, depth=2, num_heads=2, mlp_ratio=2.5, registers=3)
FREE = ENCODER | dict(decoder_embed_dim=32, decoder_depth=1, decoder_num_heads=2, decoder_mlp_ratio=3.0)
RUN = dict(FREE, epochs=2, checkpoint_freq=5)


@pytest.fixture(scope="module")
def run(blobs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("shapes") / "run"
    assert pretrain(small_run(blobs, folder, **RUN)) == 0
    return folder


@pytest.fixture(scope="module")
def model(run):
    return load_model(run)


def images(model):
    shape = (3, *model.img_size, model.in_chans)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(2))


def gives_the_same(path, model, **given):
    found = load_model(path, **given)
    return torch.equal(found.forward_features(images(model)), model.forward_features(images(model)))


def test_the_model_has_the_sizes_and_the_run_says_them(run, model):
    assert {name: sizes_of(model).shape[name] for name in FREE} == FREE
    assert (sizes_of(model).hidden, sizes_of(model).decoder_hidden, model.prefix_tokens) == (120, 96, 4)
    assert model.reg_token.std() > 0.01
    start = json.loads((run / "environment.jsonl").read_text().splitlines()[0])
    assert "heads of a multiple of 16 numbers up to 128, got 24" in start["backends"]["attention"]


def test_it_resumes_to_the_bit_and_with_no_other_sizes(blobs, run, tmp_path):
    resumed = tmp_path / "run"
    shutil.copytree(run, resumed)
    shutil.rmtree(max((resumed / "checkpoints").iterdir()))
    for name, value in (("depth", 3), ("registers", None), ("mlp_ratio", None), ("decoder_mlp_ratio", 4.0)):
        with pytest.raises(UserError, match=f"was made with {name} "):
            pretrain(small_run(blobs, resumed, **{**RUN, name: value}, resume="auto"))
    assert pretrain(small_run(blobs, resumed, **RUN, resume="auto")) == 0
    assert_same_run(resumed, run)


@pytest.mark.parametrize("file", ["checkpoint-1.pth", "checkpoint-1.safetensors"])
def test_official_files_are_read_and_resumed(blobs, run, model, tmp_path, file):
    assert gives_the_same(run / file, model)
    assert {name: open_checkpoint(run / file).settings[name] for name in SHAPE} == FREE
    if file.endswith("pth"):
        assert pretrain(small_run(blobs, tmp_path / "on", **FREE, epochs=3, resume=str(run / file))) == 0
    changes = {**FREE, "registers": 0}
    with pytest.raises(UserError, match="its encoder has --registers 3, not 0; give its --registers and --model"):
        pretrain(small_run(blobs, tmp_path / "off", **changes, epochs=3, resume=str(run / file)))


def export(run, output, *words):
    assert main(["export", str(run), "--output", str(output), *words]) == 0
    return output


@pytest.mark.parametrize("words", [("official", "full"), ("official", "encoder"), ("timm", "encoder")])
def test_exports_are_read_again(run, model, tmp_path, capsys, words):
    path = export(run, tmp_path / "a.safetensors", "--to", words[0], *(["--part", words[1]] * (words[0] != "timm")))
    given = {} if words[0] == "official" else dict(num_heads=2, mean=model.mean.tolist(), std=model.std.tolist())
    assert gives_the_same(path, model, **given)
    if words[0] == "timm":
        weights = load_file(path)
        assert weights["pos_embed"].shape == (1, 1 + 3 + 16, 48)
        assert not weights["pos_embed"][:, :4].any()
        said = (
            "timm.models.VisionTransformer(img_size=16, patch_size=4, in_chans=1, num_classes=0, global_pool='token', "
        )
        said += "embed_dim=48, depth=2, num_heads=2, mlp_ratio=2.5, reg_tokens=3)"
        assert said in capsys.readouterr().out


def test_timm_loads_the_file_strictly_and_gives_the_same_features(run, model, tmp_path):
    """With registers, and the sizes that the export says."""
    pytest.importorskip("torchvision", reason="timm imports it, and it has no build for every machine")
    import timm

    from fastmae.export.timm import as_timm

    path = export(run, tmp_path / "a.safetensors", "--to", "timm")
    theirs = eval(f"timm.models.{as_timm(model)}", {"timm": timm}).eval()
    theirs.load_state_dict(load_file(path), strict=True)
    floats = torch.randn(3, 1, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(theirs.forward_features(floats), model.forward_features(floats), rtol=0, atol=1e-5)


@pytest.mark.slow
def test_programs_give_the_same_tokens(run, model, tmp_path):
    floats = normalised(model, images(model)).contiguous()
    for to, suffix, opened in (("torch-export", "pt2", opened_program), ("onnx", "onnx", opened_onnx)):
        tokens = opened(export(run, tmp_path / f"a.{suffix}", "--to", to))(floats)
        assert tokens.shape == (3, 4 + 16, 48)
        torch.testing.assert_close(tokens, model.forward_features(floats), rtol=0, atol=1e-5)


def test_transformers_gets_no_registers(run, tmp_path, refusal):
    line = refusal(["export", str(run), "--to", "hf", "--output", str(tmp_path / "a")])
    assert line == (
        "fastmae: --to hf: transformers' ViT and ViTMAE have no registers, which this model has; use --to timm"
    )


@pytest.mark.slow
def test_transformers_gets_free_sizes(blobs, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    import transformers

    plain = tmp_path / "plain"
    assert pretrain(small_run(blobs, plain, **{**FREE, "registers": 0}, epochs=1)) == 0
    model, folder = load_model(plain), export(plain, tmp_path / "folder", "--to", "hf")
    theirs = transformers.ViTMAEForPreTraining.from_pretrained(folder).eval()
    floats = torch.randn(3, 1, 16, 16, generator=torch.Generator().manual_seed(2))
    noise = torch.rand(3, 16, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        loss, pred, _ = model(floats, 0.75, ids_shuffle=noise.argsort(dim=1))
        output = theirs(floats, noise=noise)
    torch.testing.assert_close(output.loss, loss, rtol=1e-5, atol=0)
    torch.testing.assert_close(output.logits, pred, rtol=0, atol=1e-5)
    assert gives_the_same(folder, model)


def test_readers_take_it(blobs, run, tmp_path, capsys):
    for words in (
        ["reconstruct", str(run), "--images", blobs, "--output", str(tmp_path / "a.png")],
        ["features", str(run), blobs, "--output", str(tmp_path / "a.npz")],
    ):
        assert main(words) == 0, capsys.readouterr().err


def test_it_is_fine_tuned_and_the_classifier_is_read(blobs, run, model, tmp_path):
    tuned = tmp_path / "tuned"
    flags = partial(FinetuneConfig, data_path=blobs, finetune=str(run), batch_size=8, device="cpu", warmup_epochs=0)
    assert finetune(flags(output_dir=str(tuned), epochs=1, checkpoint_freq=4)) == 0
    classifier = load_classifier(tuned)
    assert isinstance(classifier, Classifier)
    assert (len(classifier.blocks), classifier.prefix_tokens, classifier.head_dim) == (2, 4, 24)
    logits = classifier(images(model))
    torch.testing.assert_close(load_classifier(tuned / "checkpoint-0.pth")(images(model)), logits, rtol=0, atol=1e-5)
    with pytest.raises(UserError, match="depth=3: the encoder has 2; leave it out"):
        finetune(flags(output_dir=str(tmp_path / "other"), depth=3))


def test_random_encoders_of_a_fine_tuning_have_the_sizes_that_are_given(blobs, tmp_path):
    run = tmp_path / "run"
    flags = dict(data_path=blobs, output_dir=str(run), batch_size=8, device="cpu", warmup_epochs=0, epochs=1)
    assert finetune(FinetuneConfig(**flags, **ENCODER)) == 0
    assert (len(load_classifier(run).blocks), load_classifier(run).prefix_tokens) == (2, 4)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (dict(embed_dim=50), "embed_dim=50: must be a multiple of 4, as positions are sines and cosines of two axes"),
        (
            dict(embed_dim=64, num_heads=3),
            "embed_dim=64: must be a multiple of the heads, of which there are 3; num_heads=1 would fit",
        ),
        (
            dict(embed_dim=132, num_heads=None, decoder_embed_dim=100),
            "decoder_embed_dim=100: must be a multiple of the heads, of which there are 3 that mae_vit_tiny_patch4",
        ),
        (dict(mlp_ratio=0.001), "mlp_ratio=0.001: leaves nothing of a width of 128"),
        (dict(mlp_ratio=0.0), "mlp_ratio=0.0: must be a positive number"),
        (dict(registers=-1), "registers=-1: must be 0 or more"),
        (dict(depth=0), "depth=0: must be at least 1"),
        (dict(embed_dim=72, num_heads=3, attention="cpu"), "heads of a multiple of 16 numbers up to 128, got 24"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused_in_one_line(blobs, tmp_path, flags, said):
    with pytest.raises(UserError) as caught:
        pretrain(small_run(blobs, tmp_path / "run", **flags))
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_run_begins_with_its_encoder_and_has_its_sizes(blobs, run, model, tmp_path):
    begun, file = tmp_path / "run", "checkpoint-1.safetensors"
    assert pretrain(small_run(blobs, begun, init=str(run / file), epochs=1, warmup_epochs=1e-3, lr=1e-9)) == 0
    found = load_model(begun)
    assert {name: sizes_of(found).shape[name] for name in ENCODER} == ENCODER
    torch.testing.assert_close(found.reg_token, model.reg_token, rtol=0, atol=1e-4)
    for start in (run, run / file):
        with pytest.raises(UserError, match=r"num_heads=4: the encoder of .* has 2; leave it out"):
            pretrain(small_run(blobs, tmp_path / "other", init=str(start), epochs=1, num_heads=4))
