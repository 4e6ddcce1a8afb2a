"""Draws grids of ratios as one picture: blue is less than fair, white fair, red more; gray has no
value."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

from pretrain.evaluate.routing.grids import Grid

LESS, FAIR, MORE, NOTHING = (33, 82, 153), (255, 255, 255), (178, 24, 43), (222, 222, 222)
DOUBLINGS = 2.0
"""The full color stands for 4 times as much, or a quarter, and all beyond."""

MARGIN, LABEL, HEAD, FONT_SIZE = 10, 62, 38, 12
WIDEST, NARROWEST = 34, 5
"""Side of a cell, pixels."""
SHEET, MOST_IN_A_ROW = 1400, 6
"""Width up to which grids stand side by side, pixels, and how many at most."""

Color = tuple[int, int, int]


def shade(ratio: float) -> Color:
    """The color of a ratio, by its logarithm."""
    if math.isnan(ratio):
        return NOTHING
    strength = DOUBLINGS if ratio == math.inf else math.log2(ratio) if ratio > 0 else -DOUBLINGS
    share = min(1.0, abs(strength) / DOUBLINGS)
    end = MORE if strength > 0 else LESS
    red, green, blue = (round(a + share * (b - a)) for a, b in zip(FAIR, end, strict=True))
    return red, green, blue


def ink(color: Color) -> Color:
    """Black or white, whichever is easier to read on a color."""
    red, green, blue = color
    return (0, 0, 0) if 0.299 * red + 0.587 * green + 0.114 * blue > 140 else (255, 255, 255)


def ratio_text(ratio: float) -> str:
    """A ratio in at most four letters."""
    if math.isnan(ratio):
        return ""
    return f"{ratio:.2f}" if ratio < 9.995 else f"{min(ratio, 9999):.0f}"


def draw_grids(grids: Sequence[Grid]) -> Image.Image:
    """All grids on one white sheet, side by side as long as they fit, then below one another."""
    alike = Counter(grid.ratio_RC.shape for grid in grids)
    tiles = [
        _draw(grid, cell_side(len(grid.columns), alike[grid.ratio_RC.shape])) for grid in grids
    ]
    places, right, bottom, x, y, row_height = [], 0, 0, MARGIN, MARGIN, 0
    for tile in tiles:
        if x > MARGIN and x + tile.width > SHEET:
            x, y, row_height = MARGIN, y + row_height + MARGIN, 0
        places.append((x, y))
        row_height = max(row_height, tile.height)
        right, bottom = max(right, x + tile.width), max(bottom, y + tile.height)
        x += tile.width + MARGIN
    sheet = Image.new("RGB", (right + MARGIN, bottom + MARGIN), "white")
    for tile, place in zip(tiles, places, strict=True):
        sheet.paste(tile, place)
    return sheet


def cell_side(columns: int, grids: int) -> int:
    """Pixels of a cell, so that of so many grids alike about as many stand in a row as there are
    rows of them."""
    room = SHEET // min(MOST_IN_A_ROW, math.isqrt(max(1, grids) - 1) + 1) - LABEL - 2 * MARGIN
    return max(NARROWEST, min(WIDEST, room // max(1, columns)))


def _draw(grid: Grid, side: int) -> Image.Image:
    font, small = ImageFont.load_default(FONT_SIZE), ImageFont.load_default(FONT_SIZE - 1)
    # Half of the last column's label may stand out.
    width = max(LABEL + side * len(grid.columns) + MARGIN, int(font.getlength(grid.title)) + 4)
    tile = Image.new("RGB", (width, HEAD + side * len(grid.rows)), "white")
    pen = ImageDraw.Draw(tile)
    pen.text((0, 0), grid.title, fill="black", font=font)
    step = max(1, -(-16 // side))  # labels need their room
    for column, label in enumerate(grid.columns):
        if column % step == 0:
            middle = LABEL + column * side + side / 2
            pen.text((middle, HEAD - 4), label, fill=(90, 90, 90), font=small, anchor="ms")
    for row, label in enumerate(grid.rows):
        y = HEAD + row * side
        if row % step == 0:
            pen.text((LABEL - 6, y + side / 2), label, fill=(90, 90, 90), font=small, anchor="rm")
        for column in range(len(grid.columns)):
            _cell(pen, LABEL + column * side, y, side, float(grid.ratio_RC[row, column]), small)
    return tile


def _cell(
    pen: ImageDraw.ImageDraw,
    x: int,
    y: int,
    side: int,
    ratio: float,
    font: ImageFont.FreeTypeFont | ImageFont.ImageFont,
) -> None:
    color = shade(ratio)
    pen.rectangle((x, y, x + side - 2, y + side - 2), fill=color)
    if side >= 28:
        pen.text(
            (x + side / 2 - 1, y + side / 2 - 1),
            ratio_text(ratio),
            fill=ink(color),
            font=font,
            anchor="mm",
        )
