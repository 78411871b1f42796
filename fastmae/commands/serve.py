"""Starts the service, or writes its file for a cluster."""

from __future__ import annotations

import dataclasses
import errno
import os
import socket
import time
from importlib.util import find_spec
from pathlib import Path
from typing import BinaryIO

import yaml

from fastmae.commands.shared import make_folder
from fastmae.config import ServeConfig
from fastmae.config.serve import with_whole_paths
from fastmae.errors import SettingError, UserError, install_hint
from fastmae.files import write_whole
from fastmae.screen import complain, say
from fastmae.signals import StopSignals, remembered
from fastmae.train.parallel import choose_device

GLANCE = 0.2
LOOK = 5.0
"""Seconds between looks for a signal, and for the health of the service."""


def run_serve(config: ServeConfig) -> int:
    """Answers requests until a signal comes, then ends those in work; or writes the file for ``serve deploy``."""
    for package in ("fastapi", "python_multipart", "prometheus_client", "ray"):
        if find_spec(package) is None:
            raise UserError(f"fastmae serve needs {package}; {install_hint('serve')}")
    if config.write is None:
        # Ray's own ports lie at 127.0.0.1 as well, where a machine is no cluster; it is read when Ray is imported.
        os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
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
    _require_port(config)
    where = f"http://{config.host}:{config.port}"
    with remembered(), running(config) as service_here, StopSignals() as stop:  # Ray replaces handlers when it starts
        asked = "a token is asked for" if token else "no token is asked for"
        reach = "only this machine can reach it" if config.is_local else "OTHER MACHINES CAN REACH IT"
        say(f"{where} answers: {tasks}; {asked}; {reach}")
        looked = time.monotonic()
        while stop.received is None:
            time.sleep(GLANCE)
            if time.monotonic() - looked > LOOK:
                looked = time.monotonic()
                if not service_here.is_alive():
                    logs = "/tmp/ray/session_latest/logs/serve"
                    complain(f"the service does not run any more; the logs of Ray say why ({logs})")
                    return 1
        say(f"{stop.received}: answering the requests in work")
        service_here.drain()
    say("stopped")
    return 0


def _require_port(config: ServeConfig) -> None:
    """Refuses an address or a port that cannot be listened at, before Ray is started.

    Raises:
        SettingError: another program has the port, or the address is not this machine's.
    """
    try:
        kind, _, _, _, address = socket.getaddrinfo(config.host, config.port, type=socket.SOCK_STREAM)[0]
        with socket.socket(kind) as one:
            one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            one.bind(address)
    except OSError as error:
        if isinstance(error, socket.gaierror) or error.errno == errno.EADDRNOTAVAIL:
            problem = f"is no address of this machine ({error.strerror}); 127.0.0.1 is one, 0.0.0.0 means all of them"
            raise SettingError("host", config.host, problem) from error
        problem = f"cannot be listened at {config.host} ({error.strerror or error}); choose another port or host"
        raise SettingError("port", config.port, problem) from error


def _for_other_processes(config: ServeConfig) -> ServeConfig:
    """Returns the settings as replicas need them: whole paths, and the kind of device, of which Ray gives each one."""
    return dataclasses.replace(with_whole_paths(config), device=choose_device(config.device).type)
