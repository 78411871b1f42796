"""Prints versions, devices, and which backends would be used and why."""

from __future__ import annotations

import json

from fastmae.config import InfoConfig
from fastmae.config.training import COMPILED_STEPS
from fastmae.data.loader import choose_decoder, describe_decoder
from fastmae.data.reading import Reading
from fastmae.environment import hardware, versions
from fastmae.screen import show_table
from fastmae.train.choosing import known_here
from fastmae.train.parallel import choose_device
from fastmae.train.precision import choose_precision
from fastmae.train.settings import describe_backends


def run_info(config: InfoConfig) -> int:
    """Prints the versions, the hardware and the backends of this machine."""
    device = choose_device(None)
    shapes = {"encoder": (50, 64), "decoder": (197, 32)}  # of ViT-B/16 and ViT-L/16 with three quarters masked
    decoding = describe_decoder(*choose_decoder("auto", device, None, Reading(3)))
    backends = describe_backends(device, choose_precision("auto", device), shapes, decoding)
    backends["compile"] = _compile_auto(device.type == "cuda")
    sections = {"versions": versions(), "hardware": hardware(), "backends": backends, "choices": known_here()}
    if config.json:
        print(json.dumps(sections))
        return 0
    rows: list[tuple[str, str] | None] = []
    for section, entries in sections.items():
        rows += [None, (section, "")]
        rows += [(name, ", ".join(v) or "none" if isinstance(v, list) else str(v)) for name, v in entries.items()]
    show_table({"name": "left", "value": "left"}, rows[1:], header=False)
    return 0


def _compile_auto(on_gpu: bool) -> str:
    """Describes what --compile auto comes to here."""
    if not on_gpu:
        return "off (on a CPU)"
    return f"block for runs of at least {COMPILED_STEPS:,} steps where it works, else off (on a GPU)"
