"""Whatever starts several ranks, each knows which one it is, or says in one line why it cannot."""

import pytest

from fastmae.errors import UserError
from fastmae.launch import Launch, first_host, is_first, read_launch, tasks_per_node

BATCH = dict(SLURM_JOB_ID="71", SLURM_NTASKS="8", SLURM_PROCID="0", SLURM_LOCALID="0", SLURM_JOB_NODELIST="n[04-05]")
STEP = BATCH | dict(
    SLURM_STEP_ID="0", SLURM_STEP_NUM_TASKS="8", SLURM_STEP_NODELIST="n[04-05]", SLURM_STEP_TASKS_PER_NODE="4(x2)",
    SLURM_PROCID="6", SLURM_LOCALID="2", SLURM_NODEID="1",
)  # fmt: skip
TORCHRUN = dict(RANK="1", WORLD_SIZE="2", LOCAL_RANK="1", LOCAL_WORLD_SIZE="2", MASTER_ADDR="h", MASTER_PORT="29500")
OPEN_MPI = dict(
    OMPI_COMM_WORLD_RANK="3", OMPI_COMM_WORLD_SIZE="4", OMPI_COMM_WORLD_LOCAL_RANK="3", OMPI_COMM_WORLD_LOCAL_SIZE="4",
)  # fmt: skip
MPICH = dict(PMI_RANK="1", PMI_SIZE="2", MPI_LOCALRANKID="1", MPI_LOCALNRANKS="2")


def test_torchrun_says_it_and_is_believed_first():
    assert read_launch(TORCHRUN | STEP | OPEN_MPI) == Launch(1, 2, 1, 2, "h", 29500)
    assert read_launch({}) == read_launch(dict(WORLD_SIZE="1", RANK="0")) == Launch()
    assert read_launch(TORCHRUN).variables == TORCHRUN


def test_tasks_of_srun_are_ranks():
    launch = read_launch(STEP)
    assert launch == Launch(6, 8, 2, 4, "n04", launch.port, "SLURM")
    assert launch.port == read_launch(STEP | dict(SLURM_PROCID="0", SLURM_LOCALID="0", SLURM_NODEID="0")).port
    assert launch.port != read_launch(STEP | dict(SLURM_JOB_ID="72")).port
    assert 20_000 <= launch.port < 30_000
    given = read_launch(STEP | dict(MASTER_ADDR="head", MASTER_PORT="4711"))
    assert (given.address, given.port) == ("head", 4711)


@pytest.mark.parametrize(
    "variables",
    [
        BATCH,
        BATCH | dict(SLURM_STEP_ID="4294967291", SLURM_STEP_NUM_TASKS="8"),  # a batch script
        BATCH | dict(SLURM_STEP_ID="4294967290", SLURM_STEP_NUM_TASKS="8"),  # the shell of salloc
        BATCH | dict(SLURM_STEP_ID="-5", SLURM_STEP_NUM_TASKS="8"),
        STEP | dict(SLURM_STEP_NUM_TASKS="1", SLURM_PROCID="0"),
        dict(OMPI_COMM_WORLD_RANK="0", OMPI_COMM_WORLD_SIZE="1"),
    ],
)
def test_a_job_of_many_tasks_that_runs_one_process_is_one_rank(variables):
    assert read_launch(variables) == Launch()
    assert is_first(variables)


def test_tasks_of_mpirun_are_ranks():
    assert read_launch(OPEN_MPI) == Launch(3, 4, 3, 4, "127.0.0.1", 29500, "Open MPI")
    assert read_launch(MPICH) == Launch(1, 2, 1, 2, "127.0.0.1", 29500, "MPICH")
    # mpirun in a job of SLURM starts its own helpers by srun: what it says itself counts
    inside = read_launch(STEP | OPEN_MPI | dict(OMPI_COMM_WORLD_LOCAL_SIZE="2", OMPI_COMM_WORLD_LOCAL_RANK="1"))
    assert (inside.rank, inside.size, inside.local_rank, inside.address) == (3, 4, 1, "n04")
    assert (is_first(OPEN_MPI), is_first(MPICH), is_first(STEP), is_first({})) == (False, False, False, True)


@pytest.mark.parametrize(
    ("variables", "line"),
    [
        (TORCHRUN | dict(WORLD_SIZE="two"), "WORLD_SIZE='two': must be a whole number of 1 or more"),
        (TORCHRUN | dict(WORLD_SIZE=""), "WORLD_SIZE='': must be a whole number of 1 or more"),
        (TORCHRUN | dict(WORLD_SIZE="9" * 5000), "WORLD_SIZE='999"),
        (TORCHRUN | dict(RANK="-1"), "RANK='-1': must be a whole number of 0 or more"),
        (TORCHRUN | dict(RANK="2"), "RANK=2: must be below WORLD_SIZE=2"),
        (dict(RANK="3"), "RANK=3: must be below WORLD_SIZE=1"),
        (TORCHRUN | dict(LOCAL_RANK="x"), "LOCAL_RANK='x': must be"),
        (TORCHRUN | dict(MASTER_PORT="99999"), "MASTER_PORT='99999': must be a whole number from 1 to 65535"),
        (TORCHRUN | dict(MASTER_ADDR=""), "MASTER_ADDR: missing for 2 ranks"),
        ({name: value for name, value in TORCHRUN.items() if name != "MASTER_PORT"}, "MASTER_PORT: missing"),
        ({name: value for name, value in TORCHRUN.items() if name != "RANK"}, "RANK: missing"),
        (STEP | dict(SLURM_PROCID="8"), "SLURM_PROCID=8: must be below SLURM_STEP_NUM_TASKS=8"),
        (OPEN_MPI | dict(OMPI_COMM_WORLD_LOCAL_SIZE="2"), r"Open MPI started 4 tasks .*export MASTER_ADDR and MASTER"),
        (
            dict(PMI_RANK="1", PMI_SIZE="2"),
            "MPICH started 2 tasks .*`torchrun --nnodes N --nproc_per_node M -m fastmae",
        ),
    ],
    ids=str,
)
def test_what_cannot_be_is_one_line_that_names_the_variable(variables, line):
    with pytest.raises(UserError, match=f"^{line}") as refused:
        read_launch(variables)
    assert "\n" not in str(refused.value)


def test_lists_of_machines_and_counts_are_read_as_slurm_writes_them():
    for nodes, first in {
        "n1": "n1", "n[004-007,9],g1": "n004", "r[1-2]n[03-09]": "r1n03", "a,b[1-2]": "a", "n[2,4]-ib": "n2-ib", "": "",
    }.items():  # fmt: skip
        assert first_host(nodes) == first
    assert tasks_per_node("2(x2),1") == [2, 2, 1]
    assert tasks_per_node("") == tasks_per_node("many") == []
