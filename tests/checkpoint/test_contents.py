"""Files of other trainers: what is understood gives the same bits, the rest is left out with a line or refused."""

import copy
import json
import os

import pytest
import torch
from safetensors.torch import save_file

from fastmae.checkpoint.contents import NotMeantError, understand
from fastmae.checkpoint.huggingface import to_huggingface
from fastmae.checkpoint.load import load_model, open_checkpoint
from fastmae.checkpoint.restore import restore
from fastmae.config.model import ModelSpec
from fastmae.config.shape import SHAPE
from fastmae.errors import UserError
from fastmae.model.build import build_model
from fastmae.model.presets import mae_vit_tiny_patch4
from fastmae.model.sizes import beyond_preset, sizes_of
from fastmae.model.vit import sincos_positions
from fastmae.train.optim import make_optimizer

SIZE = 16, 64  # 4×16 patches, as many as 8×8


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = mae_vit_tiny_patch4(img_size=SIZE, mean=[0.1, 0.2, 0.3], std=[0.4, 0.5, 0.6])
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.02 * torch.randn_like(parameter)
    return model.eval()


@pytest.fixture(scope="module")
def encoder(model):
    state = model.state_dict()
    return {name: tensor for name, tensor in state.items() if not name.startswith(("decoder_", "mask_token"))}


@pytest.fixture
def saved(tmp_path):
    """A function that saves what a file holds and returns its path."""

    def save(content, name="a.pth"):
        torch.save(content, tmp_path / name)
        return tmp_path / name

    return save


def same_features(path, model, **given):
    images = torch.randint(0, 256, (2, *model.img_size, 3), generator=torch.Generator().manual_seed(1))
    images = images.to(torch.uint8)
    found = load_model(path, mean=model.mean.tolist(), std=model.std.tolist(), **given)
    return torch.equal(found.forward_features(images), model.forward_features(images))


def renamed(weights, prefix):
    return {prefix + name: tensor for name, tensor in weights.items()}


# --- prefixes and containers ------------------------------------------------------------------------------------------

WRAPPED = {
    "bare": lambda e: e,
    "DDP": lambda e: {"model": renamed(e, "module.")},
    "compiled": lambda e: {"state_dict": renamed(e, "_orig_mod.")},
    "encoder": lambda e: {"model_state_dict": renamed(e, "encoder.")},
    "backbone": lambda e: {"model_state": renamed(e, "backbone.")},
    "compiled blocks": lambda e: {name.replace("attn.", "_orig_mod.attn."): tensor for name, tensor in e.items()},
    "Lightning": lambda e: {
        "state_dict": renamed(e, "model.vit."),
        "pytorch-lightning_version": "2",
        "loops": {"a": 1},
    },
    "nested": lambda e: {"checkpoint": {"weights": {"net": renamed(e, "module.encoder.")}}, "iteration": 5},
    "averaged": lambda e: {"model": e, "model_ema": {name: torch.zeros_like(tensor) for name, tensor in e.items()}},
    "transformers": lambda e: renamed(to_huggingface(e), "model."),
    "transformers' ViTModel": lambda e: {n.removeprefix("vit."): t for n, t in to_huggingface(e).items()},
}


@pytest.mark.parametrize("name", WRAPPED)
def test_prefixes_and_containers_do_not_change_a_bit(name, model, encoder, saved):
    assert same_features(saved(WRAPPED[name](encoder)), model)


def test_a_decoder_beside_the_encoder_is_its_decoder(model, encoder, saved):
    decoder = {name: tensor for name, tensor in model.state_dict().items() if name not in encoder}
    for inner in ("", "decoder."):
        path = saved({"state_dict": renamed(encoder, "mae.encoder.") | renamed(decoder, f"mae.{inner}")})
        found = load_model(path, needs_decoder=True).state_dict()
        assert all(torch.equal(found[name], tensor) for name, tensor in model.state_dict().items())


def test_of_student_and_teacher_the_teacher_is_taken_and_every_key_is_accounted_for(encoder):
    student = renamed({name: torch.zeros_like(tensor) for name, tensor in encoder.items()}, "module.backbone.")
    teacher = renamed(encoder, "backbone.") | {"head.mlp.0.weight": torch.zeros(2, 2)}
    found = understand({"student": student, "teacher": teacher, "epoch": 3})
    assert all(torch.equal(found.weights[name], tensor) for name, tensor in encoder.items())
    assert found.weights.keys() == encoder.keys()
    assert found.notes[0] == "holds 2 encoders; that of teacher.backbone is taken"
    assert found.notes[1].startswith(f"{len(encoder) + 1} tensors beside the encoder, not used: head.mlp.0.weight")


def test_used_and_left_out_tensors_add_up(model, encoder):
    content = {"model": renamed(model.state_dict(), "module.") | {"module.loss.scale": torch.zeros(1)}}
    content |= {"queue": torch.zeros(3), "head": {"weight": torch.zeros(2)}}
    found = understand(content)
    left_out = sum(int(note.split()[0]) for note in found.notes)
    assert len(found.weights) + left_out == len(model.state_dict()) + 3
    assert "loss.scale" in found.weights  # inside the model and unknown: loading refuses it


def test_split_biases_are_joined(model, encoder, saved):
    split = dict(encoder)
    for block in range(4):
        q, _, v = split.pop(f"blocks.{block}.attn.qkv.bias").chunk(3)
        split |= {f"blocks.{block}.attn.q_bias": q, f"blocks.{block}.attn.v_bias": v}
    joined = mae_vit_tiny_patch4(img_size=SIZE, mean=model.mean.tolist(), std=model.std.tolist()).eval()
    joined.load_state_dict(model.state_dict())
    for block in joined.blocks:
        block.attn.qkv.bias.data[128:256] = 0
    assert same_features(saved(split), joined)
    assert "biases of attn.qkv of 4 blocks are made of q_bias and v_bias" in understand(split).notes[0]


@pytest.mark.parametrize("names", [("ls1.gamma", "ls2.gamma"), ("gamma_1", "gamma_2")])
def test_layer_scale_is_multiplied_into_the_products_before_it(names, model, encoder, saved):
    gammas = {f"blocks.{i}.{name}": torch.randn(128) for i in range(4) for name in names}
    scaled = copy.deepcopy(model)
    for i, block in enumerate(scaled.blocks):
        for name, product in zip(names, (block.attn.proj, block.mlp.fc2), strict=True):
            product.weight.data *= gammas[f"blocks.{i}.{name}"][:, None]
            product.bias.data *= gammas[f"blocks.{i}.{name}"]
    assert same_features(saved(encoder | gammas), scaled)
    assert understand(encoder | gammas).notes == ("LayerScale of 8 branches is multiplied into their last products",)


def test_a_dinov2_of_transformers_gives_its_features(tmp_path, caplog):
    import transformers

    sizes = {"hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4, "image_size": 28, "patch_size": 14}
    torch.manual_seed(0)
    theirs = transformers.Dinov2Model(transformers.Dinov2Config(**sizes, layerscale_value=0.5)).eval()
    theirs.save_pretrained(tmp_path)
    images = torch.randn(2, 3, 28, 28)
    ours = load_model(tmp_path)
    assert ours.patch_size == (14, 14)
    torch.testing.assert_close(ours.forward_features(images), theirs(images).last_hidden_state, rtol=1e-5, atol=1e-5)
    assert "LayerScale of 8 branches" in caplog.text
    assert "1 tensors not used, as no masked autoencoder has them: vit.embeddings.mask_token" in caplog.text


def test_a_dinov2_with_gated_mlps_is_refused(tmp_path):
    import transformers

    config = transformers.Dinov2Config(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14, use_swiglu_ffn=True
    )
    transformers.Dinov2Model(config).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="use_swiglu_ffn is another architecture"):
        load_model(tmp_path)


# --- sizes ------------------------------------------------------------------------------------------------------------


def of_any_shape(**changes):
    """A model of no preset's sizes, with registers."""
    torch.manual_seed(0)
    spec = dict(model="mae_vit_base_patch16", input_size=(16, 32), patch_size=(4, 4), mean=[0.5] * 3, std=[0.2] * 3)
    spec |= dict(embed_dim=192, depth=2, num_heads=3, mlp_ratio=2.5, registers=3, in_chans=3)
    spec |= dict(decoder_embed_dim=64, decoder_depth=1, decoder_num_heads=2, decoder_mlp_ratio=3.0)
    model = build_model(ModelSpec(**{**spec, **changes}))
    return model.eval()


def test_sizes_of_no_preset_are_recognised_from_tensors_and_heads_are_said(saved, capsys):
    model = of_any_shape()
    found = open_checkpoint(saved(model.state_dict()))
    assert found.settings["model"] == "mae_vit_tiny_patch16"  # whose width and heads it has
    shape = beyond_preset("mae_vit_tiny_patch16", sizes_of(model).shape)
    assert {name: found.settings[name] for name in SHAPE} == shape
    assert sizes_of(found.model) == sizes_of(model)
    assert same_features(saved(model.state_dict()), model)
    said = capsys.readouterr().err
    assert "does not say the heads of its decoder; 2 of 32 numbers each are taken" in said
    assert "heads of its encoder" not in said


def test_heads_that_nothing_says_are_asked_for_or_guessed_with_a_line(saved, capsys):
    model = of_any_shape(embed_dim=64, num_heads=4)
    path = saved({"model": model.state_dict()})
    assert not same_features(path, model)
    assert "does not say the heads of its encoder; 1 of 64 numbers each are taken" in capsys.readouterr().err
    assert same_features(path, model, num_heads=4)
    assert same_features(saved({"model": model.state_dict(), "args": {"num_heads": 4}}), model)
    odd = saved(of_any_shape(embed_dim=48, num_heads=2).state_dict())
    with pytest.raises(UserError, match="no preset has such a width, and nothing says the heads of its encoder; give"):
        load_model(odd)
    assert load_model(odd, num_heads=2).head_dims[0] == 24
    with pytest.raises(UserError, match=r"its settings make no model .embed_dim=48: must be a multiple of the heads"):
        load_model(odd, num_heads=5)
    with pytest.raises(
        UserError, match=r"mae_vit_base_patch16'?: its tokens are 768 wide, and those of .* 48; leave it"
    ):
        load_model(odd, model="mae_vit_base_patch16")


def test_no_file_makes_us_build_what_it_does_not_hold(saved):
    weights = of_any_shape().state_dict()
    many = weights | {f"blocks.{number}.norm1.bias": torch.zeros(192) for number in range(2, 2000)}
    with pytest.raises(UserError, match="is a masked autoencoder, 2000 blocks of 192, but"):
        load_model(saved(many))


REGISTERS = {
    "ours": lambda w: w,
    "timm's with positions": lambda w: (
        w | {"pos_embed": torch.cat([w["pos_embed"][:, :1], w["reg_token"], w["pos_embed"][:, 1:]], 1)}
        | {"reg_token": torch.zeros_like(w["reg_token"])}
    ),
    "timm's without": lambda w: (
        w | {"pos_embed": w["pos_embed"][:, 1:], "cls_token": w["cls_token"] + w["pos_embed"][:, :1]}
    ),
    "DINOv2's": lambda w: {{"reg_token": "register_tokens"}.get(name, name): tensor for name, tensor in w.items()},
    "transformers'": lambda w: {n.removeprefix("vit."): t for n, t in to_huggingface(w).items()},
}  # fmt: skip


@pytest.mark.parametrize("positions", ["fixed", "learnt"])
@pytest.mark.parametrize("name", REGISTERS)
def test_registers_are_read_under_every_name_and_with_every_table(name, positions, saved):
    model = of_any_shape(input_size=(16, 16))
    if positions == "learnt":
        torch.nn.init.normal_(model.pos_embed)
    weights = {n: t for n, t in model.state_dict().items() if not n.startswith(("decoder_", "mask_token"))}
    assert same_features(saved(REGISTERS[name](weights)), model)


# --- what a file is ---------------------------------------------------------------------------------------------------

REFUSED = {
    "an optimiser": (
        lambda e: {"state": {0: {"step": torch.zeros(1)}}, "param_groups": []},
        "is the state of an optimiser",
    ),
    "two encoders": (lambda e: {"a": e, "b": e}, r"holds 2 encoders \(a, b\), and nothing tells"),
    "layer scale of another width": (
        lambda e: e | {"blocks.0.ls1.gamma": torch.zeros(64)},
        "has no layer scale of other widths",
    ),
    "gated MLPs": (
        lambda e: e | {"blocks.0.mlp.w12.weight": torch.zeros(4, 128)},
        r"has no gated MLPs \(SwiGLU\)",
    ),
    "rotary positions": (lambda e: e | {"rope_embed.periods": torch.zeros(16)}, "has no rotary positions"),
    "a first norm": (lambda e: e | {"norm_pre.weight": torch.zeros(128)}, "has no norm before the first block"),
    "distilled": (lambda e: e | {"dist_token": torch.zeros(1, 1, 128)}, "has no distillation token"),
    "relative positions": (
        lambda e: e | {"blocks.0.attn.relative_position_bias_table": torch.zeros(3, 4)},
        "has no relative positions",
    ),
    "adapters": (lambda e: e | {"blocks.0.attn.qkv.lora_A.weight": torch.zeros(4, 128)}, "must be merged first"),
    "parametrised": (
        lambda e: e | {"blocks.0.attn.qkv.parametrizations.weight.0": torch.zeros(4)},
        "must be merged first",
    ),
    "no class token": (lambda e: {n: t for n, t in e.items() if n != "cls_token"}, "has no class token"),
    "a ResNet": (lambda e: {"layer1.0.conv1.weight": torch.zeros(2)}, "is a ResNet"),
    "torchvision": (
        lambda e: {"conv_proj.weight": torch.zeros(2), "class_token": torch.zeros(1)},
        "a ViT of torchvision",
    ),
    "a CLIP": (lambda e: {"visual.conv1.weight": torch.zeros(2)}, "is a CLIP"),
    "a width of 100": (
        lambda e: e | {"patch_embed.proj.weight": torch.zeros(100, 3, 4, 4)},
        "is a ViT encoder, 4 blocks of 100, without decoder; no preset has such a width",
    ),
    "not finite": (
        lambda e: e | {"norm.bias": torch.full((128,), torch.nan)},
        "norm.bias holds numbers that are not finite",
    ),
    "one bias missing": (
        lambda e: {n: t for n, t in e.items() if n != "blocks.2.attn.qkv.bias"},
        "1 tensors are missing .blocks.2.attn.qkv",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_meant_is_refused_by_name(name, encoder, saved):
    make, said = REFUSED[name]
    with pytest.raises(UserError, match=said) as caught:
        load_model(saved(make(encoder)))
    assert "\n" not in str(caught.value)


def test_a_folder_of_transformers_in_pieces_is_named(tmp_path, encoder):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(UserError, match=r"in pieces \(model.safetensors.index.json\)"):
        load_model(tmp_path)


def test_a_pipe_is_named_and_not_waited_for(tmp_path, model):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError, match="pipe: a pipe or a device; give a run folder"):
        load_model(tmp_path / "pipe")
    optimizer = make_optimizer(model, 1e-3, 0.05)
    with pytest.raises(UserError, match="pipe: a pipe or a device; give a run folder"):
        restore(str(tmp_path / "pipe"), tmp_path, model, optimizer, fixed={}, fresh_step=0, steps_per_epoch=1)


def test_objects_and_programs_are_named(tmp_path, saved):
    with pytest.raises(UserError, match=r"objects \(__main__.Bomb|objects .* that could run code"):
        load_model(saved({"model": {}, "hyper_parameters": Foreign()}))
    torch.jit.script(torch.nn.Linear(2, 2)).save(str(tmp_path / "program.pt"))
    with pytest.raises(UserError, match="a TorchScript program"):
        load_model(tmp_path / "program.pt")
    (tmp_path / "encoder.onnx").write_bytes(b"x")
    with pytest.raises(UserError, match="an ONNX program; give the checkpoint"):
        load_model(tmp_path / "encoder.onnx")


class Foreign:
    """A class that no file may hold."""


def test_two_names_of_one_tensor_are_refused(encoder):
    with pytest.raises(NotMeantError, match=r"norm\.bias twice"):
        understand(encoder | {"_orig_mod.norm.bias": torch.zeros(128)})


# --- positions --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("grid", [(8, 32), (32, 8), (16, 16), (1, 256), (4, 64)])
def test_fixed_positions_tell_their_grid(grid, dtype, encoder, saved):
    table = sincos_positions(128, grid)[None].to(dtype)
    found = load_model(saved(encoder | {"pos_embed": table}))
    assert found.grid_size == grid
    assert torch.equal(found.pos_embed, table.float())


def test_a_table_with_rows_before_columns_tells_its_grid(encoder, saved):
    table = sincos_positions(128, (8, 32))[None]
    table = torch.cat([table[..., 64:], table[..., :64]], dim=2)
    found = load_model(saved(encoder | {"pos_embed": table}))
    assert found.grid_size == (8, 32)
    assert torch.equal(found.pos_embed, table)


def test_learnt_positions_are_square_with_a_line_or_said_by_somebody(encoder, saved, caplog):
    path = saved(encoder | {"pos_embed": torch.randn(1, 65, 128)})
    assert load_model(path).grid_size == (8, 8)
    assert "taken as square, 8×8; give input_size if not" in caplog.text
    caplog.clear()
    assert load_model(path, input_size=(16, 64)).grid_size == (4, 16)
    assert "square" not in caplog.text
    path = saved(encoder | {"pos_embed": torch.randn(1, 97, 128)})
    with pytest.raises(UserError, match=r"^input_size: must be given.*97 positions") as caught:
        load_model(path)
    assert "--input_size: must be given" in caught.value.as_on_the_command_line()
    assert load_model(path, input_size=(32, 48)).grid_size == (8, 12)


def test_a_table_without_a_class_row_gets_one(model, encoder, saved, caplog):
    assert same_features(saved(encoder | {"pos_embed": encoder["pos_embed"][:, 1:]}), model)
    assert "pos_embed has no row for the class token" in caplog.text


def test_a_missing_table_is_made_for_the_size_that_is_said(model, encoder, saved, caplog):
    without = {name: tensor for name, tensor in encoder.items() if name != "pos_embed"}
    with pytest.raises(UserError, match="pos_embed is missing, and nothing says the size"):
        load_model(saved(without))
    assert same_features(saved(without), model, input_size=SIZE)
    assert "pos_embed is missing; fixed positions of 4×16 patches are taken" in caplog.text
    assert same_features(saved({"model": without, "args": {"input_size": [16, 64]}}), model)


def test_tables_that_contradict_each_other_or_the_settings_are_refused(model, saved):
    state = model.state_dict() | {"decoder_pos_embed": sincos_positions(96, (8, 8))[None]}
    with pytest.raises(UserError, match="pos_embed is of 4×16 patches and decoder_pos_embed of 8×8"):
        load_model(saved(state))
    with pytest.raises(UserError, match="of 4×16 patches, and the input_size of its settings has 8×8"):
        load_model(saved({"model": model.state_dict(), "args": {"input_size": 32}}))


def test_fixed_positions_are_computed_for_another_size_and_others_interpolated(model, encoder, saved, caplog):
    found = load_model(saved(model.state_dict()), input_size=32)
    assert found.img_size == (32, 32)
    assert torch.equal(found.pos_embed[0], sincos_positions(128, (8, 8), (4, 16)))
    assert torch.equal(found.decoder_pos_embed[0], sincos_positions(96, (8, 8), (4, 16)))
    assert "positions computed 4×16 → 8×8" in caplog.text
    assert found.forward_features(torch.zeros(1, 3, 32, 32)).shape == (1, 65, 128)
    path = saved({"model": encoder | {"pos_embed": torch.randn(1, 65, 128)}, "args": {"input_size": [16, 64]}})
    assert load_model(path, input_size=(16, 32)).grid_size == (4, 8)
    assert "positions interpolated 4×16 → 4×8" in caplog.text
    with pytest.raises(UserError, match=r"^input_size=\(30, 30\): an image of 30×30 pixels is not a multiple"):
        load_model(path, input_size=30)


def test_pretraining_goes_on_only_from_positions_of_its_own_grid(model, saved, tmp_path):
    """8×8 and 4×16 patches have tables of one shape."""
    square = mae_vit_tiny_patch4(img_size=32)
    path = saved(model.state_dict())
    words = dict(fixed={}, fresh_step=0, steps_per_epoch=9)
    with pytest.raises(UserError, match="of images of 16×64 pixels, not 32×32; give input_size"):
        restore(str(path), tmp_path / "run", square, make_optimizer(square, 1e-3, 0.05), **words)


def test_pretraining_says_where_a_file_was_trained_otherwise(model, saved, tmp_path, caplog):
    fresh = mae_vit_tiny_patch4(img_size=SIZE)
    path = saved({"model": model.state_dict(), "args": {"norm_pix_loss": True, "mean": [0.1, 0.2, 0.3]}})
    words = dict(fixed={}, fresh_step=0, steps_per_epoch=9)
    restore(str(path), tmp_path / "run", fresh, make_optimizer(fresh, 1e-3, 0.05), **words)
    assert "says norm_pix_loss True, and this run has False" in caplog.text
    assert "says mean [0.1, 0.2, 0.3], and this run has" in caplog.text


# --- what a file does not say -----------------------------------------------------------------------------------------


def test_what_a_file_does_not_say_is_given_or_told(model, saved, caplog):
    path = saved(model.state_dict())
    found = load_model(path)
    assert "does not say mean, std, norm_pix_loss; taken: mean 0.485 0.456 0.406, std 0.229" in caplog.text
    assert not found.norm_pix_loss
    caplog.clear()
    found = load_model(path, norm_pix_loss=True, mean=[0.1] * 3, std=[0.2] * 3)
    assert found.norm_pix_loss
    assert (found.mean.tolist(), found.std.tolist()) == (pytest.approx([0.1] * 3), pytest.approx([0.2] * 3))
    assert caplog.text == ""
    with pytest.raises(UserError, match=r"^mean=\(0.1, 0.2\): must be 3 numbers, one for each channel"):
        load_model(path, mean=[0.1, 0.2])


def test_a_file_that_says_everything_has_no_line(model, tmp_path, caplog):
    settings = {"model": "mae_vit_tiny_patch4", "input_size": [16, 64], "norm_pix_loss": True}
    settings |= {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]}
    weights = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    save_file(weights, tmp_path / "a.safetensors", {"settings": json.dumps(settings)})
    assert load_model(tmp_path / "a.safetensors").norm_pix_loss
    assert caplog.text == ""


# --- classifiers ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model_name", ["vit_tiny_patch4", "vit_tiny_patch4_32.mae", None])
def test_a_classifier_is_opened_as_its_encoder_and_named(model_name, encoder, saved, caplog):
    official = {
        name.replace("norm.", "fc_norm.") if name.startswith("norm.") else name: t for name, t in encoder.items()
    }
    head = {"head.weight": torch.randn(10, 128), "head.bias": torch.randn(10)}
    path = saved({"model": official | head, **({"args": {"model": model_name}} if model_name else {})})
    opened = open_checkpoint(path)
    assert opened.what == "a fine-tuned classifier with 10 classes, 4 blocks of 128, without decoder"
    assert torch.equal(opened.head["head.weight"], head["head.weight"])
    assert torch.equal(opened.model.fc_norm.weight, encoder["norm.weight"])
    with pytest.raises(UserError, match=r"is a fine-tuned classifier with 10 classes.*reconstruction needs"):
        load_model(path, needs_decoder=True)


def test_a_head_of_two_vectors_is_left_out_with_a_line(encoder, saved):
    """As DINOv2's linear classifiers, which read the class token and the mean of the patches."""
    wide = encoder | {"head.weight": torch.zeros(10, 256), "head.bias": torch.zeros(10)}
    found = understand(wide)
    assert found.kind == "encoder"
    assert found.notes == ("2 tensors not used, as no masked autoencoder has them: head.bias, head.weight",)
    load_model(saved(wide))


def test_a_head_of_another_kind_is_left_out_with_a_line(model, encoder, saved, caplog):
    probe = {"head.0.running_mean": torch.zeros(128), "head.0.num_batches_tracked": torch.tensor(3)}
    path = saved(encoder | probe | {"head.1.weight": torch.zeros(5, 128), "pre_logits.fc.bias": torch.zeros(2)})
    assert same_features(path, model)
    assert "4 tensors not used, as no masked autoencoder has them: head.0.num_batches_tracked" in caplog.text
