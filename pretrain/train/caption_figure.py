"""Draws images with generated and reference captions below them, as one figure."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from data_pipeline.content.captions import clean_caption

TILE, MARGIN, FONT_SIZE, LINE_HEIGHT, MAX_LINES = 192, 12, 14, 18, 2
COLUMNS = 4

MATCH_COLOR, MISMATCH_COLOR, REFERENCE_COLOR = (20, 120, 50), (170, 40, 30), (110, 110, 110)
"""Text colors: a generated caption that equals its reference, one that does not, the reference."""


def draw_captions(
    images: np.ndarray[Any, Any], generated: Sequence[str], references: Sequence[str]
) -> np.ndarray[Any, Any]:
    """Images in rows of four, each with its generated caption and, in gray, the reference.

    Args:
        images: uint8 `[images, 3, height, width]`.
        generated: The model's caption of each image.
        references: The reference caption of each image.

    Returns:
        uint8 `[height, width, 3]`.
    """
    font = ImageFont.load_default(FONT_SIZE)
    height = TILE + 2 * MAX_LINES * LINE_HEIGHT + MARGIN
    columns = max(1, min(COLUMNS, len(images)))
    rows = max(1, -(-len(images) // columns))
    size = (columns * (TILE + MARGIN) + MARGIN, rows * (height + MARGIN) + MARGIN)
    figure = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(figure)
    for index, (image, caption, reference) in enumerate(
        zip(images, generated, references, strict=True)
    ):
        x = MARGIN + index % columns * (TILE + MARGIN)
        y = MARGIN + index // columns * (height + MARGIN)
        figure.paste(_tile(image), (x, y))
        color = (
            MATCH_COLOR if clean_caption(caption) == clean_caption(reference) else MISMATCH_COLOR
        )
        lines = [(line, color) for line in _wrap(caption)]
        lines += [(line, REFERENCE_COLOR) for line in _wrap(reference)]
        for row, (line, fill) in enumerate(lines):
            draw.text((x, y + TILE + 4 + row * LINE_HEIGHT), line, fill=fill, font=font)
    return np.asarray(figure)


def _tile(image: np.ndarray[Any, Any]) -> Image.Image:
    """One image at tile size; small images are enlarged without smoothing."""
    pil_image = Image.fromarray(np.ascontiguousarray(image.transpose(1, 2, 0)))
    small = max(pil_image.size) <= TILE // 2
    method = Image.Resampling.NEAREST if small else Image.Resampling.LANCZOS
    return pil_image.resize((TILE, TILE), method)


def _wrap(text: str) -> list[str]:
    """A caption in exactly `MAX_LINES` lines, so that all references start at the same height."""
    lines = textwrap.wrap(text, width=27, max_lines=MAX_LINES, placeholder=" ...") or ["(nothing)"]
    return (lines + [""] * MAX_LINES)[:MAX_LINES]
