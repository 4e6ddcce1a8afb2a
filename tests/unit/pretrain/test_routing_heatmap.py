"""Colors and layout of the routing heat map."""

from __future__ import annotations

import math

import numpy as np
import pytest
from PIL import ImageFont

from pretrain.evaluate.routing.grids import Grid
from pretrain.evaluate.routing.heatmap import (
    ABOVE_MEAN,
    AT_MEAN,
    BELOW_MEAN,
    FONT_SIZE,
    HEAD,
    LABEL,
    MARGIN,
    MAX_WIDTH,
    MIN_CELL,
    NO_VALUE,
    cell_side,
    draw_grids,
    shade,
)


def test_colors_by_ratio() -> None:
    assert shade(1.0) == AT_MEAN
    assert shade(4.0) == shade(math.inf) == ABOVE_MEAN
    assert shade(0.25) == shade(0.0) == BELOW_MEAN
    assert shade(math.nan) == NO_VALUE
    red, _, blue = shade(2.0)
    assert shade(2.0) not in (AT_MEAN, ABOVE_MEAN) and red > blue


@pytest.mark.parametrize("experts", [1, 8, 64, 256])
def test_every_cell_is_visible(experts: int) -> None:
    ratio_RC = np.full((3, experts), np.nan)
    ratio_RC[1, experts - 1] = 100.0
    grid = Grid("load", ratio_RC, ("a", "b", "c"), tuple(map(str, range(experts))))
    pixels = np.asarray(draw_grids([grid, grid]))
    side = cell_side(experts, 2)
    assert pixels.shape[1] <= max(MAX_WIDTH, side * experts) + 200

    cell_pixels = (side - 1) ** 2
    num_red = (pixels == np.array(ABOVE_MEAN)).all(axis=2).sum()
    assert 2 * cell_pixels * 0.5 <= num_red <= 2 * cell_pixels


def test_many_grids_fit_one_image() -> None:
    grids = [Grid(f"layer {n}", np.ones((32, 32)), ("a",) * 32, ("b",) * 32) for n in range(11)]
    image = draw_grids(grids)
    assert image.width <= MAX_WIDTH + 100 and image.height <= MAX_WIDTH


def test_cell_size_depends_on_grids_of_equal_shape_only() -> None:
    loads = Grid("load", np.full((2, 32), 100.0), ("a", "b"), ("0",) * 32)
    coactivation = Grid("", np.ones((32, 32)), ("0",) * 32, ("0",) * 32)
    pixels = np.asarray(draw_grids([loads] * 2 + [coactivation] * 12))
    num_red = (pixels == np.array(ABOVE_MEAN)).all(axis=2).sum()
    assert num_red == 2 * loads.ratio_RC.size * (cell_side(32, 2) - 1) ** 2
    assert cell_side(32, 2) > 2 * cell_side(32, 12)


def test_the_last_label_is_complete() -> None:
    columns = 253  # with the smallest cells every fourth column has a label, including the last
    grid = Grid("", np.ones((2, columns)), ("a", "b"), tuple(map(str, range(columns))))
    pixels = np.asarray(draw_grids([grid]).convert("L"))
    dark_columns = np.flatnonzero((pixels[: MARGIN + HEAD] < 200).any(axis=0))
    middle = MARGIN + LABEL + (columns - 0.5) * MIN_CELL
    label_width = ImageFont.load_default(FONT_SIZE - 1).getlength("252")
    assert dark_columns.max() == pytest.approx(middle + label_width / 2, abs=2)
