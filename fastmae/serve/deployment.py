"""The app on Ray Serve: replicas, batches, and what starts and stops them."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import secrets
import tempfile
import time
from collections.abc import Callable, Generator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException

from fastmae.config.serve import ServeConfig, config_of, settings_of, with_whole_paths
from fastmae.errors import UserError
from fastmae.messages import logger

NAME = "fastmae"
FOLDER_VARIABLE = "FASTMAE_SERVE_FOLDER"
"""A folder of one machine: there lies the mark that the service is stopping, and the figures of all replicas."""
STOPPING = "stopping"
NOTICE = 1.0
"""Seconds between the first answer that the service is stopping and its end, so that who sends requests sees it."""


def application(settings: dict[str, Any]) -> serve.Application:
    """Returns what Ray Serve runs, from the settings of ``fastmae serve`` by their names.

    ``serve deploy`` calls it with the ``args`` of its file, ``serve run`` with its words ``NAME=VALUE``.

    Raises:
        SettingError: naming the setting, its value and what it must be.
    """
    config = with_whole_paths(config_of(settings))  # replicas have a folder of their own

    def build() -> Any:  # in each replica
        return build_app(config)

    most = config.max_replicas or config.replicas
    options: dict[str, Any] = {
        "name": NAME,
        "max_ongoing_requests": 2 * config.max_requests,  # the app refuses before that, so that nothing waits unseen
        "graceful_shutdown_wait_loop_s": 0.2,
        "graceful_shutdown_timeout_s": config.drain,
        "health_check_period_s": 5,
        "health_check_timeout_s": max(30.0, config.timeout),
        "ray_actor_options": {
            "num_cpus": config.cpus,
            "num_gpus": 1 if (config.device or "").startswith("cuda") else 0,
        },
    }
    if most > config.replicas:
        scaling = {
            "min_replicas": config.replicas, "max_replicas": most, "target_ongoing_requests": config.target_requests,
            "upscale_delay_s": 5, "downscale_delay_s": 120, "look_back_period_s": 10, "metrics_interval_s": 2,
        }  # fmt: skip
        options["autoscaling_config"] = scaling
    else:
        options["num_replicas"] = config.replicas
    return serve.deployment(**options)(serve.ingress(build)()).bind()


def build_app(config: ServeConfig) -> Any:
    """Opens the model in a replica, and returns its app."""
    folder = os.environ.get(FOLDER_VARIABLE)
    if folder is not None:  # before prometheus_client is imported, which decides by it where it counts
        os.environ["PROMETHEUS_MULTIPROC_DIR"] = folder
        _stay_on_this_machine()
    from fastmae.serve.answers import open_service
    from fastmae.serve.app import make_app
    from fastmae.serve.batches import in_batches
    from fastmae.serve.metrics import Metrics
    from fastmae.serve.uploads import read_token

    token = read_token(config)
    service = open_service(config)
    metrics = Metrics()

    answer = in_batches(service.answer, config.max_batch, config.batch_wait_ms / 1000, metrics.batches.observe)
    mark = None if folder is None else Path(folder) / STOPPING
    return make_app(
        service, answer, token=token, metrics=metrics, is_stopping=lambda: mark is not None and mark.exists()
    )


def _stay_on_this_machine() -> None:
    """Lets a replica open the port at which Ray's processes call it at 127.0.0.1.

    Ray (seen in 2.60) opens it at all addresses and takes pickles there, which nobody else may send. This is a private
    name of Ray; where it is gone, a line says that a firewall is needed.
    """
    from ray.serve._private import replica

    add_port: Callable[[Any, str], int] | None = getattr(replica, "add_port_to_grpc_server", None)
    if add_port is None:
        logger.warning(
            "this version of Ray may open ports of its replicas beyond 127.0.0.1; keep them behind a firewall"
        )
        return
    replica.add_port_to_grpc_server = lambda server, address: add_port(server, address.replace("[::]", "127.0.0.1"))


def _keep_other_users_out(folder: Path) -> None:
    """Gives Ray's own processes a secret of this start, without which other users of this machine cannot call them.

    Otherwise Ray (seen in 2.60) would write one to the home, and ask for it in every cluster that is started later.
    Whoever has chosen another way by Ray's variables keeps it.
    """
    if not any(name in os.environ for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")):
        path = folder / "ray_token"
        path.touch(0o600)
        path.write_text(secrets.token_hex(32), encoding="ascii")
        os.environ["RAY_AUTH_TOKEN_PATH"] = str(path)


@dataclass(frozen=True)
class Running:
    """The service on this machine."""

    folder: Path

    def is_alive(self) -> bool:
        """Whether Ray Serve still runs the service; it starts replicas that died again by itself (UNHEALTHY)."""
        try:
            return serve.status().applications[NAME].status in ("RUNNING", "DEPLOYING", "UNHEALTHY")
        except (KeyError, RayError, RayServeException):
            return False

    def drain(self) -> None:
        """Lets the service take no new requests, and waits until those in work are answered."""
        (self.folder / STOPPING).touch()
        time.sleep(NOTICE)
        serve.delete(NAME)


@contextlib.contextmanager
def running(config: ServeConfig) -> Generator[Running]:
    """Starts Ray and the service on this machine, and stops both at the end.

    Raises:
        UserError: the service did not start.
    """
    most = config.max_replicas or config.replicas
    with tempfile.TemporaryDirectory(prefix="fastmae-serve-") as folder:
        os.environ[FOLDER_VARIABLE] = folder
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is reported to anybody
        _keep_other_users_out(Path(folder))
        try:
            ray.init(
                address="local",
                num_cpus=max(os.cpu_count() or 1, math.ceil(most * config.cpus)),
                include_dashboard=False,
                log_to_driver=False,
                logging_level=logging.ERROR,
                object_store_memory=100_000_000,
            )
            logging.getLogger("ray.serve").setLevel(logging.ERROR)
            http = {"host": config.host, "port": config.port, "request_timeout_s": config.timeout + 5}
            serve.start(proxy_location="HeadOnly", http_options=http)
            serve.run(application(settings_of(config)), name=NAME, route_prefix="/")
        except (RuntimeError, RayError, RayServeException) as error:
            ray.shutdown()
            raise UserError(f"the service did not start: {' '.join(str(error).split())[:300]}") from error
        try:
            yield Running(Path(folder))
        finally:
            ray.shutdown()  # this Ray is ours alone, and goes with all that runs on it


def deployed(config: ServeConfig) -> dict[str, Any]:
    """Returns the file for ``serve deploy``: the same service on a cluster of Ray."""
    args = {name: list(value) if isinstance(value, tuple) else value for name, value in settings_of(config).items()}
    return {
        "proxy_location": "EveryNode",
        "http_options": {"host": config.host, "port": config.port, "request_timeout_s": config.timeout + 5},
        "applications": [
            {"name": NAME, "route_prefix": "/", "import_path": f"{__name__}:application", "args": args},
        ],
    }
