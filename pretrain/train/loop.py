"""The training loop."""

from __future__ import annotations

import logging
import shlex
import time
from dataclasses import replace

from data_pipeline.common.errors import ConfigError
from data_pipeline.common.tables import counted
from data_pipeline.content.tokenizer import TokenizerError
from data_pipeline.loading.ledger import Ledger
from data_pipeline.loading.loader import Loader
from data_pipeline.order.state import LoaderState
from pretrain.checkpoint.reader import load_latest
from pretrain.config.schema import RunConfig
from pretrain.optim.schedule import learning_rate
from pretrain.train.caption_samples import CaptionSampleLogger
from pretrain.train.components import TrainComponents
from pretrain.train.corrupt_samples import UnusableDataError, empty_batch_error
from pretrain.train.events import EventLog
from pretrain.train.guards import RewindError, StepGuard, log_skipped_step, rewind
from pretrain.train.periodic_checkpoints import PeriodicCheckpoints
from pretrain.train.reporter import Reporter
from pretrain.train.signals import StopFlag
from pretrain.train.state import TrainState
from pretrain.train.step import train_step
from pretrain.train.window_logs import WindowLogs

logger = logging.getLogger(__name__)


def train(components: TrainComponents) -> TrainState:
    """Train until `schedule.total_steps` or a stop signal; saves a checkpoint in both cases.

    Collective.
    """
    state = _resume(components)
    if state.step >= components.run.schedule.total_steps:
        _check_no_new_phase(components, state)
        _log_complete(components, state)
        return state
    events = EventLog(components.out, enabled=components.communicator.rank == 0)
    num_rewinds = 0
    while True:
        try:
            return _train_from(components, state, events)
        except RewindError as error:
            num_rewinds += 1
            state = rewind(components, error, num_rewinds)
            events.write("rewind", state.step, reason=str(error), skipped=[error.first, error.end])


def _train_from(components: TrainComponents, state: TrainState, events: EventLog) -> TrainState:
    """Train from a state until the end or a stop signal. Collective.

    Raises:
        RewindError: The run must continue from its last checkpoint.
    """
    total_steps = components.run.schedule.total_steps
    loader = components.open_loader(state.loader)
    _log_phase(state.loader, loader)
    components.save_resolved_config()
    reporter = components.on_rank_zero(lambda: Reporter(components.out, components.run, state.step))
    ledger = components.open_ledger(loader, state.step)
    checkpoints = PeriodicCheckpoints(components, ledger)
    events.start(state.step, world_size=components.communicator.world_size)
    try:
        with StopFlag() as stop:
            state = _train_loop(
                components, loader, ledger, state, reporter, stop, events, checkpoints
            )
        if state.step >= total_steps:
            _log_complete(components, state)
        return state
    except (RewindError, UnusableDataError):
        # Every rank raises these: what is being written can still become a checkpoint.
        checkpoints.writer.finish()
        raise
    finally:
        loader.close()
        if ledger is not None:
            ledger.close()
        if reporter is not None:
            reporter.close()


def _check_no_new_phase(components: TrainComponents, state: TrainState) -> None:
    """A complete run has no steps for a new phase of its data."""
    run = components.run
    if run.data.phase > state.loader.phase:
        raise ConfigError(
            f"data.phase is {run.data.phase}, but {components.out} is complete: step {state.step} "
            f"of {run.schedule.total_steps}; a new phase needs more schedule.total_steps"
        )


def _log_phase(saved: LoaderState, loader: Loader) -> None:
    """Log that training continues on other data than that of the checkpoint."""
    if loader.state.phase == saved.phase:
        return
    logger.info(
        "phase %d of the data begins at position %s, with %s",
        loader.state.phase,
        f"{loader.state.phase_begin:,}",
        ", ".join(
            f"{source.name} ({counted(source.samples, 'sample')})" for source in loader.sources
        ),
    )


def _log_complete(components: TrainComponents, state: TrainState) -> None:
    """Log that the run is complete, and the commands that use it."""
    run, out = components.run, shlex.quote(str(components.out))
    commands = [f"vlmoe eval {out}" + ("" if run.eval.sets else " --shards SHARDS")]
    commands.append(f"vlmoe caption {out} IMAGE...")
    if run.moe.blocks(run.model.num_layers):
        commands.append(f"vlmoe routing {out}")
    commands.append(f"tensorboard --logdir {out}")
    logger.info(
        "%s is complete: step %d of %d. Next:\n  %s",
        components.out,
        state.step,
        run.schedule.total_steps,
        "\n  ".join(commands),
    )


def _train_loop(
    components: TrainComponents,
    loader: Loader,
    ledger: Ledger | None,
    state: TrainState,
    reporter: Reporter | None,
    stop: StopFlag,
    events: EventLog,
    checkpoints: PeriodicCheckpoints,
) -> TrainState:
    run, engine = components.run, components.engine
    logs = WindowLogs(components, loader, reporter, first_sample=state.loader.position)
    captions = CaptionSampleLogger.open(components)
    guard = StepGuard(run.guard)
    seconds_before = state.seconds
    steps = loader.steps()
    while state.step < run.schedule.total_steps:
        wait_start = time.perf_counter()
        batches, loader_state = next(steps)
        wait_seconds = time.perf_counter() - wait_start

        rate = learning_rate(state.step, run.schedule, run.optim.lr)
        log_routing = is_routing_logged(run, state.step + 1)
        result = train_step(
            engine,
            batches,
            run,
            step=state.step,
            learning_rate=rate,
            coactivation=log_routing,
            limits=guard.limits(),
        )
        if not result.pairs:  # not saved: the run can resume from its last checkpoint
            raise empty_batch_error(state.step + 1, batches)
        if ledger is not None:
            ledger.add(state.step + 1, state.loader.position, loader_state.position, batches)
        before = state.loader.position
        state = replace(
            state,
            step=state.step + 1,
            samples_seen=state.samples_seen + result.pairs,
            seconds=seconds_before + time.perf_counter() - components.start_time,
            loader=loader_state,
        )
        logs.window.add(result, wait_seconds, batches)
        try:
            guard.add(result, before=before, after=loader_state.position)
        finally:
            if not result.is_updated:
                log_skipped_step(result, state.step, events)

        stopping, save_due, save_pending = engine.communicator.any_true(
            stop.is_set, checkpoints.is_due(), not checkpoints.writer.is_ready()
        )
        last = stopping or state.step == run.schedule.total_steps
        saving = last or save_due or _is_multiple(state.step, run.checkpoint.every_steps)
        # A run that does not recover goes back to a checkpoint from before its first skipped step.
        saving = saving and (guard.is_good or last)
        if checkpoints.writer.is_pending and not save_pending:
            checkpoints.writer.advance()
        # Logged before every save, so that a resumed run neither repeats nor loses a row.
        if saving or state.step % run.log.every_steps == 0:
            logs.write(state, rate)
        if log_routing and reporter is not None:
            coactivation = result.router.coactivation_EE.numpy()
            reporter.log_routing(state.step, result.assignments_LME.numpy(), coactivation)
        if captions is not None and captions.is_due(state.step, last=last):
            captions.log(reporter, state.step)
            logs.window.exclude_pause()
        if saving:
            checkpoints.save(state, last=last)
            logs.window.exclude_pause()
        if stopping:
            logger.info(
                "stop signal received: saved step %d; rerun the same command to resume", state.step
            )
            break
    return state


def is_routing_logged(run: RunConfig, step: int) -> bool:
    """Whether routing heatmaps are logged after this step; the same on every rank."""
    every = run.log.routing_every_steps
    due = every > 0 and (step % every == 0 or step == run.schedule.total_steps)
    return due and bool(run.moe.blocks(run.model.num_layers))


def _is_multiple(step: int, every_steps: int) -> bool:
    return every_steps > 0 and step % every_steps == 0


def _resume(components: TrainComponents) -> TrainState:
    """State of the newest checkpoint, or the initial state."""
    resumed = load_latest(components.engine, components.checkpoints)
    if resumed is None:
        return TrainState(loader=LoaderState(seed=components.run.seed))
    if resumed.state_json["tokenizer"] != components.tokenizer.fingerprint:
        raise TokenizerError(
            f"{resumed.path} was trained with another tokenizer than data.tokenizer "
            f"({components.run.data.tokenizer}), so token ids would have other meanings. Set "
            f"data.tokenizer to the tokenizer of this run, or use another run folder"
        )
    state = TrainState.from_json(resumed.state_json["train"])
    pairs = counted(state.samples_seen, "pair")
    logger.info("resumed from %s: step %d, %s seen", resumed.path, state.step, pairs)
    return state
