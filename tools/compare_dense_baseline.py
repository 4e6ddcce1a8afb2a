"""`python -m tools.compare_dense_baseline`: a sparse run compared with its dense baseline.

Trains both (the baseline has equal active FLOPs, see `pretrain.model.dense_baseline`) on the same
pairs in the same order with several seeds, evaluates them, and prints one table: means over the
seeds, and the mean and standard deviation of the differences between two runs with the same seed.
Each run has its own folder; completed runs are reused.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from data_pipeline.common import storage
from data_pipeline.common.json_file import write_json
from data_pipeline.common.logs import setup_logging
from data_pipeline.common.tables import markdown_table
from pretrain.config.schema import RunConfig
from pretrain.config.validate import check_run
from pretrain.model.dense_baseline import DEFAULT_TEXT_TOKENS, dense_baseline, resolve_text_tokens
from tools.study.arguments import study_parser
from tools.study.seed_means import lookup, paired_difference, seed_mean
from tools.study.trials import Result, Trial, load_trial, run_or_report_error

SPARSE, DENSE = "sparse", "dense"

EXAMPLES = """\
examples:
  python -m tools.compare_dense_baseline                        three pairs of quickstart runs
  python -m tools.compare_dense_baseline --seeds 0 --steps 200  one short pair
  python -m tools.compare_dense_baseline --out runs/sixteen moe.num_experts=16 optim.lr=1e-3
  python -m tools.compare_dense_baseline --run run.yaml --text-tokens 24
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the comparison; returns the exit status."""
    options = _parse(arguments)
    setup_logging()
    outcome = run_or_report_error(
        lambda: make_trials(
            options.run,
            options.overrides,
            seeds=options.seeds,
            steps=options.steps,
            text_tokens=options.text_tokens,
        ),
        options.out,
    )
    if isinstance(outcome, int):
        return outcome
    _, results = outcome
    table = comparison(results[SPARSE], results[DENSE])
    print(table)
    write_json(options.out / "comparison.json", results)
    storage.write_bytes(str(options.out / "comparison.md"), f"{table}\n".encode())
    return 0


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = study_parser(
        "tools.compare_dense_baseline",
        __doc__,
        EXAMPLES,
        out="runs/dense-baseline",
        seeds=[0, 1, 2],
        steps=0,
    )
    parser.add_argument(
        "--text-tokens",
        type=float,
        default=None,
        help="mean number of caption tokens, for equal FLOPs "
        f"(default: {DEFAULT_TEXT_TOKENS}, at most model.context_length)",
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
    """Both models for each seed, in pairs: an interrupted study then has complete pairs.

    Raises:
        ConfigError: The run or the number of text tokens is invalid, or there is no dense baseline.
    """
    sparse = load_trial(run, overrides, steps=steps)
    tokens = resolve_text_tokens(text_tokens, sparse.model.context_length)
    dense = dense_baseline(sparse, text_tokens=tokens)
    trials = []
    for seed in seeds:
        for name, config in ((SPARSE, sparse), (DENSE, dense)):
            seeded: RunConfig = replace(config, seed=seed)
            check_run(seeded, 1, source=f"{run} ({name})")
            trials.append(Trial(name, seeded))
    return trials


def comparison(sparse: Sequence[Result], dense: Sequence[Result]) -> str:
    """The Markdown table of the results of both models, ordered by seed."""
    rows = []
    for label, path, digits in _rows(sparse[0]):
        sparse_values = _known(sparse, path)
        dense_values = _known(dense, path)
        if not sparse_values or len(sparse_values) != len(dense_values):
            continue
        rows.append(
            [
                label,
                seed_mean(sparse_values).text(digits),
                seed_mean(dense_values).text(digits),
                paired_difference(sparse_values, dense_values).text(digits, signed=True),
            ]
        )
    seeds = ", ".join(str(result["seed"]) for result in sparse)
    header = ["", "sparse", "dense baseline", "sparse - dense"]
    caption = (
        f"{sparse[0]['pairs']:,} pairs in {sparse[0]['steps']:,} steps each, seeds {seeds}: mean ± "
        f"standard deviation, differences of runs with the same seed; recalls and captions in "
        f"percent"
    )
    return f"{markdown_table(header, rows)}\n\n{caption}"


def _known(results: Sequence[Result], path: Sequence[str]) -> list[float]:
    """The values at `path` that are not None."""
    values = [lookup(result, path) for result in results]
    return [value for value in values if value is not None]


def _rows(result: Mapping[str, Any]) -> list[tuple[str, tuple[str, ...], int]]:
    """Label, path in a result, and decimals of each row."""
    rows: list[tuple[str, tuple[str, ...], int]] = [
        ("loss (contrastive + caption, weighted)", ("loss", "main"), 4),
        ("  contrastive", ("loss", "contrastive"), 4),
        ("  caption", ("loss", "caption"), 4),
    ]
    for name, scores in result["eval"].items():
        for direction in ("image_to_text", "text_to_image"):
            for rank in ("R@1", "R@5", "R@10"):
                key = f"{direction}/{rank}"
                if key in scores:
                    label = f"{name}: {direction.replace('_', ' ')} {rank}"
                    rows.append((label, ("eval", name, key), 2))
        rows.append((f"{name}: exact captions", ("eval", name, "caption_exact"), 2))
        rows.append((f"{name}: caption token accuracy", ("eval", name, "caption_tokens"), 2))
    return [
        *rows,
        ("training seconds", ("seconds",), 1),
        ("MFLOPs per pair", ("mega_flops_per_pair",), 2),
        ("thousand parameters", ("kilo_parameters",), 1),
        ("  active per token", ("kilo_active_parameters",), 1),
    ]


if __name__ == "__main__":
    sys.exit(main())
