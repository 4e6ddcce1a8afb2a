"""Which characters cleaning keeps and removes."""

from __future__ import annotations

import json
import re
import sys
import unicodedata
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import strategies as st

from data_pipeline.content import captions
from data_pipeline.content.caption_characters import (
    REMOVED_KINDS,
    remove_characters,
    removed_kinds,
)
from data_pipeline.content.captions import clean_caption, hash_caption
from data_pipeline.shards.writer import write_shards
from tests.support.data_commands import run_data_command
from tests.support.properties import check_property, num_examples
from tests.support.small_shards import make_png


def flag(code: str) -> str:
    """The flag of a part of a country: an emoji tag sequence."""
    return "\U0001f3f4" + "".join(chr(0xE0000 + ord(char)) for char in code) + "\U000e007f"


ENGLAND, SCOTLAND, WALES = map(flag, ("gbeng", "gbsct", "gbwls"))
VISIBLE = [*range(0x600, 0x606), 0x6DD, 0x70F, 0x890, 0x891, 0x8E2, *range(0xFFF9, 0xFFFC), 0x110BD,
           0x110CD, *range(0x13430, 0x13439)]  # fmt: skip
"""Formatting characters that are not Default_Ignorable (Unicode 14)."""
SPELLING = [0x180E, 0x200C, 0x200D]
TAGS = [0xE0001, *range(0xE0020, 0xE0080)]


def test_every_control_and_formatting_character_is_accounted_for() -> None:
    patterns = [re.compile(f"[{chars}]") for chars in REMOVED_KINDS.values()]
    characters = list(map(chr, range(sys.maxunicode + 1)))
    others = [char for char in characters if unicodedata.category(char)[0] != "C"]
    assert remove_characters("".join(others)) == "".join(others)

    for char in characters:
        category, code = unicodedata.category(char), ord(char)
        if category not in ("Cc", "Cf", "Cs"):
            continue
        is_kept = char.isspace() or code in VISIBLE or code in SPELLING or 0x13439 <= code < 0x13460
        num_kinds = sum(bool(pattern.match(char)) for pattern in patterns)
        assert num_kinds == (not is_kept and code not in TAGS), hex(code)
        assert (remove_characters(f"a{char}b") == "ab") == (not is_kept), hex(code)
        assert bool(removed_kinds(f"a{char}b")) == (not is_kept), hex(code)


def test_flags_of_parts_of_a_country_are_distinct() -> None:
    flags = [ENGLAND, SCOTLAND, WALES, "\U0001f3f4"]
    assert [clean_caption(f"the flag {item} of") for item in flags] == [
        f"the flag {item} of" for item in flags
    ]
    assert len({hash_caption(item) for item in flags}) == 4


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a" + ENGLAND[1:], "a"),  # hidden text
        (ENGLAND[:-1], "\U0001f3f4"),  # without its end
        ("\U0001f3f4\U000e007f", "\U0001f3f4"),
        (f"\U0001f3f4\u200b{ENGLAND[1:]}", ENGLAND),
        (f"\U0001f3f4\ufe0f{ENGLAND[1:]}", f"\U0001f3f4\ufe0f{ENGLAND[1:]}"),
        (f"\U0001d15e{ENGLAND[1:]}", unicodedata.normalize("NFC", "\U0001d15e")),
        ("\u0600\u0661\u0662 \u06dd\u0663", "\u0600\u0661\u0662 \u06dd\u0663"),
        ("\U000110bd\U00011083", "\U000110bd\U00011083"),
        ("\U0001f469\u200d\U0001f680 \u06cc\u200c\u062e",) * 2,
        ("\ufeffe\u00ad\u0301\u202e", "\u00e9"),
        ("\ue000 \U000e0fff", "\ue000 \U000e0fff"),
    ],
)  # fmt: skip
def test_kept_and_removed_characters(text: str, expected: str) -> None:
    assert clean_caption(text) == expected


PARTS = ["a", " ", "e", "\u0301", "\u0f73", "\U0001d15e", "\U0001f3f4", "\ufe0f", "\u200d",
         "\u200b", "\ufeff", "\x00", "\x85", "\u2028", "\ud800", "\U000e0067", "\U000e007f",
         "\u1100", "\u1161", ENGLAND, "\u0301" * 40, "\u06dd", "\u202e"]  # fmt: skip


@num_examples
def test_cleaning_is_idempotent_and_reports_what_it_removes(examples: int) -> None:
    def check(parts: list[str]) -> None:
        text = "".join(parts)
        once = clean_caption(text)
        assert clean_caption(once) == once == unicodedata.normalize("NFC", once)
        assert not removed_kinds(once)
        once.encode()
        composed = unicodedata.normalize("NFC", text)
        if not removed_kinds(text):
            assert once == " ".join(composed.split())

    check_property(check, examples, st.lists(st.sampled_from(PARTS) | st.characters(), max_size=12))


CARRIERS = [chr(code) for code in [*VISIBLE, *SPELLING, 0x13430, 0xE000, 0x378, 0x200C]]
HIDDEN = ["\x00", "\x1b", "\ufeff", "\u00ad", "\u200b", "\u2066", "\u2063", "\ud800"]


@num_examples
def test_only_characters_of_the_reported_kinds_are_lost(examples: int) -> None:
    """All others remain, in canonical form; compared without their order, which NFC may change."""

    def characters(text: str) -> Counter[str]:
        return Counter("".join(unicodedata.normalize("NFD", text).split()))

    def check(parts: list[str]) -> None:
        text = "".join(parts)
        lost = characters(text) - characters(clean_caption(text))
        assert not characters(clean_caption(text)) - characters(text)
        kinds = {
            kind
            for char in lost
            for kind, chars in REMOVED_KINDS.items()
            if re.match(f"[{chars}]", char)
        }
        kinds |= {"tags outside of emoji" for char in lost if ord(char) in TAGS}
        others = [char for char in lost if unicodedata.category(char)[0] not in "C"]
        kinds |= {
            "marks beyond 30 of a letter" for char in others if unicodedata.category(char)[0] == "M"
        }
        assert removed_kinds(text) == kinds
        assert all(unicodedata.category(char)[0] in "CM" for char in lost)
        assert not lost.keys() & {*CARRIERS}

    values = st.sampled_from([*PARTS, *CARRIERS, *HIDDEN]) | st.characters()
    check_property(check, examples, st.lists(values, max_size=12))


def test_removed_kinds() -> None:
    assert removed_kinds("a\x00\ufeff\ufeff\u00ad b") == {
        "control characters", "byte order marks", "soft hyphens"
    }  # fmt: skip
    assert removed_kinds(f"x{WALES}") == set()
    assert removed_kinds(f"x{WALES[1:]}") == {"tags outside of emoji"}
    assert removed_kinds("e" + "\u0301" * 31) == {"marks beyond 30 of a letter"}
    assert removed_kinds("a\tcaption\nwith spaces\x85") == set()


def test_usual_captions_skip_the_removal(monkeypatch: pytest.MonkeyPatch) -> None:
    def unexpected(text: str) -> str:
        raise AssertionError(text)

    monkeypatch.setattr(captions, "remove_characters", unexpected)
    assert clean_caption(" A red  fox ") == "A red fox"
    assert clean_caption("ein großer Fu\u0308chs") == "ein großer Füchs"
    monkeypatch.setattr(captions, "normalize", unexpected)
    assert clean_caption("A red  fox") == "A red fox"


def test_stats_count_captions_with_removed_characters(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = ["a cat", "\ufeffa dog", "an\u00ad owl\u00ad\ufeff", f"flag {ENGLAND}"]
    samples: list[dict[str, object]] = [
        {"__key__": str(index), "png": make_png(1), "txt": text.encode()}
        for index, text in enumerate(texts)
    ]
    write_shards(samples, tmp_path / "s", samples_per_shard=2)
    files = ("--json", tmp_path / "s.json", "--html", tmp_path / "s.html")
    run_data_command("stats", tmp_path / "s", *files, "--workers", 0)
    removed = json.loads((tmp_path / "s.json").read_text())["removed_characters"]
    assert removed == {"byte order marks": 2, "soft hyphens": 1}
    output = capsys.readouterr().out
    assert re.search(r"byte order marks +2 +50.0%", output)
    assert "soft hyphens" in (tmp_path / "s.html").read_text()
