"""Rendering of quickstart drawings: colors, transparency, resuming, and parallel rendering."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest

from data_pipeline.common.errors import DataError
from data_pipeline.content.image import decode_image
from tests.unit.tools.quickstart_packages import svg_body
from tools.quickstart_data import render as render_module
from tools.quickstart_data.captions import Concept
from tools.quickstart_data.collect import Drawing
from tools.quickstart_data.render import SIDE, render, render_all


def svg(body: str, view_box: str = "0 0 32 32") -> str:
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="{view_box}" width="9" height="9">'
        f"{body}</svg>"
    )


def drawings(count: int) -> list[Drawing]:
    concept = Concept(caption="x")
    return [
        Drawing(key=f"s_{index}", source="s", concept=concept, data=svg(svg_body(index)))
        for index in range(count)
    ]


def test_svg_keeps_color_transparency_and_aspect_ratio() -> None:
    image = decode_image(render(svg('<rect x="8" y="8" width="16" height="16" fill="#ff8000"/>')))
    assert image.shape == (SIDE, SIDE, 4)
    np.testing.assert_array_equal(image[SIDE // 2, SIDE // 2], (255, 128, 0, 255))
    assert image[2, 2, 3] == 0 and image[..., 3].mean() == pytest.approx(255 / 4, rel=0.01)

    wide = decode_image(render(svg('<rect width="64" height="32" fill="red"/>', "0 0 64 32")))
    assert wide[..., 3].max(axis=1).astype(bool).sum() == SIDE // 2


def test_large_images_are_resized_without_a_dark_edge() -> None:
    y, x = np.mgrid[0:256, 0:256] - 127.5
    image = np.zeros((256, 256, 4), np.uint8)
    image[np.hypot(x, y) < 90] = (0, 200, 250, 255)  # BGRA
    small = decode_image(render(cv2.imencode(".png", image)[1].tobytes()))
    visible = small[small[..., 3] > 0].astype(int)
    assert np.abs(visible[:, :3] - (250, 200, 0)).max() <= 2
    assert visible[:, 3].sum() / 255 == pytest.approx(np.pi * 90**2 / 16, rel=0.01)


def test_interrupted_rendering_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(render_module, "CHUNK", 4)
    expected = {drawing.key: render(drawing.data) for drawing in drawings(10)}
    assert render_all(drawings(10), tmp_path, processes=1) == expected
    chunks = sorted(tmp_path.glob("*.npz"))
    assert len(chunks) == 3
    chunks[0].unlink()
    chunks[1].write_bytes(chunks[1].read_bytes()[:200])  # truncated

    calls: list[object] = []

    def counting_render(data: str | bytes) -> bytes:
        calls.append(data)
        return render(data)

    monkeypatch.setattr(render_module, "render", counting_render)
    assert render_all(drawings(10), tmp_path, processes=1) == expected
    assert 0 < len(calls) <= 8
    assert render_all(drawings(10), tmp_path, processes=1) == expected
    assert len(calls) <= 8


def test_several_processes_give_the_same_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(render_module, "CHUNK", 3)
    serial = render_all(drawings(8), tmp_path / "1", processes=1)
    parallel = render_all(drawings(8), tmp_path / "2", processes=2)
    assert serial == parallel and list(serial) == list(parallel)


def test_invisible_drawings_are_excluded_and_invalid_ones_rejected(tmp_path: Path) -> None:
    visible, invisible = drawings(2)
    invisible = replace(invisible, data=svg(""))
    assert list(render_all([visible, invisible], tmp_path, processes=1)) == [visible.key]
    with pytest.raises(DataError, match="s_0"):
        render_all([replace(visible, data="<svg")], tmp_path, processes=1)
