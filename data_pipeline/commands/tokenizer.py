"""`vlmoe tokenizer`: trains a vocabulary on captions, and shows how it encodes text."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from data_pipeline.commands.options import add_caption_keys, add_workers, shown, workers_of
from data_pipeline.common.commands import Subparsers, add_command, add_group
from data_pipeline.common.errors import ConfigError

if TYPE_CHECKING:
    from data_pipeline.content.tokenizer import Tokenizer
    from data_pipeline.preparing.tokenizer_stats import EncodingStats

_TRAIN_EXAMPLES = """\
  vlmoe tokenizer train data/quickstart/train --out tokenizer.model --vocab-size 4000
  vlmoe tokenizer train shards/ --out t.model --caption-key txt --caption-key json:tags
  vlmoe tokenizer train s3://bucket/pairs --out t.model --samples 1000000 --vocab-size auto

The size must equal model.vocab_size of the runs that use it, unless that is 0. Training is
deterministic: the same captions give the same file. Captions that cannot be used are counted, with
the reason."""
_ENCODE_EXAMPLES = """\
  vlmoe tokenizer encode t.model 'a red fox in the snow'
  vlmoe tokenizer encode t.model --shards shards/ --samples 5

Prints the pieces, with _ for a word boundary, and below them the ids. Characters outside the
vocabulary are encoded as bytes, such as <0xE7>."""
_INSPECT_EXAMPLES = """\
  vlmoe tokenizer inspect t.model
  vlmoe tokenizer inspect t.model --shards shards/ --caption-key txt

With --shards, it also prints the number of tokens per caption, and how many captions fit into a
given model.context_length."""

_DEFAULT_VOCAB_SIZE = 32_000
_LINE_WIDTH = 100


def add(subparsers: Subparsers) -> None:
    """Add the group and its commands."""
    commands = add_group(subparsers, "tokenizer", summary="vocabularies: train, encode, inspect")
    _add_train(commands)

    encode = add_command(
        commands,
        "encode",
        summary="print the pieces and ids of text",
        examples=_ENCODE_EXAMPLES,
        description="Print how a vocabulary encodes given text, or captions from shards.",
    )
    _add_model(encode, samples=10)
    encode.add_argument("text", metavar="TEXT", nargs="*", help="text to encode")
    encode.set_defaults(handle=handle_encode)

    inspect = add_command(
        commands,
        "inspect",
        summary="describe a vocabulary and the context length it needs",
        examples=_INSPECT_EXAMPLES,
        description="Print a vocabulary's size, ids, pieces, and statistics of encoded captions.",
    )
    _add_model(inspect, samples=20_000)
    inspect.set_defaults(handle=handle_inspect)


def _add_train(commands: Subparsers) -> None:
    train = add_command(
        commands,
        "train",
        summary="train a vocabulary on the captions of shards",
        examples=_TRAIN_EXAMPLES,
        description="Train a SentencePiece unigram model with byte fallback on the captions of the "
        "shards.",
    )
    train.add_argument(
        "manifests",
        metavar="DATASET",
        nargs="+",
        help="folders with a manifest.json, or that file",
    )
    train.add_argument(
        "--out", metavar="FILE", type=Path, required=True, help="model file to write"
    )
    train.add_argument(
        "--vocab-size",
        metavar="N",
        type=_vocab_size,
        default=_DEFAULT_VOCAB_SIZE,
        help=f"vocabulary size, or auto: as many as the captions allow, at most "
        f"{_DEFAULT_VOCAB_SIZE} (default: {_DEFAULT_VOCAB_SIZE})",
    )
    train.add_argument(
        "--character-coverage",
        metavar="RATIO",
        type=float,
        help="ratio of the text whose characters get an id, 0.98 to 1; the rarest ones are encoded "
        "as bytes (default: 0.9998, or 0.9995 if a tenth of the letters is Han, kana or Hangul)",
    )
    _add_sampling(train, samples=0, default="0, all")
    add_caption_keys(train)
    add_workers(train)
    train.set_defaults(handle=handle_train)


def _vocab_size(text: str) -> int | None:
    """The value of `--vocab-size`; None is `auto`."""
    if text == "auto":
        return None
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number nor auto") from None


def _add_model(parser: argparse.ArgumentParser, *, samples: int) -> None:
    parser.add_argument("model", metavar="MODEL", type=Path, help="tokenizer.model")
    parser.add_argument(
        "--shards",
        metavar="DATASET",
        action="append",
        default=[],
        help="use captions of this dataset; may be repeated",
    )
    _add_sampling(parser, samples=samples, default=f"{samples}; 0: all")
    add_caption_keys(parser)
    add_workers(parser)


def _add_sampling(parser: argparse.ArgumentParser, *, samples: int, default: str) -> None:
    parser.add_argument(
        "--samples",
        metavar="N",
        type=int,
        default=samples,
        help=f"number of random samples from the shards (default: {default})",
    )
    parser.add_argument(
        "--seed", metavar="N", type=int, default=0, help="seed for choosing samples (default: 0)"
    )


def handle_train(args: argparse.Namespace) -> None:
    """Train a vocabulary and print a summary."""
    from data_pipeline.preparing.caption_stream import iter_captions
    from data_pipeline.preparing.tasks import open_datasets
    from data_pipeline.preparing.tokenizer_training import TrainingText, train_tokenizer

    captions = iter_captions(
        open_datasets(args.manifests),
        args.caption_key or ["txt"],
        samples=args.samples,
        seed=args.seed,
        workers=workers_of(args),
    )
    text = TrainingText.of(captions)
    coverage = args.character_coverage
    if coverage is None:
        coverage = text.default_coverage()
    tokenizer = train_tokenizer(
        text,
        args.out,
        vocab_size=_DEFAULT_VOCAB_SIZE if args.vocab_size is None else args.vocab_size,
        exact=args.vocab_size is not None,
        character_coverage=coverage,
    )
    print(f"trained on {text.summary()}")
    print(f"character coverage {coverage:g}")
    size, fingerprint = tokenizer.vocab_size, tokenizer.fingerprint[:16]
    print(f"{shown(str(args.out))}: {size:,} pieces, fingerprint {fingerprint}")


def handle_encode(args: argparse.Namespace) -> None:
    """Print pieces and ids."""
    from data_pipeline.content.tokenizer import Tokenizer
    from data_pipeline.preparing.tokenizer_stats import byte_token_ids, encoding_stats

    tokenizer = Tokenizer.load(args.model)
    texts = args.text or _captions(args)
    if not texts:
        raise ConfigError("there is nothing to encode; give TEXT, or --shards")

    byte_ids = set(byte_token_ids(tokenizer))
    for text in texts:
        _print_encoding(tokenizer, text, byte_ids)
    if len(texts) > 1:
        print(_summary(encoding_stats(tokenizer, texts)))


def _print_encoding(tokenizer: Tokenizer, text: str, byte_ids: set[int]) -> None:
    from data_pipeline.common.escaping import escape_control
    from data_pipeline.preparing.tokenizer_stats import MAX_TOKENS

    ids = tokenizer.encode(text, MAX_TOKENS)
    num_bytes = sum(token_id in byte_ids for token_id in ids)
    byte_note = f", {num_bytes} of them bytes" if num_bytes else ""
    print(f"{escape_control(text)}\n  {len(ids)} tokens{byte_note}")

    pieces = [escape_control(tokenizer.piece(token_id)).replace("\u2581", "_") for token_id in ids]
    widths = [
        max(len(piece), len(str(token_id))) for piece, token_id in zip(pieces, ids, strict=True)
    ]
    for start, end in _line_ranges(widths, _LINE_WIDTH):
        for row in (pieces[start:end], ids[start:end]):
            cells = zip(row, widths[start:end], strict=True)
            print("  " + " ".join(str(cell).ljust(width) for cell, width in cells).rstrip())


def _line_ranges(widths: list[int], limit: int) -> list[tuple[int, int]]:
    """Ranges of columns that fit into a line."""
    ranges, start, used = [], 0, 0
    for column, width in enumerate(widths):
        if used + width + 1 > limit and column > start:
            ranges.append((start, column))
            start, used = column, 0
        used += width + 1
    return [*ranges, (start, len(widths))]


def handle_inspect(args: argparse.Namespace) -> None:
    """Describe a vocabulary."""
    from data_pipeline.common.escaping import escape_control
    from data_pipeline.common.tables import format_table
    from data_pipeline.content.tokenizer import NUM_BYTE_TOKENS, NUM_SPECIAL_TOKENS, Tokenizer
    from data_pipeline.preparing.tokenizer_stats import encoding_stats, longest_pieces

    tokenizer = Tokenizer.load(args.model)
    num_pieces = tokenizer.vocab_size - NUM_SPECIAL_TOKENS - NUM_BYTE_TOKENS
    print(
        f"vocabulary   {tokenizer.vocab_size:,} ids: {NUM_SPECIAL_TOKENS} special tokens, "
        f"{NUM_BYTE_TOKENS} bytes, {num_pieces:,} pieces\n"
        f"special      pad {tokenizer.pad_id}, start {tokenizer.start_id}, "
        f"end {tokenizer.end_id}, unknown {tokenizer.unk_id}\n"
        f"fingerprint  {tokenizer.fingerprint}"
    )
    print("longest      " + " ".join(map(escape_control, longest_pieces(tokenizer, 12))))

    captions = _captions(args)
    if not captions:
        return
    stats = encoding_stats(tokenizer, captions)
    print(_summary(stats))
    print(f"used         {stats.num_used_pieces:,} pieces occur in these captions\n")
    rows = [(f"{ratio:.1%}", longest, length) for ratio, longest, length in stats.context_lengths()]
    print(format_table(["captions that fit", "tokens", "model.context_length"], rows))


def _summary(stats: EncodingStats) -> str:
    num_tokens = max(1, stats.num_tokens)
    return (
        f"captions     {len(stats.lengths):,}: {stats.lengths.mean():.1f} tokens per caption "
        f"(with start and end), {stats.num_tokens / max(1, stats.num_words):.2f} tokens per word, "
        f"{stats.num_characters / num_tokens:.2f} characters per token\n"
        f"bytes        {stats.num_byte_tokens / num_tokens:.2%} of tokens, "
        f"unknown {stats.num_unknown_tokens / num_tokens:.2%}"
    )


def _captions(args: argparse.Namespace) -> list[str]:
    from data_pipeline.preparing.caption_stream import iter_captions
    from data_pipeline.preparing.tasks import open_datasets

    if not args.shards:
        return []
    captions = iter_captions(
        open_datasets(args.shards),
        args.caption_key or ["txt"],
        samples=args.samples,
        seed=args.seed,
        workers=workers_of(args),
    )
    return list(captions)
