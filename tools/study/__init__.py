"""Comparison of training runs on the same data; used by `tools.compare_dense_baseline` and
`tools.balancing_study`."""
