"""Starts the service, or writes its file for a cluster."""

from __future__ import annotations

import dataclasses
import os
import time
from pathlib import Path
from typing import BinaryIO

import yaml

from fastmae.commands.shared import make_folder
from fastmae.config import ServeConfig
from fastmae.errors import UserError, install_hint
from fastmae.files import write_whole
from fastmae.screen import complain, say
from fastmae.signals import StopSignals, remembered
from fastmae.train.parallel import choose_device

GLANCE = 0.2
LOOK = 5.0
"""Seconds between looks for a signal, and for the health of the service."""


def run_serve(config: ServeConfig) -> int:
    """Answers requests until a signal comes, then ends those in work; or writes the file for ``serve deploy``."""
    try:
        import fastapi  # noqa: F401
        import prometheus_client  # noqa: F401
        import python_multipart  # noqa: F401
        import ray.serve  # noqa: F401
    except ImportError as error:
        raise UserError(f"fastmae serve needs {error.name}; {install_hint('serve')}") from error
    from fastmae.serve.answers import open_service
    from fastmae.serve.deployment import deployed, running
    from fastmae.serve.uploads import read_token

    config = _for_other_processes(config)
    token = read_token(config)
    service = open_service(config)  # what cannot be served is told here, in one line
    tasks = ", ".join(service.tasks)
    del service
    if config.write is not None:
        path = Path(config.write)
        make_folder(path.parent, "write")
        text = yaml.safe_dump(deployed(config), sort_keys=False)

        def write(file: BinaryIO) -> None:
            file.write(text.encode())

        write_whole(path, write)
        say(f"{path}: start it on a cluster with `serve deploy {path}`; every node must find the paths in it")
        return 0
    where = f"http://{config.host}:{config.port}"
    with remembered(), StopSignals() as stop, running(config) as is_running:
        asked = "a token is asked for" if token else "no token is asked for"
        reach = "only this machine can reach it" if config.is_local else "OTHER MACHINES CAN REACH IT"
        say(f"{where} answers: {tasks}; {asked}; {reach}")
        seen = time.monotonic()
        while stop.received is None:
            time.sleep(GLANCE)
            if time.monotonic() - seen > LOOK:
                seen = time.monotonic()
                if not is_running():
                    logs = "/tmp/ray/session_latest/logs/serve"
                    complain(f"the service does not run any more; the logs of Ray say why ({logs})")
                    return 1
        say(f"{stop.received}: answering the requests in work")
    say("stopped")
    return 0


def _for_other_processes(config: ServeConfig) -> ServeConfig:
    """Returns the settings as replicas need them: whole paths, and the kind of device, of which Ray gives each one."""
    paths = {
        name: os.path.abspath(os.path.expanduser(value))
        for name in ("checkpoint", "index", "token_file")
        if (value := getattr(config, name)) is not None
    }
    return dataclasses.replace(config, **paths, device=choose_device(config.device).type)
