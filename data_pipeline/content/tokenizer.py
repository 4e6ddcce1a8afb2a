"""Captions to numbers and back, with SentencePiece.

A unigram model with byte fallback: text in any language goes in and comes out unchanged, because a
character that the vocabulary lacks is spelt in its UTF-8 bytes. Ids 0..3 are padding, start, end
and unknown; none of them is ever a piece of text. The model file's SHA-256 is its fingerprint.
"""

from __future__ import annotations

import hashlib
import io
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import sentencepiece

from data_pipeline.common.errors import TokenizerError
from data_pipeline.content.captions import clean

PAD_ID, START_ID, END_ID, UNK_ID = 0, 1, 2, 3

_BLOCK = "\u2581"
"""How SentencePiece spells a blank inside; a real one in a caption must go round it, as bytes."""


class Tokenizer:
    """A trained vocabulary; make one with `Tokenizer.load`."""

    pad_id, start_id, end_id, unk_id = PAD_ID, START_ID, END_ID, UNK_ID

    def __init__(self, model: bytes, *, where: str = "the tokenizer") -> None:
        """Take a SentencePiece model's bytes.

        Raises:
            TokenizerError: They are not a model, or one with other special ids or without bytes.
        """
        try:
            self._pieces = sentencepiece.SentencePieceProcessor(model_proto=model)
        except RuntimeError as error:
            raise TokenizerError(
                f"{where} is not a SentencePiece model; train one with `vlmoe tokenizer train`"
            ) from error
        found = tuple(
            getattr(self._pieces, name)() for name in ("pad_id", "bos_id", "eos_id", "unk_id")
        )
        if found != (PAD_ID, START_ID, END_ID, UNK_ID):
            raise TokenizerError(
                f"{where} has pad, start, end, unknown ids {found}, not (0, 1, 2, 3); train it with "
                f"`vlmoe tokenizer`, which gives them so"
            )
        self._block_ids = [self._pieces.piece_to_id(f"<0x{byte:02X}>") for byte in _BLOCK.encode()]
        if UNK_ID in self._block_ids:
            raise TokenizerError(
                f"{where} was trained without byte fallback; some text would be lost"
            )
        self.vocab_size: int = self._pieces.get_piece_size()
        self.fingerprint: str = hashlib.sha256(model).hexdigest()
        self.model_bytes = model

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Tokenizer:
        """Read a model file.

        Raises:
            TokenizerError: It is missing or not a model of this kind.
        """
        try:
            model = Path(path).read_bytes()
        except OSError as error:
            raise TokenizerError(
                f"cannot read the tokenizer {path}: {error.strerror}; check the path, or make one with "
                f"`vlmoe tokenizer train`"
            ) from error
        return cls(model, where=str(path))

    def encode(self, text: str, max_length: int) -> list[int]:
        """Ids of start, the caption's pieces, end: at most `max_length` of them.

        A longer caption loses its last pieces, never its end mark.

        Args:
            text: A caption; cleaned here.
            max_length: Most ids, both marks included; at least 2.
        """
        return self.encode_clean(clean(text), max_length)

    def encode_clean(self, caption: str, max_length: int) -> list[int]:
        """`encode` of a caption that is clean already."""
        if max_length < 2:
            raise ValueError(f"max_length is {max_length}; start and end alone need 2")
        if not caption:
            return [START_ID, END_ID]
        # The leading blank makes the first word the same piece as in the middle of a sentence.
        head, *rest = (" " + caption).split(_BLOCK)
        ids: list[int] = self._pieces.encode(head)
        for part in rest:
            ids += self._block_ids + self._pieces.encode(part)
            if len(ids) > max_length:
                break  # a caption of nothing but these would take a call for each
        return [START_ID, *ids[: max_length - 2], END_ID]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids` up to the first end mark; other marks and padding are left out."""
        kept: list[int] = []
        for token in ids:
            if token == END_ID:
                break
            if token not in (PAD_ID, START_ID):
                kept.append(int(token))
        return str(self._pieces.decode(kept)).removeprefix(" ")

    def piece(self, token: int) -> str:
        """How one id is spelt inside the model, for people to look at."""
        return str(self._pieces.id_to_piece(token))


def train_tokenizer(
    captions: Iterable[str], path: str | os.PathLike[str], *, vocab_size: int, exact: bool = True
) -> Tokenizer:
    """Learn a vocabulary and write it, whole or not at all.

    The same captions in the same order give the same bytes.

    Args:
        captions: What to learn from; cleaned here, empty ones left out.
        path: Model file to write.
        vocab_size: Ids wanted, the four special ones and the 256 bytes included.
        exact: Refuse text that is too little for so many; otherwise there are fewer ids.

    Raises:
        TokenizerError: There are no captions, or too few to fill `vocab_size`.
    """
    model = io.BytesIO()
    lines = (
        " " + caption for text in captions if (caption := clean(text).replace(_BLOCK, " ").strip())
    )
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_nonempty(lines),
            model_writer=model,
            model_type="unigram",
            vocab_size=vocab_size,
            hard_vocab_limit=exact,
            byte_fallback=True,
            # A character in fewer than one of 5,000 places is spelt in bytes: it would cost an id.
            character_coverage=0.9998,
            pad_id=PAD_ID,
            bos_id=START_ID,
            eos_id=END_ID,
            unk_id=UNK_ID,
            pad_piece="<pad>",
            bos_piece="<start>",
            eos_piece="<end>",
            unk_piece="<unk>",
            # Captions arrive clean, and what is encoded must come back letter for letter.
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            max_sentence_length=1 << 20,
            num_threads=1,  # more threads add in another order, and the bytes differ
            minloglevel=2,
        )
    except RuntimeError as error:
        most = re.search(r"Please set it to a value <= (\d+)", str(error))
        if most:
            raise TokenizerError(
                f"these captions have too little text for {vocab_size} pieces (4 marks and 256 bytes included): they "
                f"allow {most[1]} at most; give --vocab-size {most[1]}, and model.vocab_size={most[1]} to the run"
            ) from None
        raise TokenizerError(
            f"SentencePiece cannot make {vocab_size} pieces (4 marks and 256 bytes included) of these "
            f"captions; choose another vocab_size or give more text. It says: {_last_line(error)}"
        ) from error
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    aside = target.with_name(f".{target.name}.{os.getpid()}.part")
    aside.write_bytes(model.getvalue())
    os.replace(aside, target)
    return Tokenizer.load(target)


def _nonempty(lines: Iterator[str]) -> Iterator[str]:
    """`lines`, or an error at once where SentencePiece would only print one."""
    first = next(lines, None)
    if first is None:
        raise TokenizerError("there is no caption to learn a vocabulary from")
    yield first
    yield from lines


def _last_line(error: RuntimeError) -> str:
    return (str(error).strip().splitlines() or ["nothing"])[-1]
