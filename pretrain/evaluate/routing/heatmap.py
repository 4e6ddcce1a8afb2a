"""Draws grids of ratios as one image: blue below 1, white at 1, red above; gray without value."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

from pretrain.evaluate.routing.grids import Grid

BELOW_MEAN, AT_MEAN, ABOVE_MEAN, NO_VALUE = (
    (33, 82, 153),
    (255, 255, 255),
    (178, 24, 43),
    (222, 222, 222),
)
MAX_DOUBLINGS = 2.0
"""Ratios from 1/4 to 4 have different colors; beyond, the color is saturated."""

MARGIN, LABEL, HEAD, FONT_SIZE = 10, 62, 38, 12
MAX_CELL, MIN_CELL = 34, 5
"""Side of a cell, pixels."""
MAX_WIDTH, MAX_PER_ROW = 1400, 6
"""Width of the image up to which grids are placed side by side, pixels; maximum grids per row."""
MIN_CELL_WITH_TEXT, LABEL_SPACING = 28, 16

Color = tuple[int, int, int]


def shade(ratio: float) -> Color:
    """The color of a ratio, by its logarithm."""
    if math.isnan(ratio):
        return NO_VALUE
    if ratio == math.inf:
        doublings = MAX_DOUBLINGS
    else:
        doublings = math.log2(ratio) if ratio > 0 else -MAX_DOUBLINGS
    saturation = min(1.0, abs(doublings) / MAX_DOUBLINGS)
    end = ABOVE_MEAN if doublings > 0 else BELOW_MEAN
    red, green, blue = (round(a + saturation * (b - a)) for a, b in zip(AT_MEAN, end, strict=True))
    return red, green, blue


def text_color(background: Color) -> Color:
    """Black or white, whichever has more contrast with a background."""
    red, green, blue = background
    return (0, 0, 0) if 0.299 * red + 0.587 * green + 0.114 * blue > 140 else (255, 255, 255)


def ratio_text(ratio: float) -> str:
    """A ratio in at most four characters."""
    if math.isnan(ratio):
        return ""
    return f"{ratio:.2f}" if ratio < 9.995 else f"{min(ratio, 9999):.0f}"


def draw_grids(grids: Sequence[Grid]) -> Image.Image:
    """All grids on a white image, row by row."""
    num_by_shape = Counter(grid.ratio_RC.shape for grid in grids)
    tiles = []
    for grid in grids:
        side = cell_side(len(grid.columns), num_by_shape[grid.ratio_RC.shape])
        tiles.append(_draw(grid, side))

    positions, right, bottom, x, y, row_height = [], 0, 0, MARGIN, MARGIN, 0
    for tile in tiles:
        if x > MARGIN and x + tile.width > MAX_WIDTH:
            x, y, row_height = MARGIN, y + row_height + MARGIN, 0
        positions.append((x, y))
        row_height = max(row_height, tile.height)
        right, bottom = max(right, x + tile.width), max(bottom, y + tile.height)
        x += tile.width + MARGIN

    image = Image.new("RGB", (right + MARGIN, bottom + MARGIN), "white")
    for tile, position in zip(tiles, positions, strict=True):
        image.paste(tile, position)
    return image


def cell_side(columns: int, grids: int) -> int:
    """Side of a cell in pixels, such that `grids` equal grids form about a square."""
    per_row = min(MAX_PER_ROW, math.isqrt(max(1, grids) - 1) + 1)
    width = MAX_WIDTH // per_row - LABEL - 2 * MARGIN
    return max(MIN_CELL, min(MAX_CELL, width // max(1, columns)))


def _draw(grid: Grid, side: int) -> Image.Image:
    font, small = ImageFont.load_default(FONT_SIZE), ImageFont.load_default(FONT_SIZE - 1)
    # The margin has space for half of the last column's label.
    width = max(LABEL + side * len(grid.columns) + MARGIN, int(font.getlength(grid.title)) + 4)
    tile = Image.new("RGB", (width, HEAD + side * len(grid.rows)), "white")
    pen = ImageDraw.Draw(tile)
    pen.text((0, 0), grid.title, fill="black", font=font)

    step = max(1, -(-LABEL_SPACING // side))
    for column, label in enumerate(grid.columns):
        if column % step == 0:
            middle = LABEL + column * side + side / 2
            pen.text((middle, HEAD - 4), label, fill=(90, 90, 90), font=small, anchor="ms")
    for row, label in enumerate(grid.rows):
        y = HEAD + row * side
        if row % step == 0:
            pen.text((LABEL - 6, y + side / 2), label, fill=(90, 90, 90), font=small, anchor="rm")
        for column in range(len(grid.columns)):
            ratio = float(grid.ratio_RC[row, column])
            _draw_cell(pen, (LABEL + column * side, y), side, ratio, small)
    return tile


def _draw_cell(
    pen: ImageDraw.ImageDraw,
    position: tuple[int, int],
    side: int,
    ratio: float,
    font: ImageFont.FreeTypeFont | ImageFont.ImageFont,
) -> None:
    x, y = position
    color = shade(ratio)
    pen.rectangle((x, y, x + side - 2, y + side - 2), fill=color)
    if side >= MIN_CELL_WITH_TEXT:
        center = (x + side / 2 - 1, y + side / 2 - 1)
        pen.text(center, ratio_text(ratio), fill=text_color(color), font=font, anchor="mm")
