"""Figures in TensorBoard: caption samples and routing heatmaps."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pretrain.evaluate.routing.heatmap import ABOVE_MEAN, BELOW_MEAN, cell_side
from pretrain.train.caption_figure import (
    COLUMNS,
    MARGIN,
    MATCH_COLOR,
    MISMATCH_COLOR,
    TILE,
    draw_captions,
)
from pretrain.train.reporter import Reporter
from tests.unit.pretrain.reporter_support import RUN, events


def decode(event: Any) -> np.ndarray[Any, Any]:
    return np.asarray(Image.open(io.BytesIO(event.encoded_image_string)))


def count_pixels(image: np.ndarray[Any, Any], color: tuple[int, int, int]) -> int:
    return int((image == np.array(color)).all(axis=2).sum())


def test_routing_heatmaps(tmp_path: Path) -> None:
    load_LME = np.ones((2, 2, 4)) * 10
    load_LME[1, 0] = [40, 0, 0, 0]
    coactivation_LEE = np.full((2, 4, 4), 30) - np.diag([20] * 4)
    reporter = Reporter(tmp_path, RUN, 0)
    reporter.log_routing(7, load_LME, coactivation_LEE)
    reporter.close()
    accumulator = events(tmp_path)
    assert accumulator.Tags()["images"] == ["moe/load", "moe/coactivation"]
    (load_event,) = accumulator.Images("moe/load")
    assert load_event.step == 7
    cell = (cell_side(4, 2) - 1) ** 2
    heatmap = decode(load_event)
    assert 0.5 * cell < count_pixels(heatmap, ABOVE_MEAN) <= cell  # one overloaded expert
    assert 1.5 * cell < count_pixels(heatmap, BELOW_MEAN) <= 3 * cell  # three unused experts
    balanced = decode(accumulator.Images("moe/coactivation")[0])
    assert count_pixels(balanced, ABOVE_MEAN) == count_pixels(balanced, BELOW_MEAN) == 0


@pytest.mark.parametrize(
    ("top_k", "coactivation_LEE"),
    [
        (1, np.zeros((2, 4, 4), dtype=np.int64)),
        (2, np.zeros((2, 0, 0), dtype=np.int64)),
    ],
    ids=["top-1", "not counted"],
)
def test_no_coactivation_heatmap_without_pairs_of_experts(
    tmp_path: Path, top_k: int, coactivation_LEE: Any
) -> None:
    reporter = Reporter(tmp_path, replace(RUN, moe=replace(RUN.moe, top_k=top_k)), 0)
    reporter.log_routing(1, np.zeros((2, 2, 4)), coactivation_LEE)
    reporter.close()
    assert events(tmp_path).Tags()["images"] == ["moe/load"]


def test_caption_samples_as_image_and_text(tmp_path: Path) -> None:
    images = np.zeros((6, 3, 8, 8), dtype=np.uint8)
    reporter = Reporter(tmp_path, RUN, 0)
    reporter.log_captions(5, images, ["a fox"] * 6, ["a fox"] * 5 + ["a | <b>cat</b>"])
    reporter.close()
    accumulator = events(tmp_path)
    event = accumulator.Images("captions")[0]
    assert event.step == 5
    assert decode(event).shape[:2] == (event.height, event.width)
    text = accumulator.Tensors("captions/text_summary")[0].tensor_proto.string_val[0].decode()
    cells = [cell.strip() for cell in text.splitlines()[-1].split("|")]
    assert cells == ["", "a fox", "a &#124; &lt;b>cat&lt;/b>", ""]


def test_caption_figure_shows_images_and_colors_matching_captions() -> None:
    images = np.random.default_rng(0).integers(0, 255, (5, 3, 48, 48), dtype=np.uint8)
    figure = draw_captions(
        images, ["a fox", "blue bull", "", "a", "漢字"], ["a fox ", "a fox", "b", "c", "d"]
    )
    assert figure.dtype == np.uint8
    assert figure.shape[1] == COLUMNS * (TILE + MARGIN) + MARGIN
    tile = figure[MARGIN : MARGIN + TILE, MARGIN : MARGIN + TILE]
    assert np.array_equal(tile[2::4, 2::4], images[0].transpose(1, 2, 0))
    colors = []
    for x in (MARGIN, 2 * MARGIN + TILE):
        pixels = figure[MARGIN + TILE :][:60, x : x + TILE].reshape(-1, 3).tolist()
        colors.append({tuple(pixel) for pixel in pixels})
    assert MATCH_COLOR in colors[0] and MISMATCH_COLOR not in colors[0]
    assert MISMATCH_COLOR in colors[1] and MATCH_COLOR not in colors[1]
