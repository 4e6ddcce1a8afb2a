"""Meeting point of the ranks: a store that only the processes of this start use.

torchrun keeps one store for all restarts of a group, and gloo finds the addresses of other ranks in
it: a restarted rank that is faster than the others reads those of dead processes, and waits.
Therefore the ranks agree on a new part of the store first:

    rank 0          writes a token under `token`, again whenever it is started
    other ranks     read the token, and answer with a number of their own under it
    rank 0          waits for all answers, and lists their numbers under the token
    other ranks     wait for a list with their number; if the token changes meanwhile, begin again

A token of an earlier start has a list without the number of this process, or none.
"""

from __future__ import annotations

import datetime
import json
import time
import uuid

from torch.distributed import PrefixStore, Store

_PREFIX = "vlmoe"
_POLL_SECONDS = 0.05


def agree_on_store(
    store: Store, rank: int, world_size: int, timeout: datetime.timedelta
) -> PrefixStore:
    """The part of a store that the processes of this start share. Collective.

    Args:
        store: A store that all ranks can reach, also ranks of earlier starts.
        rank: This rank.
        world_size: Number of ranks.
        timeout: How long to wait for the others.

    Raises:
        TimeoutError: Some ranks have not come; the message says which, on rank 0.
    """
    meeting = PrefixStore(_PREFIX, store)
    deadline = time.monotonic() + timeout.total_seconds()
    number = uuid.uuid4().hex
    if rank == 0:
        token = _lead(meeting, number, world_size, deadline)
    else:
        token = _follow(meeting, number, rank, deadline)
    return PrefixStore(f"{_PREFIX}/{token}", store)


def _lead(meeting: Store, token: str, world_size: int, deadline: float) -> str:
    meeting.set("token", token)
    missing, numbers = set(range(1, world_size)), list[str]()
    while missing:
        present = {rank for rank in missing if meeting.check([f"{token}/{rank}"])}
        numbers += [meeting.get(f"{token}/{rank}").decode() for rank in present]
        missing -= present
        if missing and time.monotonic() > deadline:
            ranks = ", ".join(map(str, sorted(missing)[:8])) + (", ..." if len(missing) > 8 else "")
            raise TimeoutError(f"rank(s) {ranks} of {world_size} did not start")
        if missing:
            time.sleep(_POLL_SECONDS)
    meeting.set(f"{token}/all", json.dumps(numbers))
    return token


def _follow(meeting: Store, number: str, rank: int, deadline: float) -> str:
    answered = ""
    while True:
        token = meeting.get("token").decode() if meeting.check(["token"]) else ""
        if token and token != answered:
            meeting.set(f"{token}/{rank}", number)
            answered = token
        everyone = f"{token}/all"
        if token and meeting.check([everyone]) and number in json.loads(meeting.get(everyone)):
            return token
        if time.monotonic() > deadline:
            raise TimeoutError("rank 0 did not start")
        time.sleep(_POLL_SECONDS)
