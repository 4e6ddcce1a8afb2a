"""Draws pictures with the captions that a model wrote below them, as one image."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from data_pipeline.content.captions import clean

TILE, MARGIN, FONT_SIZE, LINE, LINES = 192, 12, 14, 18, 2
COLUMNS = 4

RIGHT, WRONG, TRUE = (20, 120, 50), (170, 40, 30), (110, 110, 110)
"""Ink of a caption that is exactly right, of another one, and of the true one below it."""


def draw_captions(
    images: np.ndarray[Any, Any], written: Sequence[str], true: Sequence[str]
) -> np.ndarray[Any, Any]:
    """Pictures in rows of four, each with the written caption and, in gray, the true one.

    Args:
        images: uint8 `[pictures, 3, height, width]`.
        written: What the model wrote for each.
        true: What was to be written.

    Returns:
        uint8 `[height, width, 3]`.
    """
    font = ImageFont.load_default(FONT_SIZE)
    height = TILE + 2 * LINES * LINE + MARGIN
    columns = max(1, min(COLUMNS, len(images)))
    rows = max(1, -(-len(images) // columns))
    size = (columns * (TILE + MARGIN) + MARGIN, rows * (height + MARGIN) + MARGIN)
    sheet = Image.new("RGB", size, "white")
    pen = ImageDraw.Draw(sheet)
    for number, (image, caption, label) in enumerate(zip(images, written, true, strict=True)):
        x = MARGIN + number % columns * (TILE + MARGIN)
        y = MARGIN + number // columns * (height + MARGIN)
        sheet.paste(_tile(image), (x, y))
        ink = RIGHT if clean(caption) == clean(label) else WRONG
        for line, (text, color) in enumerate([*_lines(caption, ink), *_lines(label, TRUE)]):
            pen.text((x, y + TILE + 4 + line * LINE), text, fill=color, font=font)
    return np.asarray(sheet)


def _tile(image: np.ndarray[Any, Any]) -> Image.Image:
    """One picture at tile size; small ones keep their square pixels."""
    picture = Image.fromarray(np.ascontiguousarray(image.transpose(1, 2, 0)))
    method = (
        Image.Resampling.NEAREST if max(picture.size) <= TILE // 2 else Image.Resampling.LANCZOS
    )
    return picture.resize((TILE, TILE), method)


def _lines(text: str, ink: tuple[int, int, int]) -> list[tuple[str, tuple[int, int, int]]]:
    """A caption broken into as many lines as every caption gets, so that the true one starts
    alike."""
    wrapped = textwrap.wrap(text, width=27, max_lines=LINES, placeholder=" ...") or ["(nothing)"]
    return [(line, ink) for line in (wrapped + [""] * LINES)[:LINES]]
