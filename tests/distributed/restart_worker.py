"""Worker of test_restarts.py: one rank kills itself in each of the first starts."""

from __future__ import annotations

import os
import signal
import sys
import time

import torch
import torch.distributed as dist

from pretrain.parallel.environment import rank_environment, start_process_group

KILLS, TIMEOUT_SECONDS = int(sys.argv[1]), 77.0

start = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
environment = rank_environment()
began = time.monotonic()
start_process_group(environment, TIMEOUT_SECONDS)
for step in range(8):
    total = torch.ones(1)
    dist.all_reduce(total)
    assert int(total) == environment.world_size
    if start < KILLS and step == start % 8 and environment.rank == start % environment.world_size:
        os.kill(os.getpid(), signal.SIGKILL)
group = dist.new_group()  # without a timeout, as DeepSpeed creates groups
timeout = group._get_backend(torch.device("cpu")).options._timeout.total_seconds()
dist.destroy_process_group()
if environment.rank == 0:
    print(f"RESULT start {start} timeout {timeout:g}", flush=True)
