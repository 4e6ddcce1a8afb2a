"""Checks of training data and held-out sets across sections and modules."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from data_pipeline.common.addresses import without_secrets
from data_pipeline.common.errors import ConfigError
from pretrain.config.paths import normalized_address
from pretrain.config.schema import RunConfig


def data_problems(run: RunConfig) -> Iterator[str]:
    """Sources that are repeated, and conditions that cannot be parsed."""
    counts = Counter(normalized_address(source.shards) for source in run.data.sources)
    for address, count in sorted(counts.items()):
        if count > 1:
            yield (
                f"data.train contains {address} {count} times; its samples would "
                f"be repeated in every epoch"
            )
    if run.data.filters.require:
        # Imports numpy, which commands such as `vlmoe plan` should not wait for.
        from data_pipeline.content.filters import parse_conditions

        try:
            parse_conditions(run.data.filters.require)
        except ConfigError as error:
            yield str(error)


def eval_problems(run: RunConfig) -> Iterator[str]:
    """Held-out sets that are also used for training."""
    training_addresses = {normalized_address(source.shards) for source in run.data.sources}
    for eval_set in run.eval.sets:
        if normalized_address(eval_set.shards) in training_addresses:
            yield (
                f"eval.sets {eval_set.name!r} is {without_secrets(eval_set.shards)}, which is also "
                f"in data.train; a held-out set must not be used for training"
            )
