"""`python -m tools.bench_loader`: speed of the data loader, compared with other loaders and with
decoding alone."""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

from data_pipeline.common.json_file import write_json
from data_pipeline.common.tables import markdown_table
from tools.arguments import benchmark_parser, import_peers, print_error, unknown_name
from tools.bench_loader.options import Benchmark, Options
from tools.measurements import HEADER, Measurement
from tools.reporting import describe_machine, log_progress
from tools.timing import MIN_REPEATS

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
  python -m tools.bench_loader                            all benchmarks, ten to fifteen minutes
  python -m tools.bench_loader --only loader --only raw   selected benchmarks
  python -m tools.bench_loader --quick                    check that it runs (meaningless numbers)
  pip install --target peers --no-deps mosaicml-streaming ...
  python -m tools.bench_loader --peers peers              compare with packages in a folder
"""


class Entry(NamedTuple):
    """A benchmark that `--only` can select."""

    description: str
    measure: Benchmark


def _benchmarks() -> dict[str, Entry]:
    """Benchmarks by name; their imports take seconds, so `--help` must not trigger them."""
    from tools.bench_loader import (
        data_wait,
        memory,
        object_store,
        raw,
        seek,
        soak,
        throughput,
        workers,
    )

    return {
        "loader": Entry(
            "samples/s/core against other loaders, and against decoding alone", throughput.measure
        ),
        "workers": Entry("samples/s/core with two worker processes", workers.measure),
        "raw": Entry("samples/s/core read and verified, without decoding", raw.measure),
        "waiting": Entry("fraction of a training step that waits for data", data_wait.measure),
        "seek": Entry("time to the first batch in a long epoch", seek.measure),
        "store": Entry("indexing and seeking in an object store", object_store.measure),
        "memory": Entry("peak memory of a worker with small and large shards", memory.measure),
        "soak": Entry("resource growth over a million samples", soak.measure),
    }


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmarks, print tables, write a JSON report; returns the exit status."""
    options = _parse(arguments)
    benchmarks = _benchmarks()
    names = options.only or list(benchmarks)
    if problem := unknown_name(names, benchmarks, "benchmark"):
        return print_error(problem)

    import_peers(options.peers)
    machine = describe_machine(PACKAGES)
    log_progress(
        f"{machine['cpu']}, {machine['cores']} cores, load {machine['load'][0]}, "
        f"nice {machine['nice']}"
    )
    repeats = options.repeats or (2 if options.quick else MIN_REPEATS)
    with tempfile.TemporaryDirectory(prefix="vlmoe-bench-") as scratch:
        root = Path(scratch) if options.quick else options.data
        settings = Options(root=root, repeats=repeats, quick=options.quick)
        results: dict[str, list[Measurement]] = {}
        for name in names:
            log_progress(f"== {name}: {benchmarks[name].description}")
            results[name] = list(benchmarks[name].measure(settings))

    for name, rows in results.items():
        print(f"\n{name}: {benchmarks[name].description}\n")
        print(markdown_table(HEADER, [row.row() for row in rows], align="l"))
    report = {
        "machine": machine,
        "repeats": repeats,
        "quick": settings.quick,
        "benchmarks": {name: [row.to_json() for row in rows] for name, rows in results.items()},
    }
    write_json(options.out, report)
    log_progress(f"\nwrote {options.out}")
    return 0


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = benchmark_parser(
        "tools.bench_loader",
        __doc__,
        EXAMPLES,
        out="data/bench/report.json",
        unit="benchmark",
        peers="other loaders",
    )
    parser.add_argument("--quick", action="store_true", help="minimal data in a temporary folder")
    parser.add_argument(
        "--repeats",
        type=int,
        default=0,
        help=f"rounds of each comparison (default: {MIN_REPEATS})",
    )
    parser.add_argument(
        "--data",
        type=Path,
        default=Path("data/bench"),
        help="folder of generated data (default: %(default)s)",
    )
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
