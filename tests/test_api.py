"""What ``import fastmae`` gives: nothing is loaded before it is used, and runs and features are functions."""

import subprocess
import sys
import threading

import numpy as np
import pytest
import torch
from helpers import metrics

import fastmae
from fastmae.checkpoint.load import load_classifier
from fastmae.config import PretrainConfig
from fastmae.evaluate.features import extract_features
from fastmae.model.classifier import classifier_of
from fastmae.ops.backends import asked_backends, set_backends
from fastmae.ops.choices import Choices
from fastmae.train.pretrain import pretrain

SETTINGS = dict(model="mae_vit_tiny_patch4", input_size=16, epochs=1, batch_size=64, probe=False, warmup_epochs=0)


def run_python(code):
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd="/")
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


@pytest.fixture(scope="module")
def pretrained(blobs, tmp_path_factory):
    return fastmae.pretrain(blobs, output_dir=tmp_path_factory.mktemp("api") / "run", **SETTINGS)


def test_import_loads_neither_torch_nor_numpy_nor_tyro():
    names = "torch", "numpy", "tyro", "rich"
    code = f"import sys, fastmae; print(*(n for n in {names} if n in sys.modules), fastmae.__version__)"
    assert len(run_python(code)) == 1


def test_errors_and_functions_are_reached_without_torch():
    code = "import sys, fastmae; fastmae.UserError, fastmae.pretrain, fastmae.Run; print('torch' in sys.modules)"
    assert run_python(code) == ["False"]


def test_every_public_name_is_there_and_listed():
    for name in fastmae.__all__:
        assert getattr(fastmae, name) is not None
        assert name in dir(fastmae)
    with pytest.raises(AttributeError, match="no attribute 'pre_train'"):
        _ = fastmae.pre_train


def test_pretrain_does_what_the_configuration_does(pretrained, blobs, tmp_path):
    config = PretrainConfig(data_path=blobs, output_dir=tmp_path / "run", **SETTINGS)
    assert pretrain(config) == pretrained.status == 0
    assert metrics(tmp_path / "run") == metrics(pretrained.folder)
    assert [row["step"] for row in pretrained.metrics] == list(range(1, len(pretrained.metrics) + 1))
    assert isinstance(pretrained.model, fastmae.MaskedAutoencoderViT)
    assert pretrained.model is pretrained.model
    assert not pretrained.model.training


def test_finetune_gives_the_classifier(pretrained, blobs, tmp_path):
    settings = dict(epochs=1, batch_size=64, warmup_epochs=0, tune="lora")
    run = fastmae.finetune([blobs], output_dir=tmp_path / "run", finetune=pretrained.folder, **settings)
    assert run.status == 0
    images = torch.zeros(2, 16, 16, pretrained.model.in_chans, dtype=torch.uint8)
    assert run.model(images).shape == (2, run.model.head.out_features)
    with pytest.raises(fastmae.UserError, match="not of a fine-tuned classifier"):
        load_classifier(pretrained.folder)


def test_settings_from_a_file_are_overridden_by_arguments(pretrained, blobs, tmp_path, monkeypatch):
    monkeypatch.setattr("fastmae.train.pretrain.pretrain", lambda config, given: configs.append(config) or 0)
    monkeypatch.setattr("fastmae.train.classify.finetune", lambda config, given: configs.append(config) or 0)
    (tmp_path / "a.toml").write_text('epochs = 7\nblr = 1\ndata_path = "x"\nattention = "native"\n')
    (tmp_path / "b.yaml").write_text("finetune: runs/x\nepochs: 7\n")
    configs = []
    fastmae.pretrain(blobs, output_dir=tmp_path / "run", config=tmp_path / "a.toml", epochs=3)
    fastmae.pretrain(blobs, output_dir=tmp_path / "run", config=pretrained.folder, decoder="pool")
    fastmae.finetune(blobs, output_dir=tmp_path / "run", config=tmp_path / "b.yaml")
    one, two, three = configs
    assert (one.epochs, one.blr, one.data_path, one.attention) == (3, 1.0, blobs, "cpu")
    assert (two.image_decoder, two.model, two.output_dir) == ("threads", "mae_vit_tiny_patch4", str(tmp_path / "run"))
    assert (three.finetune, three.epochs) == ("runs/x", 7)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"epoch": 3}, "epoch=3: no such setting; did you mean epochs?"),
        ({"zzzzzz": 3}, "zzzzzz=3: no such setting; leave it out"),
        ({"epochs": "three"}, "epochs='three': must be"),
        ({"keep": 0}, "keep=0: must be at least 1"),
        ({"ops": "cuda"}, "ops='cuda': must be"),
    ],
)
def test_a_wrong_setting_is_named_as_an_argument(tmp_path, settings, words):
    with pytest.raises(fastmae.UserError) as caught:
        fastmae.pretrain("digits", output_dir=tmp_path / "run", **settings)
    assert words in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_features_of_a_path_an_array_and_a_tensor(pretrained):
    model = fastmae.load_model(pretrained.folder)
    images = np.random.default_rng(0).integers(0, 256, (5, 16, 16, model.in_chans), dtype=np.uint8)
    expected = model.forward_features(torch.from_numpy(images))[:, 1:].mean(dim=1).detach()
    for data in (images, torch.from_numpy(images)):
        features = fastmae.extract_features(model, data)
        torch.testing.assert_close(features.values, expected)
        assert features.indices.tolist() == [0, 1, 2, 3, 4]
    assert torch.equal(fastmae.extract_features(str(pretrained.folder), images).values, features.values)
    train, val = (fastmae.extract_features(model, "digits", split=split).values for split in ("train", "val"))
    assert (len(train), len(val)) == (1438, 359)


@pytest.mark.parametrize(
    ("data", "settings", "words"),
    [
        (np.full((2, 16, 16, 1), 0.5), {}, "float64 pixels where uint8 ones are meant"),
        (np.zeros((2, 16, 16, 1), complex), {}, "data: images must be integers or floating-point numbers"),
        (np.zeros((2, 16), np.uint8), {}, "data: images must have shape"),
        ("digits", {"pool": "max"}, "pool='max': must be one of mean, cls, both, tokens"),
        ("digits", {"split": "test"}, "split='test': must be one of train, val"),
        ("digits", {"batch_size": 0}, "batch_size=0: must be at least 1"),
    ],
)
def test_wrong_arguments_of_features_are_named(pretrained, data, settings, words):
    with pytest.raises(fastmae.UserError) as caught:
        fastmae.extract_features(pretrained.model, data, **settings)
    assert words in str(caught.value)


def test_a_run_may_be_started_from_another_thread(blobs, tmp_path):
    """As in a server or a notebook's background job, where Python lets nobody handle signals."""
    runs = []
    thread = threading.Thread(
        target=lambda: runs.append(fastmae.pretrain(blobs, output_dir=tmp_path / "run", **SETTINGS))
    )
    thread.start()
    thread.join()
    assert [run.status for run in runs] == [0]


def test_the_names_that_version_0_1_showed_stay():
    from fastmae.train.checkpoint import load_model

    assert load_model is fastmae.load_model
    assert callable(pretrain)
    assert callable(extract_features)


@pytest.fixture
def tiny():
    return fastmae.mae_vit_tiny_patch4(img_size=8)


def test_tune_measures_and_sets_the_choice_of_the_process(tiny, monkeypatch, tmp_path):
    found, asked = Choices.always(linear_weight="onednn-copy"), []
    monkeypatch.setattr("fastmae.ops.tuning.measure", lambda *of: asked.append(of) or found)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    before = asked_backends()
    try:
        assert fastmae.tune(tiny, 7) == asked_backends().choices == found
        fastmae.tune(classifier_of(tiny, 3), 7, precision="bf16")
    finally:
        set_backends(before)
    (calls, dtype), (classifier_calls, classifier_dtype) = asked
    assert (dtype, classifier_dtype) == (torch.float32, torch.bfloat16)
    assert (7 * 2, 128, 3 * 128) in {call.shape for call in calls}  # the class token and one visible patch of four
    assert (7 * 5, 128, 3 * 128) in {call.shape for call in classifier_calls}


@pytest.mark.parametrize(
    ("wrong", "line"),
    [
        ({"model": torch.nn.Linear(2, 2)}, r"model='Linear': must be a masked autoencoder or a classifier of fastmae"),
        ({"batch_size": 0}, "batch_size=0: must be an integer of at least 1"),
        ({"batch_size": 2.5}, "batch_size=2.5: must be an integer of at least 1"),
        ({"mask_ratio": 1.0}, "mask_ratio=1.0: .*at least one must be visible"),
        ({"mask_ratio": "most"}, "mask_ratio='most': "),
        ({"precision": "fp16"}, "precision='fp16': must be fp32 or bf16"),
    ],
)
def test_tune_names_a_wrong_argument_in_one_line(tiny, wrong, line):
    with pytest.raises(fastmae.UserError, match=line) as caught:
        fastmae.tune(**{"model": tiny, "batch_size": 4} | wrong)
    assert "\n" not in str(caught.value)


def test_tune_refuses_a_model_that_is_not_on_the_cpu(tiny):
    with pytest.raises(fastmae.UserError, match="model: is on meta; choices are measured for the CPU alone"):
        fastmae.tune(tiny.to("meta"), 4)
