"""The examples for schedulers: each is read by its own library, and what it starts is a command of fastmae.

SkyPilot and Ray are large: their tests run in an environment of their own (`make test-schedulers`).
"""

import importlib.util
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from fastmae.cli import parse
from fastmae.config import PretrainConfig

EXAMPLES = Path(__file__).parent.parent / "examples"


def command_in(words: list[str]) -> PretrainConfig:
    """The configuration that `… -m fastmae WORDS` asks for."""
    place = words.index("fastmae")
    assert words[place - 1] == "-m"
    return parse(words[place + 1 :])


def is_the_run(config: PretrainConfig) -> bool:
    return (config.model, config.batch_size, config.resume) == ("mae_vit_large_patch16", 64, "auto")


# --- SLURM ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def slurm(tmp_path):
    """Commands of SLURM that write down how they are called; srun ends with a status, or waits for scancel."""
    journal = tmp_path / "journal"
    stub = f'#!/bin/bash\necho "$(basename $0) $*" >> {journal}\n'
    scripts = {
        "scontrol": '[ "$1" = show ] && echo node1; exit 0',
        "scancel": f"touch {tmp_path}/cancelled",
        "srun": f"""for i in $(seq 400); do
            [ -e {tmp_path}/cancelled ] && exit 1
            [ -n "$ENDS" ] && exit $ENDS
            sleep 0.05
        done""",
    }
    for name, script in scripts.items():
        (tmp_path / name).write_text(stub + script + "\n")
        (tmp_path / name).chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    environment |= {"SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "4", "SLURM_JOB_NODELIST": "node[1-4]"}

    def start(**more: str) -> subprocess.Popen:
        return subprocess.Popen(["bash", EXAMPLES / "slurm.sbatch"], env=environment | more)

    return start, journal


@pytest.mark.parametrize(("status", "requeued"), [("0", False), ("2", False), ("75", True)])
def test_the_batch_script_ends_as_its_step_does(slurm, status, requeued):
    start, journal = slurm
    assert start(ENDS=status).wait(timeout=30) == int(status)
    lines = journal.read_text().splitlines()
    assert ("scontrol requeue 7" in lines) == requeued
    words = shlex.split(next(line for line in lines if line.startswith("srun")))
    assert words[words.index("--rdzv_endpoint") + 1] == "node1:29500"
    assert is_the_run(command_in(words))


def test_the_batch_script_lets_the_ranks_save_and_goes_back_into_the_queue(slurm):
    start, journal = slurm
    job = start()
    for _ in range(400):
        if journal.exists() and "srun" in journal.read_text():
            break
        time.sleep(0.05)
    job.send_signal(signal.SIGUSR1)
    assert job.wait(timeout=30) == 75
    assert journal.read_text().splitlines()[-2:] == ["scancel --signal=TERM 7.0", "scontrol requeue 7"]


# --- submitit ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_submitit_goes_on_where_it_was_interrupted(tmp_path):
    submitit = pytest.importorskip("submitit")
    spec = importlib.util.spec_from_file_location("submitit_pretrain", EXAMPLES / "submitit_pretrain.py")
    example = importlib.util.module_from_spec(spec)
    sys.modules["submitit_pretrain"] = example
    spec.loader.exec_module(example)
    run = tmp_path / "run"
    words = ["--output_dir", str(run), "--epochs", "4", "--probe", "False", "--device", "cpu", "--tune", "off"]
    executor = submitit.LocalExecutor(folder=tmp_path / "jobs")
    executor.update_parameters(timeout_min=30)
    import cloudpickle

    cloudpickle.register_pickle_by_value(example)  # the job cannot import what lies in a folder of examples
    job = executor.submit(example.Pretraining(words, 1))
    metrics = run / "metrics.jsonl"
    for _ in range(1200):
        if metrics.exists() and len(metrics.read_text().splitlines()) > 5:
            break
        time.sleep(0.1)
    controller = Path("/proc", str(job._process.pid), "task", str(job._process.pid), "children")
    os.kill(int(controller.read_text().split()[0]), signal.SIGUSR2)  # as SLURM does before the time is over
    assert job.result() == 0
    events = [json.loads(line)["event"] for line in (run / "events.jsonl").read_text().splitlines()]
    assert {"stopped", "resumed"} <= set(events)
    steps = [json.loads(line)["step"] for line in metrics.read_text().splitlines()]
    assert steps == list(range(1, len(steps) + 1)), "no step is missing or twice"


# --- Kubernetes, SkyPilot, Ray ----------------------------------------------------------------------------------------


def test_the_job_of_kubeflow_is_one():
    models = pytest.importorskip("kubeflow_trainer_api.models")
    content = yaml.safe_load((EXAMPLES / "kubeflow.yaml").read_text())
    job = models.TrainerV1alpha1TrainJob.from_dict(content)
    assert job is not None
    # Fields that the models do not know would be dropped.
    assert job.to_dict() == content
    assert is_the_run(command_in([*job.spec.trainer.command, *job.spec.trainer.args]))


def test_the_task_of_skypilot_starts_the_run():
    content = yaml.safe_load((EXAMPLES / "skypilot.yaml").read_text())
    line = content["run"].replace("\\\n", " ").strip().splitlines()[-1]
    assert is_the_run(command_in(shlex.split(line)))


def test_the_task_of_skypilot_is_one():
    sky = pytest.importorskip("sky")
    task = sky.Task.from_yaml(str(EXAMPLES / "skypilot.yaml"))
    assert task.num_nodes == 2
    assert set(task.storage_mounts) == {"/data", "/runs"}


def test_ray_trains(tmp_path):
    pytest.importorskip("ray")
    run = tmp_path / "run"
    words = ["--output_dir", str(run), "--epochs", "1", "--probe", "False", "--device", "cpu", "--tune", "off"]
    command = [sys.executable, EXAMPLES / "ray_train.py", "--storage", str(tmp_path / "ray"), "--", *words]
    subprocess.run(command, check=True, timeout=300, cwd=tmp_path)
    assert (run / "checkpoint-0.pth").exists()
