"""What Prometheus reads: requests, their times, refusals, batches.

Replicas on one machine count into files of a common folder (``PROMETHEUS_MULTIPROC_DIR``), so that whichever answers
tells the sums of all.
"""

from __future__ import annotations

import os
from pathlib import Path

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.multiprocess import MultiProcessCollector, mark_process_dead

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
BATCHES = (1, 2, 4, 8, 16, 32, 64, 128)


class Metrics:
    """The figures of one process."""

    def __init__(self) -> None:
        registry = CollectorRegistry()
        self.requests = Counter(
            "fastmae_requests",
            "Requests that were answered, by task and status.",
            ["task", "status"],
            registry=registry,
        )
        self.seconds = Histogram(
            "fastmae_request_seconds", "Seconds of a request, its upload included.", ["task"],
            buckets=SECONDS, registry=registry,
        )  # fmt: skip
        self.in_work = Gauge(
            "fastmae_requests_in_work", "Requests in work.", registry=registry, multiprocess_mode="livesum"
        )
        self.batches = Histogram(
            "fastmae_batch_images", "Images that were computed together.", buckets=BATCHES, registry=registry
        )
        self._registry = registry

    def text(self) -> bytes:
        """Returns all figures as Prometheus reads them, of all replicas on this machine where they share a folder."""
        folder = os.environ.get("PROMETHEUS_MULTIPROC_DIR")
        if folder is None:
            return generate_latest(self._registry)
        for file in Path(folder).glob("gauge_live*.db"):  # what a killed replica had in work is in work no more
            pid = file.stem.rpartition("_")[2]
            if pid.isdigit() and not Path("/proc", pid).exists():
                mark_process_dead(int(pid), folder)
        registry = CollectorRegistry()
        MultiProcessCollector(registry)
        return generate_latest(registry)
