"""`python -m tools.quickstart_data --out data/quickstart`: see `build` for what it makes."""

from __future__ import annotations

import argparse
import logging
import sys
import time
from pathlib import Path

from data_pipeline.common.errors import VlmError
from data_pipeline.common.logs import clock_text, setup_logging
from tools.quickstart_data.build import Settings, build
from tools.quickstart_data.sources import SOURCES, attribution
from tools.quickstart_data.split import SPLITS

EXPECTED = {"train": (13203, 5401), "unseen_style": (1705, 1705), "unseen_concept": (1379, 209)}
"""Pictures and distinct captions of the whole set, with the packages that `sources` pins."""

logger = logging.getLogger(__name__)


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.quickstart_data",
        description="Make the quickstart set: real drawings with captions, as shards with manifests, "
        "split into training, unseen styles and unseen concepts.",
    )
    parser.add_argument("--out", type=Path, default=Path("data/quickstart"), help="folder to fill")
    parser.add_argument(
        "--limit", type=int, default=0, metavar="N", help="at most N drawings of a source"
    )
    parser.add_argument("--vocab-size", type=int, default=2048, help="ids of the tokenizer")
    parser.add_argument(
        "--processes", type=int, default=0, help="processes that render; 0: one a core"
    )
    parser.add_argument(
        "--attribution", action="store_true", help="print authors and licences, and stop"
    )
    options = parser.parse_args(arguments)
    if options.attribution:
        print(attribution())
        return 0
    setup_logging()
    start = time.monotonic()
    try:
        facts = build(
            Settings(
                out=options.out,
                limit=options.limit,
                vocab_size=options.vocab_size,
                processes=options.processes,
            )
        )
    except VlmError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; the same command goes on from here", file=sys.stderr)
        return 130
    print(f"{thanks()}\n\n{table(facts, whole=options.limit == 0)}\n")
    print(
        f"{options.out} is ready ({clock_text(time.monotonic() - start)}); see {options.out}/ATTRIBUTION.md"
    )
    return 0


def thanks() -> str:
    """Whose drawings these are, one line each; with addresses it is what `--attribution` prints."""
    lines = [f"{'drawings':<22}{'licence':<15}by"]
    lines += [f"{source.title:<22}{source.license:<15}{source.author}" for source in SOURCES]
    return "\n".join([*lines, f"{'Names and tags':<22}{'MIT':<15}Miles Johnson (emojibase)"])


def table(facts: dict[str, dict[str, int]], *, whole: bool) -> str:
    """Counts of each set; beside them the expected ones where they differ."""
    lines = [f"{'set':<16}{'pictures':>10}{'captions':>10}"]
    for split in SPLITS:
        found = (facts["pictures"][split], facts["captions"][split])
        note = "" if not whole or found == EXPECTED[split] else f"  expected {EXPECTED[split]}"
        lines.append(f"{split:<16}{found[0]:>10,}{found[1]:>10,}{note}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
