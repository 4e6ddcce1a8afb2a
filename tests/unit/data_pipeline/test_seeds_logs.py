"""Named seeds, log lines and progress lines."""

from __future__ import annotations

import io
import logging

import numpy as np
import pytest

from data_pipeline.common.logs import Progress, format_duration, setup_logging
from data_pipeline.common.seeds import named_seed, rng


def test_every_name_has_a_different_seed() -> None:
    names = [
        ("a", "bc"),
        ("ab", "c"),
        ("abc",),
        ("a", "b", "c"),
        (1,),
        ("1",),
        (-1,),
        (1, ""),
        ("", 1),
        (10**30,),
    ]
    seeds = {named_seed(*name) for name in names} | {named_seed()}
    assert len(seeds) == len(names) + 1
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_seeds_are_stable() -> None:
    """A run that is resumed with a newer version must continue with the same samples."""
    assert named_seed(1, "a") == 294328509404019414
    assert named_seed(np.int64(1), "a") == named_seed(1, "a")  # type: ignore[arg-type]
    assert rng(3).random() == pytest.approx(0.7958280786852708, abs=0)


def test_generators_are_independent() -> None:
    first, second = rng("augment", 1), rng("augment", 2)
    assert first.random() == rng("augment", 1).random() != second.random()


@pytest.mark.parametrize("part", [1.0, None, True, b"a"])
def test_invalid_parts_are_rejected(part: object) -> None:
    with pytest.raises(TypeError, match="must be int or str"):
        named_seed(part)  # type: ignore[arg-type]


def test_log_levels_by_rank(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    root = logging.getLogger()
    monkeypatch.setattr(root, "handlers", list(root.handlers))
    monkeypatch.setattr(root, "level", root.level)
    for rank, expected in ((0, ["step 3", "warning: slow"]), (2, ["[rank 2] warning: slow"])):
        setup_logging(rank)
        logging.getLogger("any").info("step %d", 3)
        logging.getLogger("any").warning("slow")
        lines = capsys.readouterr().err.splitlines()
        assert [line.partition(" ")[2] for line in lines] == expected


def test_progress_shows_rate_and_remaining_time() -> None:
    now, out = [100.0], io.StringIO()
    progress = Progress("rendering", 1000, "pictures", done=200, stream=out, clock=lambda: now[0])
    now[0] = 104.0
    progress.update(100)
    assert out.getvalue() == ""  # too soon for a file
    now[0] = 110.0
    progress.update(100)
    assert out.getvalue() == "rendering: 400/1000 pictures (40%), 20/s, 30 s left\n"
    with progress:
        now[0] = 140.0
        progress.done = 1000
    assert out.getvalue().endswith("\nrendering: 1000/1000 pictures (100%), 20/s, 40 s\n")


def test_progress_is_printed_by_rank_zero(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    root = logging.getLogger()
    monkeypatch.setattr(root, "handlers", [])
    monkeypatch.setattr(root, "level", root.level)
    for rank, count in ((0, 1), (2, 0), (0, 1)):
        setup_logging(rank)
        with Progress("x", 1, "files") as progress:
            progress.update()
        assert capsys.readouterr().err.count("x: 1/1 files") == count


def test_progress_on_a_terminal() -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    now, out = [0.0], Terminal()
    progress = Progress("x", 0, "files", stream=out, clock=lambda: now[0])
    for now[0] in (1.0, 2.0):
        progress.update()
    progress.close()
    assert out.getvalue().count("\r") == 2 and out.getvalue().count("\n") == 1


def test_format_duration() -> None:
    texts = [format_duration(seconds) for seconds in (4.21, 59.4, 59.6, 185, 7620)]
    assert texts == ["4.2 s", "59 s", "1m00s", "3m05s", "2h07m"]
