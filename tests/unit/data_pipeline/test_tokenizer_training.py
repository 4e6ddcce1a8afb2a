"""Training a tokenizer: reserved text, long captions, and the sizes that captions allow."""

from __future__ import annotations

import logging
import re
import time
from pathlib import Path

import pytest
import sentencepiece
from hypothesis import strategies as st

from data_pipeline.common.errors import ConfigError
from data_pipeline.content.captions import clean_caption
from data_pipeline.content.tokenizer import TokenizerError
from data_pipeline.preparing import tokenizer_training
from data_pipeline.preparing.tokenizer_training import TrainingText, train_tokenizer
from data_pipeline.preparing.unicode_scripts import many_character_ratio
from data_pipeline.shards.writer import write_shards
from tests.support.data_commands import run_data_command
from tests.support.properties import check_property, num_examples
from tests.support.small_shards import make_png

CORPUS = [f"{size} {animal} {number}" for size in ("small", "old") for animal in ("cat", "owl")
          for number in range(20)]  # fmt: skip
MARKS = "<unk> <start> <end> <pad> <0x41> </s> <s>"
CHINESE = ["一只红色的猫", "雪地里的狗", "树下的老马", "两只小鸟在树上"]


def allowed_sizes(captions: list[str], vocab_size: int, path: Path) -> tuple[int, int]:
    """The sizes that the error message states."""
    with pytest.raises(TokenizerError, match=rf"--vocab-size {vocab_size} ") as error:
        train_tokenizer(captions, path, vocab_size=vocab_size)
    message = str(error.value)
    assert "required_chars" not in message and ".cc" not in message and "\n" not in message
    sizes = re.search(r"allow (?:only )?(\d+)(?: to (\d+))?", message)
    assert sizes, message
    return int(sizes[1]), int(sizes[2] or sizes[1])


@pytest.mark.parametrize(
    "reserved", ["\u2585", "\u2585\u2585\u2585", "\u2581", MARKS, "\t<PERSON>\u2581", "\x00"]
)
def test_captions_with_reserved_text_are_trained_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, reserved: str
) -> None:
    captions = [f"zebra {reserved} giraffe", *CORPUS] * 3
    tokenizer = train_tokenizer(captions, tmp_path / "t.model", vocab_size=320, exact=False)
    ids = tokenizer.encode("zebra giraffe", 99)
    assert not any(tokenizer.piece(token).startswith("<0x") for token in ids)
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
    for text in (f"a {reserved} cat", reserved, MARKS):
        ids = tokenizer.encode(text, 999)
        assert not {0, 1, 2, 3} & set(ids[1:-1])
        assert tokenizer.decode(ids) == clean_caption(text)


def test_text_of_intact_captions_is_unchanged() -> None:
    text = TrainingText.of([" a  cat", "日本", "a <b> c"])
    assert text.lines == [" a cat", " 日本", " a <b> c"]
    assert text.summary() == "3 captions of 3"


def test_left_out_captions_are_counted() -> None:
    text = TrainingText.of(["cat", " ", "\u2585\u2585", "\u200b", "dog \u2581", "<pad>"])
    assert text.lines == [" cat", " dog", " < pad>"]
    assert (text.num_captions, text.num_replaced) == (6, 2)
    assert sorted(text.left_out.values()) == [1, 2]
    assert "3 captions of 6" in text.summary() and "left out 2: empty" in text.summary()


def test_every_line_is_accepted_by_sentencepiece() -> None:
    alphabet = st.sampled_from(["a", "b ", "\u2585", "\u2581", "\t", "\x00", "\ufffd", "<unk>",
                                "\U0010ffff", "日", "<0x41>", "\u2047", "e\u0301"])  # fmt: skip

    def check(captions: list[list[str]]) -> None:
        text = TrainingText.of(["cat", *map("".join, captions)])
        _, num_accepted = tokenizer_training._train(text.lines, 400, 1.0, exact=False)
        assert num_accepted == len(text.lines)

    check_property(check, 30, st.lists(st.lists(alphabet, max_size=6), max_size=6))


@num_examples
def test_splitting_keeps_all_words(examples: int) -> None:
    def check(words: list[str]) -> None:
        caption = clean_caption(" ".join(words * 700))
        lines = TrainingText.of([caption]).lines
        assert all(len(line) <= 4001 and line[0] == " " and line[1] != " " for line in lines)
        assert "".join(lines).replace(" ", "") == caption.replace(" ", "")

    check_property(check, examples, st.lists(st.text("ab<>", max_size=9), max_size=4))


def test_long_captions_are_trained_on_fast(tmp_path: Path) -> None:
    captions = ["x" * 90_000, "y " * 90_000, "z" * (1 << 21), *CORPUS]
    start = time.process_time()
    tokenizer = train_tokenizer(captions, tmp_path / "t.model", vocab_size=280, exact=False)
    assert time.process_time() - start < 60  # 0.5 s per 90,000; unsplit, y alone takes 80 s
    assert not any(tokenizer.piece(token).startswith("<0x") for token in tokenizer.encode("yz", 9))


def test_lines_that_sentencepiece_skips_are_reported(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    text = TrainingText.of(CORPUS)
    text.lines.append(" \u2585")
    train_tokenizer(text, tmp_path / "t.model", vocab_size=290, exact=False)
    assert f"accepted {len(CORPUS)} of {len(CORPUS) + 1} lines" in caplog.text


@pytest.mark.parametrize("vocab_size", [-5, 0, 3, 259, 5000, 1 << 31, 1 << 70])
@pytest.mark.parametrize("captions", [["cat"], ["a"] * 50, ["\U0001f600"] * 3, CORPUS, CHINESE])
def test_stated_sizes_work_and_others_do_not(
    tmp_path: Path, captions: list[str], vocab_size: int
) -> None:
    path = tmp_path / "t.model"
    smallest, largest = allowed_sizes(captions, vocab_size, path)
    assert not path.exists()
    for size in {smallest, (smallest + largest) // 2, largest}:
        assert train_tokenizer(captions, path, vocab_size=size).vocab_size == size
    for size in (smallest - 1, largest + 1):
        assert allowed_sizes(captions, size, path) == (smallest, largest)


def test_only_reserved_characters(tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match=r"no caption.*0 captions of 2; left out 2: .*U\+2585"):
        train_tokenizer(["\u2585", "\u2581 \u2585"], tmp_path / "t.model", vocab_size=300)


def test_character_coverage_depends_on_the_scripts(tmp_path: Path) -> None:
    assert TrainingText.of(CORPUS).default_coverage() == 0.9998
    assert TrainingText.of(["Русский язык", "été"]).default_coverage() == 0.9998
    for many in (CHINESE, ["カタカナ"], ["한국어"], [*CORPUS, *CHINESE * 9]):
        assert TrainingText.of(many).default_coverage() == 0.9995
    assert many_character_ratio(["ab 日本", "12"]) == pytest.approx(0.5)
    with pytest.raises(ConfigError, match=r"--character-coverage is 0\.5, expected 0\.98 to 1"):
        train_tokenizer(CORPUS, tmp_path / "t.model", vocab_size=300, character_coverage=0.5)

    rare = [*CORPUS * 60, "Ж"]
    for coverage, has_rare in ((0.99, False), (1.0, True)):
        tokenizer = train_tokenizer(
            rare, tmp_path / "t.model", vocab_size=290, exact=False, character_coverage=coverage
        )
        pieces = [tokenizer.piece(token) for token in range(tokenizer.vocab_size)]
        assert any("Ж" in piece for piece in pieces) == has_rare


def test_log_of_sentencepiece_is_not_printed(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    tokenizer = train_tokenizer(CORPUS, tmp_path / "t.model", vocab_size=290, exact=False)
    sentencepiece.SentencePieceProcessor(model_proto=tokenizer.model_bytes)
    assert capfd.readouterr().err == ""


def test_train_command_prints_counts_and_coverage(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    texts = [*CORPUS, "a \u2585 zebra", "\u2585", ""]
    samples: list[dict[str, object]] = [
        {"__key__": f"{index:03d}", "png": make_png(1), "txt": text}
        for index, text in enumerate(texts)
    ]
    write_shards(samples, tmp_path / "s")
    command = ("tokenizer", "train", tmp_path / "s", "--out", tmp_path / "t.model", "--workers", 0)
    run_data_command(*command, "--vocab-size", "auto")
    output = capsys.readouterr().out
    assert "81 captions of 82" in output and "left out 1: only reserved" in output
    assert "character coverage 0.9998" in output
    assert f"1 samples of {len(texts)} have no caption in txt" in caplog.text
    automatic = int(re.search(r"model: (\d+) pieces", output)[1])  # type: ignore[index]
    assert automatic == allowed_sizes(texts, 5000, tmp_path / "other")[1]

    run_data_command(*command, "--vocab-size", 281, "--character-coverage", "0.99")
    assert "character coverage 0.99\n" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        run_data_command(*command, "--vocab-size", "many")
    assert "'many' is neither a number nor auto" in capsys.readouterr().err
