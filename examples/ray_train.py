"""Pretrains by Ray Train, one worker per machine, each with a torchrun of its own.

    python examples/ray_train.py --nodes 4 --gpus 8 --storage /shared/ray -- \
        --data_path /data/imagenet --output_dir /shared/runs/vit-l --model mae_vit_large_patch16 --batch_size 64

Needs: fastmae, ray[train].
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from typing import Any

import ray
from ray import train
from ray.train.torch import TorchTrainer

PORT = 29500


def pretrain(config: dict[str, Any]) -> None:
    """Runs on every machine. Ray starts all of them again if one fails; --resume auto then goes on."""
    context = train.get_context()
    command = ["--nnodes", str(context.get_world_size()), "--nproc_per_node", str(config["ranks"])]
    if context.get_world_size() > 1:
        first = os.environ["MASTER_ADDR"]  # as Ray says where its first worker is
        command += ["--node_rank", str(context.get_world_rank()), "--master_addr", first, "--master_port", str(PORT)]
    else:
        command += ["--standalone"]
    command += ["-m", "fastmae", "pretrain", *config["words"], "--resume", "auto"]
    environment = {**os.environ, "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    status = subprocess.run([sys.executable, "-m", "torch.distributed.run", *command], env=environment).returncode
    if status:
        raise RuntimeError(f"the training ended with status {status}; its own last line says why")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--nodes", type=int, default=1)
    parser.add_argument("--gpus", type=int, default=0, help="per machine; 0 trains on its CPU with one rank")
    parser.add_argument("--storage", default=os.path.abspath("runs/ray"), help="a folder that all machines see")
    parser.add_argument("--failures", type=int, default=3, help="how often a machine may fail")
    parser.add_argument("words", nargs="*", help="flags of `fastmae pretrain`, after --")
    args = parser.parse_args()
    ray.init()
    trainer = TorchTrainer(
        pretrain,
        train_loop_config={"words": args.words, "ranks": args.gpus or 1},
        scaling_config=train.ScalingConfig(
            num_workers=args.nodes,
            use_gpu=args.gpus > 0,
            resources_per_worker={"GPU": args.gpus} if args.gpus else {"CPU": 1},
            placement_strategy="STRICT_SPREAD" if args.nodes > 1 else "PACK",  # one worker per machine
        ),
        run_config=train.RunConfig(
            name="fastmae", storage_path=args.storage, failure_config=train.FailureConfig(max_failures=args.failures)
        ),
    )
    trainer.fit()


if __name__ == "__main__":
    main()
