"""Every file in examples/ does what it says: it is run as a user runs it, but in this process."""

import re
import runpy
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from helpers import forget_accelerate

from fastmae.config.serve import config_of
from fastmae.data import shapes
from fastmae.export.vitdet import save_vitdet
from fastmae.model.presets import mae_vit_tiny_patch4

EXAMPLES = Path(__file__).parents[1] / "examples"


def run(name: str, **settings) -> list[float]:
    """Returns what ``main`` of an example gives."""
    forget_accelerate()
    return runpy.run_path(str(EXAMPLES / name))["main"](**settings)


def learns(losses: list[float]) -> bool:
    """Whether the last losses are clearly below the first ones."""
    return sum(losses[-4:]) < 0.97 * sum(losses[:4])


def test_plain_loop():
    assert learns(run("plain_loop.py"))


def test_accelerate_loop():
    assert learns(run("accelerate_loop.py"))


@pytest.mark.slow
def test_transformers_trainer(caplog):
    assert learns(run("transformers_trainer.py"))
    assert "accelerate: the model's own code" not in caplog.text


@pytest.mark.slow
def test_lightning_module():
    assert learns(run("lightning_module.py"))


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    """A ViTDet backbone of an encoder that is as it was made."""
    folder = tmp_path_factory.mktemp("backbone") / "vitdet"
    torch.manual_seed(0)
    model = mae_vit_tiny_patch4(img_size=(64, 64), patch_size=(8, 8), in_chans=3)
    save_vitdet(folder, model, window=0, image_size=(64, 64), relative=False)
    return str(folder)


def test_detect(backbone):
    pytest.importorskip("pycocotools")
    assert learns(run("detect.py", folder=backbone, count=2, steps=40, batch_size=4, held_out=10))


@pytest.mark.slow
def test_detect_finds_what_it_has_seen(backbone, monkeypatch, capsys):
    pytest.importorskip("pycocotools")
    made = shapes.make_shapes(np.arange(16))
    monkeypatch.setattr(shapes, "make_shapes", lambda numbers: made)
    run("detect.py", folder=backbone, count=16, steps=400, batch_size=16)
    found = re.findall(r"box AP ([\d.]+) %, AP50 ([\d.]+) %", capsys.readouterr().out)
    assert float(found[0][1]) > 60


def test_detect_scores_as_coco_does(backbone):
    """Every box found, with the right class and no other one, is an AP of 100; boxes that are a fifth too wide have an
    IoU of 5/6, which counts up to a threshold of 0.8."""
    pytest.importorskip("pycocotools")
    names = runpy.run_path(str(EXAMPLES / "detect.py"))
    _, labels = names["inputs_of"](shapes.make_shapes(np.arange(20)), backbone)
    logits, boxes = torch.full((20, 10, 5), -20.0), torch.full((20, 10, 4), 0.001)
    for n, known in enumerate(labels):
        count = len(known["boxes"])
        boxes[n, :count] = known["boxes"]
        logits[n, range(count), known["class_labels"]] = 20
        logits[n, count:, 4] = 20
    assert names["box_ap"](logits, boxes, labels) == pytest.approx((100, 100))
    boxes[..., 2] *= 1.2
    assert names["box_ap"](logits, boxes, labels) == pytest.approx((70, 100))


def test_the_code_of_the_page_runs():
    page = (EXAMPLES.parent / "docs" / "examples.md").read_text()
    names: dict = {}
    exec(re.findall(r"```python\n(.*?)```", page, re.DOTALL)[0], names)
    assert names["model"].decoder.mask_token.grad.abs().sum() > 0
    assert names["model"].forward.func.__module__ == "fastmae.model.accelerate"


def test_each_example_is_listed_and_says_what_it_needs():
    page = (EXAMPLES.parent / "docs" / "examples.md").read_text()
    tests = Path(__file__).read_text() + Path(__file__).with_name("test_schedulers.py").read_text()
    for path in filter(Path.is_file, EXAMPLES.iterdir()):
        assert f"examples/{path.name}" in page, path.name
        assert f'"{path.name}"' in tests, path.name
        assert "Needs: fastmae" in path.read_text() or path.suffix != ".py", path.name
        assert len(path.read_text().splitlines()) <= 80, path.name


def test_the_settings_of_a_service_are_those_of_the_command():
    said = yaml.safe_load((EXAMPLES / "serve.yaml").read_text())
    config = config_of(said["applications"][0]["args"])
    assert said["http_options"] == {"host": config.host, "port": config.port, "request_timeout_s": config.timeout + 5}
    assert (config.replicas, config.max_replicas, config.target_requests, config.cpus) == (1, 8, 8, 2)
