"""`python -m tools.quickstart_data --out data/quickstart`: builds the data set (see `build`)."""

from __future__ import annotations

import argparse
import logging
import sys
import time
from pathlib import Path
from typing import Any

from data_pipeline.common.errors import VlmError
from data_pipeline.common.logs import format_duration, setup_logging
from data_pipeline.common.tables import format_table
from tools.quickstart_data.build import BuildSettings, build
from tools.quickstart_data.sources import SOURCES, attribution
from tools.quickstart_data.split import SPLITS

EXPECTED = {"train": (13203, 5401), "unseen_style": (1705, 1705), "unseen_concept": (1379, 209)}
"""Images and distinct captions of the complete set, with the package versions of `sources`."""

logger = logging.getLogger(__name__)


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    options = _parse(arguments)
    if options.attribution:
        print(attribution())
        return 0
    setup_logging()
    start = time.monotonic()
    try:
        counts = build(
            BuildSettings(
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
        print("interrupted; rerun the same command to resume", file=sys.stderr)
        return 130

    duration = format_duration(time.monotonic() - start)
    print(f"{credits_table()}\n\n{counts_table(counts, complete=options.limit == 0)}\n")
    print(f"{options.out} is ready ({duration}); see {options.out}/ATTRIBUTION.md")
    return 0


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tools.quickstart_data",
        description="Build the quickstart data set: drawings with captions, as shards with "
        "manifests, split into training, unseen styles and unseen concepts.",
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("data/quickstart"),
        help="output folder (default: %(default)s)",
    )
    parser.add_argument(
        "--limit", type=int, default=0, metavar="N", help="use at most N drawings per source"
    )
    parser.add_argument(
        "--vocab-size",
        type=int,
        default=2048,
        help="vocabulary size of the tokenizer (default: %(default)s)",
    )
    parser.add_argument(
        "--processes",
        type=int,
        default=0,
        help="rendering processes (default: one per core, at most 8)",
    )
    parser.add_argument(
        "--attribution", action="store_true", help="print authors and licenses, then exit"
    )
    return parser.parse_args(arguments)


def credits_table() -> str:
    """Authors and licenses, one line per source; `--attribution` also prints addresses."""
    rows = [(source.title, source.license, source.author) for source in SOURCES]
    rows.append(("Names and tags", "MIT", "Miles Johnson (emojibase)"))
    return format_table(["drawings", "license", "by"], rows, align="l", rule=False)


def counts_table(counts: dict[str, Any], *, complete: bool) -> str:
    """Counts of each split; for a complete set also the expected ones where they differ."""
    rows = []
    for split in SPLITS:
        images, captions = counts["images"][split], counts["captions"][split]
        note = ""
        if complete and (images, captions) != EXPECTED[split]:
            note = f"expected {EXPECTED[split]}"
        rows.append((split, images, captions, note))
    return format_table(["set", "images", "captions", ""], rows, rule=False)


if __name__ == "__main__":
    sys.exit(main())
