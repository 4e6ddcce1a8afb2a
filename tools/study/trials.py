"""Trains and judges a list of runs, each in its own folder; what is done already is not done again.

    OUT/NAME/run.yaml       the run, as it is started
    OUT/NAME/result.json    its numbers, written last: a folder that has them is done
    OUT/NAME/...            what `vlmoe train` leaves

Stopped in the middle, the same command goes on: with the trial that was running from its last
checkpoint.
"""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from data_pipeline.common.config import dump_yaml
from data_pipeline.common.errors import ConfigError, VlmError
from pretrain.config.presets import load_run
from pretrain.config.schema import RunConfig
from pretrain.evaluate.report import write_json
from tools.study.numbers import judge

logger = logging.getLogger(__name__)

RUN_FILE, RESULT_FILE = "run.yaml", "result.json"

Result = dict[str, Any]
Train = Callable[[RunConfig, Path], None]
Judge = Callable[[Path], Result]


class Trial(NamedTuple):
    """One way of training, with one seed."""

    name: str
    """Of what is compared; trials that differ only in the seed share it."""
    run: RunConfig

    @property
    def folder(self) -> str:
        """Its folder below that of the study."""
        return f"{self.name}-seed{self.run.seed}"


def run_trials(
    trials: Sequence[Trial], out: Path, *, train: Train | None = None, judge: Judge = judge
) -> dict[str, list[Result]]:
    """Do what is left to do.

    Args:
        trials: In the order in which they are run.
        out: Folder of the study.
        train: Trains a run in a folder; by default a process that runs `vlmoe train`.
        judge: Makes the numbers of a trained folder.

    Returns:
        Results by name, in the order of the trials.

    Raises:
        ConfigError: A folder holds another run than the trial's, or two trials are the same.
        subprocess.CalledProcessError: A training process failed.
    """
    folders = [trial.folder for trial in trials]
    if repeated := next((folder for folder in folders if folders.count(folder) > 1), ""):
        raise ConfigError(
            f"{repeated} would be counted {folders.count(repeated)} times, as if it had been trained "
            f"as often; give every seed and every method once"
        )
    found: dict[str, list[Result]] = {}
    for number, trial in enumerate(trials, start=1):
        folder = out / trial.folder
        result = finished(trial, folder)
        what = "done before" if result else "training"
        logger.info(
            "%d of %d: %s, seed %d: %s", number, len(trials), trial.name, trial.run.seed, what
        )
        if result is None:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / RUN_FILE).write_text(dump_yaml(trial.run), encoding="utf-8")
            (train or train_process)(trial.run, folder)
            result = judge(folder)
            write_json(folder / RESULT_FILE, result)
        found.setdefault(trial.name, []).append(result)
    return found


def run_or_tell(
    make: Callable[[], Sequence[Trial]], out: Path
) -> tuple[Sequence[Trial], dict[str, list[Result]]] | int:
    """Make trials and do them; the exit status of a command that cannot, which has said why."""
    try:
        trials = make()
        return trials, run_trials(trials, out)
    except VlmError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except subprocess.CalledProcessError as error:
        print("error: a training process failed; the reason stands above", file=sys.stderr)
        return error.returncode


def finished(trial: Trial, folder: Path) -> Result | None:
    """The numbers of a trial that was done before; None when it is still to be done, or to be
    ended.

    Raises:
        ConfigError: The folder holds another run.
    """
    written = folder / RUN_FILE
    if written.exists() and written.read_text(encoding="utf-8") != dump_yaml(trial.run):
        raise ConfigError(
            f"{folder} holds a trial with other settings (see its {RUN_FILE}); choose another --out, "
            f"or remove that folder to train it again"
        )
    if not (folder / RESULT_FILE).exists():
        return None
    result: Result = json.loads((folder / RESULT_FILE).read_text(encoding="utf-8"))
    return result


def train_process(run: RunConfig, folder: Path) -> None:
    """`vlmoe train` in a process of its own, so that nothing of one trial is left in the next;
    quiet."""
    command = [
        sys.executable,
        "-m",
        "pretrain",
        "train",
        str(folder / RUN_FILE),
        "--out",
        str(folder),
    ]
    with (folder / "output.log").open("ab") as output:
        try:
            subprocess.run(command, check=True, stdout=output, stderr=output)
        except subprocess.CalledProcessError:
            tail = (folder / "output.log").read_text(errors="replace").splitlines()[-3:]
            logger.error(
                "training of %s failed (%s): %s",
                folder.name,
                folder / "output.log",
                " | ".join(tail),
            )
            raise


def load_trial(path_or_preset: str, overrides: Sequence[str], *, steps: int) -> RunConfig:
    """A run made ready for a study: one process, all pairs of a step at once, no pictures.

    Args:
        path_or_preset: The run.
        overrides: A person's settings; they win.
        steps: Optimizer steps, with a warm-up of a tenth of them, at most 100; 0 leaves the run's
            own.
    """
    settings = [
        "parallel.engine=plain",
        "parallel.expert_parallel_size=1",
        "log.captions_every_steps=0",
        "log.routing_every_steps=0",
    ]
    if steps:
        settings += [
            f"schedule.total_steps={steps}",
            f"schedule.warmup_steps={min(100, steps // 10)}",
        ]
    run = load_run(path_or_preset, [*settings, *overrides])
    if any(setting.startswith("batch.micro_batch_size=") for setting in overrides):
        return run
    # Micro-batches would cost a second forward pass and change nothing.
    return replace(run, batch=replace(run.batch, micro_batch_size=run.batch.global_batch_size))
