"""The composition root: the only place that turns a configuration into live objects."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

from data_pipeline.common import errors, storage
from data_pipeline.common.addresses import without_secrets
from data_pipeline.common.config import dump_yaml
from data_pipeline.common.errors import (
    ConfigError,
    DataError,
    StorageError,
    TokenizerError,
    VlmError,
)
from data_pipeline.common.logs import log_to_file, setup_logging
from data_pipeline.content.tokenizer import Tokenizer
from data_pipeline.loading.ledger import Ledger
from data_pipeline.loading.ledger_facts import LedgerFacts
from data_pipeline.loading.loader import Loader
from data_pipeline.loading.sources import Source, data_fingerprint
from data_pipeline.order.state import LoaderState
from data_pipeline.reading.store import check_present
from data_pipeline.settings import DataConfig
from pretrain.checkpoint.retention import list_checkpoints
from pretrain.config.batch import BatchPlan, plan_batch
from pretrain.config.schema import RunConfig
from pretrain.config.validate import check
from pretrain.model import build_model
from pretrain.parallel.deepspeed_config import (
    load_profile,
    profile_path,
    resolve,
    zero_stage,
    zero_stage_of,
)
from pretrain.parallel.engine import TrainEngine
from pretrain.parallel.environment import (
    RankEnvironment,
    keep_freed_memory,
    rank_environment,
    start_process_group,
)
from pretrain.parallel.layout import Layout
from pretrain.parallel.plain_engine import PlainEngine
from pretrain.train.data import count_data, open_data

logger = logging.getLogger(__name__)

T = TypeVar("T")

CONFIG_FILE, DEEPSPEED_FILE, TOKENIZER_FILE = "config.yaml", "deepspeed.json", "tokenizer.model"
LEDGER_FOLDER = "ledger"


@dataclass(frozen=True, kw_only=True)
class Parts:
    """Everything a training run is made of, on one rank."""

    run: RunConfig
    out: Path
    started: float
    """`time.perf_counter()` when building began."""
    environment: RankEnvironment
    batch_plan: BatchPlan
    engine: TrainEngine
    tokenizer: Tokenizer
    sources: tuple[Source, ...]

    @property
    def data(self) -> DataConfig:
        """How data are read; copies of remote shards go below the run folder if nothing else is
        said."""
        return replace(self.run.data, cache_dir=self.run.data.cache_dir or str(self.out / "cache"))

    def open_loader(self, state: LoaderState) -> Loader:
        """The training data from `state` on."""
        return Loader(
            sources=self.sources,
            tokenizer_path=self.run.data.tokenizer,
            data=self.data,
            image_size=self.run.model.image_size,
            context_length=self.run.model.context_length,
            seed=self.run.seed,
            rank=self.environment.rank,
            world_size=self.environment.world_size,
            global_batch_size=self.run.batch.global_batch_size,
            micro_batch_size=self.run.batch.micro_batch_size,
            state=state,
        )

    def open_ledger(self, loader: Loader, step: int) -> Ledger | None:
        """This rank's record of delivered samples from `step` on, if the run keeps one."""
        if not self.run.data.ledger:
            return None
        return Ledger.open(
            self.out / LEDGER_FOLDER,
            rank=self.environment.rank,
            world_size=self.environment.world_size,
            micro_batch_size=self.run.batch.micro_batch_size,
            resumed_step=step,
            facts=LedgerFacts.of(self.sources, self.run.data.shuffle_window, loader.state),
        )

    def on_first_rank(self, work: Callable[[], T]) -> T | None:
        """What `work` gives on rank 0, None on others; its errors are those of every rank.
        Collective."""
        return _on_first_rank(self.engine, self.out, work)

    def keep_settings(self) -> None:
        """Write the resolved settings and the tokenizer into the folder. Collective.

        Called when the run is sure to train: a refused start must leave there what fits the
        checkpoints.
        """
        # Run folders are copied and shown to others; signed queries open what they are for to
        # anybody.
        sets = tuple(
            replace(held_out, shards=without_secrets(held_out.shards))
            for held_out in self.run.eval.sets
        )
        shown = replace(
            self.run, data=self.run.data.without_secrets(), eval=replace(self.run.eval, sets=sets)
        )

        def write() -> None:
            storage.write_bytes(str(self.out / TOKENIZER_FILE), self.tokenizer.model_bytes)
            storage.write_bytes(str(self.out / CONFIG_FILE), dump_yaml(shown).encode())
            _write_deepspeed(self.run, self.out, self.batch_plan)

        self.on_first_rank(write)


def build(run: RunConfig, out: Path) -> Parts:
    """Check the run against this world, make its folder, and build every part. Collective.

    Raises:
        VlmError: Anything about the run, the data or the cluster that cannot work; the same on
        every rank.
    """
    started = time.perf_counter()
    environment = rank_environment()
    setup_logging(environment.rank)
    if environment.device.type == "cpu":
        keep_freed_memory()
    check(run, environment.world_size, source="this run", zero_stage=zero_stage_of(run))
    batch_plan = plan_batch(
        run.batch.global_batch_size, run.batch.micro_batch_size, environment.world_size
    )
    tokenizer = Tokenizer.load(run.data.tokenizer)
    _check_vocabulary(run, tokenizer)
    sources = open_data(run)
    engine = build_engine(run, environment, batch_plan)
    # Asked of all: a folder on a node's own disk may look different there.
    if not engine.agree(sources is not None) or sources is None:
        sources = count_data(run, out, engine)
    check_same_everywhere(
        engine, data_fingerprint(sources, run.data.shuffle_window), tokenizer.fingerprint
    )
    _on_first_rank(
        engine,
        out,
        lambda: check_present([s.manifest for s in sources], run.data.max_corrupt_ratio),
    )
    _on_first_rank(engine, out, lambda: _open_run_folder(run, out, tokenizer))
    log_to_file(out / "logs" / f"rank-{environment.rank:05d}.log", environment.rank)
    _tell(run, environment.world_size, sources)
    return Parts(
        run=run,
        out=out,
        started=started,
        environment=environment,
        batch_plan=batch_plan,
        engine=engine,
        tokenizer=tokenizer,
        sources=sources,
    )


def build_engine(
    run: RunConfig, environment: RankEnvironment, batch_plan: BatchPlan
) -> TrainEngine:
    """The model with its first values, on this rank's engine. Collective unless the engine is
    plain."""
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
        expert_layer="deepspeed" if run.moe.backend == "deepspeed" else "ours",
    )
    start_process_group(environment, run.parallel.timeout_seconds)
    # Imported late: DeepSpeed takes seconds to import and wants the accelerator chosen first.
    from pretrain.parallel.deepspeed_engine import DeepSpeedEngine
    from pretrain.parallel.deepspeed_moe import expert_parallel_layers
    from pretrain.parallel.deepspeed_native_moe import fill_as_ours, native_layers

    native, first_expert = run.moe.backend == "deepspeed", layout.first_expert(environment.rank)
    model = build_model(
        run,
        make_moe_layer=native_layers(layout)
        if native
        else expert_parallel_layers(layout, environment.rank),
        first_expert=first_expert,
    )
    if native:
        fill_as_ours(model, run, first_expert)
    config = resolve(run, profile, path, Path(CONFIG_FILE), batch_plan)
    return DeepSpeedEngine(model, run.optim, layout, environment.device, config)


def check_same_everywhere(engine: TrainEngine, data: str, tokenizer: str) -> None:
    """Refuse ranks that would read different data: copies on a node's own disk can be stale.
    Collective.

    Args:
        engine: Talks to the other ranks.
        data: Fingerprint of this rank's manifests.
        tokenizer: Fingerprint of this rank's tokenizer.

    Raises:
        DataError: A rank has others than rank 0; on every rank alike.
    """
    everyone = engine.gather_json([data, tokenizer])
    for what, place in (("data.train", 0), ("data.tokenizer", 1)):
        others = [rank for rank, found in enumerate(everyone) if found[place] != everyone[0][place]]
        if others:
            shown = ", ".join(map(str, others[:8])) + (", ..." if len(others) > 8 else "")
            raise DataError(
                f"{what} is not the same on every node: rank(s) {shown} read another content than rank 0; "
                f"copy it to those nodes again, or use a place that all nodes share"
            )


def _tell(run: RunConfig, world_size: int, sources: Sequence[Source]) -> None:
    """What is trained on, one line a source."""
    logger.info(
        "%s: %d ranks, %d pairs in %d sources",
        run.name,
        world_size,
        sum(s.samples for s in sources),
        len(sources),
    )
    for source in sources:
        damaged = [shard for shard in source.manifest.shards if shard.damage]
        if damaged:
            logger.warning(
                "%s: %d shards were damaged when they were indexed, and lack samples; %s: %s",
                source.name,
                len(damaged),
                damaged[0].name,
                damaged[0].damage,
            )
    for source in sources if len(sources) > 1 else ():
        config, manifest = source.config, source.manifest
        weight = (
            f"weight {config.weight:g}"
            if config.weight is not None
            else f"repeats {config.repeats}"
        )
        logger.info(
            "  %s: %d pairs in %d shards, %s",
            source.name,
            source.samples,
            len(manifest.shards),
            "weights by schedule" if config.weight_schedule else weight,
        )


def _check_vocabulary(run: RunConfig, tokenizer: Tokenizer) -> None:
    if tokenizer.vocab_size != run.model.vocab_size:
        raise ConfigError(
            f"model.vocab_size is {run.model.vocab_size}, but the tokenizer {run.data.tokenizer} has "
            f"{tokenizer.vocab_size} pieces; set model.vocab_size={tokenizer.vocab_size}"
        )


def _open_run_folder(run: RunConfig, out: Path, tokenizer: Tokenizer) -> None:
    """Make the folder; refuse one that was trained with another tokenizer."""
    out.mkdir(parents=True, exist_ok=True)
    kept, trained = out / TOKENIZER_FILE, list_checkpoints(out / "checkpoints")
    if trained and kept.exists() and Tokenizer.load(kept).fingerprint != tokenizer.fingerprint:
        raise TokenizerError(
            f"{out} was trained with another tokenizer ({kept}) than data.tokenizer "
            f"({run.data.tokenizer}); its token numbers would mean other words. Set data.tokenizer={kept}, "
            f"or start in another folder"
        )


def _on_first_rank(engine: TrainEngine, out: Path, work: Callable[[], T]) -> T | None:
    """See `Parts.on_first_rank`."""
    problem, result = None, None
    if engine.rank == 0:
        try:
            result = work()
        except VlmError as error:
            problem = [type(error).__name__, str(error)]
        except OSError as error:
            problem = [
                StorageError.__name__,
                f"cannot write into the run folder {out}: {error.strerror}; free "
                f"space or mend permissions there, or choose another --out",
            ]
    problem = engine.broadcast_json(problem)
    if problem:
        raise getattr(errors, problem[0], VlmError)(problem[1])
    return result


def _write_deepspeed(run: RunConfig, out: Path, batch_plan: BatchPlan) -> None:
    if run.parallel.engine == "plain":
        return
    path = profile_path(run.parallel.deepspeed)
    resolved = resolve(run, load_profile(path), path, out / CONFIG_FILE, batch_plan)
    storage.write_bytes(str(out / DEEPSPEED_FILE), json.dumps(resolved, indent=2).encode() + b"\n")
