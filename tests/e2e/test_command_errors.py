"""Errors of `vlmoe eval` and `vlmoe caption`."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.bad_input import assert_contains, one_error
from tests.support.command_server import CommandRunner
from tests.support.shape_dataset import CAPTIONS, render_shape_png

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(120)]


def test_eval_without_run_folder(vlmoe: CommandRunner, tmp_path: Path) -> None:
    error = one_error(vlmoe(["eval", str(tmp_path)]))
    assert_contains(error, f"{tmp_path} is not a run folder", "config.yaml")


def test_caption_of_unreadable_images(
    vlmoe: CommandRunner, trained_run: Path, tmp_path: Path
) -> None:
    (tmp_path / "note.jpg").write_text("hello")
    (tmp_path / "good.png").write_bytes(render_shape_png(CAPTIONS[0], 24))
    images = [str(tmp_path / name) for name in ("note.jpg", "good.png", "no.png")]
    result = vlmoe(["caption", str(trained_run), *images])
    assert_contains(
        one_error(result),
        "2 of 3 images",
        "note.jpg: the image cannot be decoded",
        "no.png: No such file or directory",
    )
    assert f"{tmp_path}/good.png: " in result.output, "no caption for the valid image"
