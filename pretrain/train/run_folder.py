"""Files of a run folder that are written before training: resolved configs and the tokenizer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import BinaryIO, TypeVar

from data_pipeline.common import storage
from data_pipeline.common.addresses import without_secrets
from data_pipeline.common.config import to_mapping
from data_pipeline.common.errors import StorageError, VlmError, error_from_values, error_values
from data_pipeline.common.json_file import write_json
from data_pipeline.common.yaml_file import to_yaml
from data_pipeline.content.tokenizer import Tokenizer, TokenizerError
from pretrain.checkpoint.retention import list_checkpoints
from pretrain.config.batch import BatchPlan
from pretrain.config.paths import (
    CHECKPOINTS_FOLDER,
    CONFIG_FILE,
    DEEPSPEED_FILE,
    TOKENIZER_FILE,
    absolute_paths,
)
from pretrain.config.schema import RunConfig
from pretrain.parallel.communicator import Communicator
from pretrain.parallel.deepspeed_config import load_profile, profile_path, resolve
from pretrain.train.run_lock import lock_run_folder

T = TypeVar("T")

LEDGER_FOLDER = "ledger"


def create_run_folder(run: RunConfig, out: Path, tokenizer: Tokenizer) -> BinaryIO:
    """Create the run folder and lock it; returns the open file of the lock.

    Raises:
        StorageError: Another process trains in it.
        TokenizerError: It has checkpoints that were trained with another tokenizer.
    """
    out.mkdir(parents=True, exist_ok=True)
    lock = lock_run_folder(out)
    saved, checkpoints = out / TOKENIZER_FILE, list_checkpoints(out / CHECKPOINTS_FOLDER)
    if (
        checkpoints
        and saved.exists()
        and Tokenizer.load(saved).fingerprint != tokenizer.fingerprint
    ):
        raise TokenizerError(
            f"{out} was trained with another tokenizer ({saved}) than data.tokenizer "
            f"({run.data.tokenizer}), so token ids would have other meanings. "
            f"Set data.tokenizer={saved}, or use another run folder"
        )
    return lock


def write_run_files(run: RunConfig, out: Path, tokenizer: Tokenizer, batch_plan: BatchPlan) -> None:
    """Write the tokenizer, the resolved run config and the resolved DeepSpeed config."""
    storage.write_bytes(str(out / TOKENIZER_FILE), tokenizer.model_bytes)
    settings = absolute_paths(to_mapping(_without_secrets(run)))
    storage.write_bytes(str(out / CONFIG_FILE), to_yaml(settings).encode())
    if run.parallel.engine == "plain":
        return
    path = profile_path(run.parallel.deepspeed)
    resolved = resolve(run, load_profile(path), path, out / CONFIG_FILE, batch_plan)
    write_json(out / DEEPSPEED_FILE, resolved)


def _without_secrets(run: RunConfig) -> RunConfig:
    """The run without signed queries of URLs, which grant access to anyone who copies them."""
    eval_sets = tuple(
        replace(eval_set, shards=without_secrets(eval_set.shards)) for eval_set in run.eval.sets
    )
    return replace(run, data=run.data.without_secrets(), eval=replace(run.eval, sets=eval_sets))


def run_on_rank_zero(communicator: Communicator, out: Path, work: Callable[[], T]) -> T | None:
    """Call `work` on rank 0; returns its result there and None on other ranks. Collective.

    Raises:
        VlmError: `work` raised a VlmError or an OSError; raised on every rank.
    """
    problem, result = None, None
    if communicator.rank == 0:
        try:
            result = work()
        except VlmError as error:
            problem = error_values(error)
        except OSError as error:
            message = (
                f"cannot write into the run folder {out}: {error.strerror}; check the path, "
                f"its permissions and the free space, or choose another --out"
            )
            problem = error_values(StorageError(message))
    problem = communicator.broadcast_json(problem)
    if problem:
        raise error_from_values(problem)
    return result
