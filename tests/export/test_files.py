"""Files for other tools: what they compute is what fastmae computes, and read again they are the same bits."""

import json
import re
from functools import partial

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from fastmae.checkpoint.load import load_model, open_checkpoint
from fastmae.checkpoint.official import model_of_file, read_official
from fastmae.checkpoint.restore import restore
from fastmae.cli import main
from fastmae.errors import UserError
from fastmae.export.hf import save_huggingface
from fastmae.export.timm import as_timm, save_timm
from fastmae.model.mae import MaskedAutoencoderViT
from fastmae.model.presets import PRESETS, mae_vit_tiny_patch4
from fastmae.model.sizes import sizes_of
from fastmae.train.optim import make_optimizer

FORMATS = {
    "official": ["--to", "official", "--output", "out.pth"],
    "official safetensors": ["--to", "official", "--output", "out.safetensors"],
    "official encoder": ["--to", "official", "--part", "encoder", "--output", "out.pth"],
    "timm": ["--to", "timm", "--output", "out.pth"],
    "timm safetensors": ["--to", "timm", "--output", "out.safetensors"],
    "hf": ["--to", "hf", "--output", "folder"],
    "hf encoder": ["--to", "hf", "--part", "encoder", "--output", "folder"],
}
WITH_DECODER = ("official", "official safetensors", "hf")


def uneven(model):
    """Biases and norms start at 0 and 1, where mistakes could hide."""
    for parameter in model.parameters():
        parameter.data += 0.02 * torch.randn_like(parameter)
    return model.eval()


def encoder_of(model):
    return {name: t for name, t in model.state_dict().items() if not name.startswith(("decoder_", "mask_token"))}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A checkpoint in the published form, with settings of its own."""
    torch.manual_seed(0)
    model = uneven(mae_vit_tiny_patch4(img_size=16, in_chans=1, norm_pix_loss=True, mean=[0.1], std=[0.7]))
    args = {"model": "mae_vit_tiny_patch4", "input_size": 16, "norm_pix_loss": True, "mask_ratio": 0.5}
    args |= {"mean": [0.1], "std": [0.7], "data_path": "/secret"}
    path = tmp_path_factory.mktemp("export") / "checkpoint-3.pth"
    torch.save({"model": model.state_dict(), "epoch": 3, "args": args}, path)
    return path


def exported(trained, tmp_path, name, capsys):
    *words, output = FORMATS[name]
    assert main(["export", str(trained), *words, str(tmp_path / output)]) == 0
    assert str(tmp_path / output) in capsys.readouterr().out
    return tmp_path / output


@pytest.mark.parametrize("name", FORMATS)
def test_what_is_exported_and_read_again_is_the_same_bits(trained, tmp_path, name, capsys):
    path = exported(trained, tmp_path, name, capsys)
    before, after = load_model(str(trained)), open_checkpoint(str(path))
    assert after.has_decoder == (name in WITH_DECODER)
    assert after.model.img_size == (16, 16)
    wanted = before.state_dict() if after.has_decoder else encoder_of(before)
    assert all(torch.equal(after.model.state_dict()[key], tensor) for key, tensor in wanted.items())
    if "timm" not in name:  # whose files are weights and no more
        assert torch.equal(after.model.mean, before.mean)
        assert torch.equal(after.model.std, before.std)
    if after.has_decoder:
        assert after.model.norm_pix_loss
        assert after.settings["mask_ratio"] == 0.5
    else:
        with pytest.raises(UserError, match="holds the encoder alone"):
            load_model(str(path), needs_decoder=True)
    said = capsys.readouterr().err
    if "timm" in name:
        assert "does not say mean, std" in said
        assert "taken as square, 4×4" in said  # the positions of this model are no fixed ones
    else:
        assert said == ""
    assert not list(tmp_path.glob(".*"))


def test_one_format_after_another_gives_the_same_bits(trained, tmp_path, capsys):
    source = trained
    for i, name in enumerate(("official", "hf", "official safetensors", "hf encoder", "timm safetensors", "timm")):
        (tmp_path / str(i)).mkdir()
        source = exported(source, tmp_path / str(i), name, capsys)
    model = load_model(str(source))
    assert all(torch.equal(model.state_dict()[key], t) for key, t in encoder_of(load_model(str(trained))).items())


def test_an_exported_file_does_not_name_the_folders_of_its_run(trained, tmp_path, capsys):
    content = torch.load(exported(trained, tmp_path, "official", capsys), weights_only=True)
    assert content.keys() == {"model", "args"}
    assert "data_path" not in content["args"]


@pytest.mark.parametrize("name", ["official", "hf"])
def test_training_starts_from_an_exported_file(trained, tmp_path, name, capsys):
    source = exported(trained, tmp_path, name, capsys)
    model = mae_vit_tiny_patch4(img_size=16, in_chans=1, norm_pix_loss=True)
    optimizer = make_optimizer(model, 1e-3, 0.05)
    progress = restore(str(source), tmp_path / "run", model, optimizer, fixed={}, fresh_step=7, steps_per_epoch=9)
    assert (progress.step, progress.origin) == (7, str(source))
    assert all(torch.equal(model.state_dict()[key], t) for key, t in load_model(str(trained)).state_dict().items())


def test_training_does_not_start_from_an_encoder_alone(trained, tmp_path, capsys):
    source = exported(trained, tmp_path, "hf encoder", capsys)
    words = ["--device", "cpu", "--output_dir", str(tmp_path / "run"), "--resume", str(source)]
    assert main(["pretrain", "--model", "mae_vit_tiny_patch4", "--input_size", "16", *words]) == 2
    error = capsys.readouterr().err
    assert "holds the encoder alone" in error
    assert error.count("\n") == 1


# --- timm -------------------------------------------------------------------------------------------------------------


def timm_shapes(width, depth, patch, channels, patches):
    """The state dict of timm's VisionTransformer with a class token, biases and no head."""
    shapes = {"cls_token": (1, 1, width), "pos_embed": (1, patches + 1, width)}
    shapes |= {"patch_embed.proj.weight": (width, channels, patch, patch), "patch_embed.proj.bias": (width,)}
    for i in range(depth):
        for name, (rows, columns) in {
            "attn.qkv": (3 * width, width), "attn.proj": (width, width),
            "mlp.fc1": (4 * width, width), "mlp.fc2": (width, 4 * width),
        }.items():  # fmt: skip
            shapes |= {f"blocks.{i}.{name}.weight": (rows, columns), f"blocks.{i}.{name}.bias": (rows,)}
        shapes |= {f"blocks.{i}.{norm}.{leaf}": (width,) for norm in ("norm1", "norm2") for leaf in ("weight", "bias")}
    return shapes | {"norm.weight": (width,), "norm.bias": (width,)}


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_timm_gets_the_keys_and_shapes_of_its_vision_transformer(tmp_path, suffix):
    path = tmp_path / f"encoder.{suffix}"
    save_timm(path, mae_vit_tiny_patch4(img_size=16, in_chans=1))
    weights = load_file(path) if suffix == "safetensors" else torch.load(path, weights_only=True)
    shapes = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    assert shapes == timm_shapes(width=128, depth=4, patch=4, channels=1, patches=16)


@pytest.mark.parametrize("name", PRESETS)
def test_timm_makes_mlps_as_wide_as_ours(name):
    """It rounds the product of width and ratio down."""
    with torch.device("meta"):
        model = PRESETS[name]()
    ratio = float(re.search(r"mlp_ratio=([\d.]+)", as_timm(model))[1])
    assert int(sizes_of(model).width * ratio) == sizes_of(model).hidden


def test_timm_loads_it_strictly_and_gives_the_same_features(trained, tmp_path):
    pytest.importorskip("torchvision", reason="timm imports it, and it has no build for every machine")
    from timm.models.vision_transformer import VisionTransformer

    ours = load_model(str(trained))
    save_timm(tmp_path / "encoder.pth", ours)
    sizes = dict(embed_dim=128, depth=4, num_heads=4, norm_layer=partial(nn.LayerNorm, eps=1e-6))
    theirs = VisionTransformer(img_size=16, patch_size=4, in_chans=1, num_classes=0, **sizes).eval()
    theirs.load_state_dict(torch.load(tmp_path / "encoder.pth", weights_only=True), strict=True)
    images = torch.randn(3, 1, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(theirs.forward_features(images), ours.forward_features(images), rtol=0, atol=1e-5)


# --- transformers -----------------------------------------------------------------------------------------------------


@pytest.fixture
def transformers(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    import transformers

    return transformers


def opened(kind, folder, **options):
    """From a folder alone, every tensor accounted for."""
    model, loading_info = kind.from_pretrained(folder, local_files_only=True, output_loading_info=True, **options)
    assert not any(loading_info.values()), loading_info
    return model.eval()


def test_transformers_gives_the_same_loss_and_predictions(trained, tmp_path, capsys, transformers):
    folder = exported(trained, tmp_path, "hf", capsys)
    ours, theirs = load_model(str(trained)), opened(transformers.ViTMAEForPreTraining, folder)
    assert theirs.config.mask_ratio == 0.5
    generator = torch.Generator().manual_seed(2)
    images, noise = torch.randn(4, 1, 16, 16, generator=generator), torch.rand(4, 16, generator=generator)
    with torch.no_grad():
        output = theirs(images, noise=noise)
        loss, pred, _ = ours(images, 0.5, ids_shuffle=noise.argsort(dim=1))
    torch.testing.assert_close(output.loss, loss, rtol=1e-5, atol=0)
    torch.testing.assert_close(output.logits, pred, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("size", "patch"), [((16, 16), (4, 4)), ((8, 24), (4, 8))])
def test_transformers_gives_the_same_features(tmp_path, transformers, size, patch):
    """Of oblong images, too, where there is no decoder."""
    sizes = dict(embed_dim=32, depth=2, num_heads=4, decoder_embed_dim=16, decoder_depth=1, decoder_num_heads=2)
    torch.manual_seed(0)
    norm_layer = lambda width: nn.LayerNorm(width, eps=1e-6)  # noqa: E731
    ours = uneven(MaskedAutoencoderViT(size, patch, norm_layer=norm_layer, **sizes))
    save_huggingface(tmp_path / "vit", ours, 0.75, "encoder")
    theirs = opened(transformers.ViTModel, tmp_path / "vit", add_pooling_layer=False)
    images = torch.randn(3, 3, *size)
    with torch.no_grad():
        tokens = theirs(images).last_hidden_state
        torch.testing.assert_close(tokens, ours.forward_features(images), rtol=0, atol=1e-5)


def test_transformers_prepares_images_as_they_were_in_training(trained, tmp_path, capsys, transformers):
    processor = transformers.AutoImageProcessor.from_pretrained(
        exported(trained, tmp_path, "hf encoder", capsys), local_files_only=True
    )
    model = load_model(str(trained))
    pixels = torch.randint(0, 256, (16, 16, 1), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    prepared = processor(pixels.numpy(), input_data_format="channels_last", return_tensors="pt")["pixel_values"]
    wanted = ((pixels / 255 - model.mean) / model.std).permute(2, 0, 1)[None]
    torch.testing.assert_close(prepared.float(), wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ["ViTMAEForPreTraining", "ViTModel"])
def test_a_folder_that_transformers_wrote_is_read(trained, tmp_path, capsys, transformers, kind):
    """What its own save_pretrained makes of ours: under whatever names its version writes."""
    name = "hf" if kind == "ViTMAEForPreTraining" else "hf encoder"
    theirs = getattr(transformers, kind).from_pretrained(exported(trained, tmp_path, name, capsys))
    theirs.save_pretrained(tmp_path / "theirs")
    capsys.readouterr()
    model, before = load_model(str(tmp_path / "theirs")), load_model(str(trained))
    wanted = before.state_dict() if kind == "ViTMAEForPreTraining" else encoder_of(before)
    assert all(torch.equal(model.state_dict()[key], tensor) for key, tensor in wanted.items())
    # ViTModel has a head on top, which a masked autoencoder has not: left out, and said.
    told = capsys.readouterr().err
    assert ("not used" in told and "pooler.dense.weight" in told) == (kind == "ViTModel")


def test_the_names_of_version_5s_modules_are_read(trained, tmp_path, capsys):
    folder = exported(trained, tmp_path, "hf", capsys)
    changes = {"attention.attention.query": "attention.q_proj", "attention.attention.key": "attention.k_proj"}
    changes |= {"attention.attention.value": "attention.v_proj", "attention.output.dense": "attention.o_proj"}
    changes |= {"intermediate.dense": "mlp.fc1", "output.dense": "mlp.fc2", "vit.encoder.layer.": "vit.layers."}
    weights = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        for old, new in changes.items():
            name = name.replace(old, new)
        weights[name] = tensor
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    model, before = load_model(str(folder)), load_model(str(trained))
    assert all(torch.equal(model.state_dict()[key], tensor) for key, tensor in before.state_dict().items())


def test_the_released_folders_epsilon_is_taken_as_published_and_said(trained, tmp_path, capsys):
    folder = exported(trained, tmp_path, "hf", capsys)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "layer_norm_eps": 1e-12}))
    assert load_model(str(folder)).norm.eps == 1e-6
    assert "layer_norm_eps 1e-12 is taken as 1e-06" in capsys.readouterr().err


def test_an_old_folder_with_a_pickle_is_read_without_running_it(trained, tmp_path, capsys):
    folder = exported(trained, tmp_path, "hf", capsys)
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    model, before = load_model(str(folder)), load_model(str(trained))
    assert all(torch.equal(model.state_dict()[key], tensor) for key, tensor in before.state_dict().items())


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cross(tmp_path_factory):
    model = mae_vit_tiny_patch4(img_size=16, in_chans=1, decoder_attention="cross")
    path = tmp_path_factory.mktemp("cross") / "checkpoint-0.pth"
    args = {"model": "mae_vit_tiny_patch4", "input_size": 16}
    torch.save({"model": model.state_dict(), "args": args}, path)
    return path


def test_of_a_decoder_with_cross_attention_transformers_gets_the_encoder(cross, tmp_path, capsys, transformers):
    words = ["export", str(cross), "--output", str(tmp_path / "vit"), "--to", "hf"]
    assert main(words) == 2
    assert "--part encoder" in capsys.readouterr().err
    assert not (tmp_path / "vit").exists()
    assert main([*words, "--part", "encoder"]) == 0
    theirs = opened(transformers.ViTModel, tmp_path / "vit", add_pooling_layer=False)
    images = torch.randn(2, 1, 16, 16)
    with torch.no_grad():
        wanted = load_model(str(cross)).forward_features(images)
        torch.testing.assert_close(theirs(images).last_hidden_state, wanted, rtol=0, atol=1e-5)


def test_a_decoder_with_cross_attention_stays_in_the_official_file(cross, tmp_path):
    assert main(["export", str(cross), "--to", "official", "--output", str(tmp_path / "full.safetensors")]) == 0
    model, before = load_model(str(tmp_path / "full.safetensors")), load_model(str(cross))
    assert all(torch.equal(model.state_dict()[key], tensor) for key, tensor in before.state_dict().items())


WRONG = {
    "another ending": (["--to", "timm", "--output", "{tmp}/a.bin"], "must end in .pth or .safetensors"),
    "no ending": (["--to", "onnx", "--output", "{tmp}/a"], "must end in .onnx"),
    "format that is not": (["--to", "keras", "--output", "{tmp}/a"], "--to"),
    "no output": (["--to", "timm"], "--output"),
    "a decoder for timm": (["--to", "timm", "--part", "full", "--output", "{tmp}/a.pth"], "--part full"),
    "a variant of a file": (["--to", "hf", "--variant", "int8", "--output", "{tmp}/a"], "--variant int8"),
    "pixels of a file": (["--to", "hf", "--input", "uint8", "--output", "{tmp}/a"], "--input uint8"),
    "check of a file": (["--to", "timm", "--check", "digits", "--output", "{tmp}/a.pth"], "--check"),
    "bf16 in ONNX": (["--to", "onnx", "--variant", "bf16", "--output", "{tmp}/a.onnx"], "--to torch-export"),
    "int8 in torch": (["--to", "torch-export", "--variant", "int8", "--output", "{tmp}/a.pt2"], "--to onnx"),
    "check on nothing": (["--to", "onnx", "--check", "{tmp}/none", "--output", "{tmp}/a.onnx"], "no such file"),
    "check without labels": (["--to", "onnx", "--check", "{tmp}/x.npy", "--output", "{tmp}/a.onnx"], "no labels"),
    "check on one class": (["--to", "onnx", "--check", "{tmp}/one.npz", "--output", "{tmp}/a.onnx"], "of one class"),
    "a folder in use": (["--to", "hf", "--output", "{tmp}"], "is a folder with files in it"),
    "under a file": (["--to", "hf", "--output", "{tmp}/x.npy/a"], "cannot be written"),
    "a program under a file": (["--to", "torch-export", "--output", "{tmp}/x.npy/a.pt2"], "cannot be written"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_one_line_and_leaves_nothing(trained, tmp_path, name, capsys):
    import numpy as np

    pixels = np.zeros((10, 16, 16), np.uint8)
    np.save(tmp_path / "x.npy", pixels)
    np.savez(tmp_path / "one.npz", x_train=pixels, y_train=np.zeros(10, int))
    words, expected = WRONG[name]
    assert main(["export", str(trained), *[word.format(tmp=tmp_path) for word in words]]) == 2
    error = capsys.readouterr().err
    assert expected in error
    assert error.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one.npz", "x.npy"]


def test_an_encoder_alone_has_no_full_form(trained, tmp_path, capsys):
    path = exported(trained, tmp_path, "timm", capsys)
    assert main(["export", str(path), "--to", "hf", "--part", "full", "--output", str(tmp_path / "mae")]) == 2
    assert "holds the encoder alone" in capsys.readouterr().err


@pytest.fixture(scope="module")
def spoilt(trained, tmp_path_factory):
    """A function that writes an exported folder with something changed, and returns it."""
    root = tmp_path_factory.mktemp("spoilt")
    save_huggingface(root / "good", load_model(str(trained)), 0.75, "full")

    def write(config=None, tensors=None, text=None):
        folder = root / str(len(list(root.iterdir())))
        folder.mkdir()
        settings = json.loads((root / "good" / "config.json").read_text())
        (folder / "config.json").write_text(text or json.dumps({**settings, **(config or {})}))
        weights = load_file(root / "good" / "model.safetensors")
        for name, tensor in (tensors or {}).items():
            weights.pop(name, None)
            weights |= {} if tensor is None else {name: tensor}
        save_file(weights, folder / "model.safetensors", {"format": "pt"})
        return folder

    return write


QUERY = "vit.encoder.layer.0.attention.attention.query.weight"
HOSTILE = {
    "another architecture": ({"config": {"model_type": "bert"}}, "model_type bert is another architecture"),
    "no JSON": ({"text": "{"}, "not readable as JSON"),
    "deep JSON": ({"text": "[" * 100_000}, "not readable as JSON"),
    "a list": ({"text": "[1]"}, "holds no settings"),
    "other heads": (
        {"config": {"num_attention_heads": 6}},
        "embed_dim=128: must be a multiple of the heads, of which there are 6;",
    ),
    "other heads of the decoder": (
        {"config": {"decoder_num_attention_heads": 5}},
        "decoder_embed_dim=96: must be a multiple of the heads, of which there are 5;",
    ),
    "heads of text": ({"config": {"num_attention_heads": "4"}}, "its encoder has '4' heads, not 4"),
    "another activation": ({"config": {"hidden_act": "relu"}}, "hidden_act relu"),
    "a huge image": ({"config": {"image_size": 1 << 40}}, "of another shape"),
    "no size": ({"config": {"image_size": "large"}}, "is not a size"),
    "a query is missing": ({"tensors": {QUERY: None}}, "1 tensors are missing (blocks.0.attn.qkv.weight)"),
    "a query of another shape": ({"tensors": {QUERY: torch.zeros(3, 3)}}, "1 tensors are missing"),
    "a foreign tensor": ({"tensors": {"vit.adapter.weight": torch.zeros(2)}}, "1 tensors are unknown (vit.adapter"),
    "whole numbers": ({"tensors": {"vit.layernorm.bias": torch.zeros(128, dtype=torch.int8)}}, "no plain tensor"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_and_foreign_folders_are_refused_in_one_line(spoilt, name):
    changes, words = HOSTILE[name]
    with pytest.raises(UserError) as caught:
        load_model(str(spoilt(**changes)))
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_every_key_that_does_not_fit_is_named(trained, tmp_path):
    content = torch.load(trained, weights_only=True)
    del content["model"]["norm.weight"], content["model"]["blocks.1.norm2.bias"]
    content["model"] |= {"head.weight": torch.zeros(3), "cls_token": torch.zeros(5)}
    torch.save(content, tmp_path / "a.pth")
    with pytest.raises(UserError) as caught:
        load_model(str(tmp_path / "a.pth"))
    for words in (
        "2 tensors are missing (blocks.1.norm2.bias, norm.weight)",
        "1 tensors are unknown (head.weight)",
        "1 tensors are of another shape (cls_token)",
    ):
        assert words in str(caught.value)


def test_a_tensor_that_claims_more_than_its_bytes_takes_no_memory(trained, tmp_path):
    """One number in the file, which stands for a billion of them."""
    content = torch.load(trained, weights_only=True)
    del content["args"]
    content["model"]["pos_embed"] = torch.zeros(1, 1, 1).expand(1, (1 << 40) + 1, 128)
    torch.save(content, tmp_path / "a.pth")
    with pytest.raises(UserError, match="pos_embed is no plain tensor"):
        model_of_file(read_official(tmp_path / "a.pth"), None)
