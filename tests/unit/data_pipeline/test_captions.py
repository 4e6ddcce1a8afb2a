from __future__ import annotations

import json
import unicodedata
from collections import Counter

import numpy as np
import pytest

from data_pipeline.common.errors import ConfigError, DataError
from data_pipeline.content.captions import caption_hash, choose, clean, find


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("  a\tred \n heart ", "a red heart"),
        ("caf\u0065\u0301", "café"),
        ("a\u00a0b\u2003c", "a b c"),
        ("a\x00b\x07c\u202ed\ufeff", "abcd"),
        ("e\u200b\u0301", "é"),
        ("👩\u200d🚀 می\u200cخواهم", "👩\u200d🚀 می\u200cخواهم"),
        ("half \ud83d pair", "half pair"),
        (" \n", ""),
    ],
)
def test_clean(text: str, expected: str) -> None:
    assert clean(text) == expected


def test_cleaning_twice_changes_nothing_more() -> None:
    rng = np.random.default_rng(0)
    for _ in range(500):
        text = "".join(chr(int(code)) for code in rng.integers(0, 0x3000, 12))
        once = clean(text)
        assert clean(once) == once == unicodedata.normalize("NFC", once)
        once.encode()


def test_hash_ignores_capitals_and_blanks_only() -> None:
    assert caption_hash("A Red  heart") == caption_hash("a red heart ") != caption_hash("a red hearts")
    assert all(0 <= caption_hash(str(number)) < 2**63 for number in range(100))


MEMBERS = {
    "txt": b" a cat\n",
    "json": json.dumps({"captions": ["one", "two", 3, ""], "title": "T", "year": 7, "none": []}).encode(),
}


def test_find_reads_members_and_json_fields() -> None:
    assert find(MEMBERS, "txt") == ["a cat"]
    assert find(MEMBERS, "json:captions") == ["one", "two"]
    assert find(MEMBERS, "json:title") == ["T"]
    assert [find(MEMBERS, key) for key in ("json:year", "json:none", "json:missing", "cap")] == [[]] * 4


def test_choose_draws_by_weight_among_the_keys_that_have_captions() -> None:
    rng = np.random.default_rng(0)
    keys, weights = ("txt", "json:missing", "json:captions"), (1.0, 5.0, 3.0)
    counts = Counter(choose(MEMBERS, keys, weights, rng) for _ in range(4000))
    assert set(counts) == {"a cat", "one", "two"}
    assert counts["a cat"] / 4000 == pytest.approx(1 / 4, abs=0.03)
    assert counts["one"] / 4000 == pytest.approx(3 / 8, abs=0.03)


def test_choose_without_a_generator_takes_the_first_caption_of_the_first_key() -> None:
    assert choose(MEMBERS, ("json:missing", "json:captions", "txt"), (0.0, 0.0, 1.0), None) == "one"
    assert choose(MEMBERS, ("json:missing",), (1.0,), None) is None
    assert choose({}, ("txt",), (1.0,), np.random.default_rng(0)) is None


def test_a_weight_of_zero_is_never_drawn_while_another_key_has_captions() -> None:
    rng = np.random.default_rng(0)
    drawn = {choose(MEMBERS, ("txt", "json:title"), (0.0, 1.0), rng) for _ in range(200)}
    assert drawn == {"T"}
    assert choose(MEMBERS, ("txt", "json:missing"), (0.0, 1.0), rng) == "a cat"


def test_damaged_members_are_named() -> None:
    for members, key, slug in [
        ({"txt": b"\xff\xfe"}, "txt", "bad-text"),
        ({"json": b"{"}, "json:a", "bad-json"),
        ({"json": b"[1]"}, "json:a", "bad-json"),
        ({"json": b"[" * 100_000}, "json:a", "bad-json"),
        ({"json": b'{"a": ' + b"1" * 5000 + b"}"}, "json:a", "bad-json"),
    ]:
        with pytest.raises(DataError) as caught:
            find(members, key)
        assert caught.value.slug == slug
    with pytest.raises(ConfigError, match=r"'txt:a' is neither"):
        find({}, "txt:a")
