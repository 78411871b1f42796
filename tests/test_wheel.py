"""A wheel installs into an empty environment and trains there, with the repository out of sight."""

import os
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
ONE_STEP = """
import torch, fastmae, fastmae.kernels, fastmae._C
from fastmae.train.optim import make_optimizer
from fastmae.train.step import TrainingLoss, train_step
assert "site-packages" in fastmae.__file__ and "site-packages" in fastmae.kernels.__file__, fastmae.__file__
torch.manual_seed(0)
model = fastmae.mae_vit_tiny_patch4(img_size=16)
images = torch.randint(0, 256, (4, 16, 16, 3), dtype=torch.uint8)
batch = [(images, fastmae.ops.random_masking(torch.arange(4), 0, 16))]
optimizer = make_optimizer(model, 1e-3, 0.05)
autocast = torch.autocast("cpu", enabled=False)
loss_of = TrainingLoss(model, 0.75)
first, second = (train_step(loss_of, optimizer, batch, 1, 1e-3, autocast).loss for _ in range(2))
assert second < first
print("one step", first.item(), second.item())
"""


def run(*words: str, cwd: Path) -> str:
    hidden = ("PYTHONPATH", "VIRTUAL_ENV", "PYTHONHOME")
    environment = {key: value for key, value in os.environ.items() if key not in hidden}
    done = subprocess.run(words, cwd=cwd, env=environment, capture_output=True, text=True, timeout=540)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.timeout(900)
def test_a_wheel_trains_in_an_empty_environment(tmp_path):
    sources = tmp_path / "sources"  # a copy: what an earlier build left behind must not get into the wheel
    shutil.copytree(ROOT, sources, ignore=shutil.ignore_patterns(".*", "build", "runs", "*.so", "*.egg-info"))
    run(sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", str(tmp_path), str(sources), cwd=tmp_path)
    (wheel,) = tmp_path.glob("fastmae-*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {
        "fastmae/kernels/__init__.py",
        "fastmae/ops/attention_table.json",
        "fastmae/benchmarks/baselines/vitmae.py",
        "fastmae/py.typed",
    } <= set(names)
    assert [name for name in names if name.startswith("fastmae/_C.") and name.endswith(".so")]
    assert not [name for name in names if name.startswith(("kernels", "tests", "benchmarks"))]
    venv.create(tmp_path / "venv", with_pip=True)
    python = str(tmp_path / "venv" / "bin" / "python")
    torch_version = torch.__version__.split("+")[0]
    run(python, "-m", "pip", "install", "-q", f"torch=={torch_version}", str(wheel), cwd=tmp_path)
    assert "one step" in run(python, "-c", ONE_STEP, cwd=tmp_path)
    words = ["--output_dir", str(tmp_path / "run"), "--epochs", "1", "--batch_size", "700", "--probe", "False"]
    out = run(str(tmp_path / "venv" / "bin" / "fastmae"), "pretrain", *words, cwd=tmp_path)
    assert "checkpoint" in out
    assert (tmp_path / "run" / "checkpoint-0.pth").exists()
