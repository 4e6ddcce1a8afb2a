"""Text from outside in messages, help and tables is escaped, whatever the locale."""

from __future__ import annotations

import argparse
import io
import logging
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from data_pipeline.common.commands import CommandParser, print_error
from data_pipeline.common.logs import log_to_file, setup_logging
from data_pipeline.common.tables import format_rows, format_table, markdown_table
from tests.support.small_shards import make_png

HOSTILE = "a\x1b[31m\udcff\u202e"
ESCAPED = r"a\x1b[31m\udcff\u202e"
LOCALES = [
    {"LC_ALL": "C", "PYTHONIOENCODING": "ascii"},
    {"LC_ALL": "POSIX", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
]


def run(folder: Path, locale: dict[str, str], *args: str | bytes) -> tuple[int, str]:
    """Exit status and output of a command of the data pipeline."""
    done = subprocess.run(
        [sys.executable, "-m", "data_pipeline", *args],
        cwd=folder,
        env=os.environ | locale | {"PYTHONPATH": os.pathsep.join(sys.path)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        check=False,
    )
    return done.returncode, done.stdout.decode("utf-8")


def test_cells_of_tables_are_escaped() -> None:
    for text in (
        format_table([HOSTILE], [["x"]]),
        format_rows([[HOSTILE, 1]]),
        markdown_table(["x"], [[HOSTILE]]),
    ):
        assert ESCAPED in text and HOSTILE not in text
    assert len(format_rows([["a\nb"]]).splitlines()) == 1


def test_log_lines_are_escaped(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    root = logging.getLogger()
    # Without pytest's handler, whose report would contain the text as it is.
    monkeypatch.setattr(root, "handlers", [])
    monkeypatch.setattr(root, "level", root.level)
    setup_logging(0)
    log_to_file(tmp_path / "log")
    logging.getLogger("any").warning("file %s\nnext line", HOSTILE)
    for text in (capsys.readouterr().err, (tmp_path / "log").read_text()):
        assert f"{ESCAPED}\nnext line" in text and "Traceback" not in text


def test_errors_are_escaped(capsys: pytest.CaptureFixture[str]) -> None:
    print_error(f"{HOSTILE}\nnext line", label="error (rank 1)")
    assert capsys.readouterr().err == f"error (rank 1): {ESCAPED}\nnext line\n"

    parser = CommandParser()
    commands = parser.add_subparsers()
    assert isinstance(commands.add_parser("x"), CommandParser)
    with pytest.raises(SystemExit):
        parser.parse_args([HOSTILE])
    error = capsys.readouterr().err
    assert HOSTILE not in error and r"\x1b" in error
    assert issubclass(CommandParser, argparse.ArgumentParser)


@pytest.mark.parametrize("locale", LOCALES, ids=lambda locale: "-".join(locale.values()))
def test_commands_with_names_that_are_not_utf8(tmp_path: Path, locale: dict[str, str]) -> None:
    folder = os.path.join(os.fsencode(tmp_path), b"in\xff\x1b")
    os.mkdir(folder)
    with tarfile.open(os.path.join(folder, b"s\xfe\x1b.tar"), "w", errors="surrogateescape") as tar:
        for name in ("ok", "b\udcffd", "e\x1b[2J", "\u00fc"):
            data = make_png(4) if name != "b\udcffd" else b"no"
            for extension, content in (("png", data), ("txt", b"caf\xc3\xa9 \x1b[31m")):
                member = tarfile.TarInfo(f"{name}.{extension}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))

    status, output = run(tmp_path, locale, "index", folder)
    assert status == 0 and r"in\udcff\x1b/manifest.json: 1 shard, 4 samples" in output
    page, model = b"p\xff\x1b.html", b"t\xff\x1b.model"
    for args, expected in (
        (["check", folder, "--decode"], r"s\udcfe\x1b.tar"),
        (["peek", folder], r"s\udcfe\x1b.tar #2  e\x1b[2J"),
        (["stats", folder, "--html", page], r"p\udcff\x1b.html"),
        (["tokenizer", "train", folder, "--out", model, "--vocab-size", "auto"], r"t\udcff\x1b"),
        (["check", b"missing\xff\x1b"], r"missing\udcff\x1b"),
        ([b"command\xff\x1b"], r"command\udcff\x1b"),
    ):
        status, output = run(tmp_path, locale, *args)
        assert expected in output and "Traceback" not in output
        assert "\x1b" not in output, args


@pytest.mark.parametrize("command", ["write", "index", "check", "peek", "stats", "tokenizer"])
def test_help_in_an_ascii_locale(tmp_path: Path, command: str) -> None:
    status, output = run(tmp_path, LOCALES[0], command, "--help")
    assert status == 0 and output.isascii() and "usage" in output
