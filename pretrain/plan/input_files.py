"""Checks that the files that a run names exist, before ranks connect and before torch is imported.

Only local files are checked, and of shards only that there are some. Everything else is checked
where the files are opened.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

from data_pipeline.common import storage
from data_pipeline.common.errors import DataError, VlmError
from data_pipeline.common.problems import section_problems
from data_pipeline.content.tokenizer import Tokenizer
from data_pipeline.shards.manifest import MANIFEST_NAME, load_manifest
from data_pipeline.shards.patterns import expand_patterns
from pretrain.config.paths import CHECKPOINTS_FOLDER, TOKENIZER_FILE
from pretrain.config.schema import RunConfig
from pretrain.parallel.deepspeed_config import load_profile, profile_path

logger = logging.getLogger(__name__)


def with_saved_tokenizer(run: RunConfig, out: Path) -> RunConfig:
    """The run with the tokenizer of its run folder, if it has been trained and `data.tokenizer` is
    empty or does not exist any more, for example because it was moved to another machine."""
    saved, given = out / TOKENIZER_FILE, run.data.tokenizer
    is_trained = saved.is_file() and any((out / CHECKPOINTS_FOLDER).glob("step-*"))
    if not is_trained or (given and (not storage.is_local(given) or storage.exists(given))):
        return run
    logger.info("data.tokenizer %s; using %s", "does not exist" if given else "is empty", saved)
    return replace(run, data=replace(run.data, tokenizer=str(saved)))


def input_file_problems(run: RunConfig) -> list[str]:
    """One message for every file that training needs and that is missing; none if the settings that
    name the files are invalid themselves."""
    messages: list[str] = []
    if not section_problems(run.data):
        for source in run.data.sources:
            messages += _problem("data.train", _check_shards, source.shards)
            messages += _problem("data.train", _check_exists, source.drop, "drop-list")
        if run.data.tokenizer:
            messages += _tokenizer_problems(run)
    if not section_problems(run.eval) and run.log.captions_every_steps:
        for eval_set in run.eval.sets[:1]:  # training reads only the first
            messages += _problem("eval.sets", _check_shards, eval_set.shards)
    if run.parallel.engine == "deepspeed":
        messages += _problem("parallel.deepspeed", _check_profile, run.parallel.deepspeed)
    return messages


def _problem(setting: str, check: Callable[..., object], *args: str) -> Iterator[str]:
    """The error that `check(*args)` raises, with the setting in front."""
    try:
        check(*args)
    except VlmError as error:
        text = str(error)
        yield text if text.startswith(setting) else f"{setting}: {text}"


def _tokenizer_problems(run: RunConfig) -> Iterator[str]:
    """A tokenizer that cannot be loaded, or has another vocabulary than the model."""
    try:
        vocab_size = Tokenizer.load(run.data.tokenizer).vocab_size
    except VlmError as error:
        yield f"data.tokenizer: {error}"
        return
    if vocab_size != run.model.vocab_size:
        yield (
            f"model.vocab_size is {run.model.vocab_size}, but the tokenizer {run.data.tokenizer} "
            f"has {vocab_size} tokens; set model.vocab_size={vocab_size}"
        )


def _check_shards(address: str) -> None:
    if not storage.is_local(address.removeprefix("@")):
        return
    if address.endswith(".json"):
        _check_manifest(address)
    elif not storage.exists(storage.join(address, MANIFEST_NAME)):
        # The first of them stands for all: training may have very many shards.
        _check_exists(expand_patterns([address])[0], "shard")


def _check_manifest(address: str) -> None:
    url = address if address.endswith(".json") else storage.join(address, MANIFEST_NAME)
    if storage.is_local(url) and not storage.exists(url):
        load_manifest(address)  # raises an error that says how to create it


def _check_exists(address: str, kind: str) -> None:
    if address and storage.is_local(address) and not storage.exists(address):
        raise DataError(f"the {kind} {address} does not exist; check the path")


def _check_profile(name: str) -> None:
    load_profile(profile_path(name))
