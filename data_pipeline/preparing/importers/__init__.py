"""One file a kind of source: what others wrote, as a stream of `Record`s (see `records.py`)."""
