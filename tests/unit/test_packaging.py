"""One version and type information of the packages; a lock file that fits their requirements."""

from __future__ import annotations

import re
import tomllib
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

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


def test_lock_file_pins_what_the_environment_needs(pyproject: dict[str, Any]) -> None:
    lines = (ROOT / "requirements.lock").read_text().splitlines()
    locked = [Requirement(line) for line in lines if not line.startswith("#")]
    assert all(re.fullmatch(r"==[^*]+", str(entry.specifier)) for entry in locked)
    versions = {canonicalize_name(entry.name): str(entry.specifier)[2:] for entry in locked}
    makefile = (ROOT / "Makefile").read_text()
    extras = re.findall(r"^EXTRAS := (\S+)$", makefile, re.MULTILINE)[0].split(",")
    project = pyproject["project"]
    groups = [project["optional-dependencies"][extra] for extra in extras]
    needed = sum(groups, start=project["dependencies"])
    unmet = {
        requirement.name: versions.get(canonicalize_name(requirement.name))
        for requirement in map(Requirement, needed)
        if versions.get(canonicalize_name(requirement.name), "0") not in requirement.specifier
    }
    assert unmet == {}, "renew it with `make lock`"
