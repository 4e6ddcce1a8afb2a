"""Samples for people to look at: on a page, in one picture, or as text."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

from PIL import Image, ImageDraw, ImageFont

from data_pipeline.common.errors import DataError
from data_pipeline.common.harmless import harmless
from data_pipeline.content.captions import find
from data_pipeline.content.images import read_header
from data_pipeline.content.recipe import picture_of
from data_pipeline.preparing.captions import first_caption
from data_pipeline.preparing.page import card
from data_pipeline.preparing.pictures import data_uri, format_of, thumbnail
from data_pipeline.preparing.tables import bytes_text, shortened
from data_pipeline.preparing.visit import ShardTask, opened, pick
from data_pipeline.samples import RawSample
from data_pipeline.shards.manifest import Manifest

_SIDE = 160
_MAX_TEXT = 2000


def read_samples(tasks: Sequence[ShardTask]) -> list[tuple[ShardTask, int, RawSample | DataError]]:
    """Some samples, with their numbers; for a few, as it reads them one shard after the other."""
    found: list[tuple[ShardTask, int, RawSample | DataError]] = []
    for task in tasks:
        try:
            with opened(task) as shard:
                found += [(task, number, raw) for number, raw in shard.samples()]
        except DataError as error:
            numbers = range(task.entry.samples) if task.samples is None else task.samples
            found += [(task, number, error) for number in numbers]
    return found


def read_places(
    manifests: Sequence[Manifest], places: Sequence[tuple[int, int, int]]
) -> Mapping[tuple[int, int, int], RawSample | DataError]:
    """Samples by (dataset, shard, number)."""
    chosen: dict[tuple[int, int], list[int]] = {}
    for dataset, shard, number in places:
        chosen.setdefault((dataset, shard), []).append(number)
    found = read_samples(
        pick(manifests, {where: sorted(set(numbers)) for where, numbers in chosen.items()})
    )
    return {(task.dataset, task.shard, number): raw for task, number, raw in found}


def sample_card(raw: RawSample | DataError, caption_keys: Sequence[str], where: str) -> str:
    """A sample as HTML; what is wrong with it is said instead of what it lacks."""
    if isinstance(raw, DataError):
        return card("", where, f"{raw.slug}: {raw}")
    try:
        uri = data_uri(thumbnail(picture_of(raw), _SIDE))
    except DataError as error:
        return card("", where, str(error))
    return card(uri, where, _caption(raw, caption_keys))


def sample_text(raw: RawSample | DataError, caption_keys: Sequence[str], where: str) -> str:
    """A sample as lines of text."""
    if isinstance(raw, DataError):
        return f"{harmless(where)}\n  {raw.slug}: {harmless(str(raw))}"
    members = ", ".join(
        f".{harmless(extension)} {bytes_text(len(data))}" for extension, data in raw.members.items()
    )
    lines = [
        f"{harmless(where)}  {harmless(raw.key)}",
        f"  files    {members}",
        f"  picture  {_picture_text(raw)}",
    ]
    for key in caption_keys:
        try:
            lines += [
                f"  {key:7}  {shortened(harmless(caption), _MAX_TEXT)}"
                for caption in find(raw.members, key)
            ]
        except DataError as error:
            lines.append(f"  {key:7}  {error.slug}: {harmless(str(error))}")
    if "json" in raw.members:
        lines += [
            f"  {'json' if not number else '':7}  {line}"
            for number, line in enumerate(_json_lines(raw))
        ]
    return "\n".join(lines)


def contact_sheet(
    samples: Sequence[tuple[str, RawSample | DataError]], caption_keys: Sequence[str]
) -> Image.Image:
    """Pictures in rows with the beginnings of their captions; for other alphabets make a page."""
    columns = min(len(samples), max(1, round(len(samples) ** 0.5 * 1.3)))
    width, height = _SIDE + 10, _SIDE + 44
    sheet = Image.new(
        "RGB", (columns * width + 10, -(-len(samples) // columns) * height + 10), "white"
    )
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(11)
    for place, (where, raw) in enumerate(samples):
        x, y = 10 + place % columns * width, 10 + place // columns * height
        try:
            if isinstance(raw, DataError):
                raise raw
            picture = Image.fromarray(thumbnail(picture_of(raw), _SIDE))
            sheet.paste(picture, (x, y + _SIDE - picture.height))
            text = harmless(_caption(raw, caption_keys))
        except DataError as error:
            draw.rectangle((x, y, x + _SIDE, y + _SIDE), outline="#b00")
            text = f"{error.slug} {harmless(where)}"
        for line, piece in enumerate(_wrapped(text, draw, font)):
            draw.text((x, y + _SIDE + 2 + 13 * line), piece, fill="black", font=font)
    return sheet


def _wrapped(
    text: str, draw: ImageDraw.ImageDraw, font: ImageFont.ImageFont | ImageFont.FreeTypeFont
) -> list[str]:
    """At most three lines of a thumbnail's width."""
    lines = [""]
    for word in text[:200].split():
        longer = f"{lines[-1]} {word}".strip()
        if draw.textlength(longer, font=font) <= _SIDE:
            lines[-1] = longer
        else:
            while word and draw.textlength(word, font=font) > _SIDE:
                word = word[:-1]
            lines.append(word)
    return [line for line in lines if line][:3]


def _caption(raw: RawSample, keys: Sequence[str]) -> str:
    try:
        return first_caption(raw, keys) or "(no caption)"
    except DataError as error:
        return f"({error.slug})"


def _picture_text(raw: RawSample) -> str:
    try:
        data = picture_of(raw)
        header = read_header(data)
    except DataError as error:
        return harmless(str(error))
    return f"{format_of(data)} {header.width} x {header.height}"


def _json_lines(raw: RawSample) -> list[str]:
    data = raw.members["json"]
    try:
        text = json.dumps(json.loads(data), ensure_ascii=False, indent=1)
    except (ValueError, RecursionError):
        text = data[:_MAX_TEXT].decode("utf-8", "backslashreplace")
    return harmless(shortened(text, _MAX_TEXT), lines=True).split("\n")
