"""Trains a SentencePiece tokenizer on captions; no caption is left out without being counted.

SentencePiece skips lines with its reserved characters and lines that are too long, and only writes
this to a log. Reserved text is therefore changed, long captions are split, and the number
of lines that SentencePiece accepted is compared with the number of lines that it received.
"""

from __future__ import annotations

import io
import logging
import os
import re
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import BinaryIO

import sentencepiece

from data_pipeline.common import storage
from data_pipeline.common.errors import ConfigError
from data_pipeline.content.captions import clean_caption
from data_pipeline.content.tokenizer import (
    END_ID,
    META_SPACE,
    NUM_BYTE_TOKENS,
    NUM_SPECIAL_TOKENS,
    PAD_ID,
    START_ID,
    UNK_ID,
    Tokenizer,
    TokenizerError,
)
from data_pipeline.preparing.unicode_scripts import many_character_ratio

logger = logging.getLogger(__name__)

COVERAGE, MANY_CHARACTER_COVERAGE = 0.9998, 0.9995
"""Ratio of the text whose characters get an id; the rarest characters are encoded as bytes. The
lower one is for scripts with thousands of characters (Han, kana, Hangul), where rare characters
would otherwise take most of the vocabulary."""
COVERAGE_RANGE = (0.98, 1.0)
"""The values that SentencePiece accepts."""

_MANY_CHARACTER_RATIO = 0.1
"""Ratio of letters of such scripts from which the lower coverage is the default."""
_RESERVED = re.compile(f"[{META_SPACE}\u2585]|<(?=(?:unk|pad|start|end|0x[0-9A-F]{{2}})>)")
"""SentencePiece's symbols for a space and for an unknown character (it skips lines with the latter)
and the start of text that looks like one of its tokens (it skips this text)."""
_RESERVED_NAMES = "U+2581, U+2585"
_LINE_CHARS = 4_000
"""Maximum length of a line; the training time is quadratic in it (90 s for 180,000 characters)."""
_LARGEST_TRIED = 32_000
"""Up to this size the largest possible vocabulary is determined for an error message."""
_MAX_VOCAB_SIZE = 1 << 24
"""More than any captions allow, and small enough for SentencePiece's integers."""


@dataclass
class TrainingText:
    """Captions in the form in which SentencePiece receives them."""

    lines: list[str] = field(default_factory=list)
    """Clean text without reserved text; a long caption has several lines."""
    num_captions: int = 0
    num_replaced: int = 0
    """Captions with reserved text, which SentencePiece receives in another form."""
    left_out: Counter[str] = field(default_factory=Counter)
    """Number of captions without a line, by reason."""

    @classmethod
    def of(cls, captions: Iterable[str]) -> TrainingText:
        """Prepare captions; they are cleaned first."""
        text = cls()
        for caption in captions:
            text.add(clean_caption(caption))
        return text

    def add(self, caption: str) -> None:
        """Add a clean caption, or count it as left out."""
        self.num_captions += 1
        if not caption:
            self.left_out["empty"] += 1
            return
        usable = _RESERVED.sub(_unreserved, caption)
        if usable != caption:
            usable = " ".join(usable.split())
            if not usable:
                self.left_out[f"only reserved characters ({_RESERVED_NAMES})"] += 1
                return
            self.num_replaced += 1
        self.lines += (f" {part}" for part in _split(usable))

    def default_coverage(self) -> float:
        """`MANY_CHARACTER_COVERAGE` for scripts with many characters, else `COVERAGE`."""
        ratio = many_character_ratio(self.lines)
        return MANY_CHARACTER_COVERAGE if ratio >= _MANY_CHARACTER_RATIO else COVERAGE

    def summary(self) -> str:
        """One line for the user: how many captions are used, changed and left out."""
        num_left_out = self.left_out.total()
        parts = [f"{self.num_captions - num_left_out:,} captions of {self.num_captions:,}"]
        if self.num_replaced:
            parts.append(
                f"text reserved by SentencePiece ({_RESERVED_NAMES}, <unk>, <0x41> ...) was "
                f"separated by spaces or replaced by them in {self.num_replaced:,}"
            )
        parts += (f"left out {count:,}: {reason}" for reason, count in self.left_out.items())
        return "; ".join(parts)


def train_tokenizer(
    captions: Iterable[str] | TrainingText,
    path: str | os.PathLike[str],
    *,
    vocab_size: int,
    exact: bool = True,
    character_coverage: float | None = None,
) -> Tokenizer:
    """Train a tokenizer and write its model file atomically.

    Deterministic: the same captions in the same order give the same bytes.

    Args:
        captions: Training text.
        path: Model file to write.
        vocab_size: Vocabulary size, including four special tokens and 256 bytes.
        exact: Fail if there is too little text for `vocab_size`; otherwise the vocabulary is
            smaller.
        character_coverage: See `COVERAGE`; None selects it by the scripts of the captions.

    Raises:
        ConfigError: The coverage is out of range.
        TokenizerError: There are no captions, or they do not allow `vocab_size`.
    """
    text = captions if isinstance(captions, TrainingText) else TrainingText.of(captions)
    if not text.lines:
        raise TokenizerError(f"there is no caption to train a tokenizer on: {text.summary()}")
    coverage = text.default_coverage() if character_coverage is None else character_coverage
    low, high = COVERAGE_RANGE
    if not low <= coverage <= high:
        raise ConfigError(f"--character-coverage is {coverage}, expected {low} to {high}")

    try:
        model, num_accepted = _train(text.lines, vocab_size, coverage, exact)
    except RuntimeError as error:
        raise _training_error(error, text, vocab_size, coverage) from None
    if num_accepted != len(text.lines):
        logger.warning(
            "SentencePiece %s accepted %s of %d lines of captions; the vocabulary lacks the others",
            sentencepiece.__version__,
            "an unknown number" if num_accepted is None else num_accepted,
            len(text.lines),
        )
    storage.write_bytes(str(path), model)
    return Tokenizer.load(path)


def _train(
    lines: list[str], vocab_size: int, coverage: float, exact: bool
) -> tuple[bytes, int | None]:
    """The model, and the number of lines in it, None if SentencePiece does not report it."""
    model = io.BytesIO()
    with _stderr_of_libraries() as log:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines),
            model_writer=model,
            model_type="unigram",
            # Below, SentencePiece fails without naming the size that it needs.
            vocab_size=min(max(vocab_size, NUM_SPECIAL_TOKENS + NUM_BYTE_TOKENS), _MAX_VOCAB_SIZE),
            hard_vocab_limit=exact,
            byte_fallback=True,
            character_coverage=coverage,
            pad_id=PAD_ID,
            bos_id=START_ID,
            eos_id=END_ID,
            unk_id=UNK_ID,
            pad_piece="<pad>",
            bos_piece="<start>",
            eos_piece="<end>",
            unk_piece="<unk>",
            # Captions are already clean, and decoding must return the encoded text exactly.
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            max_sentence_length=1 << 20,
            num_threads=1,  # more threads sum in another order, which changes the model
            minloglevel=0,
        )
        log.seek(0)
        accepted = re.search(rb"Loaded all (\d+) sentences", log.read())
    return model.getvalue(), int(accepted[1]) if accepted else None


@contextmanager
def _stderr_of_libraries() -> Iterator[BinaryIO]:
    """A file that receives what C++ code writes to standard error."""
    sys.stderr.flush()
    original = os.dup(2)
    with tempfile.TemporaryFile() as log:
        os.dup2(log.fileno(), 2)
        try:
            yield log
        finally:
            os.dup2(original, 2)
            os.close(original)
            sentencepiece.set_min_log_level(2)


def _unreserved(match: re.Match[str]) -> str:
    return "< " if match[0] == "<" else " "


def _split(caption: str) -> Iterator[str]:
    """Parts of at most `_LINE_CHARS` characters, split at spaces where possible."""
    while len(caption) > _LINE_CHARS:
        end = caption.rfind(" ", 1, _LINE_CHARS + 1)
        end = _LINE_CHARS if end == -1 else end
        yield caption[:end]
        caption = caption[end:].lstrip(" ")
    if caption:
        yield caption


def _training_error(
    error: RuntimeError, text: TrainingText, vocab_size: int, coverage: float
) -> TokenizerError:
    """States which vocabulary sizes the captions allow."""
    too_small = re.search(r"required_chars\. \d+ vs (\d+)", str(error))
    too_large = re.search(r"set it to a value <= (\d+)", str(error))
    if not (too_small or too_large):
        # Without the position in SentencePiece's source.
        reason = re.sub(r"^\w+: \S+\(\d+\) (\[.*?\] ?)?", "", str(error).strip())
        return TokenizerError(
            f"SentencePiece cannot train on these captions: {reason or 'no reason'}"
        )

    smallest = int(too_small[1]) if too_small else _smallest_size(text, coverage)
    largest = int(too_large[1]) if too_large else _largest_size(text, coverage)
    sizes = f"{smallest} to {largest}" if smallest < largest else f"only {smallest}"
    num_characters = smallest - NUM_SPECIAL_TOKENS - NUM_BYTE_TOKENS
    nearest = smallest if too_small else largest
    return TokenizerError(
        f"--vocab-size {vocab_size} is too {'small' if too_small else 'large'}: these captions "
        f"allow {sizes} ids ({NUM_SPECIAL_TOKENS} special tokens, {NUM_BYTE_TOKENS} bytes, "
        f"{num_characters} characters at --character-coverage {coverage:g}, and pieces); set "
        f"--vocab-size {nearest} or auto, and model.vocab_size of the run to the same number or 0"
    )


def _smallest_size(text: TrainingText, coverage: float) -> int:
    try:
        _train(text.lines, 0, coverage, exact=True)
    except RuntimeError as error:
        required = re.search(r"required_chars\. \d+ vs (\d+)", str(error))
        if required:
            return int(required[1])
    return NUM_SPECIAL_TOKENS + NUM_BYTE_TOKENS


def _largest_size(text: TrainingText, coverage: float) -> int:
    """The largest size up to a limit, because a larger vocabulary is trained for longer."""
    limit = max(_LARGEST_TRIED, 2 * _smallest_size(text, coverage))
    model, _ = _train(text.lines, limit, coverage, exact=False)
    return Tokenizer(model).vocab_size
