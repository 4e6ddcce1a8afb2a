"""The tokenizer: encoding, decoding, training and errors."""

from __future__ import annotations

import hashlib
import time
from pathlib import Path

import numpy as np
import pytest
import sentencepiece

from data_pipeline.common.errors import DataError
from data_pipeline.content.captions import clean_caption
from data_pipeline.content.tokenizer import Tokenizer, TokenizerError
from data_pipeline.preparing.caption_stream import iter_captions
from data_pipeline.preparing.tokenizer_training import train_tokenizer
from data_pipeline.shards.writer import write_shards

ANIMALS = ("cat", "dog", "horse", "fox", "owl", "red panda", "polar bear")
CORPUS = [
    f"{article} {animal} {location}"
    for article in ("a small", "one happy", "the old")
    for animal in ANIMALS
    for location in ("in the snow", "under a tree", "on a flag", "é")
]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return train_tokenizer(CORPUS, tmp_path_factory.mktemp("tokenizer") / "t.model", vocab_size=290)


@pytest.mark.parametrize(
    "text",
    [
        "a small cat in the snow",
        "日本語の猫",
        "שלום 👩‍🚀",
        "\u2581 a\u2581\u2581b",
        "<pad> </s> <0x41> <unk>",
        "Ünïcode",
        "  two  spaces\t",
        "",
        "e\u0301",
        "half \ud800",
    ],
)
def test_decode_inverts_encode(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text, 500)
    assert tokenizer.decode(ids) == clean_caption(text)
    assert (ids[0], ids[-1]) == (1, 2)
    assert not {0, 1, 2, 3} & set(ids[1:-1])  # special tokens never encode text


def test_decode_inverts_encode_for_random_unicode(tokenizer: Tokenizer) -> None:
    rng = np.random.default_rng(0)
    for _ in range(300):
        codes = rng.integers(32, 0x2FFFF, 10)
        text = clean_caption(
            "".join(chr(int(code)) for code in codes if not 0xD800 <= code < 0xE000)
        )
        assert tokenizer.decode(tokenizer.encode(text, 500)) == text


def test_first_word_has_the_same_ids_as_later_words(tokenizer: Tokenizer) -> None:
    fox = tokenizer.encode("fox", 99)[1:-1]
    assert tokenizer.encode("the old fox", 99)[-1 - len(fox) : -1] == fox


def test_truncation_keeps_the_end_token(tokenizer: Tokenizer) -> None:
    text = "the old polar bear under a tree"
    full = tokenizer.encode(text, 99)
    for length in range(2, len(full) + 3):
        expected = full if length >= len(full) else [*full[: length - 1], 2]
        assert tokenizer.encode(text, length) == expected
    with pytest.raises(ValueError, match="max_length is 1"):
        tokenizer.encode("a", 1)


@pytest.mark.parametrize(
    "text", ["x" * 100_000, "\u2581" * 100_000, "a \u2581 " * 25_000, "日" * 100_000]
)
def test_very_long_caption_is_encoded_fast(tokenizer: Tokenizer, text: str) -> None:
    start = time.process_time()
    ids = tokenizer.encode(text, 64)
    assert time.process_time() - start < 1.0
    assert len(ids) == 64 and (ids[0], ids[-1]) == (1, 2)


def test_encode_clean_equals_encode(tokenizer: Tokenizer) -> None:
    for text in [*CORPUS[:20], "", "日本語", "a \u2581 b"]:
        assert tokenizer.encode_clean(clean_caption(text), 40) == tokenizer.encode(f" {text}\n", 40)
    with pytest.raises(ValueError, match="max_length is 1"):
        tokenizer.encode_clean("", 1)


def test_decode_stops_at_the_end_token_and_skips_padding(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("one happy owl", 99)
    assert tokenizer.decode([*ids, 0, 0, *ids]) == "one happy owl"
    assert tokenizer.decode([]) == ""


def test_training_is_deterministic(tokenizer: Tokenizer, tmp_path: Path) -> None:
    again = train_tokenizer(iter(CORPUS), tmp_path / "sub" / "again.model", vocab_size=290)
    assert again.fingerprint == tokenizer.fingerprint
    model = (tmp_path / "sub" / "again.model").read_bytes()
    assert again.fingerprint == hashlib.sha256(model).hexdigest()

    other = train_tokenizer(CORPUS[1:], tmp_path / "other.model", vocab_size=290)
    assert other.fingerprint != tokenizer.fingerprint
    assert tokenizer.vocab_size == other.vocab_size == 290
    assert [path.name for path in tmp_path.glob("*.model")] == ["other.model"]


def test_too_little_text_for_the_vocabulary(tmp_path: Path) -> None:
    path = tmp_path / "t.model"
    with pytest.raises(TokenizerError, match=r"--vocab-size 5000 .*too large.*\d+ to \d+"):
        train_tokenizer(CORPUS, path, vocab_size=5000)
    with pytest.raises(TokenizerError, match="no caption"):
        train_tokenizer([" ", "\x00"], path, vocab_size=300)
    assert not path.exists()
    assert 260 < train_tokenizer(CORPUS, path, vocab_size=5000, exact=False).vocab_size < 1000


def test_unsuitable_model_files_are_rejected(tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match=r"missing\.model"):
        Tokenizer.load(tmp_path / "missing.model")
    (tmp_path / "text.model").write_text("hello")
    with pytest.raises(TokenizerError, match=r"text\.model is not a SentencePiece model"):
        Tokenizer.load(tmp_path / "text.model")
    for name, options in [
        ("ids", {"byte_fallback": True}),
        ("bytes", {"pad_id": 0, "bos_id": 1, "eos_id": 2, "unk_id": 3, "hard_vocab_limit": False}),
    ]:
        with open(tmp_path / name, "wb") as file:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=iter(CORPUS),
                model_writer=file,
                vocab_size=290,
                minloglevel=2,
                **options,
            )
    with pytest.raises(TokenizerError, match=r"ids \(-1, 1, 2, 0\)"):
        Tokenizer.load(tmp_path / "ids")
    with pytest.raises(TokenizerError, match="without byte fallback"):
        Tokenizer.load(tmp_path / "bytes")


def test_training_on_the_captions_of_shards(tokenizer: Tokenizer, tmp_path: Path) -> None:
    samples = [
        {
            "__key__": f"{index:03d}",
            "jpg": b"\xff",
            "txt": text,
            "json": {"tags": [f"tag {index}", "x"]},
        }
        for index, text in enumerate(CORPUS)
    ]
    manifest = write_shards(samples, tmp_path / "shards", samples_per_shard=30)
    assert list(iter_captions([manifest], ["txt"])) == CORPUS
    assert list(iter_captions([manifest], ["json:tags"]))[:4] == ["tag 0", "x", "tag 1", "x"]
    captions = iter_captions([manifest], ["txt"])
    trained = train_tokenizer(captions, tmp_path / "t.model", vocab_size=290)
    assert trained.fingerprint == tokenizer.fingerprint

    shard = tmp_path / "shards" / manifest.shards[1].name
    shard.unlink()
    with pytest.raises(DataError, match=shard.name):
        list(iter_captions([manifest], ["txt"]))


@pytest.mark.parametrize("text", ["", "a", "some words and more", "\u2581" * 30, "日本 " * 12])
def test_truncation_is_reported_and_equals_the_encoding(tokenizer: Tokenizer, text: str) -> None:
    length = len(tokenizer.encode_clean(text, 1_000))
    for max_length in range(2, length + 3):
        ids, is_truncated = tokenizer.encode_truncated(text, max_length)
        assert ids == tokenizer.encode_clean(text, max_length)
        assert is_truncated == (length > max_length)
