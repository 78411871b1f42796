"""Which rank this process is, as its launcher says: torchrun, Open MPI's or MPICH's mpirun, or SLURM's srun.

A launcher tells each of its processes by environment variables. torchrun's are taken first. Without them, those of an
MPI launcher or of srun are translated into torchrun's, so that no task of `srun -n 8` believes that it is alone. This
module reads variables and nothing else.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass

from fastmae.errors import UserError

Variables = Mapping[str, str]

MPI = (
    ("Open MPI", "OMPI_COMM_WORLD_{}", ("RANK", "SIZE"), ("OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE")),
    ("MPICH", "PMI_{}", ("RANK", "SIZE"), ("MPI_LOCALRANKID", "MPI_LOCALNRANKS")),
)
# srun numbers its steps from 0. The steps of a batch script, of an interactive shell and the like have the numbers from
# here on, and are one process whatever SLURM_NTASKS says.
MOST_STEPS = 2**32 - 256
PORTS = range(20_000, 30_000)
PORT = 29_500  # torchrun's own
BY_HAND = "or start it with `torchrun --nnodes N --nproc_per_node M -m fastmae …`"


@dataclass(frozen=True)
class Launch:
    """This process among the ranks."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    """The number of ranks on this machine."""
    address: str = ""
    """The machine of rank 0; empty for one rank."""
    port: int = 0
    by: str = "torchrun"
    """The launcher whose variables these are."""

    @property
    def variables(self) -> dict[str, str]:
        """The same in the words of torchrun."""
        return {
            "RANK": str(self.rank),
            "WORLD_SIZE": str(self.size),
            "LOCAL_RANK": str(self.local_rank),
            "LOCAL_WORLD_SIZE": str(self.local_size),
            "MASTER_ADDR": self.address,
            "MASTER_PORT": str(self.port),
        }


def read_launch(variables: Variables) -> Launch:
    """Returns which rank this process is, from the variables of whatever started it.

    Raises:
        UserError: a variable is no number or missing, or nothing says on which machine rank 0 is.
    """
    if "WORLD_SIZE" in variables or "RANK" in variables:
        return _torchrun(variables)
    for by, pattern, words, local in MPI:
        rank_name, size_name = (pattern.format(word) for word in words)
        if size_name in variables:
            size = _number(variables, size_name, 1)
            return Launch() if size == 1 else _translated(by, variables, rank_name, size_name, local)
    if is_srun_step(variables) and _number(variables, "SLURM_STEP_NUM_TASKS", 1) > 1:
        return _translated("SLURM", variables, "SLURM_PROCID", "SLURM_STEP_NUM_TASKS", ("SLURM_LOCALID", ""))
    return Launch()


def is_first(variables: Variables) -> bool:
    """Tells whether this process is the one that prints what all ranks would say, without a check of anything."""
    if "RANK" in variables:
        return variables["RANK"] == "0"
    names = [pattern.format("RANK") for _, pattern, _, _ in MPI]
    names += ["SLURM_PROCID"] if is_srun_step(variables) else []
    return next((variables[name] == "0" for name in names if name in variables), True)


def is_srun_step(variables: Variables) -> bool:
    """Tells whether srun started this process, and not sbatch or salloc, which also set SLURM_PROCID to 0."""
    step = variables.get("SLURM_STEP_ID", variables.get("SLURM_STEPID", ""))
    return "SLURM_STEP_NUM_TASKS" in variables and step.isascii() and step.isdigit() and int(step) < MOST_STEPS


def first_host(nodes: str) -> str:
    """Returns the first machine of a list as SLURM writes it: ``node004`` of ``node[004-007,9],gpu1``."""
    first = re.split(r",(?![^\[]*\])", nodes)[0]
    return re.sub(r"\[(\w+)[^\]]*\]", r"\1", first)


def tasks_per_node(counts: str) -> list[int]:
    """Returns the tasks of each machine as SLURM counts them: [2, 2, 1] of ``2(x2),1``; empty where it is not so."""
    tasks: list[int] = []
    for count in counts.split(","):
        match = re.fullmatch(r"(\d{1,9})(?:\(x(\d{1,6})\))?", count, re.ASCII)
        if match is None:
            return []
        tasks += [int(match[1])] * int(match[2] or 1)
    return tasks


def _torchrun(variables: Variables) -> Launch:
    size = _number(variables, "WORLD_SIZE", 1, default=1)
    rank = _number(variables, "RANK", 0, default=0 if size == 1 else None)
    if rank >= size:
        raise UserError(f"RANK={rank}: must be below WORLD_SIZE={size}; torchrun sets both")
    local_rank = _number(variables, "LOCAL_RANK", 0, default=0)
    local_size = _number(variables, "LOCAL_WORLD_SIZE", 1, default=1)
    if size == 1:
        return Launch(local_rank=local_rank, local_size=local_size)
    if not variables.get("MASTER_ADDR"):
        raise UserError(f"MASTER_ADDR: missing for {size} ranks; set it to the machine of rank 0, {BY_HAND}")
    port = _number(variables, "MASTER_PORT", 1, 65_535)
    return Launch(rank, size, local_rank, local_size, variables["MASTER_ADDR"], port)


def _translated(by: str, variables: Variables, rank_name: str, size_name: str, local: tuple[str, str]) -> Launch:
    """Returns the launch of several tasks by something else than torchrun."""
    rank, size = _number(variables, rank_name, 0), _number(variables, size_name, 1)
    if rank >= size:
        raise UserError(f"{rank_name}={rank}: must be below {size_name}={size}, {BY_HAND}")
    local_rank = _number(variables, local[0], 0, default=_number(variables, "SLURM_LOCALID", 0, default=0))
    on_nodes = tasks_per_node(variables.get("SLURM_STEP_TASKS_PER_NODE", ""))
    node = _number(variables, "SLURM_NODEID", 0, default=0)
    here = on_nodes[node] if node < len(on_nodes) else 1
    local_size = _number(variables, local[1], 1, default=here)
    nodes = variables.get("SLURM_STEP_NODELIST") or variables.get("SLURM_JOB_NODELIST", "")
    address = variables.get("MASTER_ADDR") or ("127.0.0.1" if local_size == size else first_host(nodes))
    if not address:
        raise UserError(
            f"{by} started {size} tasks ({size_name}), and nothing says on which machine the first one is: export "
            f"MASTER_ADDR and MASTER_PORT, {BY_HAND}"
        )
    port = _number(variables, "MASTER_PORT", 1, 65_535, default=_port(variables))
    return Launch(rank, size, local_rank, local_size, address, port, by)


def _port(variables: Variables) -> int:
    """Returns a port that all tasks of a job agree on, and two jobs on a machine hardly share."""
    names = ("SLURM_JOB_ID", "SLURM_STEP_ID", "PMIX_NAMESPACE", "PMI_JOBID")
    job = " ".join(variables[name] for name in names if name in variables)
    return PORTS[int(hashlib.sha256(job.encode()).hexdigest(), 16) % len(PORTS)] if job else PORT


def _number(variables: Variables, name: str, least: int, most: int = 2**31, default: int | None = None) -> int:
    text = variables.get(name)
    if text is None and default is not None:
        return default
    if text is None:
        raise UserError(f"{name}: missing, where other variables say that there are several ranks; {BY_HAND[3:]}")
    if not re.fullmatch(r"\d{1,10}", text, re.ASCII) or not least <= int(text) <= most:
        limits = f"from {least} to {most}" if most < 2**31 else f"of {least} or more"
        raise UserError(
            f"{name}={text[:40]!r}: must be a whole number {limits}; the launcher sets it, as torchrun does"
        )
    return int(text)


def here() -> Launch:
    """Returns which rank this process is, and sets torchrun's variables if another launcher started it.

    Raises:
        UserError: as ``read_launch``.
    """
    launch = read_launch(os.environ)
    if launch.by != "torchrun":
        os.environ.update(launch.variables)
    return launch
