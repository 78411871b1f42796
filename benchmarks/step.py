"""How long is a training step, beside the published formulation and beside transformers?

    fastmae bench step --batch_size 8 --output benchmarks/results                                        # on a CPU
    fastmae bench step --batch_size 256 --precision bf16 --rounds 30 --output benchmarks/results         # on a GPU

Forward, backward and optimiser on the same images, masks and weights. No time is reported unless all losses agree.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch

from fastmae.benchmarks.peers.vitmae import vitmae_like
from fastmae.benchmarks.timing import Stopwatch, interleave, machine_name, quartiles, times_as_fast, write_result
from fastmae.config import BenchStepConfig, check_bench
from fastmae.errors import UserError
from fastmae.model.mae import PRESETS
from fastmae.model.reference import ReferenceMAE
from fastmae.ops.random_masking import random_masking
from fastmae.train.optim import make_optimizer
from fastmae.train.parallel import choose_device
from fastmae.train.precision import choose_precision

Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
LOSS_TOLERANCE = {"fp32": 1e-5, "bf16": 2e-2}
OURS = "fastmae"


def contestants(name: str, device: torch.device) -> dict[str, tuple[Any, Loss]]:
    """Models with the same weights, each with a function of (uint8 NHWC images, ids_shuffle) that gives the loss."""
    torch.manual_seed(0)
    model: Any = PRESETS[name]()
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

    found: dict[str, tuple[Any, Loss]] = {
        OURS: (model, model.training_loss),
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


def bench_step(config: BenchStepConfig, command: Sequence[str]) -> int:
    """Prints the times, writes what was asked for, and returns 1 if the losses disagree, otherwise 0.

    Raises:
        UserError: settings that cannot work.
    """
    check_bench(config)
    if config.model not in PRESETS:
        raise UserError(f"--model {config.model}: unknown; one of {', '.join(PRESETS)}")
    device = choose_device(config.device)
    precision = choose_precision(config.precision, device)
    N = config.batch_size
    models = contestants(config.model, device)
    model = models[OURS][0]
    generator = torch.Generator().manual_seed(0)
    shape = (N, *model.img_size, model.in_chans)
    images = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator).to(device)
    ids = random_masking(torch.arange(N), 0, model.num_patches).to(device)
    optimizers = {name: make_optimizer(module, 1e-4, 0.05) for name, (module, _) in models.items()}

    def step(name: str) -> torch.Tensor:
        optimizers[name].zero_grad(set_to_none=True)
        with precision.context(device):
            loss = models[name][1](images, ids)
        loss.backward()
        optimizers[name].step()
        return loss.detach()

    losses = {name: step(name).item() for name in models}
    worst = max(abs(loss / losses[OURS] - 1) for loss in losses.values())
    if not worst <= LOSS_TOLERANCE[precision.name]:
        print(f"the losses differ by {worst:.1e}, so no time is reported: {losses}", file=sys.stderr)
        return 1
    calls = {name: lambda _, name=name: step(name) for name in models}
    samples = interleave(calls, Stopwatch(device=device, rounds=config.rounds))

    print(f"{config.model}, batch {N}, {precision.name}, {machine_name(device)}, median of {config.rounds}")
    for name, seconds in samples.items():
        ratio = times_as_fast(samples, OURS, name)
        print(f"  {name:24} {N / quartiles(seconds)[1]:8.2f} images/s   fastmae is {ratio:.2f} times as fast")
    if config.output is not None:
        file = f"step-{config.model}-{machine_name(device)}-n{N}-{precision.name}"
        measured = {"losses": losses, "seconds": samples}
        print(write_result(config.output, file, command=command, settings=config, measured=measured))
    return 0
