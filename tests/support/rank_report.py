"""Writes rank, node and environment of each rank to a file.

    torchrun ... -m tests.support.rank_report FOLDER [ARGUMENT...]

The ranks all-reduce their ranks over gloo, so a report proves that all of them communicated.
"""

from __future__ import annotations

import json
import os
import socket
import sys
from pathlib import Path

import torch
import torch.distributed as dist


def main(folder: str, *arguments: str) -> None:
    """All-reduce over all ranks and write `FOLDER/rank-R.json`."""
    dist.init_process_group("gloo")
    rank_sum = torch.tensor([dist.get_rank()])
    dist.all_reduce(rank_sum)
    report = {
        "rank": dist.get_rank(),
        "world_size": dist.get_world_size(),
        "local_rank": int(os.environ["LOCAL_RANK"]),
        "rank_sum": int(rank_sum),
        "node": int(os.environ["SLURM_NODEID"]),
        "name": os.environ["SLURMD_NODENAME"],
        "host": socket.gethostname(),
        "threads": os.environ["OMP_NUM_THREADS"],
        "arguments": arguments,
    }
    Path(folder, f"rank-{dist.get_rank()}.json").write_text(json.dumps(report))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
