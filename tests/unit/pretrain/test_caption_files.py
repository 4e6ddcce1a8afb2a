"""`vlmoe caption`: every file gets its caption or its reason."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from data_pipeline.common.errors import DataError
from pretrain.evaluate import caption_files
from pretrain.evaluate.caption_files import caption_command
from pretrain.evaluate.generated_captions import IMAGES_PER_FORWARD
from pretrain.evaluate.trained_model import TrainedModel, load_model
from tests.support.launch import ROOT
from tests.support.shape_dataset import ShapeDataset
from tests.unit.pretrain.evaluate_support import RunFolder


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory, shapes: ShapeDataset) -> Path:
    return RunFolder(tmp_path_factory.mktemp("caption") / "run", shapes).path


def image(path: Path) -> Path:
    Image.new("RGB", (9, 6), "red").save(path, "PNG")
    return path


def test_captions_are_printed_and_unreadable_files_are_listed(
    run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    red, text, blue, missing = (tmp_path / name for name in ("r.png", "t.jpg", "b.webp", "m.png"))
    image(red)
    text.write_text("not an image")
    Image.new("RGB", (60, 90), "blue").save(blue)

    with pytest.raises(DataError, match="2 of 4") as raised:
        caption_command(run_dir, [red, text, blue, missing])
    assert str(text) in str(raised.value) and str(missing) in str(raised.value)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(": ")[0] for line in lines] == [str(red), str(blue)]


def named_pipe(path: Path) -> str:
    os.mkfifo(path)
    return str(path)


def folder(path: Path) -> str:
    path.mkdir()
    return str(path)


def link(target: str) -> Callable[[Path], str]:
    def make(path: Path) -> str:
        path.symlink_to(target)
        return str(path)

    return make


def unix_socket(path: Path) -> str:
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))
    return str(path)


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (named_pipe, "named pipe"),
        (folder, "a folder"),
        (unix_socket, "a socket"),
        (link("pipe"), "named pipe"),
        (link("nowhere"), "No such file"),
        (link("x"), "symbolic links"),
        (lambda path: "/dev/zero", "a device"),
        (lambda path: "http://127.0.0.1:9/a.jpg", "addresses are not fetched"),
        (lambda path: "s3://bucket/a.jpg", "addresses are not fetched"),
        (lambda path: "file:///a.jpg", "addresses are not fetched"),
        (lambda path: "-", "standard input"),
        (lambda path: "x" * 300, "too long"),
        (lambda path: f"{path}/*.jpg", "No such file"),
    ],
)
def test_other_than_files_are_refused(
    run_dir: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    make: Callable[[Path], str],
    reason: str,
) -> None:
    os.mkfifo(tmp_path / "pipe")
    name, good = make(tmp_path / "x"), str(image(tmp_path / "good.png"))
    with pytest.raises(DataError, match=f"1 of 2.*\n.*{reason}"):
        caption_command(run_dir, [name, good])
    assert capsys.readouterr().out.startswith(f"{good}: ")


def test_secrets_of_addresses_are_not_printed(run_dir: Path) -> None:
    with pytest.raises(DataError) as raised:
        caption_command(run_dir, ["https://user:password@host/a.jpg?signature=1"])
    assert "password" not in str(raised.value) and "signature" not in str(raised.value)


def test_too_large_files_are_refused(
    run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load_with_limit(run_dir: Path) -> TrainedModel:
        trained = load_model(run_dir)
        limits = replace(trained.run.data.limits, sample_bytes=1000)
        run = replace(trained.run, data=replace(trained.run.data, limits=limits))
        return replace(trained, run=run)

    monkeypatch.setattr(caption_files, "load_model", load_with_limit)
    (tmp_path / "x.png").write_bytes(image(tmp_path / "y.png").read_bytes() + bytes(1000))
    with pytest.raises(DataError, match=r"larger than 1000 B \(data\.limits\.sample_bytes"):
        caption_command(run_dir, [tmp_path / "x.png"])


def test_more_images_than_one_forward_pass(
    run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good, bad = image(tmp_path / "good.png"), tmp_path / "missing.png"
    with pytest.raises(DataError, match="1 of"):
        caption_command(run_dir, [*[good] * IMAGES_PER_FORWARD, bad, good])
    assert len(capsys.readouterr().out.splitlines()) == IMAGES_PER_FORWARD + 1


def test_names_are_escaped_in_any_locale(run_dir: Path, tmp_path: Path) -> None:
    names = [b"\xff.png", b"a\nb.png", b"\x1b[31m.png", "\u00fcber.png".encode(), b"bad\xfe\x1b"]
    for name in names[:-1]:
        image(Path(os.fsdecode(os.path.join(os.fsencode(tmp_path), name))))
    done = subprocess.run(
        [sys.executable, "-m", "pretrain", "caption", str(run_dir), *names],
        cwd=tmp_path,
        env=os.environ | {"LC_ALL": "C", "PYTHONIOENCODING": "ascii", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        check=False,
    )
    lines = done.stdout.decode("ascii").splitlines()
    assert [line.partition(": ")[0] for line in lines] == [
        r"\udcff.png", r"a\nb.png", r"\x1b[31m.png", r"\xfcber.png"
    ]  # fmt: skip
    error = done.stderr.decode("ascii")
    assert done.returncode == 2 and r"bad\udcfe\x1b: No such file" in error
    assert "Traceback" not in error
