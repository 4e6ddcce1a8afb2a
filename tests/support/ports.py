"""Free loopback ports for servers that tests start."""

from __future__ import annotations

import random
import socket

# Below the range from which Linux takes the ports of outgoing connections (32768 and up), so that
# nothing else grabs a port between the look and the server's start. The ports 10000 higher belong
# to the S3 server too; above those, ranks of SLURM jobs meet (`slurm.py`).
_FIRST, _LAST = 11000, 15999


def free_ports(count: int) -> list[int]:
    """`count` different TCP ports on which nothing listens on 127.0.0.1."""
    chosen: list[int] = []
    for port in random.SystemRandom().sample(range(_FIRST, _LAST + 1), _LAST + 1 - _FIRST):
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
        chosen.append(port)
        if len(chosen) == count:
            return chosen
    raise RuntimeError(f"found only {len(chosen)} of {count} free ports in {_FIRST}..{_LAST}")
