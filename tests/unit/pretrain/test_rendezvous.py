"""Ranks of one start meet, whatever processes of earlier starts have left in the store."""

from __future__ import annotations

import random
import time
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import timedelta

import pytest
from torch.distributed import HashStore, PrefixStore

from pretrain.parallel.rendezvous import agree_on_store

WORLD_SIZE = 3


def meet(
    pool: ThreadPoolExecutor, store: HashStore, ranks: dict[int, float], seconds: float
) -> dict[int, Future[PrefixStore]]:
    """Start ranks after a delay each, which wait for this time."""

    def start(rank: int, delay: float) -> PrefixStore:
        time.sleep(delay)
        return agree_on_store(store, rank, WORLD_SIZE, timedelta(seconds=seconds))

    return {rank: pool.submit(start, rank, delay) for rank, delay in ranks.items()}


def assert_same_part(futures: dict[int, Future[PrefixStore]]) -> None:
    stores = [future.result(20) for future in futures.values()]
    stores[0].set("probe", "from rank 0")
    assert [store.get("probe") for store in stores] == [b"from rank 0"] * len(stores)


def test_ranks_of_one_start_share_a_part_of_the_store() -> None:
    store = HashStore()
    with ThreadPoolExecutor(8) as pool:
        first = meet(pool, store, {0: 0.2, 1: 0.0, 2: 0.4}, 10)
        assert_same_part(first)
        # The next start, with a part of its own: what the first one has written is not in it.
        second = meet(pool, store, {0: 0.4, 1: 0.0, 2: 0.2}, 10)
        assert not second[1].result(20).check(["probe"])
        assert_same_part(second)


@pytest.mark.parametrize("seed", range(6))
def test_any_ranks_of_earlier_starts_may_have_died(seed: int) -> None:
    generator = random.Random(seed)
    store = HashStore()
    with ThreadPoolExecutor(32) as pool:
        for _ in range(3):  # starts in which some ranks are missing, or all came
            ranks = generator.sample(range(WORLD_SIZE), generator.randrange(1, WORLD_SIZE + 1))
            delays = {rank: generator.random() * 0.2 for rank in ranks}
            for future in meet(pool, store, delays, 0.3).values():
                future.exception(20)
        delays = {rank: generator.random() * 0.5 for rank in range(WORLD_SIZE)}
        assert_same_part(meet(pool, store, delays, 10))


def test_missing_ranks_are_named() -> None:
    store = HashStore()
    with pytest.raises(TimeoutError, match=r"rank\(s\) 1, 2 of 3 did not start"):
        agree_on_store(store, 0, 3, timedelta(seconds=0.2))
    with pytest.raises(TimeoutError, match="rank 0 did not start"):
        agree_on_store(HashStore(), 1, 3, timedelta(seconds=0.2))
