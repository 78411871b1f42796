"""Data, models and functions given in Python: the same training as from files, to the bit."""

import io
import json
import signal
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import metrics
from PIL import Image
from ranks import run_script, start_ranks
from torch.utils.data import Dataset

import fastmae
from fastmae.config.model import ModelSpec
from fastmae.model.build import build_model, settings_of
from fastmae.train.given import NOTHING, told
from fastmae.train.pretrain import _fresh

TINY = dict(model="mae_vit_tiny_patch4", input_size=16)
SETTINGS = dict(**TINY, epochs=2, batch_size=16, warmup_epochs=0, probe=False, num_workers=2, tune="off")


class Pictures(Dataset):
    """What a user of torchvision's ImageFolder has: images of Pillow and labels of class folders."""

    def __init__(self, folder, read=lambda path: Image.open(path).convert("RGB")):
        self.paths = sorted(path for path in Path(folder).rglob("*") if path.is_file())
        self.classes = sorted({path.parent.name for path in self.paths})
        self.targets = [self.classes.index(path.parent.name) for path in self.paths]
        self.read = read

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, index):
        return self.read(self.paths[index]), self.targets[index]


def write_folder(folder, suffix):
    rng = np.random.default_rng(0)
    for name in ("ant", "bee"):
        (folder / name).mkdir(parents=True)
        for number in range(24):
            height, width = rng.integers(16, 40, 2)
            pixels = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{number:02}.{suffix}")
    return folder


@pytest.fixture(scope="module")
def pngs(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("given") / "png", "png")


@pytest.fixture(scope="module")
def of_files(pngs, tmp_path_factory):
    return fastmae.pretrain(pngs, output_dir=tmp_path_factory.mktemp("given") / "files", **SETTINGS)


def weights(run):
    return run.model.state_dict()


def same_weights(one, other):
    return all(torch.equal(tensor, other[name]) for name, tensor in one.items())


# --- data -------------------------------------------------------------------------------------------------------------


def test_a_dataset_of_pillow_and_the_same_pngs_give_the_same_run_to_the_bit(pngs, of_files, tmp_path):
    run = fastmae.pretrain(Pictures(pngs), output_dir=tmp_path / "run", **SETTINGS)
    assert metrics(run.folder) == metrics(of_files.folder)
    assert same_weights(weights(run), weights(of_files))
    settings, before = (json.loads((one.folder / "config.json").read_text()) for one in (run, of_files))
    assert settings.pop("data_path") == "<Dataset Pictures of 48 images>"
    assert settings | {"output_dir": ""} == {name: before[name] for name in settings} | {"output_dir": ""}


def test_a_dataset_of_jpegs_and_the_same_folder_give_the_same_run_to_the_bit(tmp_path):
    def read(path):
        """Their bytes, their paths, and images that are opened and not decoded, in turns."""
        return (Path.read_bytes, str, Image.open)[int(path.stem) % 3](path)

    folder = write_folder(tmp_path / "jpg", "jpg")
    expected = fastmae.pretrain(folder, output_dir=tmp_path / "files", **SETTINGS | {"epochs": 1})
    run = fastmae.pretrain(Pictures(folder, read), output_dir=tmp_path / "run", **SETTINGS | {"epochs": 1})
    assert metrics(run.folder) == metrics(expected.folder)


def test_tensors_of_to_tensor_give_the_same_run_to_the_bit(pngs, of_files, tmp_path):
    def to_tensor(path):
        return torch.from_numpy(np.array(Image.open(path).convert("RGB"))).permute(2, 0, 1).float().div(255)

    statistics = dict(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
    run = fastmae.pretrain(Pictures(pngs, to_tensor), output_dir=tmp_path / "tensors", **SETTINGS, **statistics)
    assert metrics(run.folder) == metrics(of_files.folder)


def test_a_stopped_run_goes_on_with_a_dataset_and_refuses_another_one(pngs, of_files, tmp_path):
    def stop(info):
        return "stop" if info.step == 2 else None

    data, folder = Pictures(pngs), tmp_path / "run"
    run = fastmae.pretrain(data, output_dir=folder, on_step=stop, log_freq=1, **SETTINGS)
    assert (run.status, len(run.metrics)) == (75, 2)
    with pytest.raises(fastmae.UserError, match="was made with other train data"):
        fastmae.pretrain(data.paths[:-1], output_dir=folder, resume="auto", **SETTINGS)
    other = Pictures(pngs, lambda path: Image.open(path).convert("RGB").transpose(Image.Transpose.FLIP_TOP_BOTTOM))
    with pytest.raises(fastmae.UserError, match="was made with other train data: data_path now has other contents"):
        fastmae.pretrain(other, output_dir=folder, resume="auto", **SETTINGS)
    run = fastmae.pretrain(data, output_dir=folder, resume="auto", **SETTINGS)
    assert run.status == 0
    assert metrics(folder) == metrics(of_files.folder)
    assert same_weights(weights(run), weights(of_files))


def test_a_run_of_objects_says_that_it_needs_python_again(pngs, of_files, tmp_path):
    from fastmae.cli import main

    run = fastmae.pretrain(Pictures(pngs).paths, output_dir=tmp_path / "run", **SETTINGS)  # a list of paths
    assert metrics(run.folder) == metrics(of_files.folder)
    command = ["pretrain", "--config", str(run.folder), "--output_dir", str(tmp_path / "other")]
    assert main(command) == 2
    with pytest.raises(fastmae.UserError, match=r"data_path='<list of 48 images.*call fastmae from Python"):
        fastmae.pretrain(output_dir=tmp_path / "other", config=run.folder)
    with pytest.raises(fastmae.UserError, match="data: must be given"):
        fastmae.probe(run)


def test_a_run_fed_back_from_its_config_gives_the_same_losses_to_the_bit(of_files, tmp_path):
    run = fastmae.pretrain(output_dir=tmp_path / "run", config=of_files.folder / "config.yaml")
    assert metrics(run.folder) == metrics(of_files.folder)
    assert same_weights(weights(run), weights(of_files))


def test_samples_that_raise_are_quarantined(tmp_path):
    def read(path):
        if path.name == "05.png":
            raise RuntimeError("no such thing")
        return Image.open(path).convert("RGB")

    folder = write_folder(tmp_path / "png", "png")
    run = fastmae.pretrain(Pictures(folder, read), output_dir=tmp_path / "run", **SETTINGS | {"epochs": 1})
    listed = [json.loads(line) for line in (run.folder / "quarantine.jsonl").read_text().splitlines()]
    assert {(row["name"], row["reason"]) for row in listed} == {
        ("Dataset Pictures[5]", "RuntimeError: no such thing"),
        ("Dataset Pictures[29]", "RuntimeError: no such thing"),
    }


def test_finetune_and_probe_take_a_dataset_with_its_val_part(pngs, of_files, tmp_path):
    train, val = Pictures(pngs), Pictures(pngs / "ant")
    val.classes, val.targets = ["ant", "bee"], [0] * len(val)
    settings = dict(epochs=1, batch_size=16, warmup_epochs=0, num_workers=2, autotune="off")
    run = fastmae.finetune({"train": train, "test": train}, output_dir=tmp_path / "run", finetune=of_files, **settings)
    assert run.model(torch.zeros(2, 16, 16, 3, dtype=torch.uint8)).shape == (2, 2)
    assert json.loads((run.folder / "config.json").read_text())["class_names"] == ["ant", "bee"]
    accuracies = fastmae.probe(of_files, train, val=val, k=5)
    assert (accuracies["train"], accuracies["test"], accuracies["k"]) == (48, 24, 5)


def test_probe_returns_what_the_command_prints(pngs, of_files, capsys):
    from fastmae.cli import main

    assert main(["probe", str(of_files.folder), "--json", "--k", "5"]) == 0
    printed = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert fastmae.probe(of_files, k=5) == fastmae.probe(of_files.model, Pictures(pngs), k=5) == printed


# As a user writes it: no `if __name__ == "__main__"`, and nothing that another process would have to import.
SCRIPT = """
import os, signal, sys
import numpy as np
import torch
from PIL import Image
import fastmae

folder, output_dir, batch_size, what = sys.argv[1:]


class Pictures(torch.utils.data.Dataset):
    paths = sorted(os.path.join(top, name) for top, _, names in os.walk(folder) for name in names)

    def __len__(self):
        return len(self.paths) - (what == "differ" and os.environ["RANK"] == "1")

    def __getitem__(self, index):
        return Image.open(self.paths[index]).convert("RGB")


def look(info):
    if what == "kill" and info.step == 4:
        os.kill(os.getpid(), signal.SIGKILL)


fastmae.pretrain(
    Pictures(), output_dir=output_dir, model="mae_vit_tiny_patch4", input_size=16, epochs=2, warmup_epochs=0,
    batch_size=int(batch_size), tune="off", num_workers=2, checkpoint_freq=1, log_freq=1, resume="auto", on_step=look,
)
print("after the run")
"""


@pytest.fixture
def script(pngs, tmp_path):
    """Starts a script that trains on a Dataset in ``ranks`` processes."""
    (tmp_path / "script.py").write_text(SCRIPT)

    def start(folder, ranks=1, what=""):
        words = (str(pngs), str(folder), str(16 // ranks), what)
        return start_ranks(ranks, partial(run_script, tmp_path / "script.py", *words))

    return start


@pytest.mark.slow
def test_a_script_that_was_killed_goes_on_with_its_dataset_to_the_bit(script, of_files, tmp_path):
    (rank,) = script(tmp_path / "run", what="kill")
    assert rank.finish()[0] == -signal.SIGKILL
    before = len(metrics(tmp_path / "run"))
    (rank,) = script(tmp_path / "run")
    assert rank.finish()[0] == 0, rank.finish()
    assert "resumed " in rank.said()
    assert "after the run" in rank.said()
    assert 3 <= before < 6
    assert metrics(tmp_path / "run") == metrics(of_files.folder)
    assert same_weights(fastmae.load_model(tmp_path / "run").state_dict(), weights(of_files))


@pytest.mark.slow
def test_two_ranks_with_a_dataset_train_as_one_and_must_have_the_same(script, of_files, tmp_path):
    assert [rank.finish()[0] for rank in script(tmp_path / "run", ranks=2)] == [0, 0]
    for row, expected in zip(metrics(tmp_path / "run"), metrics(of_files.folder), strict=True):
        assert row[:2] == expected[:2]
        assert row[2] == pytest.approx(expected[2], rel=1e-5)  # the loss
    ended = [rank.finish() for rank in script(tmp_path / "other", ranks=2, what="differ")]
    assert any("rank 1 reads other train data than rank 0: it has 47 images instead of 48" in err for _, err in ended)
    assert all(status != 0 for status, _ in ended)


# --- a model ----------------------------------------------------------------------------------------------------------


def seeded_model(**sizes):
    torch.manual_seed(0)
    return fastmae.mae_vit_tiny_patch4(img_size=16, **sizes)


def test_a_model_that_is_given_is_trained_as_the_preset_is(pngs, of_files, tmp_path):
    model = seeded_model()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    settings = {name: value for name, value in SETTINGS.items() if name not in TINY}
    run = fastmae.pretrain(pngs, model=model, output_dir=tmp_path / "run", **settings)
    assert metrics(run.folder) == metrics(of_files.folder)
    assert run.model is model
    assert not model.training
    assert same_weights(model.state_dict(), of_files.model.state_dict())
    assert not same_weights(model.state_dict(), before)
    opened = fastmae.load_model(run.folder)  # as a checkpoint of the preset
    assert same_weights(opened.state_dict(), model.state_dict())


def test_a_model_that_is_given_reads_images_as_it_was_trained(tmp_path):
    """Wide pixels, their range and the choice of bands are no weights, and follow the data."""
    rng, model = np.random.default_rng(0), seeded_model(mean=(0.5,) * 3, std=(0.2,) * 3)
    images = rng.integers(0, 5000, (32, 16, 16, 4), dtype=np.uint16)
    settings = dict(epochs=1, batch_size=16, warmup_epochs=0, probe=False, num_workers=1, tune="off")
    choice = dict(bands=(4, 1, 2), value_range=(0, 5000), mean=0.5, input_size=[16, 16])
    run = fastmae.pretrain(images, model=model, output_dir=tmp_path / "run", **choice, **settings)
    opened = fastmae.load_model(run.folder)
    assert (model.pixels, model.read_as) == (opened.pixels, opened.read_as)
    assert (model.pixels.dtype, model.read_as.bands) == ("uint16", (4, 1, 2))
    loaded = fastmae.load_model(run.folder, model=seeded_model())
    expected = opened.embed([*images[:2]])
    assert torch.equal(run.model.embed([*images[:2]]), expected)
    assert torch.equal(loaded.embed([*images[:2]]), expected)


def test_a_model_that_is_made_of_the_shards_of_ranks_computes_as_they_do():
    """Losses on images that are held out are those of one rank."""
    spec = ModelSpec(model="mae_vit_tiny_patch4", input_size=(16,), in_chans=3)
    config = SimpleNamespace(**vars(spec), residual="bf16")
    assert _fresh(config, NOTHING).autocast_residual


class Weighted(fastmae.MaskedAutoencoderViT):
    """A loss of one's own with a parameter of one's own."""

    def __init__(self, **arguments):
        super().__init__(**arguments)
        self.weight = torch.nn.Parameter(torch.ones(1))

    def forward_loss(self, imgs, pred, mask):
        return super().forward_loss(imgs, pred, mask) * self.weight.exp()


def weighted():
    sizes = dict(embed_dim=32, depth=1, num_heads=2, decoder_embed_dim=16, decoder_depth=1, decoder_num_heads=2)
    return Weighted(img_size=16, patch_size=8, **sizes)


def test_a_subclass_is_trained_and_its_weights_are_loaded_into_another_one(pngs, tmp_path):
    model = weighted()
    settings = {name: value for name, value in SETTINGS.items() if name not in TINY}
    run = fastmae.pretrain(pngs, model=model, output_dir=tmp_path / "run", **settings)
    assert model.weight.item() != 1
    with pytest.raises(fastmae.UserError, match=r"'<Weighted of .*test_given>': was given in Python; make such a"):
        fastmae.load_model(run.folder)
    other = fastmae.load_model(run.folder, model=weighted())
    assert same_weights(other.state_dict(), model.state_dict())
    assert torch.equal(other.embed([pngs / "ant" / "00.png"]), run.model.embed([pngs / "ant" / "00.png"]))


class OwnConv(fastmae.ConvMAE):
    pass


class OwnConvNeXt(fastmae.ConvNeXtMAE):
    pass


class OwnMLP(fastmae.MLPMAE):
    pass


SMALL_CONVNEXT = dict(depths=(1, 1, 1, 1), dims=(8, 8, 8, 8), decoder_embed_dim=8)


@pytest.mark.parametrize(
    ("make", "data", "ratio", "blr", "other"),
    [
        (partial(OwnConv, 16, widths=(4, 4), latent_dim=4), "images", 0.25, 4e-3, dict(fill="noise")),
        (partial(OwnConvNeXt, 64, **SMALL_CONVNEXT), "images", 0.6, 1e-3, dict(patch_size=16)),
        (
            partial(OwnMLP, (1, 1), 6, mean=[0.0] * 6, std=[1.0] * 6, widths=(8, 4)),
            "rows",
            0.5,
            4e-3,
            dict(widths=(8, 3)),
        ),
    ],
)
def test_a_subclass_of_another_family_has_the_defaults_of_that_family(make, data, ratio, blr, other, pngs, tmp_path):
    of = pngs if data == "images" else np.random.default_rng(0).normal(size=(48, 6)).astype("float32")
    settings = dict(epochs=1, batch_size=16, warmup_epochs=0, probe=False, tune="off", output_dir=tmp_path / "run")
    with pytest.raises(fastmae.UserError, match=next(iter(other))):
        fastmae.pretrain(of, model=make(), **settings, **other)
    run = fastmae.pretrain(of, model=make(), **settings)
    saved = json.loads((run.folder / "config.json").read_text())
    assert (saved["mask_ratio"], saved["blr"]) == (ratio, blr)
    assert same_weights(fastmae.load_model(run.folder, model=make()).state_dict(), weights(run))
    assert fastmae.pretrain(of, model=make(), resume="auto", **settings).status == 0


@pytest.mark.parametrize(
    "model",
    [
        seeded_model(),
        seeded_model(in_chans=1, norm_pix_loss=True, mean=(0.1,), std=(0.2,)),
        seeded_model(decoder_attention="cross", decoder_depth=3),
        fastmae.mae_vit_tiny_patch16(img_size=(32, 48), patch_size=8),
    ],
)
def test_the_settings_of_a_model_make_one_like_it(model):
    settings = settings_of(model)
    assert settings["model"] in ("mae_vit_tiny_patch4", "mae_vit_tiny_patch16")
    again = build_model(ModelSpec(**settings))
    assert repr(again) == repr(model)
    assert torch.equal(again.mean, model.mean)


def test_a_model_that_no_preset_makes_is_not_taken_for_one():
    other_eps = seeded_model(norm_layer=torch.nn.LayerNorm)  # whose eps is 1e-5, and that of presets 1e-6
    assert settings_of(other_eps)["model"] == "<MaskedAutoencoderViT of fastmae.model.mae>"


class DrawsItsOwn(fastmae.MaskedAutoencoderViT):
    def random_masking(self, x, mask_ratio):
        return super().random_masking(x, mask_ratio)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"model": torch.nn.Linear(2, 2)}, "model='Linear': is no preset's name and no masked autoencoder of fastmae"),
        ({"model": seeded_model(), "input_size": 32}, r"input_size=32: is \(16, 16\) of the model that is given"),
        ({"model": seeded_model(), "norm_pix_loss": True}, "norm_pix_loss=True: is False of the model"),
        ({"model": seeded_model(), "init": "x.pth"}, "init='x.pth': is for a preset"),
        ({"model": seeded_model(), "mean": 0.5}, "mean=0.5: is .* of the model that is given"),
        ({"model": DrawsItsOwn(img_size=32)}, "model='DrawsItsOwn': its random_masking draws masks of its own"),
        ({"optimizer": None}, r"optimizer: is not taken.* copy the loop in fastmae/train/pretrain.py"),
        ({"transform": None}, "transform: is not taken.* set crop_scale and flip"),
        ({"callbacks": []}, "callbacks: is not taken.* on_step is called"),
        ({"loss": max}, "loss: is not taken.* forward_loss is your own"),
        ({"loss": "mae"}, "loss='mae': must be mse or bce"),
        ({"collate_fn": None}, "collate_fn: is not taken.*fastmae/train/batches.py"),
        ({"val": "x"}, "val: is for objects in Python"),
        ({"data_path": "x"}, "data_path='x': is another name of data"),
    ],
)
def test_what_cannot_be_given_is_refused_in_one_line(pngs, tmp_path, arguments, words):
    with pytest.raises(fastmae.UserError, match=words) as caught:
        fastmae.pretrain(pngs, output_dir=tmp_path / "run", **arguments)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_an_encoder_that_a_file_names_does_not_replace_the_weights_of_a_model(tmp_path):
    (tmp_path / "mine.yaml").write_text("init: encoder.pth")
    with pytest.raises(fastmae.UserError, match=r"init='encoder\.pth': is for a preset"):
        fastmae.pretrain("digits", model=seeded_model(), config=tmp_path / "mine.yaml", output_dir=tmp_path / "run")


def test_settings_of_files_are_refused_with_objects(pngs, tmp_path):
    with pytest.raises(fastmae.UserError, match="pages='all': is for files that a path names"):
        fastmae.pretrain(Pictures(pngs), output_dir=tmp_path / "run", pages="all")


# --- a function that looks on -----------------------------------------------------------------------------------------


def test_on_step_is_told_of_every_step_when_numbers_are_read(pngs, tmp_path):
    infos, counts = [], []

    def look(info):
        infos.append(info)
        counts.append(len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()))

    run = fastmae.pretrain(Pictures(pngs), output_dir=tmp_path / "run", on_step=look, **SETTINGS)
    for info, row in zip(infos, run.metrics, strict=True):
        assert (info.step, info.epoch, info.loss, info.lr, info.grad_norm) == (
            row["step"],
            row["epoch"],
            row["loss"],
            row["lr"],
            row["grad_norm"],
        )
        assert (info.total_steps, info.skipped) == (6, False)
    assert counts == [1, 2, 3, 5, 5, 6]  # the first steps soon, as on the screen, and the last of an epoch


def test_whatever_on_step_returns_but_stop_changes_nothing():
    row = {"step": 1, "epoch": 0, "loss": 1.0, "lr": 0.1, "grad_norm": 1.0}
    for answer in (None, True, np.array(["stop", "stop"]), torch.zeros(2)):
        told(lambda info, answer=answer: answer, 2, pytest.fail)([row])
    stopped = []
    told(lambda info: "stop", 2, stopped.append)([row])
    assert stopped == ["on_step"]


def test_an_error_of_on_step_ends_the_run_in_one_line(pngs, tmp_path):
    def look(info):
        raise ValueError("a\nb")

    with pytest.raises(fastmae.UserError, match="on_step raised ValueError: a b at step 1; mend it") as caught:
        fastmae.pretrain(pngs, output_dir=tmp_path / "run", on_step=look, **SETTINGS)
    assert "\n" not in str(caught.value)


# --- images one by one ------------------------------------------------------------------------------------------------


def test_embed_and_preprocess_give_what_extract_features_does(pngs, of_files):
    model, paths = of_files.model, Pictures(pngs).paths[:5]
    expected = fastmae.extract_features(model, paths).values
    images = [str(paths[0]), paths[1], paths[2].read_bytes(), Image.open(paths[3]), Image.open(paths[4]).convert("RGB")]
    assert torch.equal(model.embed(images), expected)
    assert torch.equal(model.embed(images, batch_size=2), expected)
    assert torch.equal(model.embed(paths[0]), expected[:1])
    prepared = torch.stack([model.preprocess(image) for image in images])
    assert (prepared.shape, prepared.dtype) == ((5, 16, 16, 3), torch.uint8)
    tokens = model.forward_features(prepared)
    assert torch.equal(tokens[:, 1:].mean(dim=1), expected)
    assert model.embed(images, pool="both").shape == (5, 256)


def test_arrays_are_embedded_as_a_whole(of_files):
    arrays = np.random.default_rng(0).integers(0, 256, (3, 20, 20, 3), dtype=np.uint8)
    expected = fastmae.extract_features(of_files, arrays).values
    assert torch.equal(of_files.model.embed([*arrays]), expected)
    floats = torch.from_numpy(arrays).permute(0, 3, 1, 2).float().div(255)
    assert torch.equal(of_files.model.embed([*floats]), expected)


def test_preprocessing_says_how_pixels_are_normalised(of_files):
    preprocess = of_files.model.preprocess
    assert (preprocess.size, preprocess.dtype, preprocess.channels) == ((16, 16), "uint8", 3)
    assert (preprocess.low, preprocess.high) == ((0, 0, 0), (255, 255, 255))
    assert preprocess.mean == pytest.approx((0.485, 0.456, 0.406))


@pytest.mark.parametrize(
    ("image", "words"),
    [("no.png", "number 1 cannot be used: .*No such file"), (b"GIF", "number 1 cannot be used: no image format")],
)
def test_an_image_that_cannot_be_used_is_named_by_its_place(of_files, image, words):
    good = Image.new("RGB", (20, 20))
    with pytest.raises(fastmae.UserError, match=words):
        of_files.model.embed([good, image])


def test_no_images_are_refused(of_files):
    with pytest.raises(fastmae.UserError, match="embed: the list of images is empty"):
        of_files.model.embed([])


def test_growing_crops_are_refused_for_a_model_with_positions_of_its_own(pngs, tmp_path):
    model = fastmae.mae_vit_tiny_patch4(img_size=16)
    model.pos_embed.data.normal_()
    settings = {name: value for name, value in SETTINGS.items() if name not in TINY}
    with pytest.raises(fastmae.UserError, match=r"start_size=\(8, 8\): must be left out, as the model has pos"):
        fastmae.pretrain(pngs, output_dir=tmp_path, model=model, start_size=8, **settings)


def test_bytes_in_a_file_object_are_no_image(of_files):
    with pytest.raises(fastmae.UserError, match="number 0 cannot be used: BytesIO is no image; give a path"):
        of_files.model.embed([io.BytesIO()])
