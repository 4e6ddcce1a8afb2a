"""Builds the quickstart data set: 13,000 drawings with captions, from published packages."""
