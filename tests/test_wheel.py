"""The sdist has what git has, and its wheels install into empty environments, with the repository out of sight."""

import os
import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
VERSION = PROJECT["version"]
WITHOUT_TORCH = """
import sys, fastmae, fastmae._C
assert "site-packages" in fastmae.__file__, fastmae.__file__
assert "torch" not in sys.modules
print(fastmae.__version__, fastmae._C.instruction_set())
"""
TWO_STEPS = """
import torch, fastmae, fastmae.kernels
assert "site-packages" in fastmae.__file__ and "site-packages" in fastmae.kernels.__file__, fastmae.__file__
torch.manual_seed(0)
model = fastmae.mae_vit_tiny_patch4(img_size=16)
images = torch.randint(0, 256, (4, 16, 16, 3), dtype=torch.uint8)
ids_shuffle = fastmae.ops.random_masking(torch.arange(4), 0, 16)
optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
losses = []
for _ in range(2):
    loss = model(images, ids_shuffle=ids_shuffle)[0]
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    losses.append(loss.item())
assert losses[1] < losses[0], losses
"""


def run(*words: str | Path, cwd: Path) -> str:
    hidden = ("PYTHONPATH", "VIRTUAL_ENV", "PYTHONHOME")
    environment = {key: value for key, value in os.environ.items() if key not in hidden}
    done = subprocess.run(words, cwd=cwd, env=environment, capture_output=True, text=True, timeout=540)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def interpreter(version: str) -> str:
    """The path of a Python of this version, from PATH or from pyenv, which reads PYENV_VERSION."""
    words = [f"python{version}", "-c", "import sys; print(sys.executable)"]
    try:
        environment = os.environ | {"PYENV_VERSION": version}
        return subprocess.run(words, env=environment, capture_output=True, text=True, check=True).stdout.strip()
    except (FileNotFoundError, subprocess.CalledProcessError):
        pytest.skip(f"there is no python{version} on this machine")


def test_every_extra_that_is_named_exists():
    paths = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "fastmae").rglob("*.py")]
    text = "\n".join(path.read_text() for path in paths)
    named = re.findall(r"(?:fastmae|pip install '?\.)\[([\w,]+)\]", text)
    named += re.findall(r"install_hint\([\"'](\w+)[\"']\)", text)
    extras = {extra for names in named for extra in names.split(",")}
    assert {"dali", "export"} <= extras <= set(PROJECT["optional-dependencies"])


def test_the_files_about_the_project_know_its_version():
    assert f"\nversion: {VERSION}\n" in (ROOT / "CITATION.cff").read_text()
    assert f"\n## [{VERSION}]" in (ROOT / "CHANGELOG.md").read_text()


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sdist")
    alone = ("--no-isolation", "--skip-dependency-check")  # needs no network; ninja is for wheels only
    run(sys.executable, "-m", "build", "--sdist", *alone, "--outdir", folder, ROOT, cwd=folder)
    (path,) = folder.glob("fastmae-*.tar.gz")
    return path


def test_an_sdist_has_every_file_of_the_repository(sdist):
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"CMakeLists.txt", "csrc/bindings.cpp", "kernels/masked_mse.py", "tests/test_wheel.py", "Makefile"} <= names
    assert not [name for name in names if name.endswith((".so", ".pyc"))]
    if (ROOT / ".git").exists():
        tracked = run("git", "ls-files", cwd=ROOT).splitlines()
        assert not [name for name in tracked if name not in names and (ROOT / name).exists()]


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("version", ["3.11", "3.12", "3.13"])
def test_a_wheel_from_the_sdist_installs(version, sdist, tmp_path):
    run(interpreter(version), "-m", "venv", tmp_path / "venv", cwd=tmp_path)
    python = tmp_path / "venv" / "bin" / "python"
    run(python, "-m", "pip", "wheel", "-q", "--no-deps", "-w", tmp_path, sdist, cwd=tmp_path)
    (wheel,) = tmp_path.glob("fastmae-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    folders = {"fastmae": "fastmae", "kernels": "fastmae/kernels", "benchmarks": "fastmae/benchmarks"}
    for source, target in folders.items():
        modules = [path.relative_to(ROOT / source) for path in (ROOT / source).rglob("*.py*") if path.suffix != ".pyc"]
        assert {f"{target}/{path}" for path in modules} <= set(names)
    data = {"fastmae/ops/attention_table.json", "fastmae/benchmarks/report.html.jinja", "fastmae/py.typed"}
    data |= {"fastmae/commands/verify_report.html.jinja"}
    assert data <= set(names)
    assert [name for name in names if name.startswith("fastmae/_C.") and name.endswith(".so")]
    assert {name.split("/")[0] for name in names} == {"fastmae", f"fastmae-{VERSION}.dist-info"}
    assert not [name for name in names if "results" in name]

    run(python, "-m", "pip", "install", "-q", "--no-deps", wheel, cwd=tmp_path)
    assert run(python, "-c", WITHOUT_TORCH, cwd=tmp_path).split()[0] == VERSION
    if version != "3.11":  # torch's wheels for the others are CUDA builds of several GB where this is tested
        return
    torch_version = torch.__version__.split("+")[0]
    run(python, "-m", "pip", "install", "-q", f"torch=={torch_version}", wheel, cwd=tmp_path)
    run(python, "-c", TWO_STEPS, cwd=tmp_path)
    words = ["--output_dir", tmp_path / "run", "--epochs", "1", "--batch_size", "700", "--probe", "False"]
    assert "checkpoint" in run(tmp_path / "venv" / "bin" / "fastmae", "pretrain", *words, cwd=tmp_path)
    assert (tmp_path / "run" / "checkpoint-0.pth").exists()
