"""Shared test support: local servers and clusters, small datasets, child processes."""
