"""SentencePiece tokenizer for captions.

A unigram model with byte fallback: a character that is not in the vocabulary is encoded as its
UTF-8 bytes, so any text is decoded unchanged. Ids 0..3 are the special tokens padding, start, end
and unknown; none of them encodes text. The fingerprint is the model file's SHA-256.
"""

from __future__ import annotations

import hashlib
import io
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import sentencepiece

from data_pipeline.common import storage
from data_pipeline.common.errors import DataError
from data_pipeline.content.captions import clean_caption

PAD_ID, START_ID, END_ID, UNK_ID = 0, 1, 2, 3

_META_SPACE = "\u2581"
"""SentencePiece's internal symbol for a space; a literal one in a caption is encoded as bytes."""


class TokenizerError(DataError):
    """The tokenizer is missing, corrupt, or not the one that this run was trained with."""


class Tokenizer:
    """A trained tokenizer; create one with `Tokenizer.load`."""

    pad_id, start_id, end_id, unk_id = PAD_ID, START_ID, END_ID, UNK_ID

    def __init__(self, model: bytes, *, where: str = "the tokenizer") -> None:
        """Load from the bytes of a SentencePiece model; `where` names it in errors.

        Raises:
            TokenizerError: Not a model, or a model with other special ids or without byte fallback.
        """
        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        except RuntimeError as error:
            raise TokenizerError(
                f"{where} is not a SentencePiece model; train one with `vlmoe tokenizer train`"
            ) from error

        special_ids = tuple(
            getattr(self._processor, name)() for name in ("pad_id", "bos_id", "eos_id", "unk_id")
        )
        if special_ids != (PAD_ID, START_ID, END_ID, UNK_ID):
            raise TokenizerError(
                f"{where} has pad, start, end, unknown ids {special_ids}, expected (0, 1, 2, 3); "
                f"train a tokenizer with `vlmoe tokenizer train`"
            )

        self._meta_space_ids = [
            self._processor.piece_to_id(f"<0x{byte:02X}>") for byte in _META_SPACE.encode()
        ]
        if UNK_ID in self._meta_space_ids:
            raise TokenizerError(
                f"{where} was trained without byte fallback, so some text cannot be encoded; train "
                f"a tokenizer with `vlmoe tokenizer train`"
            )

        self.vocab_size: int = self._processor.get_piece_size()
        self.fingerprint: str = hashlib.sha256(model).hexdigest()
        self.model_bytes = model

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Tokenizer:
        """Load a model file.

        Raises:
            TokenizerError: The file is missing or not a suitable model.
        """
        try:
            model = Path(path).read_bytes()
        except OSError as error:
            raise TokenizerError(
                f"cannot read the tokenizer {path}: {error.strerror}; check the path, or train one "
                f"with `vlmoe tokenizer train`"
            ) from error
        return cls(model, where=str(path))

    def encode(self, text: str, max_length: int) -> list[int]:
        """Ids of a caption, including start and end.

        A longer caption is truncated before the end token.

        Args:
            text: A caption; it is cleaned first.
            max_length: Maximum number of ids, including start and end; at least 2.
        """
        return self.encode_clean(clean_caption(text), max_length)

    def encode_clean(self, caption: str, max_length: int) -> list[int]:
        """`encode` of a caption that is already clean."""
        if max_length < 2:
            raise ValueError(f"max_length is {max_length}; start and end alone need 2")
        if not caption:
            return [START_ID, END_ID]

        # With the leading space, the first word has the same ids as in the middle of a caption.
        head, *rest = (" " + caption).split(_META_SPACE)
        ids: list[int] = self._processor.encode(head)
        for part in rest:
            ids += self._meta_space_ids + self._processor.encode(part)
            if len(ids) > max_length:
                break  # a caption of only these symbols would need one call for each
        return [START_ID, *ids[: max_length - 2], END_ID]

    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids` up to the first end token, without padding and start tokens."""
        kept: list[int] = []
        for token in ids:
            if token == END_ID:
                break
            if token not in (PAD_ID, START_ID):
                kept.append(int(token))
        return str(self._processor.decode(kept)).removeprefix(" ")

    def piece(self, token: int) -> str:
        """SentencePiece's representation of one id, for display."""
        return str(self._processor.id_to_piece(token))


def train_tokenizer(
    captions: Iterable[str], path: str | os.PathLike[str], *, vocab_size: int, exact: bool = True
) -> Tokenizer:
    """Train a tokenizer and write its model file atomically.

    Deterministic: the same captions in the same order give the same bytes.

    Args:
        captions: Training text; it is cleaned first, and empty captions are skipped.
        path: Model file to write.
        vocab_size: Vocabulary size, including four special tokens and 256 bytes.
        exact: Fail if there is too little text for `vocab_size`; otherwise the vocabulary is
            smaller.

    Raises:
        TokenizerError: There are no captions, or too few for `vocab_size`.
    """
    model = io.BytesIO()
    try:
        _train(_training_lines(captions), model, vocab_size, exact)
    except RuntimeError as error:
        raise _training_error(error, vocab_size) from error

    target = Path(path)
    storage.write_bytes(str(target), model.getvalue())
    return Tokenizer.load(target)


def _train(lines: Iterator[str], model: io.BytesIO, vocab_size: int, exact: bool) -> None:
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=lines,
        model_writer=model,
        model_type="unigram",
        vocab_size=vocab_size,
        hard_vocab_limit=exact,
        byte_fallback=True,
        # Characters rarer than one in 5,000 are encoded as bytes instead of taking an id each.
        character_coverage=0.9998,
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
        minloglevel=2,
    )


def _training_lines(captions: Iterable[str]) -> Iterator[str]:
    """Clean, non-empty lines. Raises if there are none; SentencePiece would only print an error."""
    is_empty = True
    for text in captions:
        caption = clean_caption(text).replace(_META_SPACE, " ").strip()
        if caption:
            is_empty = False
            yield " " + caption
    if is_empty:
        raise TokenizerError("there is no caption to train a tokenizer on")


def _training_error(error: RuntimeError, vocab_size: int) -> TokenizerError:
    max_size = re.search(r"Please set it to a value <= (\d+)", str(error))
    if max_size:
        return TokenizerError(
            f"too little text for a vocabulary of {vocab_size} ids (including 4 special tokens and "
            f"256 bytes): at most {max_size[1]} are possible; set --vocab-size {max_size[1]}, and "
            f"model.vocab_size={max_size[1]} for the run"
        )
    last_line = (str(error).strip().splitlines() or ["no message"])[-1]
    return TokenizerError(
        f"SentencePiece cannot train a vocabulary of {vocab_size} ids (including 4 special tokens "
        f"and 256 bytes): {last_line}; set another --vocab-size or add text"
    )
