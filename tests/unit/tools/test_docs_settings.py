"""The reference of settings and presets that the documentation's hook generates."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

import pytest

from data_pipeline.common.describe_settings import settings_of
from data_pipeline.common.errors import ConfigError
from data_pipeline.common.yaml_file import parse_yaml
from pretrain.config.presets import preset_names
from pretrain.config.schema import RunConfig
from tools.docs_settings import (
    MARKER,
    on_page_markdown,
    presets_reference,
    settings_reference,
)


@dataclass(frozen=True, kw_only=True)
class Entry:
    """An entry of a list."""

    path: str
    """Where | what."""


@dataclass(frozen=True, kw_only=True)
class Root:
    """A run."""

    kind: Literal["a", "b"] = "b"
    """Which one."""
    entries: tuple[Entry, ...] = ()
    """All entries."""


def test_tables_of_a_small_dataclass() -> None:
    rows = settings_reference(Root).splitlines()
    assert "| `kind` | `b` | Which one. One of a, b. |" in rows
    assert "| [`entries`](#entries) | `[]` | All entries. |" in rows
    assert rows.index("## entries") < rows.index("| `path` | required | Where \\| what. |")


def documented_settings(cls: type = RunConfig) -> int:
    """Number of settings, with those of sections and of entries of lists."""
    return sum(
        1 + (documented_settings(inner) if (inner := setting.section or setting.entry) else 0)
        for setting in settings_of(cls)
    )


def test_every_setting_has_a_row_with_a_meaning() -> None:
    rows = [row for row in settings_reference().splitlines() if re.match(r"\| \[?`", row)]
    assert len(rows) == documented_settings() > 100
    assert [row for row in rows if row.endswith("|  |")] == []


def test_defaults_are_yaml_values() -> None:
    sections = [RunConfig, *(setting.section for setting in settings_of(RunConfig))]
    for section in filter(None, sections):
        defaults = {setting.name: setting.default for setting in settings_of(section)}
        # The first table is that of the section itself; lists of sections have a link instead.
        table = settings_reference(section).partition("\n##")[0]
        rows = re.findall(r"^\| `(\w+)` \| `(.+?)` \|", table, re.MULTILINE)
        assert rows
        for name, default in rows:
            assert parse_yaml(f"{name}: {default}", source="test") == {name: defaults[name]}


def test_links_of_sections_lead_to_their_headings() -> None:
    text = settings_reference()
    headings = re.findall(r"^##+ (.+)$", text, re.MULTILINE)
    anchors = [heading.lower().replace(".", "").replace(" ", "-") for heading in headings]
    assert len(set(anchors)) == len(anchors)
    assert set(re.findall(r"\]\(#([^)]+)\)", text)) == {*anchors} - {"top-level"}


def test_page_with_markers() -> None:
    page = f"before\n{MARKER.format('presets')}\n{MARKER.format('settings')}\nafter"
    text = on_page_markdown(page, page=None)
    assert text == f"before\n{presets_reference()}\n{settings_reference()}\nafter"
    assert all(f"### {name}\n" in text for name in preset_names())
    assert on_page_markdown("no marker") == "no marker"


def test_unknown_marker_is_an_error() -> None:
    with pytest.raises(ConfigError, match="setings"):
        on_page_markdown(MARKER.format("setings"))
