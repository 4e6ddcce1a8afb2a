"""`python -m tools.balancing_study`: load-balancing methods on the same model, data and seeds.

Prints one table. The topology (number and width of experts, top-k, shared experts) is always that
of the run, also for presets, so that only routing and balancing differ. Each run has its own
folder; completed runs are reused, so adding seeds trains only the new ones.
"""

from __future__ import annotations

import argparse
import sys
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from data_pipeline.common import storage
from data_pipeline.common.errors import ConfigError
from data_pipeline.common.json_file import write_json
from data_pipeline.common.logs import setup_logging
from data_pipeline.common.tables import format_rows, markdown_table
from data_pipeline.common.yaml_file import load_yaml
from pretrain.config.presets import preset_path
from pretrain.config.schema import RunConfig
from pretrain.config.validate import check_run
from tools.study.arguments import study_parser
from tools.study.methods import METHODS, apply_method
from tools.study.seed_means import lookup, seed_mean
from tools.study.trials import Result, Trial, load_trial, run_or_report_error

DOCS = Path("docs/balancing.md")
DOCS_HEAD = """# Load-balancing methods compared

Written by `python -m tools.balancing_study --write-docs`. `tools/study/methods.py` defines the
methods and their settings.
"""
PREFERRED_EVAL_SET = "unseen_style"
"""Evaluation set whose recalls the table shows; the first one if the run lacks it."""


class Column(NamedTuple):
    """A column of the table."""

    header: str
    path: tuple[str, ...]
    """Keys of the value in a result."""
    digits: int
    factor: float = 1.0


EXPERT_COLUMNS = (
    Column("max/mean", ("routing", "max_over_mean"), 2),
    Column("image", ("routing", "image", "max_over_mean"), 2),
    Column("text", ("routing", "text", "max_over_mean"), 2),
    Column("used image", ("routing", "image", "used"), 1),
    Column("used text", ("routing", "text", "used"), 1),
    Column("entropy image", ("routing", "image", "entropy"), 2),
    Column("entropy text", ("routing", "text", "entropy"), 2),
    Column("dropped % image", ("routing", "image", "dropped"), 1, 100.0),
    Column("dropped % text", ("routing", "text", "dropped"), 1, 100.0),
    Column("dead", ("routing", "dead"), 1),
)

EXAMPLES = """\
examples:
  python -m tools.balancing_study                          every method once, on the quickstart data
  python -m tools.balancing_study --methods none balance sign --steps 200
  python -m tools.balancing_study --seeds 0 1 2 --write-docs        the table of docs/balancing.md
  python -m tools.balancing_study --run run.yaml --steps 0 moe.num_experts=16
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the study; returns the exit status."""
    options = _parse(arguments)
    setup_logging()
    outcome = run_or_report_error(
        lambda: make_trials(
            options.run,
            options.overrides,
            methods=options.methods,
            seeds=options.seeds,
            steps=options.steps,
        ),
        options.out,
    )
    if isinstance(outcome, int):
        return outcome
    trials, results = outcome
    text = report(results, trials[0].run)
    print(text)
    write_json(options.out / "balancing.json", results)
    storage.write_bytes(str(options.out / "balancing.md"), f"{text}\n".encode())
    if options.write_docs:
        storage.write_bytes(str(DOCS), f"{DOCS_HEAD}\n{text}\n".encode())
        print(f"\nwrote {DOCS}")
    return 0


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    methods = format_rows([(f"  {method.name}", method.description) for method in METHODS])
    parser = study_parser(
        "tools.balancing_study",
        __doc__,
        f"{EXAMPLES}\nmethods:\n{methods}",
        out="runs/balancing",
        seeds=[0],
        steps=600,
    )
    parser.add_argument(
        "--methods",
        nargs="+",
        metavar="NAME",
        default=[method.name for method in METHODS],
        help="methods to compare (default: all those listed below)",
    )
    parser.add_argument("--write-docs", action="store_true", help=f"also write {DOCS}")
    return parser.parse_args(arguments)


def make_trials(
    run: str, overrides: Sequence[str], *, methods: Sequence[str], seeds: Sequence[int], steps: int
) -> list[Trial]:
    """The runs to train, ordered by seed first, so that an interrupted study covers all methods.

    Raises:
        ConfigError: A method is unknown, or invalid for the run.
    """
    base = load_trial(run, overrides, steps=steps)
    known = {method.name: method for method in METHODS}
    if unknown := [name for name in methods if name not in known]:
        raise ConfigError(
            f"--methods {unknown[0]}: unknown method; expected one of {', '.join(known)}"
        )
    presets = {name: _load_preset(name) for name in {m.preset for m in known.values() if m.preset}}
    trials = []
    for seed in seeds:
        for name in methods:
            config: RunConfig = replace(
                apply_method(base, known[name], presets), seed=seed, name=name
            )
            check_run(config, 1, source=name)
            trials.append(Trial(name, config))
    return trials


def _load_preset(name: str) -> Mapping[str, Any]:
    path = preset_path(name)
    assert path is not None, name
    return load_yaml(path)


def columns(run: RunConfig) -> list[Column]:
    """All columns except the first, which names the method."""
    eval_set = _eval_set(run)
    recalls = [
        Column(rank, ("eval", eval_set, f"image_to_text/{rank}"), 2) for rank in ("R@1", "R@5")
    ]
    return [Column("loss", ("loss", "main"), 3), *recalls, *EXPERT_COLUMNS]


def _eval_set(run: RunConfig) -> str:
    names = [eval_set.name for eval_set in run.eval.sets]
    if PREFERRED_EVAL_SET in names or not names:
        return PREFERRED_EVAL_SET
    return names[0]


def report(results: Mapping[str, Sequence[Result]], run: RunConfig) -> str:
    """The table and a description of its columns, in Markdown."""
    table_columns = columns(run)
    rows = []
    for name, method_results in results.items():
        row = [name]
        for column in table_columns:
            values = [lookup(result, column.path) for result in method_results]
            scaled = [None if value is None else column.factor * value for value in values]
            row.append(seed_mean(scaled).text(column.digits))
        rows.append(row)
    table = markdown_table(["method", *(column.header for column in table_columns)], rows)
    return f"{table}\n\n{_caption(next(iter(results.values())), run)}"


def _caption(results: Sequence[Result], run: RunConfig) -> str:
    num_layers = len(run.moe.blocks(run.model.num_layers))
    seeds = ", ".join(str(result["seed"]) for result in results)
    if len(results) > 1:
        seeds += " (mean ± standard deviation)"
    setup = (
        f"{num_layers} layers of {run.moe.num_experts} routed and {run.moe.shared_experts} shared "
        f"experts, top-{run.moe.top_k}; {results[0]['pairs']:,} pairs in "
        f"{results[0]['steps']:,} steps; seeds {seeds}."
    )
    legend = (
        "`loss` is the weighted contrastive and caption loss without auxiliary losses. R@1 and R@5 "
        f"(percent) are image-to-text recalls on {_eval_set(run)}. Expert load and entropies are "
        "measured in training over the last tenth of the run, means over layers: `max/mean` is the "
        "load of the busiest expert over the mean load, of all tokens, of patches (`image`) and of "
        "text; `used` is the effective number of experts (that with the same entropy at uniform "
        "load); `entropy` (nats) is that of a token's router scores; `dropped` are assignments "
        f"over capacity; `dead` counts experts of all layers ({num_layers * run.moe.num_experts}) "
        "with less than 1 % of the mean load."
    )
    return textwrap.fill(f"{setup} {legend}", 118, break_on_hyphens=False)


if __name__ == "__main__":
    sys.exit(main())
