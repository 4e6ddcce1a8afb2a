"""The dense twin of a sparse run: the same trunk without experts, as much arithmetic for every
pair.

It answers what the experts are worth: two models that see the same pairs and compute as much for
each. Arithmetic alone, as in `pretrain.model.count`.
"""

from __future__ import annotations

import json
import logging
import math
from dataclasses import replace
from typing import Any

from data_pipeline.common.config import parse_yaml, to_mapping
from data_pipeline.common.errors import ConfigError
from pretrain.config.experts import BalanceConfig, MoEConfig
from pretrain.config.schema import ModelConfig, RunConfig
from pretrain.model.count import count_flops

logger = logging.getLogger(__name__)

TOLERANCE = 0.01
"""Largest difference of the FLOPs of a pair, as a share."""

USUAL_TEXT_TOKENS = 16
"""Tokens of a usual caption; FLOPs depend on it."""

_ALIGNED = 8
"""Widths that are a multiple of this suit matrix units."""


def caption_tokens(asked: float | None, context_length: int) -> float:
    """Average text tokens of a caption that FLOPs are counted for; no caption is longer than
    `context_length`.

    Args:
        asked: What a person gave as `--text-tokens`; None means `USUAL_TEXT_TOKENS`.
        context_length: The run's `model.context_length`.

    Raises:
        ConfigError: It is below 0, or no finite number.
    """
    if asked is None:
        return min(USUAL_TEXT_TOKENS, context_length)
    if not (math.isfinite(asked) and asked >= 0):
        raise ConfigError(
            f"--text-tokens is {asked:g}, but must be a finite number of tokens, at least 0; it is the "
            f"average of a caption, usually about {USUAL_TEXT_TOKENS}"
        )
    if asked > context_length:
        logger.warning(
            "--text-tokens is %g, but captions end at model.context_length (%d): counting %d",
            asked,
            context_length,
            context_length,
        )
    return min(asked, context_length)


def dense_baseline(run: RunConfig, *, text_tokens: float) -> RunConfig:
    """The run with dense blocks only, of one width, chosen so that a pair costs as many FLOPs.

    Everything else stays: data, batch, schedule, optimizer, seed. What only experts need is turned
    off.

    Args:
        run: A run with experts.
        text_tokens: Average valid text tokens of a caption; the router's and the experts' share
            depend on it.

    Raises:
        ConfigError: The run has no experts, or no whole width comes within `TOLERANCE`.
    """
    if not run.moe.blocks(run.model.num_layers):
        raise ConfigError(
            f"{run.name} has no block with experts (moe.start {run.moe.start}, moe.stop "
            f"{run.moe.stop}): it is dense already and has no twin"
        )
    moe = replace(run.moe, stop=0, router_input="token", backend="auto")
    wanted = _flops(run.model, run.moe, text_tokens)
    model = replace(run.model, ffn_width=_width(run.model, moe, wanted, text_tokens))
    difference = _flops(model, moe, text_tokens) / wanted - 1
    if abs(difference) > TOLERANCE:
        raise ConfigError(
            f"a dense twin of {run.name} with model.ffn_width={model.ffn_width} has "
            f"{difference:+.1%} FLOPs of a pair, and no whole width comes nearer than "
            f"{TOLERANCE:.0%}; the experts (moe.expert_width {run.moe.expert_width}) are too small"
        )
    return replace(
        run,
        name=f"{run.name}-dense",
        model=model,
        moe=moe,
        balance=BalanceConfig(balance_weight=0.0, router_z_weight=0.0),
        parallel=replace(run.parallel, expert_parallel_size=1),
    )


def settings_that_differ(run: RunConfig, other: RunConfig) -> list[str]:
    """Settings of the command line that turn one run into another, such as
    `model.ffn_width=352`."""
    settings = []
    for section, values in to_mapping(other).items():
        before = to_mapping(run)[section]
        if not isinstance(values, dict):
            settings += [f"{section}={_as_yaml(values)}"] if values != before else []
            continue
        changed = {key: value for key, value in values.items() if value != before[key]}
        settings += [f"{section}.{key}={_as_yaml(value)}" for key, value in changed.items()]
    return settings


def _as_yaml(value: Any) -> str:
    """A value as a person writes it: text without quotes where it can go without."""
    if isinstance(value, str) and parse_yaml(value, source="") == value:
        return value
    return json.dumps(value)


def _flops(model: ModelConfig, moe: MoEConfig, text_tokens: float) -> float:
    return count_flops(model, moe, text_tokens=text_tokens).forward


def _width(model: ModelConfig, dense: MoEConfig, wanted: float, text_tokens: float) -> int:
    """FLOPs are linear in the width: two points give the line. Aligned where that is near
    enough."""
    at = {width: _flops(replace(model, ffn_width=width), dense, text_tokens) for width in (1, 2)}
    exact = 1 + (wanted - at[1]) / (at[2] - at[1])
    aligned = max(1, round(exact / _ALIGNED)) * _ALIGNED
    off = abs(at[1] + (aligned - 1) * (at[2] - at[1]) - wanted) / wanted
    # Half of what is allowed leaves room for captions of another length. Not for every one: what a
    # caption gate costs grows with the text alone, and with 64 experts a twin made for 16 tokens is
    # 1.06 % off at 3.
    return aligned if off <= TOLERANCE / 2 else max(1, round(exact))
