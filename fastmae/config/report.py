"""The settings of report."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from tyro.conf import Positional, arg

from fastmae.config.values import coerce, need

Runs = Annotated[
    tuple[str, ...],
    Positional,
    arg(metavar="RUN", help="Run folders of `pretrain` or `finetune`. Several are laid over each other in each chart."),
]


@dataclass(frozen=True, kw_only=True)
class ReportConfig:
    """Write one page about runs: losses, speed, probes, reconstructions, settings and events. It needs no network."""

    runs: Runs
    output: str = "report.html"
    """The page."""

    def __post_init__(self) -> None:
        coerce(self)
        need(self, len(self.runs) > 0, "runs", "at least one run folder")
        need(self, self.output.lower().endswith((".html", ".htm")), "output", "a name that ends in .html")
