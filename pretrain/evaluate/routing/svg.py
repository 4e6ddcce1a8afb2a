"""Draws grids of ratios as SVG, for a page without scripts. All text is escaped here."""

from __future__ import annotations

import math
from html import escape

from pretrain.evaluate.routing.grids import Grid
from pretrain.evaluate.routing.heatmap import ratio_text, shade, text_color

CELL, MIN_CELL, LABEL, HEAD, MAX_WIDTH = 30, 6, 62, 20, 900
"""Sizes in pixels."""
MAX_TOOLTIPS = 1600
"""Cells up to which each has a tooltip with its value; more would make a large page."""
MIN_CELL_WITH_TEXT = 28


def svg_grid(grid: Grid) -> str:
    """One grid without its title."""
    rows, columns = len(grid.rows), len(grid.columns)
    side = max(MIN_CELL, min(CELL, (MAX_WIDTH - LABEL) // max(1, columns)))
    # The last column's label may extend beyond the cells by half of its width.
    width, height = LABEL + side * columns + LABEL // 8, HEAD + side * rows
    column_step, row_step = max(1, -(-14 // side)), max(1, -(-10 // side))
    has_tooltips = rows * columns <= MAX_TOOLTIPS

    parts = [
        f'<svg viewBox="0 0 {width} {height}" width="{width}" height="{height}" role="img" '
        f'aria-label="{escape(grid.title)}">'
    ]
    for index, label in enumerate(grid.columns[::column_step]):
        x = LABEL + (index * column_step + 0.5) * side
        parts.append(f'<text class="l" x="{x:g}" y="{HEAD - 6}">{escape(label)}</text>')
    for row, label in enumerate(grid.rows):
        if row % row_step == 0:
            y = HEAD + (row + 0.5) * side + 4
            parts.append(f'<text class="r" x="{LABEL - 6}" y="{y:g}">{escape(label)}</text>')
        for column in range(columns):
            parts.append(_cell(grid, row, column, side, has_tooltip=has_tooltips))
    return "".join([*parts, "</svg>"])


def _cell(grid: Grid, row: int, column: int, side: int, *, has_tooltip: bool) -> str:
    ratio = float(grid.ratio_RC[row, column])
    color, x, y = shade(ratio), LABEL + column * side, HEAD + row * side
    title = ""
    if has_tooltip and not math.isnan(ratio):
        text = f"{grid.rows[row]}, {grid.columns[column]}: {ratio_text(ratio)}"
        title = f"<title>{escape(text)}</title>"
    box = (
        f'<rect x="{x}" y="{y}" width="{side - 1}" height="{side - 1}" fill="{_hex(color)}">'
        f"{title}</rect>"
    )
    if side < MIN_CELL_WITH_TEXT or math.isnan(ratio):
        return box
    return (
        f'{box}<text class="v" x="{x + side / 2:g}" y="{y + side / 2 + 4:g}" '
        f'fill="{_hex(text_color(color))}">{ratio_text(ratio)}</text>'
    )


def _hex(color: tuple[int, int, int]) -> str:
    return "#{:02x}{:02x}{:02x}".format(*color)
