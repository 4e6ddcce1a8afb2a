"""Benchmark of the data loader: `python -m tools.bench_loader --help`."""
