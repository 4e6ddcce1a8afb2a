"""Several training runs on the same data, side by side; what `tools.compare_twin` and others are made of."""
