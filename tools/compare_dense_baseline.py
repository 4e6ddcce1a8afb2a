"""`python -m tools.compare_dense_baseline`: what the experts are worth, against a dense model of equal active
FLOPs.

Trains a sparse run and its dense twin (`pretrain.model.dense_baseline`) on the same pairs in the same order,
with several seeds, judges both, and prints one table: means over the seeds, and the mean difference
seed by seed with its spread. Each run has its own folder; runs that are done are used again.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from data_pipeline.common.logs import setup_logging
from pretrain.config.schema import RunConfig
from pretrain.config.validate import check
from pretrain.evaluate.report import write_json
from pretrain.model.dense_baseline import USUAL_TEXT_TOKENS, caption_tokens, dense_baseline
from tools.study.tables import markdown, paired, pick, spread
from tools.study.trials import Result, Trial, load_trial, run_or_tell

SPARSE, DENSE = "sparse", "dense"

EXAMPLES = """\
examples:
  python -m tools.compare_dense_baseline                              three pairs of runs on the quickstart's pictures
  python -m tools.compare_dense_baseline --seeds 0 --steps 200        one short pair
  python -m tools.compare_dense_baseline --out runs/twin moe.num_experts=16 optim.lr=1e-3
  python -m tools.compare_dense_baseline --run run.yaml --text-tokens 24
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the comparison; returns the exit status."""
    options = _parse(arguments)
    setup_logging()
    done = run_or_tell(
        lambda: make_trials(
            options.run,
            options.overrides,
            seeds=options.seeds,
            steps=options.steps,
            text_tokens=options.text_tokens,
        ),
        options.out,
    )
    if isinstance(done, int):
        return done
    _, results = done
    table = comparison(results[SPARSE], results[DENSE])
    print(table)
    write_json(options.out / "comparison.json", results)
    (options.out / "comparison.md").write_text(table + "\n", encoding="utf-8")
    return 0


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tools.compare_dense_baseline",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--run",
        default="quickstart",
        help="a run file or a preset with experts (default: quickstart)",
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("runs/twin"),
        help="folder of all runs (default: runs/twin)",
    )
    parser.add_argument(
        "--seeds",
        type=int,
        nargs="+",
        default=[0, 1, 2],
        help="one pair of runs each (default: 0 1 2)",
    )
    parser.add_argument(
        "--steps", type=int, default=0, help="optimizer steps of each run (default: the run's own)"
    )
    parser.add_argument(
        "--text-tokens",
        type=float,
        default=None,
        help=f"average tokens of a caption, for equal FLOPs (default: {USUAL_TEXT_TOKENS}, at most "
        f"model.context_length)",
    )
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="settings of both, such as optim.lr=1e-3"
    )
    return parser.parse_args(arguments)


def make_trials(
    run: str,
    overrides: Sequence[str],
    *,
    seeds: Sequence[int],
    steps: int,
    text_tokens: float | None,
) -> list[Trial]:
    """Both models with every seed; seed by seed, so that a study that is stopped has whole pairs.

    Raises:
        ConfigError: The run or the number of text tokens is impossible, or there is no twin.
    """
    sparse = load_trial(run, overrides, steps=steps)
    tokens = caption_tokens(text_tokens, sparse.model.context_length)
    trials = []
    for seed in seeds:
        for name, one in ((SPARSE, sparse), (DENSE, dense_baseline(sparse, text_tokens=tokens))):
            seeded: RunConfig = replace(one, seed=seed)
            check(seeded, 1, source=f"{run} ({name})")
            trials.append(Trial(name, seeded))
    return trials


def comparison(sparse: Sequence[Result], dense: Sequence[Result]) -> str:
    """The table, from the results of both by seed."""
    rows = []
    for label, path, digits in _rows(sparse[0]):
        values = [[pick(result, path) for result in results] for results in (sparse, dense)]
        known = [[value for value in column if value is not None] for column in values]
        if not known[0] or len(known[0]) != len(known[1]):
            continue
        rows.append(
            [
                label,
                spread(known[0]).text(digits),
                spread(known[1]).text(digits),
                paired(*known).text(digits, signed=True),
            ]
        )
    seeds = ", ".join(str(result["seed"]) for result in sparse)
    head = ["", "sparse", "dense twin", "sparse - dense"]
    facts = (
        f"{sparse[0]['pairs']:,} pairs in {sparse[0]['steps']:,} steps each, seeds {seeds}: mean ± standard "
        f"deviation, differences seed by seed; recalls and captions in percent"
    )
    return f"{markdown(head, rows)}\n\n{facts}"


def _rows(result: Mapping[str, Any]) -> list[tuple[str, tuple[str, ...], int]]:
    """Label, place in a result and decimals of each row."""
    rows: list[tuple[str, tuple[str, ...], int]] = [
        ("loss (contrast + captions, weighted)", ("loss", "main"), 4),
        ("  contrastive", ("loss", "contrastive"), 4),
        ("  caption", ("loss", "caption"), 4),
    ]
    for name, scores in result["eval"].items():
        for way, words in (("image_to_text", "image to text"), ("text_to_image", "text to image")):
            rows += [
                (f"{name}: {words} {at}", ("eval", name, f"{way}/{at}"), 2)
                for at in ("R@1", "R@5", "R@10")
                if f"{way}/{at}" in scores
            ]
        rows.append((f"{name}: captions exactly right", ("eval", name, "caption_exact"), 2))
        rows.append((f"{name}: caption tokens right", ("eval", name, "caption_tokens"), 2))
    return [
        *rows,
        ("seconds of training", ("seconds",), 1),
        ("million FLOPs a pair", ("mega_flops_per_pair",), 2),
        ("thousand parameters", ("kilo_parameters",), 1),
        ("  active per token", ("kilo_active_parameters",), 1),
    ]


if __name__ == "__main__":
    sys.exit(main())
