"""`vlmoe data write`: shards from tables, folders, COCO, Flickr and parquet files."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import TYPE_CHECKING

from data_pipeline.commands.options import add_parts, add_workers, workers_of
from data_pipeline.common.commands import Subparsers, add_command
from data_pipeline.common.errors import ConfigError

if TYPE_CHECKING:
    from data_pipeline.preparing.importers.records import Importer

_EXAMPLES = """\
  vlmoe data write csv pairs.csv --out shards/                        columns image and caption
  vlmoe data write csv cc3m.tsv --header caption,image --images /data/cc3m --out s3://bucket/cc3m
  vlmoe data write folder photos/ --out shards/                       photos/a.jpg with photos/a.txt
  vlmoe data write folder imagenet/ --caption-from folder --template 'a photo of a {}' --out shards/
  vlmoe data write coco captions_train2017.json --images train2017/ --out coco/
  vlmoe data write flickr results.csv --images flickr30k-images/ --out flickr30k/
  vlmoe data write parquet laion/*.parquet --out laion-shards/ --workers 8

Pictures are packed as they are. What becomes no sample (missing or damaged pictures, empty captions) is
listed in OUT/left-out.jsonl; more than --max-left-out of it is an error. The same line again goes on where
it was stopped. The same source gives the same bytes."""

_KINDS = ("csv", "folder", "coco", "flickr", "parquet")


def add(subparsers: Subparsers) -> None:
    """Add the command."""
    write = add_command(
        subparsers,
        "write",
        summary="write shards from CSV, folders, COCO, Flickr or parquet",
        examples=_EXAMPLES,
        description="Write WebDataset shards with indices and a manifest.",
    )
    write.add_argument(
        "kind",
        metavar="KIND",
        choices=_KINDS,
        help="csv (also TSV), folder, coco, flickr or parquet",
    )
    write.add_argument(
        "sources", metavar="SOURCE", nargs="+", help="files or folders of that kind, in order"
    )
    write.add_argument(
        "--out", metavar="FOLDER", required=True, help="folder of the shards; local or in a store"
    )
    write.add_argument(
        "--images",
        metavar="FOLDER",
        default="",
        help="folder of the pictures; local or in a store (csv: the table's own; coco, flickr: needed)",
    )
    write.add_argument(
        "--samples-per-shard",
        metavar="N",
        type=int,
        default=1000,
        help="pairs of a shard; all get the same, give or take one (default: 1000)",
    )
    write.add_argument(
        "--max-left-out",
        metavar="SHARE",
        type=float,
        default=0.01,
        help="largest share of the source that may become no sample (default: 0.01)",
    )
    write.add_argument(
        "--decode", action="store_true", help="decode every picture, and leave out damaged ones"
    )
    write.add_argument(
        "--overwrite", action="store_true", help="replace a dataset of another source in the folder"
    )
    write.add_argument(
        "--prefix", metavar="NAME", default="shard", help="how shards' names begin (default: shard)"
    )
    columns = write.add_argument_group("columns (csv, parquet)")
    columns.add_argument(
        "--image-column",
        metavar="NAME",
        default="",
        help="the picture: a path, or in parquet bytes",
    )
    columns.add_argument(
        "--caption-column",
        metavar="NAME",
        action="append",
        default=None,
        help="a caption; may be repeated: all go to the field `captions`, the first also to .txt",
    )
    columns.add_argument(
        "--key-column", metavar="NAME", default="", help="the key (default: the picture's name)"
    )
    columns.add_argument(
        "--header", metavar="A,B,...", default="", help="names of the columns, if line 1 has none"
    )
    columns.add_argument(
        "--delimiter",
        metavar="CHAR",
        default="",
        help="between the fields (default: a tab for .tsv and .tab, else a comma)",
    )
    columns.add_argument(
        "--group",
        action="store_true",
        help="neighboring rows with the same picture are captions of one sample",
    )
    folders = write.add_argument_group("folders")
    folders.add_argument(
        "--caption-from",
        choices=("text", "folder"),
        default="text",
        help="the .txt file beside each picture, or the name of its folder (default: text)",
    )
    folders.add_argument(
        "--template", metavar="TEXT", default="{}", help="around a folder's name, at {}"
    )
    add_workers(write)
    add_parts(write, work=False)
    write.set_defaults(handle=handle)


def handle(args: argparse.Namespace) -> None:
    """Write, and say what was written."""
    from data_pipeline.common.processes import parse_part
    from data_pipeline.common.storage import join, redact
    from data_pipeline.preparing.tables import bytes_text, table
    from data_pipeline.preparing.write import LEFT_OUT_NAME, WritePlan, write_dataset

    plan = WritePlan(
        source=_importer(args),
        out=args.out,
        prefix=args.prefix,
        samples_per_shard=args.samples_per_shard,
        max_left_out=args.max_left_out,
        check=args.decode,
        overwrite=args.overwrite,
    )
    part = parse_part(args.part)
    done = write_dataset(plan, workers=workers_of(args), part=part)
    reused = f", {done.reused:,} of them already there" if done.reused else ""
    what = f"{done.shards:,} shards{reused}, {done.samples:,} samples, {bytes_text(done.bytes)}"
    if done.manifest is None:
        print(
            f"part {args.part} of {redact(args.out)}: {what}; the same line without --part writes the manifest"
        )
    else:
        print(f"{redact(join(args.out, 'manifest.json'))}: {what}")
    if done.left_out:
        reasons = sorted({row.reason for row in done.left_out})
        counts = [
            (reason, sum(row.reason == reason for row in done.left_out)) for reason in reasons
        ]
        print(table(["left out", "pairs"], counts))
        if done.manifest:
            print(f"listed in {redact(join(args.out, LEFT_OUT_NAME))}")


def _importer(args: argparse.Namespace) -> Importer:
    """What reads the source."""
    makers: dict[str, Callable[[argparse.Namespace, tuple[str, ...]], Importer]] = {
        "csv": _table,
        "folder": _folder,
        "coco": _coco,
        "flickr": _flickr,
        "parquet": _parquet,
    }
    return makers[args.kind](args, tuple(args.sources))


def _table(args: argparse.Namespace, files: tuple[str, ...]) -> Importer:
    from data_pipeline.preparing.importers.table import Table

    delimiter = args.delimiter.replace("\\t", "\t")
    if len(delimiter) > 1:
        raise ConfigError(f"--delimiter {args.delimiter!r}: give one character")
    return Table(
        files=files,
        pictures=args.images,
        picture_column=args.image_column,
        caption_columns=tuple(args.caption_column or ()),
        key_column=args.key_column,
        header=tuple(name.strip() for name in args.header.split(",") if name.strip()),
        delimiter=delimiter,
        group=args.group,
    )


def _folder(args: argparse.Namespace, folders: tuple[str, ...]) -> Importer:
    from data_pipeline.preparing.importers.folder import Folder

    return Folder(folders=folders, caption_from=args.caption_from, template=args.template)


def _coco(args: argparse.Namespace, files: tuple[str, ...]) -> Importer:
    from data_pipeline.preparing.importers.coco import Coco

    return Coco(files=files, pictures=_images(args))


def _flickr(args: argparse.Namespace, files: tuple[str, ...]) -> Importer:
    from data_pipeline.preparing.importers.flickr import Flickr

    return Flickr(files=files, pictures=_images(args))


def _parquet(args: argparse.Namespace, files: tuple[str, ...]) -> Importer:
    from data_pipeline.preparing.importers.parquet import Parquet

    captions = args.caption_column or [""]
    if len(captions) > 1:
        raise ConfigError(
            "--caption-column can be given once for parquet; a column of lists holds several captions"
        )
    return Parquet(
        files=files,
        picture_column=args.image_column,
        caption_column=captions[0],
        key_column=args.key_column,
    )


def _images(args: argparse.Namespace) -> str:
    if not args.images:
        raise ConfigError(f"{args.kind} needs --images, the folder of the pictures")
    return str(args.images)
