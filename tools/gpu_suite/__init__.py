"""Everything that only a GPU can tell, in a few minutes: `python -m tools.gpu_suite --help`."""
