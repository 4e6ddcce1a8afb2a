"""Importers, one module per source format: each reads a source as a stream of `Record`s."""
