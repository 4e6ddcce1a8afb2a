"""`vlmoe data write`: writes shards from tables, folders, COCO, Flickr and parquet files."""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING

from data_pipeline.commands.options import add_parts, add_workers, shown, workers_of
from data_pipeline.common.commands import Subparsers, add_command
from data_pipeline.common.errors import ConfigError
from data_pipeline.common.tables import counted

if TYPE_CHECKING:
    from data_pipeline.preparing.importers.records import Importer
    from data_pipeline.preparing.write import WriteResult

_EXAMPLES = """\
  vlmoe data write csv pairs.csv --out shards/                        columns image and caption
  vlmoe data write csv cc3m.tsv --header caption,image --images /data/cc3m --out s3://bucket/cc3m
  vlmoe data write folder photos/ --out shards/                       photos/a.jpg with photos/a.txt
  vlmoe data write folder imagenet/ --caption-from folder --template 'a photo of a {}' --out shards/
  vlmoe data write coco captions_train2017.json --images train2017/ --out coco/
  vlmoe data write flickr results.csv --images flickr30k-images/ --out flickr30k/
  vlmoe data write parquet laion/*.parquet --out laion-shards/ --workers 8

Image files are stored unchanged. Rows that do not become a sample (missing or corrupt images, empty
captions) are listed in OUT/skipped.jsonl; a higher ratio than --max-skipped-ratio is an error. The
command is resumable: run the same command again to continue after an interruption. The output is
deterministic: the same source gives the same bytes."""

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
    _add_output(write)
    _add_columns(write)
    _add_folders(write)
    add_workers(write)
    add_parts(write, work_dir=False)
    write.set_defaults(handle=handle)


def _add_output(write: argparse.ArgumentParser) -> None:
    write.add_argument(
        "--out",
        metavar="FOLDER",
        required=True,
        help="folder of the shards; local or in an object store",
    )
    write.add_argument(
        "--images",
        metavar="FOLDER",
        default="",
        help="folder of the images; local or in an object store (csv: default is the folder of "
        "the table; coco, flickr: required)",
    )
    write.add_argument(
        "--samples-per-shard",
        metavar="N",
        type=int,
        default=1000,
        help="maximum number of pairs per shard; shard sizes differ by at most one (default: 1000)",
    )
    write.add_argument(
        "--max-skipped-ratio",
        metavar="RATIO",
        type=float,
        default=0.01,
        help="maximum ratio of rows that may be skipped (default: 0.01)",
    )
    write.add_argument(
        "--decode", action="store_true", help="decode every image, and skip corrupt ones"
    )
    write.add_argument(
        "--overwrite",
        action="store_true",
        help="replace a dataset in the folder that was written from another source",
    )
    write.add_argument(
        "--prefix",
        metavar="NAME",
        default="shard",
        help="first part of the shard names (default: shard)",
    )


def _add_columns(write: argparse.ArgumentParser) -> None:
    columns = write.add_argument_group("columns (csv, parquet)")
    columns.add_argument(
        "--image-column",
        metavar="NAME",
        default="",
        help="column of the image: a path, or bytes in parquet",
    )
    columns.add_argument(
        "--caption-column",
        metavar="NAME",
        action="append",
        default=None,
        help="column of a caption, or in parquet of a class; may be repeated: all go to the field "
        "`captions`, the first also to .txt",
    )
    columns.add_argument(
        "--key-column",
        metavar="NAME",
        default="",
        help="column of the key (default: derived from the image name)",
    )
    columns.add_argument(
        "--header",
        metavar="A,B,...",
        default="",
        help="column names, if the first line has none",
    )
    columns.add_argument(
        "--delimiter",
        metavar="CHAR",
        default="",
        help="field delimiter (default: detected; a tab for .tsv and .tab, else a comma, "
        "semicolon, tab or vertical bar)",
    )
    columns.add_argument(
        "--quoting",
        choices=("auto", "csv", "none"),
        default="auto",
        help="csv: fields may be in double quotes and then contain line breaks; none: a quotation "
        "mark is a character (default: none for tabs, else csv, and rows inside quotes are an "
        "error)",
    )
    columns.add_argument(
        "--group",
        action="store_true",
        help="merge consecutive rows with the same image into one sample with several captions",
    )


def _add_folders(write: argparse.ArgumentParser) -> None:
    folders = write.add_argument_group("folders, and classes in parquet")
    folders.add_argument(
        "--caption-from",
        choices=("text", "folder"),
        default="text",
        help="source of captions: the .txt file beside each image, or the name of its folder "
        "(default: text)",
    )
    folders.add_argument(
        "--template",
        metavar="TEXT",
        default="{}",
        help="caption template; {} is replaced by the name of the folder or class",
    )


def handle(args: argparse.Namespace) -> None:
    """Write shards and print a summary."""
    from data_pipeline.common.processes import parse_part
    from data_pipeline.preparing.write import WritePlan, write_dataset

    plan = WritePlan(
        source=_importer(args),
        out=args.out,
        prefix=args.prefix,
        samples_per_shard=args.samples_per_shard,
        max_skipped_ratio=args.max_skipped_ratio,
        decode=args.decode,
        overwrite=args.overwrite,
    )
    result = write_dataset(plan, workers=workers_of(args), part=parse_part(args.part))
    _print_result(result, args)


def _print_result(result: WriteResult, args: argparse.Namespace) -> None:
    from data_pipeline.common.storage import join
    from data_pipeline.common.tables import format_bytes, format_table
    from data_pipeline.shards.manifest import SKIPPED_NAME

    reused = f", {result.reused:,} of them already written" if result.reused else ""
    size = format_bytes(result.bytes)
    summary = (
        f"{counted(result.shards, 'shard')}{reused}, {counted(result.samples, 'sample')}, {size}"
    )
    if result.manifest is None:
        print(
            f"part {args.part} of {shown(args.out)}: {summary}; run without --part to write the "
            f"manifest"
        )
    else:
        print(f"{shown(join(args.out, 'manifest.json'))}: {summary}")
        print(result.inputs.describe())  # of a part, only its own rows would be known

    if result.skipped:
        counts = Counter(row.reason for row in result.skipped)
        print(format_table(["skipped", "pairs"], sorted(counts.items())))
        if result.manifest:
            print(f"listed in {shown(join(args.out, SKIPPED_NAME))}")


def _importer(args: argparse.Namespace) -> Importer:
    """The importer for the source.

    Raises:
        ConfigError: An option does not apply to it.
    """
    has_classes = args.kind == "parquet" or (args.kind, args.caption_from) == ("folder", "folder")
    if args.template != "{}" and not has_classes:
        raise ConfigError(
            f"--template {args.template!r} has no effect here: it is for the names of folders "
            f"(`folder` with --caption-from folder) and of classes (parquet); omit it"
        )
    factories: dict[str, Callable[[argparse.Namespace, tuple[str, ...]], Importer]] = {
        "csv": _table,
        "folder": _folder,
        "coco": _coco,
        "flickr": _flickr,
        "parquet": _parquet,
    }
    return factories[args.kind](args, tuple(args.sources))


def _table(args: argparse.Namespace, files: tuple[str, ...]) -> Importer:
    from data_pipeline.preparing.importers.table import Table

    delimiter = args.delimiter.replace("\\t", "\t")
    if len(delimiter) > 1:
        raise ConfigError(f"--delimiter {args.delimiter!r}: must be one character")
    return Table(
        files=files,
        image_folder=args.images,
        image_column=args.image_column,
        caption_columns=tuple(args.caption_column or ()),
        key_column=args.key_column,
        header=tuple(name.strip() for name in args.header.split(",") if name.strip()),
        delimiter=delimiter,
        quoting=args.quoting,
        group=args.group,
    )


def _folder(args: argparse.Namespace, folders: tuple[str, ...]) -> Importer:
    from data_pipeline.preparing.importers.folder import Folder

    return Folder(folders=folders, caption_from=args.caption_from, template=args.template)


def _coco(args: argparse.Namespace, files: tuple[str, ...]) -> Importer:
    from data_pipeline.preparing.importers.coco import Coco

    return Coco(files=files, image_folder=_image_folder(args))


def _flickr(args: argparse.Namespace, files: tuple[str, ...]) -> Importer:
    from data_pipeline.preparing.importers.flickr import Flickr

    return Flickr(files=files, image_folder=_image_folder(args))


def _parquet(args: argparse.Namespace, files: tuple[str, ...]) -> Importer:
    from data_pipeline.preparing.importers.parquet import Parquet

    return Parquet(
        files=files,
        image_column=args.image_column,
        caption_columns=tuple(args.caption_column or ()),
        key_column=args.key_column,
        template=args.template,
    )


def _image_folder(args: argparse.Namespace) -> str:
    if not args.images:
        raise ConfigError(f"{args.kind} needs --images, the folder of the images")
    return str(args.images)
