"""SentencePiece tokenizer for captions.

A unigram model with byte fallback: a character that is not in the vocabulary is encoded as its
UTF-8 bytes, so any text is decoded unchanged. Ids 0..3 are the special tokens padding, start, end
and unknown; none of them encodes text. The fingerprint is the model file's SHA-256.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path

import sentencepiece

from data_pipeline.common.errors import DataError
from data_pipeline.content.captions import clean_caption

PAD_ID, START_ID, END_ID, UNK_ID = 0, 1, 2, 3
NUM_SPECIAL_TOKENS, NUM_BYTE_TOKENS = 4, 256

META_SPACE = "\u2581"
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
            self._processor.piece_to_id(f"<0x{byte:02X}>") for byte in META_SPACE.encode()
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
        head, *rest = (" " + caption).split(META_SPACE)
        ids: list[int] = self._processor.encode(head)
        for part in rest:
            ids += self._meta_space_ids + self._processor.encode(part)
            if len(ids) > max_length:
                break  # a caption of only these symbols would need one call for each
        return [START_ID, *ids[: max_length - 2], END_ID]

    def encode_truncated(self, caption: str, max_length: int) -> tuple[list[int], bool]:
        """`encode_clean`, and whether the caption was truncated."""
        ids = self.encode_clean(caption, max_length + 1)
        if len(ids) <= max_length:
            return ids, False
        return [*ids[: max_length - 1], END_ID], True

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
