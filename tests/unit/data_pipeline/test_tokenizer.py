from __future__ import annotations

import hashlib
import time
from pathlib import Path

import numpy as np
import pytest
import sentencepiece

from data_pipeline.common.errors import DataError, TokenizerError
from data_pipeline.content.captions import clean
from data_pipeline.content.tokenizer import Tokenizer, train_tokenizer
from data_pipeline.preparing.corpus import captions_of
from data_pipeline.shards.writer import write_shards

ANIMALS = ("cat", "dog", "horse", "fox", "owl", "red panda", "polar bear")
CORPUS = [
    f"{how} {animal} {where}"
    for how in ("a small", "one happy", "the old")
    for animal in ANIMALS
    for where in ("in the snow", "under a tree", "on a flag", "é")
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
        "  two  blanks\t",
        "",
        "e\u0301",
        "half \ud800",
    ],
)
def test_any_text_comes_back_clean(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text, 500)
    assert tokenizer.decode(ids) == clean(text)
    assert (ids[0], ids[-1]) == (1, 2)
    assert not {0, 1, 2, 3} & set(ids[1:-1])  # marks never stand for text


def test_random_unicode_comes_back(tokenizer: Tokenizer) -> None:
    rng = np.random.default_rng(0)
    for _ in range(300):
        codes = rng.integers(32, 0x2FFFF, 10)
        text = clean("".join(chr(int(code)) for code in codes if not 0xD800 <= code < 0xE000))
        assert tokenizer.decode(tokenizer.encode(text, 500)) == text


def test_a_word_is_the_same_pieces_first_and_later(tokenizer: Tokenizer) -> None:
    fox = tokenizer.encode("fox", 99)[1:-1]
    assert tokenizer.encode("the old fox", 99)[-1 - len(fox) : -1] == fox


def test_cutting_keeps_the_end(tokenizer: Tokenizer) -> None:
    whole = tokenizer.encode("the old polar bear under a tree", 99)
    for length in range(2, len(whole) + 3):
        cut = tokenizer.encode("the old polar bear under a tree", length)
        assert cut == (whole if length >= len(whole) else [*whole[: length - 1], 2])
    with pytest.raises(ValueError, match="start and end alone need 2"):
        tokenizer.encode("a", 1)


@pytest.mark.parametrize(
    "text", ["x" * 100_000, "\u2581" * 100_000, "a \u2581 " * 25_000, "日" * 100_000]
)
def test_a_very_long_caption_costs_little(tokenizer: Tokenizer, text: str) -> None:
    start = time.process_time()
    ids = tokenizer.encode(text, 64)
    assert time.process_time() - start < 1.0
    assert len(ids) == 64 and (ids[0], ids[-1]) == (1, 2)


def test_a_clean_caption_needs_no_cleaning(tokenizer: Tokenizer) -> None:
    for text in [*CORPUS[:20], "", "日本語", "a \u2581 b"]:
        assert tokenizer.encode_clean(clean(text), 40) == tokenizer.encode(f" {text}\n", 40)
    with pytest.raises(ValueError, match="start and end alone need 2"):
        tokenizer.encode_clean("", 1)


def test_decoding_stops_at_the_end_and_leaves_out_padding(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("one happy owl", 99)
    assert tokenizer.decode([*ids, 0, 0, *ids]) == "one happy owl"
    assert tokenizer.decode([]) == ""


def test_the_same_captions_give_the_same_bytes(tokenizer: Tokenizer, tmp_path: Path) -> None:
    again = train_tokenizer(iter(CORPUS), tmp_path / "sub" / "again.model", vocab_size=290)
    assert again.fingerprint == tokenizer.fingerprint
    assert (
        again.fingerprint
        == hashlib.sha256((tmp_path / "sub" / "again.model").read_bytes()).hexdigest()
    )
    other = train_tokenizer(CORPUS[1:], tmp_path / "other.model", vocab_size=290)
    assert other.fingerprint != tokenizer.fingerprint
    assert tokenizer.vocab_size == other.vocab_size == 290
    assert [path.name for path in tmp_path.glob("*.model")] == ["other.model"]


def test_too_little_text_is_refused_unless_fewer_ids_are_welcome(tmp_path: Path) -> None:
    path = tmp_path / "t.model"
    with pytest.raises(
        TokenizerError, match=r"too little text for 5000 pieces.*allow \d+ at most; give --vocab"
    ):
        train_tokenizer(CORPUS, path, vocab_size=5000)
    with pytest.raises(TokenizerError, match="no caption"):
        train_tokenizer([" ", "\x00"], path, vocab_size=300)
    assert not path.exists()
    assert 260 < train_tokenizer(CORPUS, path, vocab_size=5000, exact=False).vocab_size < 1000


def test_a_file_that_is_no_tokenizer_of_ours_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match="cannot read the tokenizer"):
        Tokenizer.load(tmp_path / "missing.model")
    (tmp_path / "text.model").write_text("hello")
    with pytest.raises(TokenizerError, match="is not a SentencePiece model"):
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


def test_training_from_shards_is_training_on_their_captions(
    tokenizer: Tokenizer, tmp_path: Path
) -> None:
    samples = [
        {
            "__key__": f"{number:03d}",
            "jpg": b"\xff",
            "txt": text,
            "json": {"tags": [f"tag {number}", "x"]},
        }
        for number, text in enumerate(CORPUS)
    ]
    manifest = write_shards(samples, tmp_path / "shards", samples_per_shard=30)
    assert list(captions_of([manifest], ["txt"])) == CORPUS
    assert list(captions_of([manifest], ["json:tags"]))[:4] == ["tag 0", "x", "tag 1", "x"]
    learnt = train_tokenizer(captions_of([manifest], ["txt"]), tmp_path / "t.model", vocab_size=290)
    assert learnt.fingerprint == tokenizer.fingerprint

    shard = tmp_path / "shards" / manifest.shards[1].name
    shard.unlink()
    with pytest.raises(DataError, match="cannot open shard"):
        list(captions_of([manifest], ["txt"]))
