"""`vlmoe tokenizer`: learn a vocabulary from the captions of shards."""

from __future__ import annotations

import argparse
from pathlib import Path

from data_pipeline.common.commands import Subparsers, add_command, add_group

_TRAIN_EXAMPLES = """\
  vlmoe tokenizer train data/quickstart/train --out data/quickstart/tokenizer.model --vocab-size 4000
  vlmoe tokenizer train shards/ --out t.model --caption-key txt --caption-key json:tags
  vlmoe tokenizer train s3://bucket/pairs --out t.model --cache-dir /tmp/shards

The size must equal model.vocab_size of the runs that use it. The same captions give the same file."""


def add(subparsers: Subparsers) -> None:
    """Add the group and its commands."""
    commands = add_group(subparsers, "tokenizer", summary="work on vocabularies: train")
    train = add_command(
        commands, "train", summary="learn a vocabulary from the captions of shards", examples=_TRAIN_EXAMPLES,
        description="Train a SentencePiece model (unigram, with bytes for what it does not know) on every "
                    "caption of the shards.",
    )
    train.add_argument("manifests", metavar="MANIFEST", nargs="+", help="manifests, or folders that hold one")
    train.add_argument("--out", metavar="FILE", type=Path, required=True, help="model file to write")
    train.add_argument("--vocab-size", metavar="N", type=int, default=32000, help="pieces (default: 32000)")
    train.add_argument("--caption-key", metavar="KEY", action="append", default=None,
                       help="where captions are: txt, or json:FIELD; may be repeated (default: txt)")
    train.add_argument("--cache-dir", metavar="FOLDER", default="",
                       help="where copies of remote shards go; needed for those")
    train.set_defaults(handle=handle_train)


def handle_train(args: argparse.Namespace) -> None:
    """Train, and say what was made."""
    from data_pipeline.content.tokenizer import train_tokenizer
    from data_pipeline.preparing.corpus import captions_of
    from data_pipeline.shards.manifest import load_manifest

    manifests = [load_manifest(address) for address in args.manifests]
    captions = captions_of(manifests, args.caption_key or ["txt"], cache_dir=args.cache_dir)
    tokenizer = train_tokenizer(captions, args.out, vocab_size=args.vocab_size)
    print(f"{args.out}: {tokenizer.vocab_size:,} pieces, fingerprint {tokenizer.fingerprint[:16]}")
