"""The packages state one version and carry their type information."""

from __future__ import annotations

import tomllib
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

import data_pipeline
import pretrain

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def pyproject() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_packages_report_the_installed_version() -> None:
    assert pretrain.__version__ == data_pipeline.__version__ == version("vlmoe")


def test_only_pyproject_states_the_version(pyproject: dict[str, Any]) -> None:
    stated = pyproject["project"]["version"]
    files = [*ROOT.glob("*.cff"), ROOT / "setup.py", *ROOT.glob("*/__init__.py")]
    assert [path.name for path in files if stated in path.read_text()] == []


def test_package_data_includes_type_information(pyproject: dict[str, Any]) -> None:
    package_data = pyproject["tool"]["setuptools"]["package-data"]
    for package in ("pretrain", "data_pipeline"):
        assert "py.typed" in package_data[package]
    assert (ROOT / "pretrain" / "py.typed").is_file()
