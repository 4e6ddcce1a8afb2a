"""Grids of ratios as SVG, for a page without scripts. Everything that is text is escaped here."""

from __future__ import annotations

import math
from html import escape

from pretrain.evaluate.routing.figure import ink, ratio_text, shade
from pretrain.evaluate.routing.grids import Grid

CELL, SMALLEST, LABEL, HEAD, WIDEST = 30, 6, 62, 20, 900
"""Units of the drawing, as many pixels."""
TOLD = 1600
"""Cells up to which each says its number when the mouse rests on it; more would make a heavy
page."""


def svg_grid(grid: Grid) -> str:
    """One grid; its title is left to the page."""
    rows, columns = len(grid.rows), len(grid.columns)
    side = max(SMALLEST, min(CELL, (WIDEST - LABEL) // max(1, columns)))
    width, height = (
        LABEL + side * columns + LABEL // 8,
        HEAD + side * rows,
    )  # half of the last label may stand out
    step, row_step = max(1, -(-14 // side)), max(1, -(-10 // side))
    parts = [
        f'<svg viewBox="0 0 {width} {height}" width="{width}" height="{height}" role="img" '
        f'aria-label="{escape(grid.title)}">'
    ]
    for column, label in enumerate(grid.columns[::step]):
        parts.append(
            f'<text class="l" x="{LABEL + (column * step + 0.5) * side:g}" y="{HEAD - 6}">'
            f"{escape(label)}</text>"
        )
    for row, label in enumerate(grid.rows):
        if row % row_step == 0:
            parts.append(
                f'<text class="r" x="{LABEL - 6}" y="{HEAD + (row + 0.5) * side + 4:g}">'
                f"{escape(label)}</text>"
            )
        parts += [
            _cell(grid, row, column, side, told=rows * columns <= TOLD) for column in range(columns)
        ]
    return "".join([*parts, "</svg>"])


def _cell(grid: Grid, row: int, column: int, side: int, *, told: bool) -> str:
    ratio = float(grid.ratio_RC[row, column])
    color, x, y = shade(ratio), LABEL + column * side, HEAD + row * side
    title = ""
    if told and not math.isnan(ratio):
        words = f"{grid.rows[row]}, {grid.columns[column]}: {ratio_text(ratio)}"
        title = f"<title>{escape(words)}</title>"
    box = f'<rect x="{x}" y="{y}" width="{side - 1}" height="{side - 1}" fill="{_hex(color)}">{title}</rect>'
    if side < 28 or math.isnan(ratio):
        return box
    return (
        f'{box}<text class="v" x="{x + side / 2:g}" y="{y + side / 2 + 4:g}" fill="{_hex(ink(color))}">'
        f"{ratio_text(ratio)}</text>"
    )


def _hex(color: tuple[int, int, int]) -> str:
    return "#{:02x}{:02x}{:02x}".format(*color)
