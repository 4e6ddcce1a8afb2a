"""The training loop: what happens at every step, in the order it happens."""

from __future__ import annotations

import logging
import time
from dataclasses import replace

from data_pipeline.common.errors import TokenizerError
from data_pipeline.loading.ledger import Ledger
from data_pipeline.loading.loader import Loader
from data_pipeline.order.state import LoaderState
from pretrain.checkpoint.reader import load_latest
from pretrain.checkpoint.writer import save
from pretrain.config.schema import RunConfig
from pretrain.optim.schedule import learning_rate
from pretrain.train.build import Parts
from pretrain.train.metrics import BadSamples, RankReport, Window, nothing_left, source_metrics
from pretrain.train.pictures import CaptionSampleLogger
from pretrain.train.random_state import get_random_state, set_random_state
from pretrain.train.reporter import Reporter
from pretrain.train.signals import StopFlag
from pretrain.train.state import TrainState
from pretrain.train.step import train_step

logger = logging.getLogger(__name__)


def train(parts: Parts) -> TrainState:
    """Train until `schedule.total_steps`, or until asked to stop; always leaves a checkpoint.
    Collective."""
    state = _resume(parts)
    if state.step >= parts.run.schedule.total_steps:
        logger.info(
            "%s is complete: step %d of %d", parts.out, state.step, parts.run.schedule.total_steps
        )
        return state
    loader = parts.open_loader(state.loader)
    parts.keep_settings()
    reporter = parts.on_first_rank(lambda: Reporter(parts.out, parts.run, state.step))
    ledger = parts.open_ledger(loader, state.step)
    try:
        with StopFlag() as stop:
            return _train_on(parts, loader, ledger, state, reporter, stop)
    finally:
        loader.close()
        if ledger is not None:
            ledger.close()
        if reporter is not None:
            reporter.close()


def _train_on(
    parts: Parts,
    loader: Loader,
    ledger: Ledger | None,
    state: TrainState,
    reporter: Reporter | None,
    stop: StopFlag,
) -> TrainState:
    """The loop itself."""
    run, engine = parts.run, parts.engine
    window = Window(run, engine.world_size, engine.device)
    bad = BadSamples(run.data.max_corrupt_ratio, read=state.loader.position)
    pictures = CaptionSampleLogger.open(parts)
    seconds_before = state.seconds
    steps = loader.steps()
    while state.step < run.schedule.total_steps:
        waiting_since = time.perf_counter()
        batches, loader_state = next(steps)
        waited = time.perf_counter() - waiting_since
        rate = learning_rate(state.step, run.schedule, run.optim.lr)
        seeing = sees_routing(run, state.step + 1)
        result = train_step(
            engine, batches, run, step=state.step, learning_rate=rate, coactivation=seeing
        )
        if not result.pairs:
            raise nothing_left(
                state.step + 1, batches
            )  # unsaved: the run goes on from its last checkpoint
        if ledger is not None:
            ledger.add(state.step + 1, state.loader.position, loader_state.position, batches)
        state = replace(
            state,
            step=state.step + 1,
            samples_seen=state.samples_seen + result.pairs,
            seconds=seconds_before + time.perf_counter() - parts.started,
            loader=loader_state,
        )
        window.add(result, waited, [problem for batch in batches for problem in batch.problems])
        stopping = not engine.agree(not stop.is_set)
        last = stopping or state.step == run.schedule.total_steps
        saving = last or (
            run.checkpoint.every_steps > 0 and state.step % run.checkpoint.every_steps == 0
        )
        # Before a checkpoint everything is told, so that a restart from it neither repeats nor
        # loses a row.
        if saving or state.step % run.log.every_steps == 0:
            reports = [
                RankReport.from_json(r) for r in engine.gather_json(window.rank_report().to_json())
            ]
            if reporter is not None:
                problems = [problem for report in reports for problem in report.problems]
                reporter.bad_samples(problems, state.step)
                metrics, tables = window.summary(state, reports, rate)
                reporter.step(
                    state.step,
                    metrics | source_metrics(loader.order, state.loader.position),
                    tables,
                )
            window.restart()
            bad.add(reports, read=state.loader.position)
        if seeing and reporter is not None:
            reporter.routing(
                state.step, result.choices_LME.numpy(), result.router.coactivation_EE.numpy()
            )
        if pictures is not None and pictures.is_due(state.step, last=last):
            pictures.show(reporter, state.step)
            window.skip_pause()
        if saving:
            if ledger is not None:
                ledger.sync()
            _save(parts, state)
            window.skip_pause()
        if stopping:
            logger.info(
                "asked to stop: saved step %d; start the same command again to go on", state.step
            )
            break
    return state


def sees_routing(run: RunConfig, step: int) -> bool:
    """Whether pictures of the routing are shown after this step; the same on every rank."""
    every = run.log.routing_every_steps
    due = every > 0 and (step % every == 0 or step == run.schedule.total_steps)
    return due and bool(run.moe.blocks(run.model.num_layers))


def _resume(parts: Parts) -> TrainState:
    """The newest checkpoint of the run folder, or the beginning."""
    resumed = load_latest(parts.engine, parts.out / "checkpoints")
    if resumed is None:
        return TrainState(loader=LoaderState(seed=parts.run.seed))
    if resumed.state_json["tokenizer"] != parts.tokenizer.fingerprint:
        raise TokenizerError(
            f"{resumed.path} was trained with another tokenizer than data.tokenizer "
            f"({parts.run.data.tokenizer}); its token numbers would mean other words. Give the run its own "
            f"tokenizer, or start in another folder"
        )
    state = TrainState.from_json(resumed.state_json["train"])
    set_random_state(resumed.rank_state["random"])
    logger.info(
        "resumed from %s: step %d, %d pairs seen", resumed.path, state.step, state.samples_seen
    )
    return state


def _save(parts: Parts, state: TrainState) -> None:
    save(
        parts.engine,
        root=parts.out / "checkpoints",
        step=state.step,
        state_json={"train": state.to_json(), "tokenizer": parts.tokenizer.fingerprint},
        rank_state={"random": get_random_state()},
        keep=parts.run.checkpoint.keep,
    )
