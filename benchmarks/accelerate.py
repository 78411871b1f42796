"""How much faster is a training step of transformers' ViTMAE after `fastmae.accelerate`?

    python -m fastmae.benchmarks.accelerate --batch_size 32 --output benchmarks/results              # on a CPU
    python -m fastmae.benchmarks.accelerate --batch_size 256 --precisions bf16 --device cuda         # on a GPU

The same plain loop around the same model, weights, images and masks: forward, backward, torch's fused AdamW. Only the
line `accelerate(model)` differs. Each implementation has a process of its own, they take turns, and no time is reported
unless the losses of the first two steps agree.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from fastmae.benchmarks import harness
from fastmae.benchmarks.baselines.vitmae import vitmae_like
from fastmae.model.accelerate import accelerate
from fastmae.model.presets import PRESETS
from fastmae.ops.backends import asked_backends
from fastmae.train.parallel import choose_device

BASE = "transformers"
# The arguments of accelerate; None: it is not called.
IMPLEMENTATIONS: dict[str, dict[str, bool] | None] = {
    BASE: None,
    "accelerate": {},
    "accelerate-tuned": {"tune": True},
    "accelerate-tuned-without-predictions": {"tune": True, "predictions": False},
}
TOLERANCE = {"fp32": 1e-5, "bf16": 2e-2}
STEPS_COMPARED = 2
GPU_STEPS = 10  # of a sample, with one synchronisation


@dataclass(frozen=True)
class Settings:
    """What is measured."""

    model: str
    batch_size: int
    rounds: int
    precisions: tuple[str, ...]
    implementations: tuple[str, ...]
    device: str
    output: str | None


@dataclass(frozen=True)
class Facts:
    """What a process reports after its first steps."""

    losses: list[float]
    choices: dict[str, Any]


def bench(settings: Settings, command: Sequence[str]) -> int:
    """Prints the times, writes what was asked for, and returns 1 if the losses disagree, otherwise 0."""
    machine = harness.machine_name(torch.device(settings.device))
    for precision in settings.precisions:
        with ExitStack() as processes:
            begun = {
                name: processes.enter_context(harness.in_own_process(_begin, name, precision, settings))
                for name in (BASE, *settings.implementations)
            }
            facts = {name: found for name, (found, _) in begun.items()}
            losses = {name: found.losses for name, found in facts.items()}
            for name, found in losses.items():
                if not harness.agree(found, losses[BASE], TOLERANCE[precision]):
                    return harness.refuse(f"the loss of {name} in {precision} differs ({losses})")
            samplers = {name: (lambda ask=ask: ask(None)) for name, (_, ask) in begun.items()}
            seconds = harness.take_turns(samplers, settings.rounds)
        rows = [
            (
                name,
                f"{settings.batch_size / harness.quartiles(samples)[1]:.2f}",
                f"{harness.speed_up(seconds, name, BASE):.2f}",
            )
            for name, samples in seconds.items()
        ]
        what = f"{settings.model}, batch {settings.batch_size}, {precision}, {machine}, median of {settings.rounds}"
        table = harness.table(what, ("implementation", "images/s", f"times as fast as {BASE}"), rows)
        measured = {"losses": losses, "choices": {name: one.choices for name, one in facts.items()}, "seconds": seconds}
        file = f"accelerate-{settings.model}-{machine}-n{settings.batch_size}-{precision}"
        harness.report([table], file, command=command, settings=settings, measured=measured)
    return 0


def _begin(name: str, precision: str, settings: Settings) -> tuple[Facts, Callable[[Any], float]]:
    """Takes the first steps in this process; what it returns takes further ones and gives the seconds of one."""
    device = torch.device(settings.device)
    torch.manual_seed(0)
    model = vitmae_like(PRESETS[settings.model]()).to(device).train()
    size = model.config.image_size
    images = torch.randn(settings.batch_size, 3, size, size).to(device)
    asked = IMPLEMENTATIONS[name]
    if asked is not None:
        accelerate(model, **asked)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    autocast = torch.autocast(device.type, torch.bfloat16) if precision == "bf16" else nullcontext()

    def step() -> torch.Tensor:
        optimizer.zero_grad(set_to_none=True)
        with autocast:
            loss = model(images).loss
        loss.backward()
        optimizer.step()
        return loss.detach()

    torch.manual_seed(1)
    losses = [step().item() for _ in range(STEPS_COMPARED)]
    steps = GPU_STEPS if device.type == "cuda" else 1

    def seconds(_: Any) -> float:
        return harness.elapsed(step, steps, device) / steps

    return Facts(losses, asked_backends().choices.as_json()), seconds


def main(words: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="mae_vit_base_patch16")
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--precisions", nargs="+", default=["fp32", "bf16"], choices=list(TOLERANCE))
    ours = [name for name in IMPLEMENTATIONS if name != BASE]
    parser.add_argument("--implementations", nargs="*", default=ours, choices=ours, help=f"those beside {BASE}")
    parser.add_argument("--device")
    parser.add_argument("--output", help="a folder for the result as JSON")
    given = parser.parse_args(words)
    settings = Settings(
        model=given.model,
        batch_size=given.batch_size,
        rounds=given.rounds,
        precisions=tuple(given.precisions),
        implementations=tuple(given.implementations),
        device=str(choose_device(given.device)),
        output=given.output,
    )
    return bench(settings, ["python", "-m", "fastmae.benchmarks.accelerate", *words])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
