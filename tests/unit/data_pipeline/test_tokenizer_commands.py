from __future__ import annotations

from pathlib import Path

import pytest

from data_pipeline.common.errors import ConfigError, DataError
from data_pipeline.content.tokenizer import Tokenizer
from data_pipeline.preparing.caption_stream import iter_captions
from data_pipeline.preparing.tokenizer_stats import byte_token_ids, encoding_stats, longest_pieces
from data_pipeline.shards.writer import write_shards
from tests.support.data_commands import run_data_command
from tests.support.small_shards import make_caption, make_png, make_shards, make_tokenizer


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def test_training_does_not_depend_on_workers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_shards(tmp_path / "s", count=60)
    for workers in (0, 2):
        options = ("--out", tmp_path / f"{workers}.model", "--vocab-size", 296)
        run_data_command("tokenizer", "train", tmp_path / "s", *options, "--workers", workers)
    assert "296 pieces" in capsys.readouterr().out
    assert (tmp_path / "0.model").read_bytes() == (tmp_path / "2.model").read_bytes()


def test_iter_captions(tmp_path: Path) -> None:
    manifest = make_shards(tmp_path, count=30, samples_per_shard=10)
    captions = [make_caption(number) for number in range(30)]
    assert list(iter_captions([manifest], ["txt"])) == captions
    subset = list(iter_captions([manifest], ["txt"], samples=12, seed=1))
    assert len(subset) == 12 and subset == [text for text in captions if text in subset]
    with pytest.raises(ConfigError, match=r"caption_keys.*'png'"):
        list(iter_captions([manifest], ["png"]))


def test_iter_captions_skips_corrupt_samples(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    manifest = make_shards(tmp_path, count=30, samples_per_shard=10)
    captions = [make_caption(number) for number in range(30)]
    shard = Path(manifest.shard_url(manifest.shards[1]))
    content = bytearray(shard.read_bytes())
    content[600] ^= 1
    shard.write_bytes(content)
    assert list(iter_captions([manifest], ["txt"])) == captions[:10] + captions[11:]
    assert "00010 of shard-000001.tar: crc-mismatch" in caplog.text
    assert "skipped 1 corrupt sample of 30" in caplog.text

    shard.unlink()
    with pytest.raises(DataError, match=r"shard-000001.tar is unavailable \(missing-shard\)"):
        list(iter_captions([manifest], ["txt"]))


def test_encode_prints_pieces_ids_and_bytes(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    run_data_command("tokenizer", "encode", model, "a red 日 \x1b[0m", "dog")
    output = capsys.readouterr().out
    assert "captions     2:" in output and "\x1b" not in output

    ids = Tokenizer.load(model).encode("a red 日 [0m", 99)
    lines = output.splitlines()
    assert lines[0] == r"a red 日 \x1b[0m"
    assert lines[1].startswith(f"  {len(ids)} tokens, ") and "<0xE6>" in lines[2]
    pieces, printed_ids = lines[2].split(), lines[3].split()
    assert len(pieces) == len(printed_ids)
    assert printed_ids == [str(token) for token in ids][: len(printed_ids)]

    with pytest.raises(ConfigError, match="--shards"):
        run_data_command("tokenizer", "encode", model)


def test_encode_wraps_long_text(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    text = "a red cat " * 40
    run_data_command("tokenizer", "encode", model, text)
    lines = capsys.readouterr().out.splitlines()[2:]
    assert max(map(len, lines)) <= 102 and len(lines) > 2
    printed_ids = [int(word) for line in lines[1::2] for word in line.split()]
    assert printed_ids == Tokenizer.load(model).encode(text, 9999)


def test_inspect_prints_context_lengths(
    tmp_path: Path, model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = ["cat"] * 98 + ["cat dog " * 5, "cat dog " * 20]
    samples: list[dict[str, object]] = [
        {"__key__": f"{index:03d}", "png": make_png(1), "txt": text}
        for index, text in enumerate(texts)
    ]
    write_shards(samples, tmp_path)
    run_data_command("tokenizer", "inspect", model, "--shards", tmp_path, "--workers", 0)
    output = capsys.readouterr().out
    tokenizer = Tokenizer.load(model)
    assert f"{tokenizer.vocab_size:,} ids: 4 special tokens, 256 bytes" in output
    assert tokenizer.fingerprint in output

    rows = {}
    for line in output.splitlines():
        words = line.split()
        if words and words[0].endswith("%"):
            rows[words[0]] = tuple(map(int, words[1:]))
    lengths = sorted(len(tokenizer.encode(text, 9999)) for text in texts)
    for ratio, rank in (("90.0%", 89), ("99.0%", 98), ("99.9%", 99), ("100.0%", 99)):
        longest, context_length = rows[ratio]
        assert longest == lengths[rank]
        assert context_length % 8 == 0 and 0 <= context_length - longest < 8


def test_encoding_stats(model: str) -> None:
    tokenizer = Tokenizer.load(model)
    texts = ["a red cat", "日", "", "dog  dog"]
    stats = encoding_stats(tokenizer, texts)
    ids = [token for text in texts for token in tokenizer.encode(text, 99)[1:-1]]
    byte_tokens = [token for token in ids if tokenizer.piece(token).startswith("<0x")]
    assert (stats.num_tokens, stats.num_byte_tokens) == (len(ids), len(byte_tokens))
    assert stats.num_unknown_tokens == 0
    assert (stats.num_words, stats.num_characters) == (6, 17)
    assert stats.num_used_pieces == len(set(ids) - set(byte_tokens))


def test_vocabulary_pieces(model: str) -> None:
    tokenizer = Tokenizer.load(model)
    assert len(byte_token_ids(tokenizer)) == 256
    pieces = longest_pieces(tokenizer, 10_000)
    assert len(pieces) == tokenizer.vocab_size - 260
    assert len(pieces[0]) == max(map(len, pieces))
    assert not any("<" in piece for piece in pieces)
