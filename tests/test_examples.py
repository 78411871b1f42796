"""Every file in examples/ does what it says: it is run as a user runs it, but in this process."""

import re
import runpy
from pathlib import Path

import pytest
import yaml
from helpers import forget_accelerate

from fastmae.config.serve import config_of

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
