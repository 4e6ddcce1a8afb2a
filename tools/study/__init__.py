"""Several training runs on the same data, side by side; what `tools.compare_dense_baseline` and others are
made of."""
