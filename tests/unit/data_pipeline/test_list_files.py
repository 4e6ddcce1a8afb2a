"""List files of shards: every line is an address, a comment or blank."""

from __future__ import annotations

from pathlib import Path

import hypothesis.strategies as st
import pytest

from data_pipeline.common.errors import DataError
from data_pipeline.shards.patterns import expand_patterns, find_shards
from tests.support.properties import check_property, num_examples

ODD_NAMES = ("a #1.tar", "#b.tar", " c.tar", "d\u2028e.tar", "f{1,2}.tar", "g[0].tar", "h\x0b.tar")


@pytest.mark.parametrize("start", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("line_break", ["\n", "\r\n", "\r", "\n\n"])
def test_names_in_a_list_that_exist_are_literal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, start: bytes, line_break: str
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ODD_NAMES:
        Path(name).touch()
    lines = ["# a comment", *ODD_NAMES, "", "  # another", "f{1,2}.tar # the same"]
    Path("list.txt").write_bytes(start + line_break.join(lines).encode())
    assert expand_patterns(["@list.txt"]) == list(ODD_NAMES)


_NAMES = ("0.tar", "1.tar", "x/0.tar", "x/1.TAR", "x/a b.tar", *ODD_NAMES[:2])
_LINES = {
    **{name: (name,) for name in _NAMES},
    "x": ("x/0.tar", "x/1.TAR", "x/a b.tar"),
    "{0,1}.tar": ("0.tar", "1.tar"),
    "[01].tar": ("0.tar", "1.tar"),
    "x/0.tar # why": ("x/0.tar",),
    "\t0.tar  ": ("0.tar",),
    "@inner.txt": ("1.tar", "x/1.TAR"),
    "": (),
    "# 0.tar": (),
    "   #": (),
}
"""Lines of a list and their shards."""


@num_examples
def test_any_list_gives_the_shards_of_its_lines_once(
    examples: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("x").mkdir()
    for name in _NAMES:
        Path(name).touch()
    Path("x/other.txt").touch()
    Path("inner.txt").write_text("1.tar\nx/1.TAR\n")

    def check(lines: list[str], line_break: str, end: str) -> None:
        Path("list.txt").write_bytes((line_break.join(lines) + end).encode())
        expected = list(dict.fromkeys(shard for line in lines for shard in _LINES[line]))
        if not expected:
            with pytest.raises(DataError, match="lists no shards"):
                find_shards(["@list.txt"])
            return
        urls, ignored = find_shards(["@list.txt"])
        assert urls == expected and ignored == ({".txt file": 1} if "x" in lines else {})

    lines = st.lists(st.sampled_from(list(_LINES)), max_size=8)
    check_property(
        check, examples, lines, st.sampled_from(["\n", "\r\n", "\r"]), st.sampled_from(["", "\n"])
    )
