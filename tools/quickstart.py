"""`make quickstart`: data, tokenizer, training on two processes and evaluation, in 15 minutes.

It uses only commands that also run on a cluster: `python -m tools.quickstart_data`, `vlmoe train`
under torchrun, and the evaluation of `vlmoe eval`. It only chooses the number of steps: a short
trial measures the speed of this machine, and the run has as many steps as fit into `--minutes`;
`--steps` sets their number instead.
"""

from __future__ import annotations

import argparse
import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from data_pipeline.common.errors import VlmError
from data_pipeline.common.logs import setup_logging
from data_pipeline.common.tables import counted, format_rows
from pretrain.config.presets import load_run
from pretrain.config.schema import EvalSet, RunConfig
from pretrain.parallel.environment import free_port
from pretrain.train.jsonl import METRICS_FILE, read_log
from tools.quickstart_data import __main__ as quickstart_data_command

logger = logging.getLogger(__name__)

PRESET = "quickstart"
DATA_FOLDER = Path("data/quickstart")
RANKS = 2
TRIAL_STEPS = 16
MAX_STEPS = 2400
"""With 13,000 training pairs, more steps hardly improve the model."""
PRINTED_CAPTIONS = 10


def main(arguments: list[str] | None = None) -> int:
    """Run the quickstart; returns the exit status."""
    options = _parse_arguments(arguments)
    setup_logging()
    status = quickstart_data_command.main(["--out", str(DATA_FOLDER)])
    if status:
        return status
    try:
        steps = (
            options.steps
            or _steps_of_existing_run(options.out)
            or choose_steps(options.minutes, _measure_seconds_per_step(options))
        )
        _train(options.out, [*schedule_settings(steps), *options.overrides])
        summary = summarize(options.out)
    except VlmError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except subprocess.CalledProcessError as error:
        print("error: training failed; see its output above", file=sys.stderr)
        return error.returncode
    print(
        f"\nall results: {options.out}/summary.json ({summary['samples_seen']:,} pairs seen in "
        f"{summary['train_seconds'] / 60:.1f} minutes of training)"
    )
    tensorboard = os.path.relpath(Path(sys.executable).with_name("tensorboard"))
    print(f"view curves: {tensorboard} --logdir {options.out}")
    return 0


def _parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tools.quickstart",
        description="Download images with captions, train a small sparse vision-language model on "
        "two processes, and evaluate it.",
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("runs/quickstart"),
        help="folder of the run (default: %(default)s)",
    )
    parser.add_argument(
        "--minutes",
        type=float,
        default=9.3,
        help="training time from which the number of steps is computed (default: %(default)s)",
    )
    parser.add_argument(
        "--steps",
        type=int,
        default=0,
        help="optimizer steps, without a trial (default: as many as fit into --minutes)",
    )
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="settings, such as optim.lr=1e-3"
    )
    return parser.parse_args(arguments)


def _steps_of_existing_run(out: Path) -> int:
    """Number of steps of an existing run; 0 if there is none.

    A resumed run must keep its schedule.
    """
    config = out / "config.yaml"
    if not config.exists() or not (out / "checkpoints" / "latest").exists():
        return 0
    steps = load_run(config).schedule.total_steps
    logger.info("resuming %s, a run of %s", out, counted(steps, "step"))
    return steps


def _measure_seconds_per_step(options: argparse.Namespace) -> float:
    """Mean of the second half of a short trial of the run; the first steps are slower."""
    trial = options.out.with_name(options.out.name + "-trial")
    shutil.rmtree(trial, ignore_errors=True)
    logger.info("measuring the speed of this machine with a trial of %d steps", TRIAL_STEPS)
    _train(
        trial,
        [
            f"schedule.total_steps={TRIAL_STEPS}",
            "schedule.warmup_steps=0",
            "log.captions_every_steps=0",
            f"log.every_steps={TRIAL_STEPS // 2}",
            "checkpoint.every_steps=0",
            *options.overrides,
        ],
    )
    seconds_per_step = read_log(trial / METRICS_FILE)[-1].throughput.seconds_per_step
    shutil.rmtree(trial)
    return seconds_per_step


def choose_steps(minutes: float, seconds_per_step: float) -> int:
    """The number of steps that fit into `minutes`, 1 to `MAX_STEPS`; logs why."""
    fitting = int(60 * minutes / seconds_per_step)
    steps = max(1, min(MAX_STEPS, fitting))
    logger.info(
        "the trial took %.2f s per step (steps %d to %d), so %s fit into --minutes %g",
        seconds_per_step,
        TRIAL_STEPS // 2 + 1,
        TRIAL_STEPS,
        counted(fitting, "step"),
        minutes,
    )
    logger.info(
        "training for %s%s, about %.1f minutes; --steps N sets their number instead, "
        "independent of the trial",
        counted(steps, "step"),
        f" (at most {MAX_STEPS:,})" if fitting > MAX_STEPS else "",
        steps * seconds_per_step / 60,
    )
    return steps


def schedule_settings(steps: int) -> list[str]:
    """A run of `steps` steps; its warm-up is that of the preset, or a tenth of a shorter run."""
    settings = [f"schedule.total_steps={steps}"]
    if steps < load_run(PRESET).schedule.num_warmup_steps:
        settings.append(f"schedule.warmup_steps={steps // 10}")
    return settings


def _train(out: Path, overrides: list[str]) -> None:
    """Run `vlmoe train` on `RANKS` processes, as on a cluster."""
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        f"--nproc-per-node={RANKS}",
        "--master-addr=127.0.0.1",
        f"--master-port={free_port()}",
        "-m",
        "pretrain",
        "train",
        PRESET,
        "--out",
        str(out),
        *overrides,
    ]
    environment = {"OMP_NUM_THREADS": "1"} | os.environ
    subprocess.run(command, check=True, env=environment)


def summarize(out: Path) -> dict[str, Any]:
    """Evaluate the run, print the scores and some captions, and write `summary.json`."""
    from data_pipeline.common.json_file import write_json
    from pretrain.checkpoint.reader import find_latest, read_meta
    from pretrain.evaluate.command import evaluate_caption_samples, evaluate_sets
    from pretrain.evaluate.report import format_results
    from pretrain.evaluate.trained_model import load_model

    checkpoint = find_latest(out / "checkpoints")
    assert checkpoint is not None, "training always ends with a checkpoint"
    state = read_meta(checkpoint).state["train"]
    trained = load_model(out)
    results = evaluate_sets(trained, trained.run.eval.sets)
    train_set = EvalSet(name="train", shards=str(DATA_FOLDER / "train"), caption_keys=("txt",))
    train_captions = evaluate_caption_samples(trained, train_set)
    summary = {
        "train_seconds": state["seconds"],
        "samples_seen": state["samples_seen"],
        "steps": state["step"],
        "params": _parameter_counts(trained.run),
        "captions": {
            "train_exact": train_captions["caption_exact"],
            "unseen_style_exact": results["unseen_style"]["caption_exact"],
        },
        "eval": {name: _scores(result) for name, result in results.items()},
        "experts": _expert_load(out),
    }
    write_json(out / "summary.json", summary)

    print(f"\n{format_results(results)}\n")
    print(f"training images: {train_captions['caption_exact']:.1f} % exact matches of captions")
    examples = results["unseen_style"]["examples"][:PRINTED_CAPTIONS]
    print(f"\n{len(examples)} images of a held-out style (true caption -> generated caption):")
    print(format_rows([(f"  {e['references'][0]}", f"-> {e['generated']}") for e in examples]))
    return summary


def _scores(result: dict[str, Any]) -> dict[str, Any]:
    return {key: result[key] for key in ("image_to_text", "text_to_image", "chance", "images")}


def _parameter_counts(run: RunConfig) -> dict[str, int]:
    from pretrain.model.count import count_parameters

    count = count_parameters(run.model, run.moe)
    return {"total": count.total, "active": count.active}


def _expert_load(out: Path) -> dict[str, float]:
    """Smallest and largest load of any expert in the last logged step, relative to the mean."""
    layers = read_log(out / METRICS_FILE)[-1].layers
    return {
        "min_over_mean_load": min(layer.min_over_mean_load for layer in layers),
        "max_over_mean_load": max(layer.max_over_mean_load for layer in layers),
    }


if __name__ == "__main__":
    sys.exit(main())
