"""`python -m tools.bench_loader`: how fast the loader is, against others and against what is
possible."""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from tools.bench_loader.figures import HEAD, Figure, Measure, Options
from tools.benchmark import MIN_REPEATS, machine, note, table, write_json

PACKAGES = (
    "torch",
    "numpy",
    "opencv-python-headless",
    "simplejpeg",
    "pillow",
    "obstore",
    "webdataset",
    "mosaicml-streaming",
)

EXAMPLES = """\
examples:
  python -m tools.bench_loader                               everything, ten to fifteen minutes
  python -m tools.bench_loader --only loader --only raw      some measures
  python -m tools.bench_loader --quick                       does it run at all? (the figures mean nothing)
  pip install --target peers --no-deps mosaicml-streaming ... && python -m tools.bench_loader --peers peers
"""


def _measures() -> dict[str, tuple[str, Measure]]:
    """By name, what it tells and what runs it; imported here, so that `--help` answers at once."""
    from tools.bench_loader import loading, memory, raw, seek, soak, store, waiting, workers

    return {
        "loader": (
            "samples/s/core against other loaders, and against decoding alone",
            loading.measure,
        ),
        "workers": ("samples/s/core with two worker processes", workers.measure),
        "raw": ("samples/s/core read and checked, without decoding", raw.measure),
        "waiting": ("share of a training step that waits for data", waiting.measure),
        "seek": ("time to the first batch in a long epoch", seek.measure),
        "store": ("indexing and seeking in an object store", store.measure),
        "memory": ("peak memory of a worker with small and large shards", memory.measure),
        "soak": ("growth over a million samples", soak.measure),
    }


def main(arguments: list[str] | None = None) -> int:
    """Measure, print a table, write JSON; returns the exit status."""
    options = _parse(arguments)
    measures = _measures()
    names = options.only or list(measures)
    if unknown := [name for name in names if name not in measures]:
        print(
            f"error: --only {unknown[0]}: no such measure; there are {', '.join(measures)}",
            file=sys.stderr,
        )
        return 2
    for folder in options.peers:
        sys.path.append(str(folder))  # behind everything: the versions that are installed win
    about = machine(PACKAGES)
    note(f"{about['cpu']}, {about['cores']} cores, load {about['load'][0]}, nice {about['nice']}")
    with tempfile.TemporaryDirectory(prefix="vlmoe-bench-") as scratch:
        root = Path(scratch) if options.quick else options.data
        repeats = options.repeats or (2 if options.quick else MIN_REPEATS)
        settings = Options(root=root, repeats=repeats, quick=options.quick)
        found: dict[str, list[Figure]] = {}
        for name in names:
            note(f"== {name}: {measures[name][0]}")
            found[name] = list(measures[name][1](settings))
    for name, figures in found.items():
        print(f"\n{name}: {measures[name][0]}\n\n{table([each.row() for each in figures], HEAD)}")
    report = {
        "machine": about,
        "repeats": repeats,
        "quick": settings.quick,
        "measures": {name: [each.to_json() for each in figures] for name, figures in found.items()},
    }
    write_json(options.out, report)
    note(f"\nalso in {options.out}")
    return 0


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tools.bench_loader",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--only", action="append", metavar="NAME", help="a measure to run; may be given again"
    )
    parser.add_argument(
        "--quick", action="store_true", help="hardly any data, in a temporary folder"
    )
    parser.add_argument(
        "--repeats", type=int, default=0, help=f"rounds of each comparison (default {MIN_REPEATS})"
    )
    parser.add_argument(
        "--data", type=Path, default=Path("data/bench"), help="where data are kept (%(default)s)"
    )
    parser.add_argument(
        "--out", type=Path, default=Path("data/bench/report.json"), help="the report (%(default)s)"
    )
    parser.add_argument(
        "--peers",
        type=Path,
        action="append",
        default=[],
        metavar="FOLDER",
        help="a folder of packages (pip install --target) in which to look for other loaders",
    )
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
