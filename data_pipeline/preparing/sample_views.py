"""Renders samples for inspection: as HTML cards, a contact sheet image, or text."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

from PIL import Image, ImageDraw, ImageFont

from data_pipeline.common.errors import DataError
from data_pipeline.common.escaping import escape_control
from data_pipeline.common.tables import format_bytes, format_rows, truncate
from data_pipeline.content.captions import find_captions, first_caption
from data_pipeline.content.image import image_format, read_header
from data_pipeline.preparing.html_report import card
from data_pipeline.preparing.image_files import data_uri, thumbnail
from data_pipeline.preparing.shard_access import read_samples
from data_pipeline.preparing.tasks import ShardTask, tasks_for
from data_pipeline.sample_keys import SampleKeys, image_bytes
from data_pipeline.sample_settings import ImageMode
from data_pipeline.samples import RawSample, SampleProblem
from data_pipeline.shards.manifest import Manifest

_SIDE = 160
_MAX_CHARS = 2000

Font = ImageFont.ImageFont | ImageFont.FreeTypeFont


def read_tasks(
    tasks: Sequence[ShardTask],
) -> list[tuple[ShardTask, int, RawSample | SampleProblem]]:
    """Task, index and content (or problem) of each sample; sequential, for few samples."""
    samples: list[tuple[ShardTask, int, RawSample | SampleProblem]] = []
    for task in tasks:
        try:
            samples += [(task, index, raw) for index, raw in read_samples(task)]
        except DataError as error:
            indices = range(task.entry.samples) if task.samples is None else task.samples
            samples += [
                (task, i, SampleProblem(task.entry.name, f"#{i}", error.slug, str(error)))
                for i in indices
            ]
    return samples


def read_samples_at(
    manifests: Sequence[Manifest], locations: Sequence[tuple[int, int, int]]
) -> Mapping[tuple[int, int, int], RawSample | SampleProblem]:
    """Samples (or problems) by (dataset, shard, sample index)."""
    by_shard: dict[tuple[int, int], set[int]] = {}
    for dataset, shard, index in locations:
        by_shard.setdefault((dataset, shard), set()).add(index)

    tasks = tasks_for(manifests, {shard: sorted(indices) for shard, indices in by_shard.items()})
    return {(task.dataset, task.shard, index): raw for task, index, raw in read_tasks(tasks)}


def sample_card(
    raw: RawSample | SampleProblem,
    keys: SampleKeys,
    location: str,
    mode: ImageMode | None = None,
) -> str:
    """A sample as an HTML card; an error is shown in place of the image or caption.

    With a mode, the image is shown as the model's input.
    """
    if isinstance(raw, SampleProblem):
        return card("", location, f"{raw.reason}: {raw.detail}")
    try:
        uri = data_uri(thumbnail(image_bytes(raw, keys.images), _SIDE, mode))
    except DataError as error:
        return card("", location, str(error))
    return card(uri, location, _caption(raw, keys.captions))


def sample_text(raw: RawSample | SampleProblem, keys: SampleKeys, location: str) -> str:
    """A sample as lines of text: its members, image size, captions and JSON."""
    if isinstance(raw, SampleProblem):
        return f"{escape_control(location)}\n  {raw.reason}: {escape_control(raw.detail)}"

    members = ", ".join(
        f".{escape_control(extension)} {format_bytes(len(data))}"
        for extension, data in raw.members.items()
    )
    rows = [("  files", members), ("  image", _image_text(raw, keys.images))]
    for key in keys.captions:
        try:
            for caption in find_captions(raw.members, key):
                rows.append((f"  {key}", truncate(escape_control(caption), _MAX_CHARS)))
        except DataError as error:
            rows.append((f"  {key}", f"{error.slug}: {escape_control(str(error))}"))

    if "json" in raw.members:
        for number, line in enumerate(_json_lines(raw)):
            rows.append(("" if number else "  json", line))
    return f"{escape_control(location)}  {escape_control(raw.key)}\n{format_rows(rows)}"


def contact_sheet(
    samples: Sequence[tuple[str, RawSample | SampleProblem]],
    keys: SampleKeys,
    mode: ImageMode | None = None,
) -> Image.Image:
    """Images in a grid with the first lines of their captions.

    The font covers Latin text only; use an HTML page for other scripts.

    Args:
        samples: Location text and sample, or its problem.
        keys: Where images and captions are.
        mode: Show images as the model's input.
    """
    columns = min(len(samples), max(1, round(len(samples) ** 0.5 * 1.3)))
    rows = -(-len(samples) // columns)
    width, height = _SIDE + 10, _SIDE + 44
    sheet = Image.new("RGB", (columns * width + 10, rows * height + 10), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(11)

    for position, (location, raw) in enumerate(samples):
        row, column = divmod(position, columns)
        x, y = 10 + column * width, 10 + row * height
        try:
            if isinstance(raw, SampleProblem):
                raise DataError(raw.detail, slug=raw.reason)
            image = Image.fromarray(thumbnail(image_bytes(raw, keys.images), _SIDE, mode))
            sheet.paste(image, (x, y + _SIDE - image.height))
            text = escape_control(_caption(raw, keys.captions))
        except DataError as error:
            draw.rectangle((x, y, x + _SIDE, y + _SIDE), outline="#b00")
            text = f"{error.slug} {escape_control(location)}"
        for number, line in enumerate(_wrap(text, draw, font)):
            draw.text((x, y + _SIDE + 2 + 13 * number), line, fill="black", font=font)

    return sheet


def _wrap(text: str, draw: ImageDraw.ImageDraw, font: Font) -> list[str]:
    """At most three lines of a thumbnail's width."""
    lines = [""]
    for word in text[:200].split():
        extended = f"{lines[-1]} {word}".strip()
        if draw.textlength(extended, font=font) <= _SIDE:
            lines[-1] = extended
        else:
            while word and draw.textlength(word, font=font) > _SIDE:
                word = word[:-1]
            lines.append(word)

    return [line for line in lines if line][:3]


def _caption(raw: RawSample, keys: Sequence[str]) -> str:
    try:
        return first_caption(raw.members, keys) or "(no caption)"
    except DataError as error:
        return f"({error.slug})"


def _image_text(raw: RawSample, keys: Sequence[str]) -> str:
    try:
        data = image_bytes(raw, keys)
        header = read_header(data)
    except DataError as error:
        return escape_control(str(error))
    return f"{image_format(data)} {header.width} x {header.height}"


def _json_lines(raw: RawSample) -> list[str]:
    data = raw.members["json"]
    try:
        text = json.dumps(json.loads(data), ensure_ascii=False, indent=1)
    except (ValueError, RecursionError):
        text = data[:_MAX_CHARS].decode("utf-8", "backslashreplace")
    return escape_control(truncate(text, _MAX_CHARS), lines=True).split("\n")
