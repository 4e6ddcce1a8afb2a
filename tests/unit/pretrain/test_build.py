"""Checks between ranks before training."""

from __future__ import annotations

from typing import Any, cast

import pytest

from data_pipeline.common.errors import DataError
from pretrain.parallel.communicator import Communicator
from pretrain.train.build import check_same_on_all_ranks


class FakeCommunicator:
    """Returns fixed values of all ranks."""

    def __init__(self, *values: list[str]) -> None:
        self.values = list(values)

    def all_gather_json(self, value: Any) -> list[Any]:
        return self.values


def communicator(*values: list[str]) -> Communicator:
    return cast(Communicator, FakeCommunicator(*values))


def test_equal_data_on_every_rank() -> None:
    check_same_on_all_ranks(communicator(["a", "t"], ["a", "t"]), "a", "t")


@pytest.mark.parametrize(
    ("second", "message"),
    [(["b", "t"], r"data\.train .*rank\(s\) 1 "), (["a", "u"], r"data\.tokenizer .*rank\(s\) 1 ")],
)
def test_outdated_copies_on_a_node(second: list[str], message: str) -> None:
    with pytest.raises(DataError, match=message):
        check_same_on_all_ranks(communicator(["a", "t"], second), *second)
