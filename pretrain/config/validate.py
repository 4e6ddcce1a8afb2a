"""Validation of a run across sections and against the number of ranks; reports all problems at
once.

Checks of a single section are in its `__post_init__`. Whether files exist and match the run
(manifests, the tokenizer's vocabulary) is checked where they are opened.
"""

from __future__ import annotations

from data_pipeline.common.config import join_problems
from data_pipeline.common.errors import ConfigError
from pretrain.config.checks.data import augment_problems, data_problems, eval_problems
from pretrain.config.checks.experts import balance_problems, expert_problems
from pretrain.config.checks.layout import batch_problems, parallel_problems, precision_problems
from pretrain.config.checks.ranges import range_problems
from pretrain.config.schema import RunConfig


def check_run(
    run: RunConfig,
    world_size: int,
    *,
    source: str = "",
    training: bool = True,
) -> None:
    """Raise one error that lists all problems of a run.

    Args:
        run: The run.
        world_size: Number of ranks.
        source: Prefix of the error message, such as the run's file.
        training: Also check what only training needs: shards and a tokenizer.

    Raises:
        ConfigError: There is at least one problem.
    """
    messages = problems(run, world_size)
    if training:
        messages += training_problems(run)
    if messages:
        raise ConfigError(join_problems(messages, source))


def problems(run: RunConfig, world_size: int) -> list[str]:
    """One message for every invalid setting and every contradiction between settings or with the
    number of ranks; empty for a valid run."""
    return [
        *batch_problems(run, world_size),
        *parallel_problems(run, world_size),
        *expert_problems(run),
        *balance_problems(run),
        *range_problems(run),
        *data_problems(run),
        *augment_problems(run.data.augment),
        *eval_problems(run),
        *precision_problems(run),
    ]


def training_problems(run: RunConfig) -> list[str]:
    """Settings that training needs and the run does not have."""
    messages = []
    if not run.data.train:
        messages.append(
            "data.train is empty; name the manifests or folders of the training shards, such as "
            "data.train=[data/quickstart/train]"
        )
    if not run.data.tokenizer:
        messages.append(
            "data.tokenizer is empty; name a SentencePiece model, or train one: "
            "vlmoe tokenizer train MANIFEST --out tokenizer.model"
        )
    return messages
