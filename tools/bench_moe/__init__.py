"""Benchmark of the MoE layer: `python -m tools.bench_moe --help`."""
