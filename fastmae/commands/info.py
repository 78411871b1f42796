"""Prints versions, devices, and which backends would be used and why."""

from __future__ import annotations

import json

from rich.console import Console
from rich.table import Table

from fastmae.config import InfoConfig
from fastmae.data.loader import choose_decoder, describe_decoder
from fastmae.environment import hardware, versions
from fastmae.train.parallel import choose_device
from fastmae.train.precision import choose_precision
from fastmae.train.settings import describe_backends


def run_info(config: InfoConfig) -> int:
    """Prints the versions, the hardware and the backends of this machine."""
    device = choose_device(None)
    shapes = {"encoder": (50, 64), "decoder": (197, 32)}  # of ViT-B/16 and ViT-L/16 with three quarters masked
    decoding = describe_decoder(*choose_decoder("auto", device, None, in_chans=3))
    backends = describe_backends(device, choose_precision("auto", device), shapes, decoding)
    sections = {"versions": versions(), "hardware": hardware(), "backends": backends}
    if config.json:
        print(json.dumps(sections))
        return 0
    table = Table(show_header=False)
    for section, entries in sections.items():
        table.add_row(f"[bold]{section}", "")
        for name, value in entries.items():
            table.add_row(name, ", ".join(value) or "none" if isinstance(value, list) else str(value))
    Console().print(table)
    return 0
