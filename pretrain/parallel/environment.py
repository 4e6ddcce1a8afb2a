"""Rank, device and process group of this process."""

from __future__ import annotations

import ctypes
import datetime
import logging
import os
import socket
import sys
import warnings
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from pretrain.parallel.errors import LayoutError, LostRankError
from pretrain.parallel.rendezvous import agree_on_store

logger = logging.getLogger(__name__)


class RankEnvironment(NamedTuple):
    """Rank and device of this process."""

    rank: int
    world_size: int
    local_rank: int
    device: torch.device


def rank_environment() -> RankEnvironment:
    """Read the environment variables of torchrun; without them, rank 0 of 1.

    Raises:
        LayoutError: Some of the variables are missing or are not integers, the local rank has no
            GPU, or SLURM started this process as one of several tasks without torchrun.
    """
    check_started_by_torchrun()
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    present = [name for name in names if name in os.environ]
    if present and len(present) < len(names):
        missing = ", ".join(name for name in names if name not in present)
        raise LayoutError(
            f"{', '.join(present)} set but not {missing}; start the ranks with torchrun"
        )
    try:
        rank, world_size, local_rank = (
            int(os.environ.get(n, d)) for n, d in zip(names, "010", strict=True)
        )
    except ValueError as error:
        raise LayoutError(f"RANK, WORLD_SIZE and LOCAL_RANK must be integers: {error}") from None

    if not torch.cuda.is_available():
        return RankEnvironment(rank, world_size, local_rank, torch.device("cpu"))
    if local_rank >= torch.cuda.device_count():
        raise LayoutError(
            f"local rank {local_rank} has no GPU: this node has {torch.cuda.device_count()}; "
            f"start at most one process per GPU (torchrun --nproc-per-node)"
        )
    torch.cuda.set_device(local_rank)
    return RankEnvironment(rank, world_size, local_rank, torch.device("cuda", local_rank))


def check_started_by_torchrun() -> None:
    """Reject a start by `srun -n 16` without torchrun, which would give 16 independent runs.

    Raises:
        LayoutError: This process is one of several tasks of a SLURM step, and RANK is not set.
    """
    tasks = os.environ.get("SLURM_STEP_NUM_TASKS", "1")
    if "RANK" not in os.environ and tasks not in ("", "1"):
        raise LayoutError(
            f"srun started {tasks} tasks, but RANK is not set, so each task would be an "
            f"independent run; start one torchrun per node, as the scripts in slurm/ do"
        )


def start_process_group(environment: RankEnvironment, timeout_seconds: float) -> None:
    """Initialize the process group through DeepSpeed: NCCL on GPUs, gloo on CPUs.

    Does nothing if it is already initialized.
    """
    if dist.is_initialized():
        return
    if environment.device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    _limit_deepspeed_logs()
    import deepspeed
    from deepspeed.ops import __compatible_ops__

    # Otherwise the first start on CPU spends 100 s compiling a shared-memory collective, under a
    # lock that is never released if the process is killed. gloo works without it.
    __compatible_ops__["deepspeed_shm_comm"] = False
    if environment.world_size == 1 and "MASTER_PORT" not in os.environ:
        rendezvous = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        os.environ.update(rendezvous | {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"})
    backend = "nccl" if environment.device.type == "cuda" else "gloo"
    timeout = datetime.timedelta(seconds=timeout_seconds)
    _init_process_group(environment, backend, timeout)
    deepspeed.init_distributed(
        dist_backend=backend, timeout=timeout, verbose=False, auto_mpi_discovery=False
    )
    logger.debug(
        "rank %d of %d on %s", environment.rank, environment.world_size, environment.device
    )


def _init_process_group(
    environment: RankEnvironment, backend: str, timeout: datetime.timedelta
) -> None:
    """Meet the other ranks of this start, and create the default process group.

    Raises:
        LostRankError: Some ranks have not started in time.
    """
    rank, world_size = environment.rank, environment.world_size
    store, *_ = next(dist.rendezvous("env://", rank, world_size, timeout=timeout))
    store.set_timeout(timeout)
    try:
        store = agree_on_store(store, rank, world_size, timeout)
    except TimeoutError as error:
        raise LostRankError(
            f"{error} within {timeout.total_seconds():g} s (parallel.timeout_seconds); look at the "
            f"logs of those ranks and their nodes"
        ) from None
    # Groups that DeepSpeed creates without a timeout have torch's default, 10 or 30 minutes.
    distributed_c10d.default_pg_timeout = timeout
    distributed_c10d.default_pg_nccl_timeout = timeout
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout)


def retain_freed_memory() -> None:
    """Configure glibc's malloc to keep freed memory in the process instead of unmapping it.

    The kernel zeroes every fresh page. For the gradient of 64 stacked experts, which is allocated
    anew in every step, that took a quarter of the layer's time. Does nothing without `mallopt`.
    """
    library = ctypes.CDLL(None)
    if sys.platform == "linux" and hasattr(library, "mallopt"):
        library.mallopt(_M_MMAP_MAX, 0)
        library.mallopt(_M_TRIM_THRESHOLD, -1)


_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # glibc's malloc.h


def is_connection_error(error: RuntimeError) -> bool:
    """Whether torch failed to reach another rank; gloo raises plain RuntimeErrors for that."""
    return isinstance(error, dist.DistError) or "/gloo/" in str(error)


def stop_process_group() -> None:
    """Destroy the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def _limit_deepspeed_logs() -> None:
    """Limit DeepSpeed's log to warnings; at INFO it is verbose on every rank."""
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    os.environ.setdefault("DS_LOG_LEVEL", "warning")
    # DeepSpeed 0.19.8 calls collectives by names that torch 2.13 deprecates.
    warnings.filterwarnings(
        "ignore", message="`torch.distributed.*is deprecated", category=FutureWarning
    )


def free_port() -> int:
    """An unused TCP port of this machine."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
