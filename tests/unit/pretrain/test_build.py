"""What is checked before training begins and needs the other ranks."""

from __future__ import annotations

from typing import Any, cast

import pytest

from data_pipeline.common.errors import DataError
from pretrain.parallel.engine import TrainEngine
from pretrain.train.build import check_same_everywhere


class Ranks:
    """What all ranks say, whatever this one does."""

    def __init__(self, *said: list[str]) -> None:
        self.said = list(said)

    def gather_json(self, value: Any) -> list[Any]:
        return self.said


def engine(*said: list[str]) -> TrainEngine:
    return cast(TrainEngine, Ranks(*said))


def test_equal_data_on_every_rank_is_accepted() -> None:
    check_same_everywhere(engine(["a", "t"], ["a", "t"]), "a", "t")


@pytest.mark.parametrize(
    ("second", "named"),
    [(["b", "t"], r"data\.train .*rank\(s\) 1 "), (["a", "u"], r"data\.tokenizer .*rank\(s\) 1 ")],
)
def test_stale_copies_on_a_node_are_refused(second: list[str], named: str) -> None:
    with pytest.raises(DataError, match=named):
        check_same_everywhere(engine(["a", "t"], second), *second)
