"""`vlmoe tokenizer`: learn a vocabulary from captions, and see what it makes of text."""

from __future__ import annotations

import argparse
from pathlib import Path

from data_pipeline.commands.options import add_caption_keys, add_workers, workers_of
from data_pipeline.common.commands import Subparsers, add_command, add_group
from data_pipeline.common.errors import ConfigError

_TRAIN_EXAMPLES = """\
  vlmoe tokenizer train data/quickstart/train --out data/quickstart/tokenizer.model --vocab-size 4000
  vlmoe tokenizer train shards/ --out t.model --caption-key txt --caption-key json:tags
  vlmoe tokenizer train s3://bucket/pairs --out t.model --samples 1000000

The size must equal model.vocab_size of the runs that use it. The same captions give the same file."""
_ENCODE_EXAMPLES = """\
  vlmoe tokenizer encode t.model 'a red fox in the snow'
  vlmoe tokenizer encode t.model --shards shards/ --samples 5

Pieces are shown with _ for the blank before them, ids below. A character that the vocabulary lacks is spelt
in bytes, such as <0xE7>."""
_INSPECT_EXAMPLES = """\
  vlmoe tokenizer inspect t.model
  vlmoe tokenizer inspect t.model --shards shards/ --caption-key txt

With shards it says how many tokens captions take, and which model.context_length holds how many of them whole."""


def add(subparsers: Subparsers) -> None:
    """Add the group and its commands."""
    commands = add_group(subparsers, "tokenizer", summary="vocabularies: train, encode, inspect")
    train = add_command(
        commands,
        "train",
        summary="learn a vocabulary from the captions of shards",
        examples=_TRAIN_EXAMPLES,
        description="Train a SentencePiece model (unigram, with bytes for what it does not know) on the captions of "
        "the shards.",
    )
    train.add_argument(
        "manifests", metavar="DATASET", nargs="+", help="folders with a manifest.json, or that file"
    )
    train.add_argument(
        "--out", metavar="FILE", type=Path, required=True, help="model file to write"
    )
    train.add_argument(
        "--vocab-size", metavar="N", type=int, default=32000, help="pieces (default: 32000)"
    )
    train.add_argument(
        "--samples", metavar="N", type=int, default=0, help="samples to draw (default: 0, all)"
    )
    train.add_argument("--seed", metavar="N", type=int, default=0, help="of the draw (default: 0)")
    add_caption_keys(train)
    add_workers(train)
    train.set_defaults(handle=handle_train)
    encode = add_command(
        commands,
        "encode",
        summary="show the pieces and ids of text",
        examples=_ENCODE_EXAMPLES,
        description="Show what a vocabulary makes of given text, or of captions in shards.",
    )
    _add_model(encode, samples=10)
    encode.add_argument("text", metavar="TEXT", nargs="*", help="text to encode")
    encode.set_defaults(handle=handle_encode)
    inspect = add_command(
        commands,
        "inspect",
        summary="a vocabulary, and the text length it needs",
        examples=_INSPECT_EXAMPLES,
        description="Show a vocabulary's size, ids and pieces, and how it fits captions.",
    )
    _add_model(inspect, samples=20_000)
    inspect.set_defaults(handle=handle_inspect)


def _add_model(parser: argparse.ArgumentParser, *, samples: int) -> None:
    parser.add_argument("model", metavar="MODEL", type=Path, help="tokenizer.model")
    parser.add_argument(
        "--shards",
        metavar="DATASET",
        action="append",
        default=[],
        help="captions of this dataset; may be repeated",
    )
    parser.add_argument(
        "--samples",
        metavar="N",
        type=int,
        default=samples,
        help=f"samples to draw from the shards; 0 is all (default: {samples})",
    )
    parser.add_argument("--seed", metavar="N", type=int, default=0, help="of the draw (default: 0)")
    add_caption_keys(parser)
    add_workers(parser)


def handle_train(args: argparse.Namespace) -> None:
    """Train, and say what was made."""
    from data_pipeline.content.tokenizer import train_tokenizer
    from data_pipeline.preparing.corpus import captions_of
    from data_pipeline.preparing.visit import open_datasets

    captions = captions_of(
        open_datasets(args.manifests),
        args.caption_key or ["txt"],
        samples=args.samples,
        seed=args.seed,
        workers=workers_of(args),
    )
    tokenizer = train_tokenizer(captions, args.out, vocab_size=args.vocab_size)
    print(f"{args.out}: {tokenizer.vocab_size:,} pieces, fingerprint {tokenizer.fingerprint[:16]}")


def handle_encode(args: argparse.Namespace) -> None:
    """Show pieces and ids."""
    from data_pipeline.common.harmless import harmless
    from data_pipeline.content.tokenizer import Tokenizer
    from data_pipeline.preparing.vocabulary import byte_ids, encode_all

    tokenizer = Tokenizer.load(args.model)
    texts = args.text or _captions(args)
    if not texts:
        raise ConfigError("there is nothing to encode; give TEXT, or --shards")
    bytes_of = set(byte_ids(tokenizer))
    for text in texts:
        ids = tokenizer.encode(text, 1 << 20)
        pieces = [harmless(tokenizer.piece(token)).replace("\u2581", "_") for token in ids]
        widths = [
            max(len(piece), len(str(token))) for piece, token in zip(pieces, ids, strict=True)
        ]
        spelt = sum(token in bytes_of for token in ids)
        print(
            f"{harmless(text)}\n  {len(ids)} tokens" + (f", {spelt} of them bytes" if spelt else "")
        )
        for first, end in _lines(widths, 100):
            for row in (pieces[first:end], ids[first:end]):
                cells = (
                    str(cell).ljust(width)
                    for cell, width in zip(row, widths[first:end], strict=True)
                )
                print("  " + " ".join(cells).rstrip())
    if len(texts) > 1:
        print(_shares(encode_all(tokenizer, texts)))


def handle_inspect(args: argparse.Namespace) -> None:
    """Describe a vocabulary."""
    from data_pipeline.common.harmless import harmless
    from data_pipeline.content.tokenizer import Tokenizer
    from data_pipeline.preparing.tables import table
    from data_pipeline.preparing.vocabulary import NUM_BYTES, NUM_MARKS, encode_all, longest_pieces

    tokenizer = Tokenizer.load(args.model)
    print(
        f"vocabulary   {tokenizer.vocab_size:,} ids: {NUM_MARKS} marks, {NUM_BYTES} bytes, "
        f"{tokenizer.vocab_size - NUM_MARKS - NUM_BYTES:,} pieces of text"
    )
    print(
        f"marks        pad {tokenizer.pad_id}, start {tokenizer.start_id}, end {tokenizer.end_id}, "
        f"unknown {tokenizer.unk_id}"
    )
    print(f"fingerprint  {tokenizer.fingerprint}")
    print("longest      " + " ".join(harmless(piece) for piece in longest_pieces(tokenizer, 12)))
    captions = _captions(args)
    if not captions:
        return
    found = encode_all(tokenizer, captions)
    print(_shares(found))
    print(f"used         {found.used:,} pieces of text occur in these captions\n")
    rows = [(f"{share:.1%}", longest, length) for share, longest, length in found.text_lengths()]
    print(table(["captions kept whole", "tokens", "model.context_length"], rows))


def _shares(found: object) -> str:
    """Figures over several captions."""
    from data_pipeline.preparing.vocabulary import Encoded

    assert isinstance(found, Encoded)
    tokens = max(1, found.tokens)
    return (
        f"captions     {len(found.lengths):,}: {found.lengths.mean():.1f} tokens each with marks, "
        f"{found.tokens / max(1, found.words):.2f} tokens a word, {found.characters / tokens:.2f} characters a token\n"
        f"bytes        {found.byte_tokens / tokens:.2%} of tokens, unknown {found.unknown_tokens / tokens:.2%}"
    )


def _captions(args: argparse.Namespace) -> list[str]:
    from data_pipeline.preparing.corpus import captions_of
    from data_pipeline.preparing.visit import open_datasets

    if not args.shards:
        return []
    return list(
        captions_of(
            open_datasets(args.shards),
            args.caption_key or ["txt"],
            samples=args.samples,
            seed=args.seed,
            workers=workers_of(args),
        )
    )


def _lines(widths: list[int], limit: int) -> list[tuple[int, int]]:
    """Ranges of columns that fit into a line."""
    ranges, first, used = [], 0, 0
    for place, width in enumerate(widths):
        if used + width + 1 > limit and place > first:
            ranges.append((first, place))
            first, used = place, 0
        used += width + 1
    return [*ranges, (first, len(widths))]
