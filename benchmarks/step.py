"""How long is a training step, beside the published formulation and beside transformers?

Forward, backward and optimiser on the same images, masks and weights. Contestants take turns (A B C A B C …), so that
a machine whose speed drifts drifts for all, and medians are compared. No time is reported unless all losses agree.

    python benchmarks/step.py --model mae_vit_base_patch16 --batch_size 8 --output benchmarks/results/step-cpu.json
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path

import torch
from peers.vitmae import vitmae_like

from fastmae.environment import hardware, versions
from fastmae.model.mae import PRESETS
from fastmae.model.reference import ReferenceMAE
from fastmae.ops.random_masking import random_masking
from fastmae.train.optim import make_optimizer

Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
LOSS_TOLERANCE = {"fp32": 1e-5, "bf16": 2e-2}


def contestants(name: str, device: torch.device) -> dict[str, tuple[torch.nn.Module, Loss]]:
    """Models with the same weights, each with a function of (uint8 NHWC images, ids_shuffle) that gives the loss."""
    torch.manual_seed(0)
    model = PRESETS[name]()
    reference = ReferenceMAE(
        model.img_size,
        model.patch_size,
        model.in_chans,
        embed_dim=model.cls_token.shape[-1],
        depth=len(model.blocks),
        num_heads=model.blocks[0].attn.num_heads,
        decoder_embed_dim=model.mask_token.shape[-1],
        decoder_depth=len(model.decoder_blocks),
        decoder_num_heads=model.decoder_blocks[0].attn.num_heads,
    )
    reference.load_state_dict(model.state_dict())

    def normalised(images: torch.Tensor) -> torch.Tensor:
        return ((images / 255 - model.mean) / model.std).permute(0, 3, 1, 2).contiguous()

    found: dict[str, tuple[torch.nn.Module, Loss]] = {
        "fastmae": (model, model.training_loss),
        "published formulation": (reference, lambda images, ids: reference(normalised(images), ids.long())[0]),
    }
    try:
        peer = vitmae_like(model)
        found["transformers ViTMAE"] = (
            peer,
            lambda images, ids: peer(normalised(images), noise=ids.argsort(dim=1).float()).loss,
        )
    except ImportError:
        print("transformers is not installed: left out", file=sys.stderr)
    for module, _ in found.values():
        module.to(device)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="mae_vit_base_patch16", choices=PRESETS)
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--precision", default="fp32", choices=LOSS_TOLERANCE)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--output", type=Path, help="a JSON file for every sample and what they were taken on")
    args = parser.parse_args()

    device = torch.device(args.device)
    models = contestants(args.model, device)
    height, width = models["fastmae"][0].img_size
    generator = torch.Generator().manual_seed(0)
    shape = (args.batch_size, height, width, models["fastmae"][0].in_chans)
    images = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator).to(device)
    ids = random_masking(torch.arange(args.batch_size), 0, models["fastmae"][0].num_patches).to(device)
    optimizers = {name: make_optimizer(module, 1e-4, 0.05) for name, (module, _) in models.items()}

    def step(name: str) -> tuple[float, float]:
        """(seconds, loss) of one step."""
        start = time.perf_counter()
        optimizers[name].zero_grad(set_to_none=True)
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=args.precision == "bf16"):
            loss = models[name][1](images, ids)
        loss.backward()
        optimizers[name].step()
        value = loss.item()  # the wait for the device
        return time.perf_counter() - start, value

    samples: dict[str, list[float]] = {name: [] for name in models}
    for round_number in range(args.rounds + 1):
        losses = {}
        for name in models:
            seconds, losses[name] = step(name)
            if round_number:  # the first round warms up
                samples[name].append(seconds)
        worst = max(abs(loss / losses["fastmae"] - 1) for loss in losses.values())
        if round_number == 0 and worst > LOSS_TOLERANCE[args.precision]:
            sys.exit(f"the losses differ by {worst:.1e}, so no time is reported: {losses}")

    ours = statistics.median(samples["fastmae"])
    print(f"{args.model}, batch {args.batch_size}, {args.precision}, {device}, median of {args.rounds}")
    for name, seconds in samples.items():
        median = statistics.median(seconds)
        print(f"  {name:24} {args.batch_size / median:8.2f} images/s   fastmae is {median / ours:.2f} times as fast")
    if args.output is not None:
        commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent)
        result = {
            "date": date.today().isoformat(),
            "command": sys.argv,
            "commit": commit.stdout.strip(),
            "versions": versions(),
            "hardware": hardware(),
            "settings": {key: str(value) for key, value in vars(args).items()},
            "seconds": samples,
        }
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
