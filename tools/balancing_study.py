"""`python -m tools.balancing_study`: every way of balancing on the same model, data and seeds, in
one table.

The topology (number and width of experts, experts per token, shared experts) is the run's own for
all of them, also for the presets, so that only routing and balancing differ. Each run has its own
folder; runs that are done are used again, so a longer list of seeds costs only the new ones.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from data_pipeline.common.errors import ConfigError
from data_pipeline.common.logs import setup_logging
from data_pipeline.common.yaml_file import load_yaml
from pretrain.config.presets import preset_path
from pretrain.config.schema import RunConfig
from pretrain.config.validate import check
from pretrain.evaluate.report import write_json
from tools.study.methods import METHODS, balanced
from tools.study.tables import markdown, pick, spread
from tools.study.trials import Result, Trial, load_trial, run_or_tell

DOCS = Path("docs/balancing.md")
FAVOURITE = "unseen_style"
"""The held-out set of which the table shows recalls; without it the run's first one."""

EXPERTS: tuple[tuple[str, tuple[str, ...], int, float], ...] = (
    ("max/mean", ("max_over_mean",), 2, 1),
    ("image", ("image", "max_over_mean"), 2, 1),
    ("text", ("text", "max_over_mean"), 2, 1),
    ("used image", ("image", "used"), 1, 1),
    ("used text", ("text", "used"), 1, 1),
    ("entropy image", ("image", "entropy"), 2, 1),
    ("entropy text", ("text", "entropy"), 2, 1),
    ("dropped % image", ("image", "dropped"), 1, 100),
    ("dropped % text", ("text", "dropped"), 1, 100),
    ("dead", ("dead",), 1, 1),
)
"""Columns about experts: heading, place in a result's `routing`, decimals, factor."""

EXAMPLES = """\
examples:
  python -m tools.balancing_study                                    every method once, on the quickstart's pictures
  python -m tools.balancing_study --methods none balance sign --steps 200
  python -m tools.balancing_study --seeds 0 1 2 --write-docs         the table of docs/balancing.md
  python -m tools.balancing_study --run run.yaml --steps 0 moe.num_experts=16
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the study; returns the exit status."""
    options = _parse(arguments)
    setup_logging()
    done = run_or_tell(
        lambda: make_trials(
            options.run,
            options.overrides,
            methods=options.methods,
            seeds=options.seeds,
            steps=options.steps,
        ),
        options.out,
    )
    if isinstance(done, int):
        return done
    trials, results = done
    text = report(results, trials[0].run)
    print(text)
    write_json(options.out / "balancing.json", results)
    (options.out / "balancing.md").write_text(text + "\n", encoding="utf-8")
    if options.write_docs:
        DOCS.write_text(f"{_DOCS_HEAD}\n{text}\n", encoding="utf-8")
        print(f"\nwrote {DOCS}")
    return 0


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    methods = "\n".join(f"  {method.name:<22} {method.words}" for method in METHODS)
    parser = argparse.ArgumentParser(
        prog="python -m tools.balancing_study",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=f"{EXAMPLES}\nmethods:\n{methods}",
    )
    parser.add_argument(
        "--run",
        default="quickstart",
        help="a run file or a preset with experts (default: quickstart)",
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("runs/balancing"),
        help="folder of all runs (default: runs/balancing)",
    )
    parser.add_argument(
        "--methods",
        nargs="+",
        metavar="NAME",
        default=[method.name for method in METHODS],
        help="only these (default: all, see below)",
    )
    parser.add_argument(
        "--seeds", type=int, nargs="+", default=[0], help="one run each (default: 0)"
    )
    parser.add_argument(
        "--steps",
        type=int,
        default=600,
        help="optimizer steps of each run (default: 600; 0: the run's own)",
    )
    parser.add_argument("--write-docs", action="store_true", help=f"also write {DOCS}")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="settings of all, such as optim.lr=1e-3"
    )
    return parser.parse_args(arguments)


def make_trials(
    run: str, overrides: Sequence[str], *, methods: Sequence[str], seeds: Sequence[int], steps: int
) -> list[Trial]:
    """Every method with the first seed, then with the next, so that a study that is stopped is
    even.

    Raises:
        ConfigError: A method is unknown, or impossible for the run.
    """
    base = load_trial(run, overrides, steps=steps)
    known = {method.name: method for method in METHODS}
    unknown = [name for name in methods if name not in known]
    if unknown:
        raise ConfigError(f"there is no method {unknown[0]!r}; there are {', '.join(known)}")
    presets = {name: _fragment(name) for name in {m.preset for m in known.values() if m.preset}}
    trials = []
    for seed in seeds:
        for name in methods:
            one: RunConfig = replace(balanced(base, known[name], presets), seed=seed, name=name)
            check(one, 1, source=name)
            trials.append(Trial(name, one))
    return trials


def _fragment(preset: str) -> Mapping[str, Any]:
    path = preset_path(preset)
    assert path is not None, preset
    return load_yaml(path)


def columns(run: RunConfig) -> list[tuple[str, tuple[str, ...], int, float]]:
    """Heading, place in a result, decimals and factor of every column but the first."""
    names = [one.name for one in run.eval.sets]
    judged = FAVOURITE if FAVOURITE in names or not names else names[0]
    recalls = [(at, ("eval", judged, f"image_to_text/{at}"), 2, 1.0) for at in ("R@1", "R@5")]
    experts = [
        (head, ("routing", *path), digits, float(factor)) for head, path, digits, factor in EXPERTS
    ]
    return [("loss", ("loss", "main"), 3, 1.0), *recalls, *experts]


def report(results: Mapping[str, Sequence[Result]], run: RunConfig) -> str:
    """The table and what its columns mean, in Markdown."""
    shown = columns(run)
    rows = []
    for name, found in results.items():
        cells = []
        for _, path, digits, factor in shown:
            values = [pick(result, path) for result in found]
            cells.append(
                spread([None if value is None else factor * value for value in values]).text(digits)
            )
        rows.append([name, *cells])
    first = next(iter(results.values()))
    blocks = run.moe.blocks(run.model.num_layers)
    seeds = ", ".join(str(result["seed"]) for result in first)
    table = markdown(["method", *(head for head, *_ in shown)], rows)
    return f"""{table}

{len(blocks)} layers of {run.moe.num_experts} routed and {run.moe.shared_experts} shared experts, \
{run.moe.top_k} routed per token; {first[0]["pairs"]:,} pairs in {first[0]["steps"]:,} steps; \
seeds {seeds}{" (mean ± standard deviation)" if len(first) > 1 else ""}.
`loss` is contrast and captions, weighted, without balancing terms; R@1 and R@5 (percent) rank the captions of \
{shown[1][1][1]}. \
Loads and entropies are those of training in the last tenth of the run, means over layers: `max/mean` is the busiest \
expert over a fair share, of both modalities, of patches, of text; `used` is how many experts an even load of the \
same entropy would have; `entropy` (nats) is that of a token's scores; `dropped` are choices without a place; `dead` \
are experts of all layers ({len(blocks) * run.moe.num_experts}) with less than 1 % of a fair share."""


_DOCS_HEAD = """# Ways of balancing, compared

Written by `python -m tools.balancing_study --write-docs`. Methods and what they set: `tools/study/methods.py`.
"""


if __name__ == "__main__":
    sys.exit(main())
