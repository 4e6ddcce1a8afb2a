"""Makes the quickstart set: 13 thousand real drawings with captions, from published packages."""
