"""How fast the MoE layer is: `python -m tools.bench_moe --help`."""
