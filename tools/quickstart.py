"""`make quickstart`: data, tokenizer, training on two processes, evaluation, in about a quarter of
an hour.

Only commands that a cluster runs too: `python -m tools.quickstart_data`, `vlmoe train` under
torchrun, and the evaluation of `vlmoe eval`. The one thing added is the length of the run: a short
trial measures what this machine trains in a second, and the run is as long as fits into the minutes
asked for.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from data_pipeline.common.errors import VlmError
from data_pipeline.common.logs import setup_logging
from pretrain.config.presets import load_run
from pretrain.config.schema import RunConfig
from pretrain.parallel.environment import free_port
from tools.quickstart_data import __main__ as quickstart_data_command

logger = logging.getLogger(__name__)

PRESET, DATA = "quickstart", Path("data/quickstart")
RANKS = 2
TRIAL_STEPS = 16
MAX_STEPS = 2400
"""More steps than this bring little on 13,000 pairs."""


def main(arguments: list[str] | None = None) -> int:
    """Run all of it; returns the exit status."""
    options = _parse(arguments)
    setup_logging()
    status = quickstart_data_command.main(["--out", str(DATA)])
    if status:
        return status
    try:
        steps = options.steps or _steps_of(options.out) or _fitting_steps(options)
        _train(options.out, [f"schedule.total_steps={steps}", *options.overrides])
        summary = summarize(options.out)
    except VlmError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except subprocess.CalledProcessError as error:
        print("error: training failed; the reason stands above", file=sys.stderr)
        return error.returncode
    print(
        f"\nall numbers: {options.out}/summary.json ({summary['samples_seen']:,} pairs seen in "
        f"{summary['train_seconds'] / 60:.1f} minutes of training)"
    )
    tensorboard = os.path.relpath(Path(sys.executable).with_name("tensorboard"))
    print(f"watch it:    {tensorboard} --logdir {options.out}")
    return 0


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tools.quickstart",
        description="Fetch real pictures, train a small sparse vision-language model on two processes, judge it.",
    )
    parser.add_argument(
        "--out", type=Path, default=Path("runs/quickstart"), help="folder of the run"
    )
    parser.add_argument(
        "--minutes", type=float, default=9.3, help="training time that the run is sized for"
    )
    parser.add_argument(
        "--steps", type=int, default=0, help="optimizer steps; 0 measures what fits the minutes"
    )
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="settings, such as optim.lr=1e-3"
    )
    return parser.parse_args(arguments)


def _steps_of(out: Path) -> int:
    """The length of a run that was begun: going on must not change its schedule; 0 when there is
    none."""
    config = out / "config.yaml"
    if not config.exists() or not (out / "checkpoints" / "latest").exists():
        return 0
    steps = load_run(config).schedule.total_steps
    logger.info("%s was begun with %d steps; going on with it", out, steps)
    return steps


def _fitting_steps(options: argparse.Namespace) -> int:
    """Measure this machine on a short trial of the same run."""
    trial = options.out.with_name(options.out.name + "-trial")
    shutil.rmtree(trial, ignore_errors=True)
    logger.info("a trial of %d steps measures this machine", TRIAL_STEPS)
    half = TRIAL_STEPS // 2
    _train(
        trial,
        [
            f"schedule.total_steps={TRIAL_STEPS}",
            "schedule.warmup_steps=0",
            "log.captions_every_steps=0",
            f"log.every_steps={half}",
            "checkpoint.every_steps=0",
            *options.overrides,
        ],
    )
    last = json.loads((trial / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[-1])
    shutil.rmtree(trial)
    seconds_per_step = last["perf/seconds_per_step"]
    steps = min(MAX_STEPS, int(60 * options.minutes / seconds_per_step))
    logger.info(
        "%.2f s a step: %d steps fit into %.1f minutes", seconds_per_step, steps, options.minutes
    )
    return steps


def _train(out: Path, overrides: list[str]) -> None:
    """`vlmoe train` on `RANKS` processes, as a cluster starts it."""
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
    """Judge the run, print the table and ten captions, write `summary.json`."""
    from pretrain.checkpoint.reader import find_latest, read_meta
    from pretrain.evaluate.command import evaluate_sets, evaluate_written
    from pretrain.evaluate.report import format_table, write_json
    from pretrain.evaluate.trained import load_trained

    checkpoint = find_latest(out / "checkpoints")
    assert checkpoint is not None, "training always ends with a checkpoint"
    trained = load_trained(out)
    results = evaluate_sets(trained, trained.run.eval.sets)
    seen = evaluate_written(trained, str(DATA / "train"), name="train")
    state = read_meta(checkpoint).state["train"]
    summary = {
        "train_seconds": state["seconds"],
        "samples_seen": state["samples_seen"],
        "steps": state["step"],
        "params": _parameters(trained.run),
        "captions": {
            "train_exact": seen["caption_exact"],
            "unseen_style_exact": results["unseen_style"]["caption_exact"],
        },
        "eval": {
            name: {
                key: result[key] for key in ("image_to_text", "text_to_image", "chance", "images")
            }
            for name, result in results.items()
        },
        "experts": _expert_shares(out),
    }
    write_json(out / "summary.json", summary)
    print(
        f"\n{format_table(results)}\n\ntraining pictures: {seen['caption_exact']:.1f} % of captions exactly right"
    )
    print("\nten pictures of a style it has never seen, and what it wrote:")
    for example in results["unseen_style"]["examples"][:10]:
        print(f"  {example['true']:<36} -> {example['written']}")
    return summary


def _parameters(run: RunConfig) -> dict[str, int]:
    from pretrain.model.count import count_parameters

    count = count_parameters(run.model, run.moe)
    return {"total": count.total, "active": count.active}


def _expert_shares(out: Path) -> dict[str, float]:
    """Least and most used expert of any layer in the last report, as multiples of a fair share."""
    last = json.loads((out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[-1])
    # moe/max_over_mean_load/layer_03; with a modality behind it the name has one more part.
    loads = {
        name: value
        for name, value in last.items()
        if "_over_mean_load/" in name and name.count("/") == 2
    }
    least = [value for name, value in loads.items() if name.startswith("moe/min")]
    most = [value for name, value in loads.items() if name.startswith("moe/max")]
    return {"least_over_fair_share": min(least), "most_over_fair_share": max(most)}


if __name__ == "__main__":
    sys.exit(main())
