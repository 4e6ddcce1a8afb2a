"""Builds all objects of a training run from its configuration."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from pathlib import Path

from data_pipeline.common.errors import DataError
from data_pipeline.common.logs import log_to_file, setup_logging
from data_pipeline.common.tables import counted
from data_pipeline.content.tokenizer import Tokenizer
from data_pipeline.loading.sources import Source, data_fingerprint
from data_pipeline.order.state import check_phase
from data_pipeline.reading.local_shards import check_local_shards
from pretrain.config.batch import BatchPlan, plan_batch
from pretrain.config.paths import CONFIG_FILE
from pretrain.config.schema import RunConfig
from pretrain.config.validate import check_run
from pretrain.model import build_model
from pretrain.parallel.communicator import Communicator
from pretrain.parallel.deepspeed_config import (
    load_profile,
    profile_path,
    resolve,
    zero_stage,
)
from pretrain.parallel.engine import Engine
from pretrain.parallel.environment import (
    RankEnvironment,
    rank_environment,
    retain_freed_memory,
    start_process_group,
)
from pretrain.parallel.layout import Layout
from pretrain.parallel.plain_engine import PlainEngine
from pretrain.plan.input_files import input_file_problems
from pretrain.plan.sample_check import check_some_samples
from pretrain.train.components import TrainComponents
from pretrain.train.data import index_data, open_sources_if_indexed
from pretrain.train.run_folder import create_run_folder, run_on_rank_zero
from pretrain.train.state import saved_loader_state

logger = logging.getLogger(__name__)


def build(run: RunConfig, out: Path) -> TrainComponents:
    """Validate the run, create its folder and build all components. Collective.

    Raises:
        VlmError: A problem of the run, the data or the cluster; the same on every rank.
    """
    start_time = time.perf_counter()
    environment = rank_environment()
    setup_logging(environment.rank)
    if environment.device.type == "cpu":
        retain_freed_memory()
    check_run(run, environment.world_size, source="this run", more=input_file_problems(run))
    batch_plan = plan_batch(
        run.batch.global_batch_size, run.batch.micro_batch_size, environment.world_size
    )
    tokenizer = Tokenizer.load(run.data.tokenizer)
    sources = open_sources_if_indexed(run)
    engine = build_engine(run, environment, batch_plan)
    communicator = engine.communicator
    lock = run_on_rank_zero(communicator, out, lambda: create_run_folder(run, out, tokenizer))
    saved = saved_loader_state(out, communicator)
    check_phase(saved, run.data.phase)
    # All ranks decide together: files on a node's local disk may differ.
    if communicator.any_true(sources is None) == (True,) or sources is None:
        sources = index_data(run, out, communicator, saved)

    fingerprint = data_fingerprint(sources, run.data.shuffle_window)
    check_same_on_all_ranks(communicator, fingerprint, tokenizer.fingerprint)
    manifests = [source.manifest for source in sources]
    run_on_rank_zero(
        communicator, out, lambda: check_local_shards(manifests, run.data.max_corrupt_ratio)
    )
    run_on_rank_zero(communicator, out, lambda: check_some_samples(run, sources, tokenizer))
    log_to_file(out / "logs" / f"rank-{environment.rank:05d}.log", environment.rank)
    _log_sources(run, environment.world_size, sources)
    return TrainComponents(
        run=run,
        out=out,
        start_time=start_time,
        environment=environment,
        batch_plan=batch_plan,
        engine=engine,
        tokenizer=tokenizer,
        sources=sources,
        lock=lock,
    )


def build_engine(run: RunConfig, environment: RankEnvironment, batch_plan: BatchPlan) -> Engine:
    """The initialized model on this rank's engine. Collective with DeepSpeed."""
    if run.parallel.engine == "plain":
        plain = Layout(
            world_size=1,
            expert_parallel_size=1,
            zero_stage=-1,
            precision=run.precision.compute,
            num_experts=run.moe.num_experts,
        )
        return PlainEngine(build_model(run), run.optim, plain, environment.device)
    path = profile_path(run.parallel.deepspeed)
    profile = load_profile(path)
    layout = Layout(
        world_size=environment.world_size,
        expert_parallel_size=run.parallel.expert_parallel_size,
        zero_stage=zero_stage(profile, path),
        precision=run.precision.compute,
        num_experts=run.moe.num_experts,
    )
    start_process_group(environment, run.parallel.timeout_seconds)

    # Imported late: DeepSpeed takes seconds to import and requires DS_ACCELERATOR to be set.
    from pretrain.parallel.deepspeed_engine import DeepSpeedEngine
    from pretrain.parallel.deepspeed_moe import expert_parallel_layer_factory

    model = build_model(
        run,
        make_moe_layer=expert_parallel_layer_factory(layout, environment.rank),
        first_expert=layout.first_expert(environment.rank),
    )
    config = resolve(run, profile, path, Path(CONFIG_FILE), batch_plan)
    return DeepSpeedEngine(model, run.optim, layout, environment.device, config)


def check_same_on_all_ranks(communicator: Communicator, data: str, tokenizer: str) -> None:
    """Check that all ranks read the same data: copies on local disks may be outdated. Collective.

    Args:
        communicator: Provides the collectives.
        data: Fingerprint of this rank's manifests.
        tokenizer: Fingerprint of this rank's tokenizer.

    Raises:
        DataError: A rank's fingerprints differ from those of rank 0; raised on every rank.
    """
    fingerprints = communicator.all_gather_json([data, tokenizer])
    for index, setting in enumerate(("data.train", "data.tokenizer")):
        expected = fingerprints[0][index]
        differing = [rank for rank, values in enumerate(fingerprints) if values[index] != expected]
        if differing:
            ranks = ", ".join(map(str, differing[:8])) + (", ..." if len(differing) > 8 else "")
            raise DataError(
                f"{setting} is not the same on every node: on rank(s) {ranks} its content differs "
                f"from rank 0; copy it to those nodes again, or use a shared file system"
            )


def _log_sources(run: RunConfig, world_size: int, sources: Sequence[Source]) -> None:
    logger.info(
        "%s: %s, %s in %s",
        run.name,
        counted(world_size, "rank"),
        counted(sum(s.samples for s in sources), "pair"),
        counted(len(sources), "source"),
    )
    for source in sources:
        corrupt = [shard for shard in source.manifest.shards if shard.corruption]
        if corrupt:
            logger.warning(
                "%s: some samples of %s are missing because of corruption before indexing; the "
                "first is %s: %s",
                source.name,
                counted(len(corrupt), "shard"),
                corrupt[0].name,
                corrupt[0].corruption,
            )
    for source in sources if len(sources) > 1 else ():
        logger.info(
            "  %s: %s in %s, %s",
            source.name,
            counted(source.samples, "pair"),
            counted(len(source.manifest.shards), "shard"),
            _describe_weight(source),
        )


def _describe_weight(source: Source) -> str:
    config = source.config
    if config.weight_schedule:
        return "weights by schedule"
    if config.weight is not None:
        return f"weight {config.weight:g}"
    return f"repeats {config.repeats}"
