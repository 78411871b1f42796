"""Pretrains by submitit, on a SLURM cluster or in processes of this machine.

    python examples/submitit_pretrain.py --cluster slurm --nodes 4 --gpus 8 -- \
        --data_path /data/imagenet --output_dir runs/vit-l --model mae_vit_large_patch16 --batch_size 64

Needs: fastmae, submitit.
"""

from __future__ import annotations

import argparse
import signal
import subprocess
import sys
import time

import submitit


class Pretraining:
    """One machine's torchrun. submitit calls ``checkpoint`` when the time is nearly over, or a job is to make room."""

    def __init__(self, words: list[str], ranks: int) -> None:
        self.words, self.ranks = words, ranks
        self.torchrun: subprocess.Popen[bytes] | None = None

    def __call__(self) -> int:
        job = submitit.JobEnvironment()
        where = ["--nnodes", str(job.num_nodes), "--nproc_per_node", str(self.ranks), "--rdzv_id", job.job_id]
        # Several machines meet at the first one's port; a single one needs none that another run may have.
        meet = ["--rdzv_endpoint", f"{job.hostnames[0]}:29500"] if job.num_nodes > 1 else ["--standalone"]
        command = [*where, *meet, "-m", "fastmae", "pretrain", *self.words, "--resume", "auto"]
        if job.num_nodes > 1:
            command = ["--rdzv_backend", "c10d", *command]
        self.torchrun = subprocess.Popen([sys.executable, "-m", "torch.distributed.run", *command])
        while self.torchrun.poll() is None:  # not wait(), which checkpoint could not call in the middle of it
            time.sleep(1)
        if self.torchrun.returncode:
            raise SystemExit(f"the training ended with status {self.torchrun.returncode}; its last line says why")
        return 0

    def checkpoint(self) -> submitit.helpers.DelayedSubmission:
        """Lets the ranks finish their step and save it, and gives the job back to the queue, to go on from there."""
        if self.torchrun is not None:
            self.torchrun.send_signal(signal.SIGTERM)
            self.torchrun.wait()
        return submitit.helpers.DelayedSubmission(Pretraining(self.words, self.ranks))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cluster", default="local", help="slurm, or local for processes of this machine")
    parser.add_argument("--nodes", type=int, default=1)
    parser.add_argument("--gpus", type=int, default=1, help="per machine; one rank each")
    parser.add_argument("--logs", default="runs/jobs")
    parser.add_argument("words", nargs="*", help="flags of `fastmae pretrain`, after --")
    args = parser.parse_args()
    executor = submitit.AutoExecutor(folder=args.logs, cluster=args.cluster)
    executor.update_parameters(name="fastmae", nodes=args.nodes, tasks_per_node=1, timeout_min=24 * 60)
    if args.cluster == "slurm":
        executor.update_parameters(slurm_gpus_per_node=args.gpus, slurm_signal_delay_s=120)
    job = executor.submit(Pretraining(args.words, args.gpus))
    print(f"job {job.job_id}: {job.paths.stdout}")
    if args.cluster == "local":
        job.result()


if __name__ == "__main__":
    main()
