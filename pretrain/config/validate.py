"""Checks that need more than one section of a run, or the number of ranks: all problems at once.

A section's own checks are in its `__post_init__`; whether files exist and fit (manifests, the
tokenizer's vocabulary) is judged where they are opened.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator

from data_pipeline.common.addresses import without_secrets
from data_pipeline.common.config import join_problems
from data_pipeline.common.errors import ConfigError
from data_pipeline.settings import AugmentConfig
from pretrain.config.batch import plan_batch
from pretrain.config.deepspeed_layer import deepspeed_layer_problems
from pretrain.config.schema import RunConfig


def check(
    run: RunConfig,
    world_size: int,
    *,
    source: str = "",
    training: bool = True,
    zero_stage: int | None = None,
) -> None:
    """Raise one error that lists everything wrong with a run.

    Args:
        run: The run.
        world_size: Number of ranks it is started with.
        source: Named at the head of the error, such as the run's file.
        training: Also ask for what only training needs: shards and a tokenizer.
        zero_stage: Of the DeepSpeed profile, where it matters
            (`pretrain.parallel.deepspeed_config.zero_stage_of`).

    Raises:
        ConfigError: There is a problem.
    """
    found = problems(run, world_size, zero_stage) + (training_problems(run) if training else [])
    if found:
        raise ConfigError(join_problems(found, source))


def problems(run: RunConfig, world_size: int, zero_stage: int | None = None) -> list[str]:
    """Every contradiction between sections, and with the number of ranks; empty when there is
    none."""
    found: list[str] = []
    for part in (
        _batch(run, world_size),
        _parallel(run, world_size),
        _experts(run),
        _balance(run),
        _numbers(run),
        _data(run),
        _augment(run.data.augment),
        _eval(run),
        _precision(run),
        deepspeed_layer_problems(run, zero_stage),
    ):
        found.extend(part)
    return found


def training_problems(run: RunConfig) -> list[str]:
    """What is still missing before a run can train."""
    found = []
    if not run.data.train:
        found.append(
            "data.train is empty; name the manifests or folders of shards to train on, such as "
            "data.train=[data/quickstart/train]"
        )
    if not run.data.tokenizer:
        found.append(
            "data.tokenizer is empty; name a SentencePiece model, or make one: "
            "vlmoe tokenizer train MANIFEST --out tokenizer.model"
        )
    return found


def _batch(run: RunConfig, world_size: int) -> Iterator[str]:
    try:
        plan_batch(run.batch.global_batch_size, run.batch.micro_batch_size, world_size)
    except ConfigError as error:
        yield str(error)
    if run.batch.global_batch_size == 1 and run.loss.contrastive_weight > 0:
        yield (
            "batch.global_batch_size is 1: contrast needs other pairs to compare with; "
            "raise it, or set loss.contrastive_weight=0"
        )


def _parallel(run: RunConfig, world_size: int) -> Iterator[str]:
    ranks, experts = run.parallel.expert_parallel_size, run.moe.num_experts
    if ranks < 1:
        yield f"parallel.expert_parallel_size is {ranks}, but must be at least 1"
    elif ranks > experts:
        yield (
            f"parallel.expert_parallel_size is {ranks}: more ranks than the {experts} experts (moe.num_experts) can "
            f"be split over; use at most {_largest_divisor(experts, world_size)} with {world_size} ranks"
        )
    else:
        if experts % ranks:
            yield (
                f"parallel.expert_parallel_size is {ranks}, which does not divide moe.num_experts ({experts}); "
                f"possible: {_divisors(experts)}"
            )
        if world_size % ranks:
            yield (
                f"parallel.expert_parallel_size is {ranks}, which does not divide the {world_size} ranks started; "
                f"start a multiple of {ranks}, or use {_largest_divisor(experts, world_size)}"
            )
    if ranks > 1 and not run.moe.blocks(run.model.num_layers):
        yield (
            f"parallel.expert_parallel_size is {ranks}, but no block has experts (moe.start {run.moe.start}, "
            f"moe.stop {run.moe.stop}, {run.model.num_layers} blocks); set it to 1"
        )
    if run.parallel.engine == "plain" and world_size != 1:
        yield (
            f"parallel.engine is 'plain', which is one process, but {world_size} ranks were started; "
            f"start one, or set parallel.engine=deepspeed"
        )
    if run.parallel.timeout_seconds <= 0:
        yield f"parallel.timeout_seconds is {run.parallel.timeout_seconds}, but must be positive"


def _experts(run: RunConfig) -> Iterator[str]:
    if run.moe.start < 0:
        yield f"moe.start is {run.moe.start}, below 0"
    if run.moe.stop < -1:
        yield (
            f"moe.stop is {run.moe.stop}, but blocks are not counted from the end; name the block before which "
            f"experts end, or set moe.stop=-1 for all to the last"
        )
    if run.moe.expert_width < 1:
        yield f"moe.expert_width is {run.moe.expert_width}, below 1"
    if run.model.ffn_width < 1:
        yield f"model.ffn_width is {run.model.ffn_width}, below 1"
    group, pairs = run.moe.capacity_group_size, run.batch.micro_batch_size
    if run.moe.capacity_factor and pairs % group:
        yield (
            f"moe.capacity_group_size is {group}, which does not divide batch.micro_batch_size ({pairs}), so that a "
            f"group would be cut; possible: {_divisors(pairs)}"
        )
    blocks = run.moe.blocks(run.model.num_layers)
    if run.moe.router_input == "caption" and not any(
        block >= run.model.fusion_layer for block in blocks
    ):
        yield (
            f"moe.router_input is caption, but no block from model.fusion_layer ({run.model.fusion_layer}) on has experts "
            f"(moe.start {run.moe.start}, moe.every {run.moe.every}, moe.stop {run.moe.stop}); set moe.router_input=token"
        )


def _balance(run: RunConfig) -> Iterator[str]:
    balance = run.balance
    for name in (
        "balance_weight",
        "router_z_weight",
        "importance_weight",
        "load_weight",
        "expert_l1_weight",
        "router_l1_weight",
    ):
        if getattr(balance, name) < 0:
            yield f"balance.{name} is {getattr(balance, name)}, below 0"
    for name in ("local_entropy_weight", "global_entropy_weight", "global_entropy_experts"):
        for modality in ("image", "text"):
            value = getattr(getattr(balance, name), modality)
            if value < 0:
                yield f"balance.{name}.{modality} is {value}, below 0"
    wanted_of = {
        "image": balance.global_entropy_experts.image,
        "text": balance.global_entropy_experts.text,
    }
    for index, (name, wanted) in enumerate(wanted_of.items()):
        pool = run.moe.pool(index)
        if 0 < wanted < 1:
            yield (
                f"balance.global_entropy_experts.{name} is {wanted:g}, and fewer than 1 expert cannot be asked for: "
                f"the term would always be 0; set it to 1 or more, or to 0 for the usual number"
            )
        if wanted > pool.stop - pool.start:
            yield (
                f"balance.global_entropy_experts.{name} is {wanted:g}, more than the {pool.stop - pool.start} "
                f"experts that serve it"
            )
    if balance.load_weight and run.moe.routing != "noisy_top_k":
        yield (
            f"balance.load_weight is {balance.load_weight}, but without noise on the logits nothing could be "
            f"drawn anew; set moe.routing=noisy_top_k, or balance.load_weight=0"
        )
    if balance.load_weight and balance.bias != "none":
        yield (
            f"balance.load_weight is {balance.load_weight}, but the chance to be chosen that it evens out knows "
            f"nothing of balance.bias ({balance.bias}), which decides the choice with the scores; set "
            f"balance.bias=none, or balance.load_weight=0"
        )
    if balance.bias_per_modality and balance.bias == "none":
        yield (
            "balance.bias_per_modality is true, but balance.bias is none, so that there is no bias; set "
            "balance.bias=sign or zscore, or balance.bias_per_modality=false"
        )
    if balance.bias_rate <= 0:
        yield f"balance.bias_rate is {balance.bias_rate}, but must be above 0 (balance.bias=none turns biases off)"
    if not 0 <= balance.bias_freeze_ratio <= 1:
        yield f"balance.bias_freeze_ratio is {balance.bias_freeze_ratio}, but must be in 0..1"


def _numbers(run: RunConfig) -> Iterator[str]:
    """Ranges of single numbers that no section checks by itself."""
    optim, loss, schedule = run.optim, run.loss, run.schedule
    for name, value, inside, allowed in (
        ("optim.lr", optim.lr, optim.lr > 0, "above 0"),
        (
            "optim.betas",
            list(optim.betas),
            all(0 <= beta < 1 for beta in optim.betas),
            "in 0..1, 1 left out",
        ),
        ("optim.eps", optim.eps, optim.eps > 0, "above 0"),
        ("optim.weight_decay", optim.weight_decay, optim.weight_decay >= 0, "at least 0"),
        ("optim.clip_norm", optim.clip_norm, optim.clip_norm >= 0, "at least 0 (0 turns it off)"),
        (
            "schedule.min_lr_ratio",
            schedule.min_lr_ratio,
            0 <= schedule.min_lr_ratio <= 1,
            "in 0..1",
        ),
        ("schedule.decay_ratio", schedule.decay_ratio, 0 <= schedule.decay_ratio <= 1, "in 0..1"),
        (
            "data.max_corrupt_ratio",
            run.data.max_corrupt_ratio,
            0 <= run.data.max_corrupt_ratio <= 1,
            "in 0..1",
        ),
        ("data.timeout_seconds", run.data.timeout_seconds, run.data.timeout_seconds > 0, "above 0"),
        ("data.prefetch", run.data.prefetch, run.data.prefetch >= 1, "at least 1"),
        (
            "checkpoint.every_steps",
            run.checkpoint.every_steps,
            run.checkpoint.every_steps >= 0,
            "at least 0",
        ),
        ("checkpoint.keep", run.checkpoint.keep, run.checkpoint.keep >= 1, "at least 1"),
        ("log.every_steps", run.log.every_steps, run.log.every_steps >= 1, "at least 1"),
        (
            "log.captions_every_steps",
            run.log.captions_every_steps,
            run.log.captions_every_steps >= 0,
            "at least 0",
        ),
        (
            "log.routing_every_steps",
            run.log.routing_every_steps,
            run.log.routing_every_steps >= 0,
            "at least 0",
        ),
        ("log.num_captions", run.log.num_captions, run.log.num_captions >= 0, "at least 0"),
        (
            "eval.batch_size",
            run.eval.batch_size,
            run.eval.batch_size >= 1,
            "at least 1",
        ),
        (
            "eval.caption_samples",
            run.eval.caption_samples,
            run.eval.caption_samples >= 0,
            "at least 0",
        ),
        (
            "loss.logit_scale_init",
            loss.logit_scale_init,
            0 < loss.logit_scale_init < loss.logit_scale_max,
            f"above 0 and below loss.logit_scale_max ({loss.logit_scale_max})",
        ),
        ("seed", run.seed, run.seed >= 0, "at least 0"),
    ):
        if not inside:
            yield f"{name} is {value}, but must be {allowed}"
    for name in ("contrastive_weight", "caption_weight"):
        if getattr(loss, name) < 0:
            yield f"loss.{name} is {getattr(loss, name)}, below 0"
    if loss.contrastive_weight == 0 and loss.caption_weight == 0:
        yield "loss.contrastive_weight and loss.caption_weight are both 0: nothing would be learned"
    decay_steps = round(schedule.decay_ratio * schedule.total_steps)
    if schedule.kind == "wsd" and schedule.warmup_steps + decay_steps > schedule.total_steps:
        yield (
            f"schedule.warmup_steps ({schedule.warmup_steps}) and the decay (schedule.decay_ratio x total_steps "
            f"= {decay_steps}) are longer than schedule.total_steps ({schedule.total_steps})"
        )


def _data(run: RunConfig) -> Iterator[str]:
    data = run.data
    trained = [_address(source.shards) for source in data.sources]
    for shards in sorted({shards for shards in trained if trained.count(shards) > 1}):
        yield (
            f"data.train names {without_secrets(shards)} {trained.count(shards)} times; its pairs would come "
            f"as often in every epoch"
        )
    if not data.caption_keys:
        yield "data.caption_keys is empty; name where captions are, such as txt"
    for key in data.caption_keys:
        if not re.fullmatch(r"json:.+|([^:\s]+\.)?(txt|text|caption)", key):
            yield (
                f"data.caption_keys has {key!r}; write txt (or another member of text: text, caption, en.txt), or "
                f"json:FIELD for a field of the .json member"
            )
    if data.filters.require:
        from data_pipeline.content.filters import (
            compile_conditions,
        )  # loads numpy; `vlmoe plan` should not

        try:
            compile_conditions(data.filters.require)
        except ConfigError as error:
            yield str(error)
    if any(weight < 0 for weight in data.caption_weights) or (
        data.caption_weights and not sum(data.caption_weights)
    ):
        yield f"data.caption_weights is {list(data.caption_weights)}; weights are at least 0 and not all 0"


def _augment(augment: AugmentConfig) -> Iterator[str]:
    for name in ("crop_scale", "crop_ratio", "affine_scale"):
        low, high = getattr(augment, name)
        if not 0 < low <= high:
            yield f"data.augment.{name} is [{low}, {high}], but must be two positive numbers, the smaller first"
    if augment.crop_scale[1] > 1:
        yield f"data.augment.crop_scale is {list(augment.crop_scale)}; a crop keeps at most 1, the whole area"
    if not 0 <= augment.affine_degrees <= 180:
        yield f"data.augment.affine_degrees is {augment.affine_degrees}, but must lie in 0..180"
    if not 0 <= augment.affine_translate < 1:
        yield f"data.augment.affine_translate is {augment.affine_translate}, but must lie in 0..1, 1 left out"


def _eval(run: RunConfig) -> Iterator[str]:
    names = [held_out.name for held_out in run.eval.sets]
    for name in sorted({name for name in names if names.count(name) > 1}):
        yield f"eval.sets has {names.count(name)} sets called {name!r}; give each its own name"
    for held_out in run.eval.sets:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", held_out.name):
            yield f"eval.sets has a set called {held_out.name!r}; use letters, digits and _ . - only"
        if not held_out.shards:
            yield f"eval.sets {held_out.name!r} has no shards; name a manifest or the folder that holds one"
        elif _address(held_out.shards) in [_address(source.shards) for source in run.data.sources]:
            yield (
                f"eval.sets {held_out.name!r} is {without_secrets(held_out.shards)}, which data.train names too; "
                f"what is trained on is not held out"
            )


def _address(shards: str) -> str:
    """The folder of shards, spelt in one way: a manifest may be named itself, or by its folder."""
    folder = shards.removesuffix("manifest.json")
    return folder.rstrip("/") if "://" in shards else os.path.normpath(folder.removeprefix("file:"))


def _precision(run: RunConfig) -> Iterator[str]:
    if run.moe.backend in ("loop", "deepspeed"):
        return
    # torch's grouped matrix product wants rows that start on 16 bytes. `auto` is it on a GPU, and
    # where a run will be trained is not known here.
    numbers = {"bf16": 8, "fp32": 4}[run.precision.compute]
    for name, width in (
        ("model.width", run.model.width),
        ("moe.expert_width", run.moe.expert_width),
    ):
        if width % numbers:
            yield (
                f"{name} is {width}: with precision.compute={run.precision.compute} it must be a multiple of "
                f"{numbers}, or set moe.backend=loop"
            )


def _divisors(number: int) -> str:
    return ", ".join(str(n) for n in range(1, number + 1) if number % n == 0)


def _largest_divisor(experts: int, world_size: int) -> int:
    """Most ranks that one copy of the experts can be split over in this world."""
    return max(
        n
        for n in range(1, min(experts, world_size) + 1)
        if experts % n == 0 and world_size % n == 0
    )
