"""Trains and evaluates a list of runs, each in its own folder; completed runs are not repeated.

    OUT/NAME/run.yaml       configuration of the run
    OUT/NAME/result.json    its metrics, written last: a folder that has them is complete
    OUT/NAME/...            output of `vlmoe train`

After an interruption, rerun the same command: an incomplete trial resumes from its last checkpoint.
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
from data_pipeline.common.json_file import write_json
from pretrain.config.presets import load_run
from pretrain.config.schema import RunConfig
from tools.study.run_metrics import evaluate_run

logger = logging.getLogger(__name__)

RUN_FILE, RESULT_FILE, LOG_FILE = "run.yaml", "result.json", "output.log"

Result = dict[str, Any]
Train = Callable[[RunConfig, Path], None]
Evaluate = Callable[[Path], Result]


class Trial(NamedTuple):
    """One training configuration with one seed."""

    name: str
    """Name of the configuration; trials that differ only in the seed share it."""
    run: RunConfig

    @property
    def folder(self) -> str:
        """Folder name within the study."""
        return f"{self.name}-seed{self.run.seed}"


def run_trials(
    trials: Sequence[Trial],
    out: Path,
    *,
    train: Train | None = None,
    evaluate: Evaluate = evaluate_run,
) -> dict[str, list[Result]]:
    """Train and evaluate the trials that are not complete.

    Args:
        trials: In execution order.
        out: Folder of the study.
        train: Trains a run in a folder; the default starts `vlmoe train` in a subprocess.
        evaluate: Computes the metrics of a trained folder.

    Returns:
        Results of all trials by name, in order.

    Raises:
        ConfigError: A folder holds a different run, or two trials are equal.
        subprocess.CalledProcessError: A training process failed.
    """
    folders = [trial.folder for trial in trials]
    if repeated := next((folder for folder in folders if folders.count(folder) > 1), ""):
        raise ConfigError(
            f"{repeated} would be counted {folders.count(repeated)} times although it is trained "
            f"once; give every seed and every method only once"
        )

    results: dict[str, list[Result]] = {}
    for index, trial in enumerate(trials, start=1):
        folder = out / trial.folder
        result = load_result(trial, folder)
        logger.info(
            "%d of %d: %s, seed %d: %s",
            index,
            len(trials),
            trial.name,
            trial.run.seed,
            "already complete" if result else "training",
        )
        if result is None:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / RUN_FILE).write_text(dump_yaml(trial.run), encoding="utf-8")
            (train or train_in_subprocess)(trial.run, folder)
            result = evaluate(folder)
            write_json(folder / RESULT_FILE, result)
        results.setdefault(trial.name, []).append(result)
    return results


def run_or_report_error(
    make_trials: Callable[[], Sequence[Trial]], out: Path
) -> tuple[Sequence[Trial], dict[str, list[Result]]] | int:
    """Make and run trials; on failure print an error and return the command's exit status."""
    try:
        trials = make_trials()
        return trials, run_trials(trials, out)
    except VlmError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except subprocess.CalledProcessError as error:
        print("error: a training process failed; see its output above", file=sys.stderr)
        return error.returncode


def load_result(trial: Trial, folder: Path) -> Result | None:
    """The result of a complete trial; None if it must be trained or resumed.

    Raises:
        ConfigError: The folder holds a different run.
    """
    run_file = folder / RUN_FILE
    if run_file.exists() and run_file.read_text(encoding="utf-8") != dump_yaml(trial.run):
        raise ConfigError(
            f"{folder} contains a trial with other settings (see its {RUN_FILE}); use another "
            f"--out, or delete that folder to train it again"
        )
    if not (folder / RESULT_FILE).exists():
        return None
    result: Result = json.loads((folder / RESULT_FILE).read_text(encoding="utf-8"))
    return result


def train_in_subprocess(run: RunConfig, folder: Path) -> None:
    """Run `vlmoe train` in a subprocess, so that trials share no state; logs to a file."""
    command = [
        *(sys.executable, "-m", "pretrain", "train"),
        *(str(folder / RUN_FILE), "--out", str(folder)),
    ]
    log = folder / LOG_FILE
    with log.open("ab") as output:
        try:
            subprocess.run(command, check=True, stdout=output, stderr=output)
        except subprocess.CalledProcessError:
            tail = log.read_text(errors="replace").splitlines()[-3:]
            logger.error("training of %s failed (%s): %s", folder.name, log, " | ".join(tail))
            raise


def load_trial(path_or_preset: str, overrides: Sequence[str], *, steps: int) -> RunConfig:
    """Load a run and adapt it to a study: one process, no gradient accumulation, only metric logs.

    Args:
        path_or_preset: The run.
        overrides: Settings of the command line; they take precedence.
        steps: Optimizer steps, with a warm-up of a tenth of them but at most 100; 0 keeps the
            schedule of the run.
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
    # Micro-batches would cost a second forward pass and give the same gradients.
    return replace(run, batch=replace(run.batch, micro_batch_size=run.batch.global_batch_size))
