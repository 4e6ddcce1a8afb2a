from __future__ import annotations

from pathlib import Path

import pytest

from data_pipeline.common.errors import ConfigError, DataError
from data_pipeline.content.tokenizer import Tokenizer
from data_pipeline.preparing.corpus import captions_of
from data_pipeline.preparing.vocabulary import byte_ids, encode_all, longest_pieces
from data_pipeline.shards.writer import write_shards
from tests.support.data_commands import data
from tests.support.small_shards import caption, make_shards, make_tokenizer, picture


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def test_training_is_the_same_with_any_number_of_processes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_shards(tmp_path / "s", count=60)
    for workers in (0, 2):
        data(
            "tokenizer",
            "train",
            tmp_path / "s",
            "--out",
            tmp_path / f"{workers}.model",
            "--vocab-size",
            296,
            "--workers",
            workers,
        )
    assert "296 pieces" in capsys.readouterr().out
    assert (tmp_path / "0.model").read_bytes() == (tmp_path / "2.model").read_bytes()


def test_captions_of_some_samples_and_of_damaged_shards(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    manifest = make_shards(tmp_path, count=30, samples_per_shard=10)
    every = [caption(number) for number in range(30)]
    assert list(captions_of([manifest], ["txt"])) == every
    some = list(captions_of([manifest], ["txt"], samples=12, seed=1))
    assert len(some) == 12 and some == [text for text in every if text in some]
    shard = Path(manifest.shard_url(manifest.shards[1]))
    content = bytearray(shard.read_bytes())
    content[600] ^= 1
    shard.write_bytes(content)
    assert list(captions_of([manifest], ["txt"])) == every[:10] + every[11:]
    assert "left out 00010 of shard-000001.tar: crc-mismatch" in caplog.text
    assert "1 of 30 samples were damaged" in caplog.text
    shard.unlink()
    with pytest.raises(DataError, match="cannot open shard"):
        list(captions_of([manifest], ["txt"]))
    with pytest.raises(ConfigError, match="caption key"):
        list(captions_of([manifest], ["png"]))


def test_encode_shows_pieces_ids_and_bytes(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    data("tokenizer", "encode", model, "a red 日 \x1b[0m", "dog")
    said = capsys.readouterr().out
    tokenizer = Tokenizer.load(model)
    ids = tokenizer.encode("a red 日 [0m", 99)
    shown = said.splitlines()
    assert shown[0] == r"a red 日 \x1b[0m"
    assert shown[1].startswith(f"  {len(ids)} tokens, ") and "<0xE6>" in shown[2]
    rows = [line.split() for line in shown[2:4]]
    assert rows[1] == [str(token) for token in ids][: len(rows[1])] and len(rows[0]) == len(rows[1])
    assert "captions     2:" in said and "\x1b" not in said
    with pytest.raises(ConfigError, match="nothing to encode"):
        data("tokenizer", "encode", model)


def test_long_text_goes_on_in_the_next_line(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    text = "a red cat " * 40
    data("tokenizer", "encode", model, text)
    lines = capsys.readouterr().out.splitlines()[2:]
    assert max(map(len, lines)) <= 102 and len(lines) > 2
    shown = [int(word) for line in lines[1::2] for word in line.split()]
    assert shown == Tokenizer.load(model).encode(text, 9999)


def test_inspect_recommends_a_text_length(
    tmp_path: Path, model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = ["cat"] * 98 + ["cat dog " * 5, "cat dog " * 20]
    write_shards(
        [{"__key__": f"{n:03d}", "png": picture(1), "txt": text} for n, text in enumerate(texts)],
        tmp_path,
    )
    data("tokenizer", "inspect", model, "--shards", tmp_path, "--workers", 0)
    said = capsys.readouterr().out
    tokenizer = Tokenizer.load(model)
    assert (
        f"{tokenizer.vocab_size:,} ids: 4 marks, 256 bytes" in said
        and tokenizer.fingerprint in said
    )
    lengths = sorted(len(tokenizer.encode(text, 9999)) for text in texts)
    rows = {
        words[0]: tuple(map(int, words[1:]))
        for line in said.splitlines()
        if (words := line.split()) and words[0].endswith("%")
    }
    for share, place in (("90.0%", 89), ("99.0%", 98), ("99.9%", 99), ("100.0%", 99)):
        assert rows[share][0] == lengths[place]
        assert rows[share][1] % 8 == 0 and 0 <= rows[share][1] - lengths[place] < 8


def test_counts_are_those_of_counting_by_hand(model: str) -> None:
    tokenizer = Tokenizer.load(model)
    texts = ["a red cat", "日", "", "dog  dog"]
    found = encode_all(tokenizer, texts)
    ids = [token for text in texts for token in tokenizer.encode(text, 99)[1:-1]]
    bytes_of = [token for token in ids if tokenizer.piece(token).startswith("<0x")]
    assert (found.tokens, found.byte_tokens, found.unknown_tokens) == (len(ids), len(bytes_of), 0)
    assert (found.words, found.characters) == (6, 17)
    assert found.used == len(set(ids) - set(bytes_of))
    assert len(byte_ids(tokenizer)) == 256
    pieces = longest_pieces(tokenizer, 10_000)
    assert len(pieces) == tokenizer.vocab_size - 260 and len(pieces[0]) == max(map(len, pieces))
    assert not any("<" in piece for piece in pieces)
