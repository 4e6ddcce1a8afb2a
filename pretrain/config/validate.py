"""Validation of a run across sections and against the number of ranks; reports all problems at
once.

Every section lists its own problems. Whether files exist and match the run (manifests, the
tokenizer's vocabulary) is checked where they are opened.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from itertools import chain

from data_pipeline.common.errors import ConfigError
from data_pipeline.common.origins import Origins
from data_pipeline.common.problems import join_problems, section_problems
from pretrain.config.checks.data import data_problems, eval_problems
from pretrain.config.checks.experts import balance_problems, expert_problems
from pretrain.config.checks.layout import (
    batch_problems,
    negatives_problems,
    parallel_problems,
    precision_problems,
)
from pretrain.config.schema import RunConfig

NO_TRAINING_DATA = (
    "data.train is empty; name the manifests or folders of the training shards, such as "
    "data.train=[data/quickstart/train]"
)


def check_run(
    run: RunConfig,
    world_size: int | None,
    *,
    source: str | Origins = "",
    training: bool = True,
    more: Sequence[str] = (),
) -> None:
    """Raise one error that lists all problems of a run.

    Args:
        run: The run.
        world_size: Number of ranks; None if it is unknown, because it follows from an invalid
            setting.
        source: See `join_problems`.
        training: Also check what only training needs: shards and a tokenizer.
        more: Further problems for the same error, such as files that do not exist.

    Raises:
        ConfigError: There is at least one problem.
    """
    messages = problems(run, world_size)
    if training:
        messages += training_problems(run)
    messages += more
    if not any("data.tokenizer" in message for message in messages):
        messages += vocabulary_problems(run)
    if messages:
        raise ConfigError(join_problems(messages, source))


def problems(run: RunConfig, world_size: int | None) -> list[str]:
    """One message for every invalid setting and every contradiction between settings or with the
    number of ranks, if that is known; empty for a valid run.

    Sections are compared with others only if each is valid by itself.
    """
    by_section = {
        field.name: section_problems(getattr(run, field.name)) for field in dataclasses.fields(run)
    }
    messages = [*run.problems(), *chain.from_iterable(by_section.values())]
    for sections, check in _cross_checks(run, world_size):
        if not any(by_section[name] for name in sections.split()):
            messages += check
    return messages


def _cross_checks(run: RunConfig, world_size: int | None) -> Iterator[tuple[str, Iterator[str]]]:
    """The sections that a check compares, and its messages, which are computed when read."""
    if world_size is not None:
        yield "batch", batch_problems(run, world_size)
        yield "parallel moe model", parallel_problems(run, world_size)
    yield "batch loss", negatives_problems(run)
    yield "moe model batch", expert_problems(run)
    yield "balance moe", balance_problems(run)
    yield "data", data_problems(run)
    yield "eval data", eval_problems(run)
    yield "precision moe model", precision_problems(run)


def vocabulary_problems(run: RunConfig) -> list[str]:
    """A vocabulary of the size of the tokenizer, but no tokenizer to read it from."""
    if run.model.vocab_size:
        return []
    found = f"{run.data.tokenizer} cannot be read" if run.data.tokenizer else "that is empty"
    return [
        f"model.vocab_size is 0, which takes the size of data.tokenizer, but {found}; train a "
        f"tokenizer (vlmoe tokenizer train), or set model.vocab_size to a number"
    ]


def training_problems(run: RunConfig) -> list[str]:
    """Settings that training needs and the run does not have."""
    messages = []
    if not run.data.train:
        messages.append(NO_TRAINING_DATA)
    if not run.data.tokenizer:
        messages.append(
            "data.tokenizer is empty; name a SentencePiece model, or train one: "
            "vlmoe tokenizer train MANIFEST --out tokenizer.model"
        )
    return messages
