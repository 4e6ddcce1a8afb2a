"""Rank, device and process group: the machine a process finds itself on."""

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

from data_pipeline.common.errors import LayoutError

logger = logging.getLogger(__name__)


class RankEnvironment(NamedTuple):
    """Where this process stands among the started ones."""

    rank: int
    world_size: int
    local_rank: int
    device: torch.device


def rank_environment() -> RankEnvironment:
    """Read what torchrun set; a process started alone is rank 0 of 1.

    Raises:
        LayoutError: Some of the variables are missing or are not numbers, the GPU does not exist,
        or SLURM started
            this as one of several tasks without torchrun.
    """
    refuse_tasks_without_ranks()
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    present = [name for name in names if name in os.environ]
    if present and len(present) < len(names):
        missing = ", ".join(name for name in names if name not in present)
        raise LayoutError(f"{', '.join(present)} set but not {missing}; start ranks with torchrun")
    try:
        rank, world_size, local_rank = (
            int(os.environ.get(n, d)) for n, d in zip(names, "010", strict=True)
        )
    except ValueError as error:
        raise LayoutError(
            f"RANK, WORLD_SIZE and LOCAL_RANK must be whole numbers: {error}"
        ) from None
    if not torch.cuda.is_available():
        return RankEnvironment(rank, world_size, local_rank, torch.device("cpu"))
    if local_rank >= torch.cuda.device_count():
        raise LayoutError(
            f"local rank {local_rank} has no GPU: this node shows {torch.cuda.device_count()}; "
            f"start at most one process per GPU (torchrun --nproc-per-node)"
        )
    torch.cuda.set_device(local_rank)
    return RankEnvironment(rank, world_size, local_rank, torch.device("cuda", local_rank))


def refuse_tasks_without_ranks() -> None:
    """Stop where `srun -n 16` started a program that would take each of its tasks for a world of
    its own.

    Raises:
        LayoutError: This is one of several tasks of a SLURM step, and no launcher says which rank
        it is.
    """
    tasks = os.environ.get("SLURM_STEP_NUM_TASKS", "1")
    if "RANK" not in os.environ and tasks not in ("", "1"):
        raise LayoutError(
            f"srun started {tasks} tasks, but nothing says which rank each one is (RANK is not set), so each would "
            f"run alone; start one torchrun on every node, as the scripts in slurm/ do"
        )


def start_process_group(environment: RankEnvironment, timeout_seconds: float) -> None:
    """Join the ranks through DeepSpeed (NCCL on GPUs, gloo on CPUs); does nothing when already
    joined."""
    if dist.is_initialized():
        return
    if environment.device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    _quiet_deepspeed()
    import deepspeed
    from deepspeed.ops import __compatible_ops__

    # Without this the first start on CPU compiles a shared-memory collective for 100 s, behind a
    # lock that a killed builder leaves for ever. gloo serves without it.
    __compatible_ops__["deepspeed_shm_comm"] = False
    if environment.world_size == 1 and "MASTER_PORT" not in os.environ:
        alone = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        os.environ.update(alone | {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"})
    deepspeed.init_distributed(
        dist_backend="nccl" if environment.device.type == "cuda" else "gloo",
        timeout=datetime.timedelta(seconds=timeout_seconds),
        verbose=False,
        auto_mpi_discovery=False,
    )
    logger.debug(
        "rank %d of %d on %s", environment.rank, environment.world_size, environment.device
    )


def keep_freed_memory() -> None:
    """Let this process keep the memory that tensors on CPU give back, instead of returning it to
    the system.

    Fresh pages are zeroed by the kernel one by one. For the gradient of a stack of 64 experts,
    which is made anew every step, that took a quarter of the layer's time. Does nothing where the C
    library has no such knobs.
    """
    library = ctypes.CDLL(None)
    if sys.platform == "linux" and hasattr(library, "mallopt"):
        library.mallopt(_M_MMAP_MAX, 0)
        library.mallopt(_M_TRIM_THRESHOLD, -1)


_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # glibc's malloc.h


def is_lost_rank(error: RuntimeError) -> bool:
    """Whether an error of torch says that another rank cannot be reached; gloo has no type for
    it."""
    return isinstance(error, dist.DistError) or "/gloo/" in str(error)


def stop_process_group() -> None:
    """Leave the ranks; harmless when never joined."""
    if dist.is_initialized():
        dist.destroy_process_group()


def _quiet_deepspeed() -> None:
    """DeepSpeed tells its life at INFO on every rank; its warnings are what a person needs."""
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    os.environ.setdefault("DS_LOG_LEVEL", "warning")
    # DeepSpeed 0.19.8 still calls collectives by names that torch 2.13 is about to retire.
    warnings.filterwarnings(
        "ignore", message="`torch.distributed.*is deprecated", category=FutureWarning
    )


def free_port() -> int:
    """A TCP port of this machine that nobody uses now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
