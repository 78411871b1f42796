"""Does anything run here at all? One of everything that a GPU does otherwise than a CPU, in seconds.

    python -m fastmae.benchmarks.smoke --device cuda

Exits with 2 if not even a step of plain PyTorch runs, with 1 if anything else does not, and shows each traceback.
"""

from __future__ import annotations

import argparse
import sys
import traceback
from collections.abc import Callable, Sequence

import torch

from fastmae.benchmarks.attention import through
from fastmae.benchmarks.step import GPU_WINDOW, STEP, Inputs, ours
from fastmae.config import PretrainConfig
from fastmae.model.presets import mae_vit_tiny_patch16
from fastmae.ops.gather_patches import gather_patches, gather_patches_reference
from fastmae.ops.random_masking import random_masking
from fastmae.train.parallel import DistContext

N = 16


def main(words: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda")
    device = torch.device(parser.parse_args(words).device)
    if not runs("a step of plain PyTorch", lambda: step(device, ops="reference", attention="sdpa", compile="off")):
        return 2
    checks: dict[str, Callable[[], None]] = {
        "a gather": lambda: gather(device),
        "attention by default": lambda: attend("auto", device),
        "a step by default": lambda: step(device),
    }
    if device.type == "cuda":
        checks |= {
            "attention by Triton": lambda: attend("triton", device),
            "a compiled step": lambda: step(device, compile="block"),
            "a step as a CUDA graph": lambda: step(device, compile="off", cuda_graph=True),
        }
    return 0 if all([runs(what, check) for what, check in checks.items()]) else 1


def runs(what: str, check: Callable[[], None]) -> bool:
    """Says how a check went, with the traceback of one that failed."""
    try:
        check()
    except Exception:
        print(f"{what}: failed", flush=True)
        traceback.print_exc()
        return False
    print(f"{what}: right", flush=True)
    return True


def gather(device: torch.device) -> None:
    images = torch.randint(0, 256, (N, 32, 32, 3), dtype=torch.uint8, device=device)
    ids = random_masking(torch.arange(N, device=device), 0, 4)[:, :2]
    statistics = torch.full((3,), 0.5, device=device), torch.full((3,), 0.25, device=device)
    words = (images, ids, (16, 16), *statistics, torch.float32)
    torch.testing.assert_close(gather_patches(*words), gather_patches_reference(*words))


def attend(backend: str, device: torch.device) -> None:
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    packed = torch.randn(N, 50, 3, 3, 64, device=device)
    results = []
    for one, name in ((packed.to(dtype), backend), (packed, "sdpa")):
        one = one.clone().requires_grad_()
        out = through(name)(one)
        out.square().sum().backward()
        assert one.grad is not None
        results.append((out.float(), one.grad.float()))
    for got, expected in zip(*results, strict=True):
        error = ((got - expected).norm() / expected.norm()).item()
        assert error < 0.02, f"{backend} is off by {error:.1e}"


def step(device: torch.device, **flags: object) -> None:
    """A loss must fall over steps on the same images."""
    torch.manual_seed(0)
    model = mae_vit_tiny_patch16()
    images = torch.randint(0, 256, (N, 224, 224, 3), dtype=torch.uint8).to(device)
    ids = random_masking(torch.arange(N), 0, model.num_patches).to(device)
    precision = "bf16" if device.type == "cuda" else "fp32"
    config = PretrainConfig(precision=precision, **flags)  # type: ignore[arg-type]
    one = ours("mae_vit_tiny_patch16", config, Inputs(images, ids, model), DistContext(0, 1, device))
    losses = [one.go(STEP).item() for _ in range(GPU_WINDOW if device.type == "cuda" else 3)]
    assert losses[-1] < losses[0], f"the losses are {losses}"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
