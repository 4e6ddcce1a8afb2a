from __future__ import annotations

import json
import time
import unicodedata
from collections import Counter

import numpy as np
import pytest

from data_pipeline.common.errors import ConfigError, DataError
from data_pipeline.content import captions
from data_pipeline.content.captions import (
    Texts,
    caption_hash,
    check_key,
    choose,
    clean,
    clean_hash,
    find,
)
from data_pipeline.content.fields import parse_fields
from data_pipeline.settings import LimitConfig


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
    assert (
        caption_hash("A Red  heart") == caption_hash("a red heart ") != caption_hash("a red hearts")
    )
    assert all(0 <= caption_hash(str(number)) < 2**63 for number in range(100))


MEMBERS = {
    "txt": b" a cat\n",
    "json": json.dumps(
        {"captions": ["one", "two", 3, ""], "title": "T", "year": 7, "none": []}
    ).encode(),
}


def test_find_reads_members_and_json_fields() -> None:
    assert find(MEMBERS, "txt") == ["a cat"]
    assert find(MEMBERS, "json:captions") == ["one", "two"]
    assert find(MEMBERS, "json:title") == ["T"]
    assert [
        find(MEMBERS, key) for key in ("json:year", "json:none", "json:missing", "caption")
    ] == [[]] * 4


def drawn(
    members: dict[str, bytes], keys: tuple[str, ...], weights: tuple[float, ...], count: int
) -> Counter:
    """How often each caption comes."""
    texts, rng = Texts(members), np.random.default_rng(0)
    return Counter(choose(texts, keys, weights, pair) for pair in rng.random((count, 2)).tolist())


def test_choose_draws_by_weight_among_the_keys_that_have_captions() -> None:
    counts = drawn(MEMBERS, ("txt", "json:missing", "json:captions"), (1.0, 5.0, 3.0), 4000)
    assert set(counts) == {"a cat", "one", "two"}
    assert counts["a cat"] / 4000 == pytest.approx(1 / 4, abs=0.03)
    assert counts["one"] / 4000 == pytest.approx(3 / 8, abs=0.03)


def test_choose_follows_the_weights_of_several_keys() -> None:
    members = {"json": json.dumps({name: name for name in "abcd"}).encode()}
    weights = (0.1, 0.2, 0.0, 0.7)
    counts = drawn(members, tuple(f"json:{name}" for name in "abcd"), weights, 20_000)
    # Pearson's chi-squared with two degrees of freedom: above 13.8 in one of 1,000 samples.
    expected = {
        name: weight * 20_000 for name, weight in zip("abcd", weights, strict=True) if weight
    }
    assert set(counts) == set(expected)
    assert sum((counts[name] - number) ** 2 / number for name, number in expected.items()) < 13.8


def test_choose_without_numbers_takes_the_first_caption_of_the_first_key() -> None:
    texts = Texts(MEMBERS)
    assert choose(texts, ("json:missing", "json:captions", "txt"), (0.0, 0.0, 1.0), None) == "one"
    assert choose(texts, ("json:missing",), (1.0,), None) is None
    assert choose(Texts({}), ("txt",), (1.0,), (0.5, 0.5)) is None


def test_a_weight_of_zero_is_never_drawn_while_another_key_has_captions() -> None:
    assert set(drawn(MEMBERS, ("txt", "json:title"), (0.0, 1.0), 200)) == {"T"}
    assert set(drawn(MEMBERS, ("json:title", "txt"), (1.0, 0.0), 200)) == {"T"}
    assert set(drawn(MEMBERS, ("txt", "json:missing"), (0.0, 1.0), 200)) == {"a cat"}
    assert choose(Texts(MEMBERS), ("txt", "json:title"), (0.0, 1.0), (0.0, 0.0)) == "T"
    last = 1 - 2**-32
    assert choose(Texts(MEMBERS), ("txt", "json:captions"), (1.0, 1.0), (last, last)) == "two"


def test_choose_passes_over_what_does_not_fit() -> None:
    for pair in ((0.0, 0.0), (0.99, 0.99)):
        assert (
            choose(
                Texts(MEMBERS),
                ("txt", "json:captions"),
                (1.0, 1.0),
                pair,
                lambda text: text == "one",
            )
            == "one"
        )
    assert choose(Texts(MEMBERS), ("txt",), (1.0,), None, lambda text: False) is None


def test_members_are_decoded_and_parsed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = Counter[str]()
    counted = {"clean": clean, "parse_fields": parse_fields}
    for name, function in counted.items():
        monkeypatch.setattr(
            captions,
            name,
            lambda *given, name=name, function=function: (calls.update([name]), function(*given))[
                1
            ],
        )
    texts = Texts({"txt": b"t", "json": b'{"a": "A", "b": "B"}'})
    for _ in range(3):
        assert [texts.find(key) for key in ("txt", "json:a", "json:b")] == [["t"], ["A"], ["B"]]
        assert texts.fields() == {"a": "A", "b": "B"}
    assert calls == {"clean": 3, "parse_fields": 1}


def test_only_members_of_text_can_be_captions() -> None:
    """Whatever the settings say: a pickle or a script is not even decoded."""
    for key in ("txt", "text", "caption", "en.txt", "json:title", "json:a:b"):
        check_key(key)
    others = (
        "pkl",
        "pickle",
        "pyd",
        "pth",
        "npy",
        "sh",
        "jpg",
        "txt.pkl",
        "json",
        "json:",
        "txt:a",
        ":a",
        "pkl:a",
        "",
    )
    for key in others:
        with pytest.raises(ConfigError, match="is neither a member of text"):
            check_key(key)
        with pytest.raises(ConfigError, match="is neither a member of text"):
            find({key: b"x"}, key)


@pytest.mark.parametrize(
    "mark", ["\u0301\u0323", "\u0344", "\u0f73", "\u0f81\u0f71", "\u0308\u0301\u0338"]
)
def test_letters_with_thousands_of_accents_cost_little(mark: str) -> None:
    """Sorting n accents takes n * n steps: 100,000 of them would take seconds."""
    start = time.process_time()
    once = clean("a" + mark * 50_000 + " b")
    assert time.process_time() - start < 0.5
    assert (
        unicodedata.normalize("NFD", once)[0] == "a" and once.endswith(" b") and 15 < len(once) < 66
    )
    assert clean(once) == once
    few = "a" + mark * 10
    assert clean(few) == unicodedata.normalize("NFC", few)


def test_limits_of_length() -> None:
    texts = Texts(
        {"txt": b"123456", "json": b'{"a": "1234567", "b": ["1", "1234567"]}'},
        LimitConfig(caption_chars=6),
    )
    assert texts.find("txt") == ["123456"]
    for key in ("json:a", "json:b"):
        with pytest.raises(DataError, match="a caption of 7 characters, more than 6") as caught:
            texts.find(key)
        assert caught.value.slug == "caption-too-long"
    wide = "\U0001f600" * 6
    assert Texts({"txt": wide.encode()}, LimitConfig(caption_chars=6)).find("txt") == [wide]
    with pytest.raises(DataError, match="a caption of at least 25,000,000 characters") as caught:
        find({"txt": b"\xff" * 100_000_000}, "txt")
    assert caught.value.slug == "caption-too-long"


def test_a_clean_caption_has_the_hash_of_its_source() -> None:
    for text in (" A  Red\theart", "Caf\u0065\u0301", "STRASSE \ufeff"):
        assert clean_hash(clean(text)) == caption_hash(text)


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
