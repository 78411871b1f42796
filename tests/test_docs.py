"""What README.md and docs/ say is so: links lead somewhere, commands parse, the first ones and all Python run."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import inspect
import io
import os
import pkgutil
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from helpers import forget_accelerate
from PIL import Image

import fastmae.config
from fastmae.cli import asks_for_help, main, parse
from fastmae.errors import UserError

ROOT = Path(__file__).parents[1]
README, *PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
RECIPES = sorted((ROOT / "docs" / "cookbook").glob("*.md"))
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
INLINE = re.compile(r"`([^`\n]+)`")
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
COMMAND = re.compile(r"(?:^|\s)(?:fastmae|-m fastmae) (.*)")
FLAG = re.compile(r"(?<![\w-])--([a-z][\w-]*)")
FLAGS_OF_OTHERS = {"config", "help", "help_all", "version", "max_restarts", "requeue"}
# Pages to look things up in, which begin with no command.
LOOKED_UP = (
    "examples.md",
    "install.md",
    "fidelity.md",
    "glossary.md",
    "loops.md",
    "reference.md",
    "troubleshooting.md",
    "changelog.md",
)
# The shortest command of every kind, to which a flag with a value can be added. "x" stands for any file.
SHORTEST = [
    ["pretrain"], ["finetune"], ["segment"], ["upscale"], ["probe", "x"], ["reconstruct", "x"], ["verify"],
    ["features", "x"],
    ["search", "x"],
    ["impute", "x", "--output", "y"], ["inpaint", "x", "z", "--mask", "m", "--output", "y.png"],
    ["anomaly", "x"], ["pack", "x", "y"],
    ["export", "x", "--to", "hf", "--output", "y"], ["info"], ["bench", "step"], ["bench", "all"],
    ["bench", "loader"], ["bench", "quality"], ["estimate"], ["sweep", "x"], ["runs", "x"],
    ["report", "x"], ["push", "x", "y"], ["serve", "x"],
]  # fmt: skip
PARTS = 3
# Their first commands take long, start ranks of their own, or are another file's to test: they are parsed alone.
NOT_RUN = (
    "benchmarks.md", "containers.md", "convnext.md", "detection.md", "dicom.md", "finetuning.md", "inpainting.md",
    "large-runs.md", "loading.md", "pack.md", "photo-formats.md", "photos.md", "quality.md", "ranges.md",
    "schedulers.md", "segmentation.md", "serving.md", "sharing.md", "sound.md", "sweeps.md", "tables.md", "tiff.md",
    "upscaling.md", "volumes.md",
)  # fmt: skip


def blocks(text: str, language: str) -> list[str]:
    return [code for name, code in FENCE.findall(text) if name == language]


def prose(text: str) -> str:
    return FENCE.sub("", text)


def words_of(line: str) -> Iterator[list[str]]:
    """The words after `fastmae` in a line for a shell, without its comment and `…`, which stands for anything."""
    if found := COMMAND.search(re.sub(r"\s#.*", "", line)):
        yield [word for word in shlex.split(found[1].removesuffix("'")) if word != "…"]


def shell_commands(blocks: list[str]) -> list[list[str]]:
    """The variables of a loop have their first value."""
    text = "\n".join(blocks).replace("\\\n", " ")
    for name, value in re.findall(r"\bfor (\w+) in (\S+)", text):
        text = re.sub(rf"\${name}\b", value, text)
    return [words for line in text.splitlines() for words in words_of(line)]


def inline_commands(text: str) -> list[list[str]]:
    """Those between backticks; the name of a command alone is one that --help knows."""
    found = [words for code in INLINE.findall(prose(text)) for words in words_of(code)]
    return [[*words, "--help"] if len(words) <= 1 + (words[:1] == ["bench"]) else words for words in found]


def anchors(page: Path) -> set[str]:
    """Of a page's headings, as GitHub makes them."""
    titles = re.findall(r"^#+ (.*)$", prose(page.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def links(page: Path) -> list[str]:
    return [link for link in LINK.findall(prose(page.read_text())) if not re.match(r"\w+://", link)]


def flags_with_values(text: str) -> Iterator[list[str]]:
    """Between backticks, such as `--flip False` or `--compile block|model`, one list of words for each alternative."""
    for code in INLINE.findall(prose(text)):
        words = code.split()
        if len(words) > 1 and words[0].startswith("--") and not words[1].startswith("--") and "…" not in code:
            for value in words[1].split("|"):
                # A word in capitals stands for a value of the reader's, often a number.
                yield ["1" if word.isupper() else word for word in (words[0], value, *words[2:])]


def parses(words: list[str]) -> bool:
    """Whether the parser knows the flag and takes the value; what else a command would need is another question."""
    try:
        parse(words)
    except UserError as error:
        return "--help`" not in str(error)
    return True


def documented() -> list[ModuleType]:
    """The modules of the package that others import: without the command line, its leaves and the kernels."""
    inner = ("fastmae._C", "fastmae.__main__", "fastmae.benchmarks", "fastmae.cli", "fastmae.commands")
    inner += ("fastmae.config.shared", "fastmae.environment", "fastmae.files", "fastmae.kernels", "fastmae.ops.")
    inner += ("fastmae.serve.deployment",)  # which needs Ray
    names = [module.name for module in pkgutil.walk_packages([str(ROOT / "fastmae")], "fastmae.")]
    return [importlib.import_module(name) for name in names if not name.startswith(inner)]


@pytest.mark.parametrize("page", [README, *PAGES, *RECIPES], ids=lambda page: page.name)
def test_every_link_leads_to_a_file_and_a_heading(page):
    for link in links(page):
        name, _, anchor = link.partition("#")
        target = page.parent / name if name else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def test_the_readme_leads_to_every_page():
    led_to = {link.partition("#")[0] for link in links(README)}
    assert {str(page.relative_to(ROOT)) for page in (*PAGES, *RECIPES)} <= led_to


def test_the_readme_is_short():
    assert len(README.read_text().splitlines()) <= 160


def test_every_page_that_a_source_names_exists():
    for folder in ("fastmae", "kernels", "csrc", "benchmarks", "tests"):
        for path in (ROOT / folder).rglob("*"):
            if path.suffix in (".py", ".cpp", ".h"):
                for name in re.findall(r"docs/[\w-]+\.md", path.read_text()):
                    assert (ROOT / name).exists(), f"{path} names {name}"


@pytest.mark.parametrize("page", [README, *PAGES, *RECIPES], ids=lambda page: page.name)
def test_every_command_parses(page):
    text = page.read_text()
    for words in shell_commands(blocks(text, "sh")) + inline_commands(text):
        if asks_for_help(words):
            with contextlib.redirect_stdout(io.StringIO()):
                assert main(words) == 0
        else:
            parse(words)


def test_every_flag_between_backticks_is_a_setting():
    configs = [one for one in vars(fastmae.config).values() if inspect.isclass(one) and dataclasses.is_dataclass(one)]
    known = {field.name for config in configs for field in dataclasses.fields(config)} | FLAGS_OF_OTHERS
    for page in (README, *PAGES, *RECIPES):
        for code in INLINE.findall(prose(page.read_text())):
            named = {flag.replace("-", "_") for flag in FLAG.findall(code)}
            assert not {flag for flag in named if flag not in known and flag.removeprefix("no_") not in known}, page


def test_every_flag_with_a_value_between_backticks_parses():
    for page in (README, *PAGES, *RECIPES):
        for words in flags_with_values(page.read_text()):
            assert any(parses([*command, *words]) for command in SHORTEST), f"{page.name}: {' '.join(words)}"


def photos_of_two_classes() -> Any:
    """A Dataset as a reader of docs/python.md has one: images of Pillow and labels, and where these are."""

    class Photos(torch.utils.data.Dataset):
        targets = [0, 1] * 24  # as torchvision has them

        def __len__(self) -> int:
            return len(self.targets)

        def __getitem__(self, index: int) -> tuple[Image.Image, int]:
            pixels = np.random.default_rng(index).integers(0, 256, (32, 32, 3), dtype=np.uint8)
            return Image.fromarray(pixels), self.targets[index]

    return Photos()


@pytest.mark.timeout(900)
@pytest.mark.parametrize("part", range(PARTS))
def test_what_each_page_starts_with_runs(part, tmp_path, monkeypatch):
    """In several parts, which run beside each other. A command that several pages of a part have is run once."""
    monkeypatch.chdir(tmp_path)
    done: list[list[str]] = []
    for page in PAGES[part::PARTS]:
        text = page.read_text()
        first = shell_commands(blocks(text, "sh")[:1])
        assert first or page.name in LOOKED_UP, page
        for words in first:
            if page.name not in NOT_RUN and words not in done:
                assert main(words) == 0, words
                done.append(words)


@pytest.mark.timeout(900)
def test_the_page_about_python_runs_from_top_to_bottom(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for words in shell_commands(blocks((ROOT / "docs" / "python.md").read_text(), "sh")[:1]):
        assert main(words) == 0, words
    names: dict[str, Any] = {"dataset": photos_of_two_classes()}
    for code in blocks((ROOT / "docs" / "python.md").read_text(), "python"):
        exec(code, names)
    assert names["features"].shape == (2, names["run"].model.cls_token.shape[2])
    assert names["accuracies"].keys() >= {"knn", "linear"}
    assert names["of_digits"].values.shape == (359, 128)
    assert torch.equal(names["one"], fastmae.load_model("runs/digits").embed(names["dataset"][0][0]))
    assert [names[run].status for run in ("run", "tuned", "again", "stopped", "own", "cut")] == [0, 0, 0, 75, 0, 0]
    assert names["same"] is names["own"].model
    assert names["losses"] == [row["loss"] for row in names["stopped"].metrics]
    assert names["status"] == 0


@pytest.mark.slow
@pytest.mark.parametrize("page", RECIPES, ids=lambda page: page.name)
def test_each_recipe_of_the_cookbook_runs_from_top_to_bottom(page, tmp_path, monkeypatch):
    """Its Python and its commands, with one epoch in place of what it says; it fits a screen."""
    monkeypatch.chdir(tmp_path)
    text = page.read_text()
    assert len(text.splitlines()) < 60
    names: dict[str, Any] = {}
    for language, code in FENCE.findall(text):
        if language == "python":
            exec(code, names)
        for words in shell_commands([code]) if language == "sh" else ():
            short = ["--epochs", "1", "--warmup_epochs", "0"] if words[0] in ("pretrain", "finetune") else []
            assert main([*words, *short]) == 0, words


@pytest.mark.timeout(600)
def test_the_page_about_photos_works_from_a_folder_to_a_classifier(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = (ROOT / "docs" / "photos.md").read_text()
    for code in blocks(text, "python"):
        exec(code, {})
    for words in shell_commands(blocks(text, "sh")):
        if words[0] == "estimate":
            continue  # which measures the processor
        if words[0] in ("pretrain", "finetune"):
            words = [*words, "--epochs", "2", "--warmup_epochs", "1"]
        assert main(words) == 0, words
    assert {path.name for path in tmp_path.iterdir()} >= {"photos", "reconstructions.png", "photos-encoder.safetensors"}
    assert (tmp_path / "runs" / "photos-classifier" / "checkpoint-1.safetensors").exists()


@pytest.mark.parametrize("packages", [(), pytest.param(("lightning",), marks=pytest.mark.slow)])
def test_the_page_about_loops_runs_under_torchrun(packages, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, value in dict(RANK=0, LOCAL_RANK=0, WORLD_SIZE=1, MASTER_ADDR="127.0.0.1", MASTER_PORT=0).items():
        monkeypatch.setenv(name, str(value))
    names: dict[str, Any] = {}
    try:
        for code in blocks((ROOT / "docs" / "loops.md").read_text(), "python"):
            if "lightning" not in code or packages:
                exec(code, names)
    finally:
        torch.distributed.destroy_process_group()
        forget_accelerate()
    assert names["features"].shape == (32, 256)
    assert names["maps"][1].shape == (32, 128, 4, 4)
    assert names["gradient"].shape == (8, 3, 16, 16)


def test_the_quick_start_has_three_lines():
    first = blocks((ROOT / "docs" / "python.md").read_text(), "python")[0]
    assert len([line for line in first.splitlines() if line]) == 3


def test_every_public_function_and_class_says_what_it_is():
    for module in documented():
        assert module.__doc__, module
        for name, one in vars(module).items():
            is_own = not name.startswith("_") and getattr(one, "__module__", None) == module.__name__
            if is_own and (inspect.isfunction(one) or inspect.isclass(one)):
                says = inspect.cleandoc(one.__doc__ or "")
                assert says, f"{module.__name__}.{name}"
                assert not says.startswith(f"{name}("), f"{module.__name__}.{name} has what dataclass writes"


def test_every_public_name_is_in_the_reference():
    reference = (ROOT / "docs" / "reference.md").read_text()
    assert not [name for name in fastmae.__all__ if not re.search(rf"\b{name}\b", reference)]


def test_the_site_builds_and_loads_nothing_from_elsewhere(tmp_path):
    pytest.importorskip("mkdocs", reason="needs the extra docs")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    pages = sorted(tmp_path.rglob("*.html"))
    assert len(pages) > len(PAGES)
    for page in pages:
        html = page.read_text()
        loaded = re.findall(r"""<(?:script|img|iframe|source|video)\b[^>]*\bsrc=["']?(\w+:)?//[^>]*>""", html)
        loaded += re.findall(r"<link\b(?![^>]*canonical)[^>]*\bhref=[\"']?(?:\w+:)?//[^>]*>", html)
        assert not loaded, page
    for style in tmp_path.rglob("*.css"):
        assert not re.search(r"(?:@import|url\()\s*[\"']?(?:\w+:)?//", style.read_text()), style
    index = (tmp_path / "search" / "search_index.json").read_text()
    assert "extract_features" in index
    assert "random_masking" in (tmp_path / "reference.html").read_text()
