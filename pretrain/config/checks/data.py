"""Checks of training data, augmentation and held-out sets."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator

from data_pipeline.common.addresses import without_secrets
from data_pipeline.common.errors import ConfigError
from data_pipeline.settings import AugmentConfig, DataConfig
from pretrain.config.schema import EvalSet, RunConfig


def data_problems(run: RunConfig) -> Iterator[str]:
    """Settings of the training data that are invalid or contradict one another."""
    data = run.data
    addresses = [_normalize_address(source.shards) for source in data.sources]
    for address in sorted({address for address in addresses if addresses.count(address) > 1}):
        yield (
            f"data.train contains {without_secrets(address)} {addresses.count(address)} times; its "
            f"samples would be repeated in every epoch"
        )
    yield from _caption_problems(data)
    if data.filters.require:
        # Imports numpy, which commands such as `vlmoe plan` should not wait for.
        from data_pipeline.content.filters import parse_conditions

        try:
            parse_conditions(data.filters.require)
        except ConfigError as error:
            yield str(error)
    weights = data.caption_weights
    if any(weight < 0 for weight in weights) or (weights and not sum(weights)):
        yield (
            f"data.caption_weights is {list(weights)}, but all must be at least 0 and one above 0"
        )


def _caption_problems(data: DataConfig) -> Iterator[str]:
    if not data.caption_keys:
        yield "data.caption_keys is empty; give the location of the captions, such as txt"
    for key in data.caption_keys:
        if not re.fullmatch(r"json:.+|([^:\s]+\.)?(txt|text|caption)", key):
            yield (
                f"data.caption_keys contains {key!r}; use txt (or another text member: text, "
                f"caption, en.txt), or json:FIELD for a field of the .json member"
            )


def augment_problems(augment: AugmentConfig) -> Iterator[str]:
    """Ranges of augmentations that are invalid."""
    for name in ("crop_scale", "crop_ratio", "affine_scale"):
        low, high = getattr(augment, name)
        if not 0 < low <= high:
            yield (
                f"data.augment.{name} is [{low}, {high}], but must be two positive numbers in "
                f"ascending order"
            )
    if augment.crop_scale[1] > 1:
        yield (
            f"data.augment.crop_scale is {list(augment.crop_scale)}, but must be at most 1, the "
            f"whole area"
        )
    if not 0 <= augment.affine_degrees <= 180:
        yield f"data.augment.affine_degrees is {augment.affine_degrees}, but must be in 0..180"
    if not 0 <= augment.affine_translate < 1:
        yield (
            f"data.augment.affine_translate is {augment.affine_translate}, but must be in 0..1, 1 "
            f"excluded"
        )


def eval_problems(run: RunConfig) -> Iterator[str]:
    """Held-out sets with invalid names, without shards, or that are also used for training."""
    names = [eval_set.name for eval_set in run.eval.sets]
    for name in sorted({name for name in names if names.count(name) > 1}):
        yield f"eval.sets has {names.count(name)} sets named {name!r}; names must be unique"
    training_addresses = {_normalize_address(source.shards) for source in run.data.sources}
    for eval_set in run.eval.sets:
        yield from _eval_set_problems(eval_set, training_addresses)


def _eval_set_problems(eval_set: EvalSet, training_addresses: set[str]) -> Iterator[str]:
    name = eval_set.name
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", name):
        yield f"eval.sets has a set named {name!r}; use letters, digits and _ . - only"
    if not eval_set.shards:
        yield (f"eval.sets {name!r} has no shards; give a manifest or the folder that contains one")
    elif _normalize_address(eval_set.shards) in training_addresses:
        yield (
            f"eval.sets {name!r} is {without_secrets(eval_set.shards)}, which is also in "
            f"data.train; a held-out set must not be used for training"
        )


def _normalize_address(shards: str) -> str:
    """The folder of a set of shards that is given by its manifest or by its folder, in normalized
    form, so that equal folders compare equal."""
    folder = shards.removesuffix("manifest.json")
    return folder.rstrip("/") if "://" in shards else os.path.normpath(folder.removeprefix("file:"))
