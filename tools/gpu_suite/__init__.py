"""Checks and benchmarks that require a GPU: `python -m tools.gpu_suite --help`."""
