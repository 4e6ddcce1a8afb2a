"""Free loopback ports for test servers."""

from __future__ import annotations

import random
import socket

# Below Linux's range for outgoing connections (32768 and up), so that no other process takes a port
# between the probe and the start of the server. The S3 server also uses the ports 10000 higher;
# SLURM jobs use master ports above those (`slurm.py`).
_FIRST, _LAST = 11000, 15999


def free_ports(count: int) -> list[int]:
    """`count` distinct TCP ports that are free on 127.0.0.1."""
    ports: list[int] = []
    for port in random.SystemRandom().sample(range(_FIRST, _LAST + 1), _LAST + 1 - _FIRST):
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
        ports.append(port)
        if len(ports) == count:
            return ports
    raise RuntimeError(f"found only {len(ports)} of {count} free ports in {_FIRST}..{_LAST}")
