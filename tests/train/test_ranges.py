"""The range of wide pixels from the start of a run to its checkpoints, and to all that is done with them."""

import json
import math

import numpy as np
import pytest
import torch
from helpers import metrics, small_run
from ranks import run_ranks

import fastmae
from fastmae.checkpoint.load import load_classifier, load_model, open_checkpoint
from fastmae.commands.reconstruct import run_reconstruct
from fastmae.config import ExportConfig, FinetuneConfig, ReconstructConfig
from fastmae.config.model import ModelSpec
from fastmae.config.shared import ReadingConfig
from fastmae.data import statistics
from fastmae.data.plan import holdout
from fastmae.errors import SettingError, UserError
from fastmae.evaluate.anomaly import patch_errors
from fastmae.evaluate.reconstruct import drawn
from fastmae.export.encoder import Encoder
from fastmae.export.hf import save_huggingface
from fastmae.export.onnx import opened_onnx, save_onnx
from fastmae.export.program import opened_program, save_program
from fastmae.export.run import export
from fastmae.facts import PixelFacts
from fastmae.model.build import build_model
from fastmae.model.pixels import normalised
from fastmae.train.classify import finetune
from fastmae.train.pretrain import pretrain

SMALL = dict(model="mae_vit_tiny_patch4", input_size=(8, 8), epochs=1, tune="off", save_freq=1)
FLOATS = PixelFacts(dtype="float32", low=(-1024.0, 0.0), high=(3071.0, 2.0), nodata=-2000.0)


def model_of(pixels, channels=1):
    torch.manual_seed(0)
    spec = ModelSpec(
        model="mae_vit_tiny_patch4", input_size=(8, 8), in_chans=channels, mean=(0.3,) * channels,
        std=(0.2,) * channels, **fastmae.config.pixel_settings(pixels),
    )  # fmt: skip
    return build_model(spec).eval()


def floats(count=3):
    """Float pixels [N, 8, 8, 2] of which some are missing."""
    random = np.random.default_rng(0)
    images = random.normal([500, 1], [300, 0.4], (count, 8, 8, 2)).astype(np.float32)
    images[0, 0, 0, 0], images[1, 5, 5] = np.nan, -2000
    return torch.from_numpy(images)


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """The path of 24 labelled images of 12 bits, and a run on them."""
    folder = tmp_path_factory.mktemp("wide")
    values = np.random.default_rng(0).normal(1000, 200, (24, 8, 8, 1)).clip(0, 4095).astype(np.uint16)
    np.savez(folder / "wide.npz", images=values, labels=np.arange(24) % 2)
    config = small_run(str(folder / "wide.npz"), folder / "run", **SMALL)
    assert pretrain(config) == 0
    return folder


def test_a_run_keeps_the_range_and_its_files_say_it(wide):
    settings = json.loads((wide / "run" / "config.json").read_text())
    values = np.load(wide / "wide.npz")["images"]
    low, high = np.percentile(values, [0.1, 99.9], method="nearest").tolist()
    assert (settings["pixel_type"], settings["value_range"], settings["nodata"]) == ("uint16", [low, high], None)
    expected = PixelFacts(dtype="uint16", low=(low,), high=(high,))
    for name in ("", "checkpoint-0.pth", "checkpoint-0.safetensors"):
        assert load_model(wide / "run" / name).pixels == expected
    features = fastmae.extract_features(str(wide / "run"), str(wide / "wide.npz"))
    assert features.values.isfinite().all()
    assert len(features.values) == 24


def test_a_run_that_goes_on_measures_nothing_and_refuses_another_range(wide, monkeypatch, capsys):
    monkeypatch.setattr(statistics, "_sample", None)  # calling it would fail
    again = small_run(str(wide / "wide.npz"), wide / "run", **{**SMALL, "epochs": 2, "resume": "auto"})
    assert pretrain(again) == 0
    assert "of uint16 (as before)" in capsys.readouterr().out
    other = small_run(
        str(wide / "wide.npz"), wide / "run", **{**SMALL, "epochs": 3, "resume": "auto"}, value_range=(0, 4095)
    )
    with pytest.raises(SettingError, match=r"made with value_range \[.*\], not \[0.0, 4095.0\]"):
        pretrain(other)


def test_images_of_which_no_patch_can_be_predicted_are_refused_in_one_line(tmp_path):
    images = np.random.default_rng(0).random((16, 8, 8, 1), dtype=np.float32)
    images[:, ::4, ::4] = np.nan  # a pixel of every patch
    np.save(tmp_path / "images.npy", images)
    config = small_run(str(tmp_path / "images.npy"), tmp_path / "run", model="mae_vit_tiny_patch4", input_size=8)
    with pytest.raises(UserError, match="every patch of the 16 images that were looked at has a missing") as error:
        pretrain(config)
    assert "\n" not in str(error.value)


def test_the_share_of_masked_patches_without_a_target_is_logged_for_each_step_and_epoch(tmp_path):
    """Every patch of 6 of 24 images has a missing pixel, and a batch is all of them. Runs of 8 bits do not say it."""
    images = np.random.default_rng(0).normal(size=(24, 8, 8, 1)).astype(np.float32)
    images[:6] = np.nan
    np.save(tmp_path / "floats.npy", images)
    np.save(tmp_path / "bytes.npy", np.zeros((24, 8, 8, 1), np.uint8))
    small = SMALL | dict(epochs=2, batch_size=24, mean=(0.0,), std=(1.0,))
    for name in ("floats", "bytes"):
        pretrain(small_run(str(tmp_path / f"{name}.npy"), tmp_path / name, **small))
    logged = {
        name: [json.loads(line) for line in (tmp_path / name / "log.txt").read_text().splitlines()]
        for name in ("floats", "bytes")
    }
    assert [row.get("excluded") for row in logged["floats"]] == [0.25, 0.25]
    assert not any("excluded" in row for row in logged["bytes"])
    for name, expected in (("floats", 0.25), ("bytes", None)):
        steps = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        assert [row.get("excluded") for row in steps] == [expected, expected]


def test_fine_tuning_and_pictures_take_the_range_of_the_encoder(wide, capsys):
    config = FinetuneConfig(
        finetune=str(wide / "run"), data_path=str(wide / "wide.npz"), output_dir=str(wide / "tuned"), epochs=1,
        warmup_epochs=0.1, batch_size=6, device="cpu", autotune="off", num_workers=1,
    )  # fmt: skip
    assert finetune(config) == 0
    assert "(that of the encoder)" in capsys.readouterr().out
    assert load_classifier(wide / "tuned").pixels == load_model(wide / "run").pixels
    picture = wide / "grid.png"
    run_reconstruct(ReconstructConfig(checkpoint=str(wide / "run"), output=str(picture), count=2, device="cpu"))
    assert picture.exists()


def test_an_encoder_of_8_bits_is_fine_tuned_on_wide_pixels_as_the_flags_say(wide, tmp_path, capsys):
    """It keeps its mean and deviation; the range is measured or given; the classifier says so and goes on with it."""
    random = np.random.default_rng(0)
    np.save(tmp_path / "bytes.npy", random.integers(0, 256, (24, 8, 8, 1), np.uint8))
    pretrain(small_run(str(tmp_path / "bytes.npy"), tmp_path / "bytes", **SMALL))
    encoder, data = load_model(tmp_path / "bytes"), np.load(wide / "wide.npz")["images"]
    learnt = data[holdout(len(data))[0]]
    measured = tuple(np.percentile(learnt, [0.1, 99.9], method="nearest").tolist())
    for name, value_range in (("measured", None), ("given", (0, 4095))):
        words = dict(data_path=str(wide / "wide.npz"), finetune=str(tmp_path / "bytes"), epochs=1, batch_size=12)
        flags = dict(pixel_type="uint16", value_range=value_range, output_dir=str(tmp_path / name))
        assert finetune(FinetuneConfig(**words, **flags)) == 0
        low, high = value_range or measured
        assert f"{low:.6g} to {high:.6g} of uint16" in capsys.readouterr().out
        model = load_classifier(tmp_path / name)
        assert model.pixels == PixelFacts(dtype="uint16", low=(low,), high=(high,))
        assert torch.equal(model.mean, encoder.mean)
        assert torch.equal(model.std, encoder.std)
        images = torch.from_numpy(data[:4])
        shares = (images.double() - low) / (high - low)
        expected = ((shares - encoder.mean.double()) / encoder.std.double()).permute(0, 3, 1, 2)
        torch.testing.assert_close(normalised(model, images).double(), expected, rtol=1e-5, atol=1e-5)
    assert finetune(FinetuneConfig(**words, output_dir=flags["output_dir"], resume="auto")) == 0
    with pytest.raises(SettingError, match="uint16 pixels where uint8 ones are meant; set pixel_type to uint16"):
        finetune(FinetuneConfig(**words, output_dir=str(tmp_path / "none")))


def test_flags_give_a_checkpoint_another_range(wide):
    path = wide / "run" / "checkpoint-0.pth"
    given = open_checkpoint(path, ReadingConfig(value_range=(0, 4095))).model
    assert given.pixels == PixelFacts(dtype="uint16", low=(0.0,), high=(4095.0,))
    assert open_checkpoint(path, ReadingConfig(value_range=("dtype",))).model.pixels == PixelFacts(dtype="uint16")
    with pytest.raises(SettingError, match=r"^value_range=.*or 1 pairs, one for each channel"):
        open_checkpoint(path, ReadingConfig(value_range=(0, 1, 0, 1)))


def test_wide_pixels_are_drawn_through_the_range():
    model, images = model_of(FLOATS, 2), floats()
    picture = drawn(model, images)
    low, high = torch.tensor(FLOATS.low), torch.tensor(FLOATS.high)
    expected = (255 * (images - low) / (high - low)).round().clamp(0, 255)
    is_there = ~images.isnan() & (images != -2000)
    assert picture.dtype == torch.uint8
    assert (picture.float() - expected)[is_there].abs().max() <= 1
    assert (picture[~is_there] == round(0.3 * 255)).all()


def test_a_patch_with_missing_pixels_has_no_error_of_reconstruction():
    maps = patch_errors(model_of(FLOATS, 2), floats(), torch.arange(3), mask_ratio=0.75, rounds=1, seed=0)
    assert maps.isnan().flatten(1).tolist() == [
        [True, False, False, False], [False, False, False, True], [False] * 4
    ]  # fmt: skip


@pytest.mark.parametrize("dtype", ["uint16", "float32"])
def test_a_program_normalises_raw_pixels_as_the_model_does(dtype):
    pixels = FLOATS if dtype == "float32" else PixelFacts(dtype="uint16", low=(100.0, 0.0), high=(4000.0, 9.0))
    model = model_of(pixels, 2)
    images = floats() if dtype == "float32" else floats().nan_to_num(0).clamp(0, 4095).to(torch.uint16)
    with torch.no_grad():
        wanted = model.forward_features(images)
        raw, prepared = (Encoder(model, torch.float32, raw) for raw in (True, False))
        torch.testing.assert_close(raw(images), wanted, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(prepared(normalised(model, images)), wanted, rtol=1e-4, atol=1e-5)


def test_an_input_of_another_type_than_the_models_is_refused(tmp_path):
    opened = dict(checkpoint="x", to="torch-export", output=str(tmp_path / "x.pt2"))
    from fastmae.checkpoint.load import Opened

    for given in ("uint8", "float32"):
        with pytest.raises(SettingError, match=rf"^input='{given}': must be uint16"):
            export(ExportConfig(**opened, input=given), Opened(model_of(PixelFacts(dtype="uint16")), {}, True), 1)
    with pytest.raises(SettingError, match="other than auto"):
        ExportConfig(**opened, value_range=("auto",))


def test_a_folder_of_transformers_says_the_range_in_its_own_terms_and_in_ours(tmp_path):
    model = model_of(FLOATS, 2)
    save_huggingface(tmp_path / "hf", model, 0.75, "full")
    said = json.loads((tmp_path / "hf" / "preprocessor_config.json").read_text())
    images = torch.tensor([[[[500.0, 1.5]]]]).expand(1, 8, 8, 2)
    theirs = (images * said["rescale_factor"] - torch.tensor(said["image_mean"])) / torch.tensor(said["image_std"])
    torch.testing.assert_close(theirs.permute(0, 3, 1, 2), normalised(model, images), rtol=1e-4, atol=1e-4)
    assert said["do_resize"] is False
    back = load_model(tmp_path / "hf")
    assert back.pixels == FLOATS
    assert torch.equal(back.mean, model.mean)
    assert torch.equal(back.std, model.std)
    assert math.isclose(said["rescale_factor"], 1 / 4095)


@pytest.mark.slow
def test_two_ranks_train_on_wide_pixels_as_one_does(wide, tmp_path):
    settings = {**SMALL, "epochs": 2}
    one = small_run(str(wide / "wide.npz"), tmp_path / "one", **settings)
    assert pretrain(one) == 0
    halves = {**settings, "batch_size": 4}
    run_ranks(2, small_run(str(wide / "wide.npz"), tmp_path / "two", **halves))
    losses = {run: [loss for _, _, loss, _ in metrics(tmp_path / run)] for run in ("one", "two")}
    assert len(losses["one"]) == 6
    assert losses["two"] == pytest.approx(losses["one"], rel=1e-5)
    of_runs = [json.loads((tmp_path / run / "config.json").read_text()) for run in ("one", "two")]
    assert len({(*of_run["value_range"], *of_run["mean"], *of_run["std"]) for of_run in of_runs}) == 1


@pytest.mark.slow
def test_an_average_and_growing_crops_keep_the_range(wide, tmp_path):
    settings = {**SMALL, "epochs": 3, "ema": 0.9, "input_size": (16, 16), "start_size": (8, 8), "grow_epochs": 2}
    assert pretrain(small_run(str(wide / "wide.npz"), tmp_path / "run", **settings)) == 0
    expected = load_model(tmp_path / "run").pixels
    assert expected.dtype == "uint16"
    assert load_model(tmp_path / "run" / "checkpoint-2-ema.pth").pixels == expected
    assert all(math.isfinite(loss) for _, _, loss, _ in metrics(tmp_path / "run"))


@pytest.mark.slow
@pytest.mark.parametrize("form", ["onnx", "program"])
@pytest.mark.parametrize("dtype", ["uint16", "float32"])
def test_programs_take_wide_pixels_as_they_are(form, dtype, tmp_path):
    pixels = PixelFacts(dtype=dtype, low=(100.0,), high=(3000.0,))
    model, path = model_of(pixels), tmp_path / f"encoder.{'onnx' if form == 'onnx' else 'pt2'}"
    save, opened = (save_onnx, opened_onnx) if form == "onnx" else (save_program, opened_program)
    save(path, model, "fp32", True)
    values = np.random.default_rng(0).uniform(0, 4095, (5, 8, 8, 1)).astype(dtype)
    expected = model.forward_features(torch.from_numpy(values))
    assert (torch.as_tensor(opened(path)(torch.from_numpy(values))) - expected).abs().max() < 1e-4
