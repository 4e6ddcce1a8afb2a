"""Caption cleaning, hashing, extraction and selection."""

from __future__ import annotations

import json
import time
import unicodedata
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from data_pipeline.common.errors import ConfigError, DataError
from data_pipeline.content import captions
from data_pipeline.content.captions import (
    SampleTexts,
    check_caption_key,
    clean_caption,
    find_captions,
    hash_caption,
    hash_clean_caption,
    no_caption_error,
    select_caption,
)
from data_pipeline.content.json_fields import parse_json_fields
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
    assert clean_caption(text) == expected


def test_clean_is_idempotent() -> None:
    rng = np.random.default_rng(0)
    for _ in range(500):
        text = "".join(chr(int(code)) for code in rng.integers(0, 0x3000, 12))
        once = clean_caption(text)
        assert clean_caption(once) == once == unicodedata.normalize("NFC", once)
        once.encode()


def test_hash_ignores_case_and_whitespace_only() -> None:
    assert hash_caption("A Red  heart") == hash_caption("a red heart ")
    assert hash_caption("a red heart") != hash_caption("a red hearts")
    assert all(0 <= hash_caption(str(index)) < 2**63 for index in range(100))


MEMBERS = {
    "txt": b" a cat\n",
    "json": json.dumps(
        {"captions": ["one", "two", 3, ""], "title": "T", "year": 7, "none": []}
    ).encode(),
}


def test_find_captions_in_members_and_json_fields() -> None:
    assert find_captions(MEMBERS, "txt") == ["a cat"]
    assert find_captions(MEMBERS, "json:captions") == ["one", "two"]
    assert find_captions(MEMBERS, "json:title") == ["T"]
    for key in ("json:year", "json:none", "json:missing", "caption"):
        assert find_captions(MEMBERS, key) == []


def sample_counts(
    members: dict[str, bytes], keys: tuple[str, ...], weights: tuple[float, ...], count: int
) -> Counter[str | None]:
    """How often each caption is selected in `count` trials."""
    texts, rng = SampleTexts(members), np.random.default_rng(0)
    trials = rng.random((count, 2)).tolist()
    return Counter(select_caption(texts, keys, weights, uniforms) for uniforms in trials)


def test_select_samples_among_keys_with_captions() -> None:
    counts = sample_counts(MEMBERS, ("txt", "json:missing", "json:captions"), (1.0, 5.0, 3.0), 4000)
    assert set(counts) == {"a cat", "one", "two"}
    assert counts["a cat"] / 4000 == pytest.approx(1 / 4, abs=0.03)
    assert counts["one"] / 4000 == pytest.approx(3 / 8, abs=0.03)


def test_select_follows_the_weights_of_several_keys() -> None:
    members = {"json": json.dumps({name: name for name in "abcd"}).encode()}
    weights = (0.1, 0.2, 0.0, 0.7)
    keys = tuple(f"json:{name}" for name in "abcd")
    counts = sample_counts(members, keys, weights, 20_000)
    # Pearson's chi-squared with two degrees of freedom exceeds 13.8 with probability 0.001.
    expected = {
        name: weight * 20_000 for name, weight in zip("abcd", weights, strict=True) if weight
    }
    assert set(counts) == set(expected)
    chi_squared = sum((counts[name] - mean) ** 2 / mean for name, mean in expected.items())
    assert chi_squared < 13.8


def test_select_without_uniforms_returns_the_first_caption() -> None:
    texts = SampleTexts(MEMBERS)
    keys = ("json:missing", "json:captions", "txt")
    assert select_caption(texts, keys, (0.0, 0.0, 1.0), None) == "one"
    assert select_caption(texts, ("json:missing",), (1.0,), None) is None
    assert select_caption(SampleTexts({}), ("txt",), (1.0,), (0.5, 0.5)) is None


def test_weight_zero_is_selected_only_without_alternative() -> None:
    assert set(sample_counts(MEMBERS, ("txt", "json:title"), (0.0, 1.0), 200)) == {"T"}
    assert set(sample_counts(MEMBERS, ("json:title", "txt"), (1.0, 0.0), 200)) == {"T"}
    assert set(sample_counts(MEMBERS, ("txt", "json:missing"), (0.0, 1.0), 200)) == {"a cat"}


def test_select_at_the_ends_of_the_unit_interval() -> None:
    texts, largest = SampleTexts(MEMBERS), 1 - 2**-32
    assert select_caption(texts, ("txt", "json:title"), (0.0, 1.0), (0.0, 0.0)) == "T"
    keys = ("txt", "json:captions")
    assert select_caption(texts, keys, (1.0, 1.0), (largest, largest)) == "two"


def test_select_skips_captions_that_are_not_accepted() -> None:
    texts, keys = SampleTexts(MEMBERS), ("txt", "json:captions")
    for uniforms in ((0.0, 0.0), (0.99, 0.99)):
        selected = select_caption(texts, keys, (1.0, 1.0), uniforms, lambda text: text == "one")
        assert selected == "one"
    assert select_caption(texts, ("txt",), (1.0,), None, lambda text: False) is None


def test_members_are_decoded_and_parsed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = Counter[str]()

    def counted(function: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*args: Any) -> Any:
            calls[function.__name__] += 1
            return function(*args)

        return wrapper

    for function in (clean_caption, parse_json_fields):
        monkeypatch.setattr(captions, function.__name__, counted(function))

    texts = SampleTexts({"txt": b"t", "json": b'{"a": "A", "b": "B"}'})
    for _ in range(3):
        assert texts.find_captions("txt") == ["t"]
        assert texts.find_captions("json:a") == ["A"]
        assert texts.find_captions("json:b") == ["B"]
        assert texts.fields() == {"a": "A", "b": "B"}
    assert calls == {"clean_caption": 3, "parse_json_fields": 1}


def test_caption_key_must_be_a_text_member_or_json_field() -> None:
    """Even if the settings request it, a pickle or a script is never decoded."""
    for key in ("txt", "text", "caption", "en.txt", "json:title", "json:a:b"):
        check_caption_key(key)
    invalid = (
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
    for key in invalid:
        with pytest.raises(ConfigError, match="caption_keys"):
            check_caption_key(key)
        with pytest.raises(ConfigError, match="caption_keys"):
            find_captions({key: b"x"}, key)


@pytest.mark.parametrize(
    "mark", ["\u0301\u0323", "\u0344", "\u0f73", "\u0f81\u0f71", "\u0308\u0301\u0338"]
)
def test_thousands_of_combining_marks_are_cleaned_fast(mark: str) -> None:
    """Sorting n marks takes n^2 steps: 100,000 marks would take seconds."""
    start = time.process_time()
    once = clean_caption("a" + mark * 50_000 + " b")
    assert time.process_time() - start < 0.5

    assert unicodedata.normalize("NFD", once)[0] == "a" and once.endswith(" b")
    assert 15 < len(once) < 66
    assert clean_caption(once) == once
    few = "a" + mark * 10
    assert clean_caption(few) == unicodedata.normalize("NFC", few)


def test_caption_length_limit() -> None:
    texts = SampleTexts(
        {"txt": b"123456", "json": b'{"a": "1234567", "b": ["1", "1234567"]}'},
        LimitConfig(caption_chars=6),
    )
    assert texts.find_captions("txt") == ["123456"]
    for key in ("json:a", "json:b"):
        with pytest.raises(DataError, match=r"7 characters.* 6 .*caption_chars") as caught:
            texts.find_captions(key)
        assert caught.value.slug == "caption-too-long"
    wide = "\U0001f600" * 6
    texts = SampleTexts({"txt": wide.encode()}, LimitConfig(caption_chars=6))
    assert texts.find_captions("txt") == [wide]
    with pytest.raises(DataError, match="at least 25,000,000 characters") as caught:
        find_captions({"txt": b"\xff" * 100_000_000}, "txt")
    assert caught.value.slug == "caption-too-long"


def test_hash_of_the_clean_caption_equals_hash_of_the_source() -> None:
    for text in (" A  Red\theart", "Caf\u0065\u0301", "STRASSE \ufeff"):
        assert hash_clean_caption(clean_caption(text)) == hash_caption(text)


def test_corrupt_members_are_reported() -> None:
    for members, key, slug in [
        ({"txt": b"\xff\xfe"}, "txt", "invalid-text"),
        ({"json": b"{"}, "json:a", "invalid-json"),
        ({"json": b"[1]"}, "json:a", "invalid-json"),
        ({"json": b"[" * 100_000}, "json:a", "invalid-json"),
        ({"json": b'{"a": ' + b"1" * 5000 + b"}"}, "json:a", "invalid-json"),
    ]:
        with pytest.raises(DataError) as caught:
            find_captions(members, key)
        assert caught.value.slug == slug


@pytest.mark.parametrize(
    ("members", "keys", "hint"),
    [
        (("jpg", "caption"), ("txt",), "; to use caption, add it to data.caption_keys"),
        (("jpg", "outputs.txt", "json"), ("txt",), "; to use outputs.txt, add it to data.capti"),
        (("jpg", "json"), ("txt",), "; to use json:FIELD, add it to data.caption_keys"),
        (("jpg", "json"), ("json:a",), ""),
        (("jpg", "txt"), ("txt",), ""),  # an empty text
        ((), ("txt",), ""),
    ],
)
def test_an_error_names_the_keys_that_may_have_a_caption(
    members: tuple[str, ...], keys: tuple[str, ...], hint: str
) -> None:
    error = no_caption_error(members, keys)
    assert error.slug == "no-caption"
    start = f"no caption under {keys[0]}; the sample's files are {', '.join(members) or 'none'}"
    assert str(error).startswith(start + hint) and ("add it" in str(error)) == bool(hint)
