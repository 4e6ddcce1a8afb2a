"""Hook of mkdocs (`mkdocs.yml`): generates the reference of settings and presets.

In a page of `docs/`, `<!-- generated: settings -->` is replaced by tables of all settings of a run
file, and `<!-- generated: presets -->` by the presets. Both are read from the code when the site is
built, so they cannot be out of date.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
from typing import Any

from data_pipeline.common.config import to_mapping
from data_pipeline.common.describe_settings import Setting, settings_of
from data_pipeline.common.errors import ConfigError
from pretrain.config.presets import preset_names, run_path
from pretrain.config.schema import RunConfig

MARKER = "<!-- generated: {} -->"


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Replace the markers of a page; mkdocs calls this for every page.

    Raises:
        ConfigError: A marker has an unknown name.
    """
    for name, text in (("settings", settings_reference), ("presets", presets_reference)):
        marker = MARKER.format(name)
        if marker in markdown:
            markdown = markdown.replace(marker, text())
    prefix = MARKER.partition("{")[0]
    if prefix in markdown:
        unknown = markdown.partition(prefix)[2].partition(" ")[0]
        raise ConfigError(f"docs: unknown marker {prefix}{unknown} -->; see {__name__}")
    return markdown


def settings_reference(cls: type = RunConfig) -> str:
    """Markdown: one heading and one table per section of a settings dataclass."""
    return "\n".join(["## Top level", "", *_section(cls, "")])


def presets_reference() -> str:
    """Markdown: the YAML file of every preset."""
    lines: list[str] = []
    for name in preset_names():
        lines += [f"### {name}", "", "```yaml", run_path(name).read_text().rstrip(), "```", ""]
    return "\n".join(lines)


def _section(cls: type, path: str) -> list[str]:
    """The table of a section, then its sub-sections."""
    settings = settings_of(cls)
    lines = ["| setting | default | meaning |", "|---|---|---|"]
    lines += [_row(setting, path) for setting in settings]
    for setting in settings:
        inner = setting.section or setting.entry
        if inner is None:
            continue
        name = f"{path}{setting.name}"
        # A list of sections: the heading describes one entry, its row in the table the list.
        intro = setting.description if setting.section else _first_paragraph(inner)
        lines += ["", f"{'#' * (2 + name.count('.'))} {name}", "", intro, ""]
        lines += _section(inner, f"{name}.")
    return lines


def _row(setting: Setting, path: str) -> str:
    name = f"`{setting.name}`"
    if setting.section or setting.entry:
        name = f"[{name}](#{_anchor(path + setting.name)})"
    if setting.section:
        default = "a section"
    else:
        default = "required" if setting.is_required else f"`{_yaml_value(setting.default)}`"
    return f"| {name} | {default} | {_cell(setting.description)} |"


def _anchor(heading: str) -> str:
    """The anchor that Python-Markdown gives to a heading."""
    return heading.replace(".", "").lower()


def _first_paragraph(cls: type) -> str:
    return " ".join((inspect.getdoc(cls) or "").split("\n\n")[0].split())


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")


def _yaml_value(value: Any) -> str:
    """A default in YAML's flow style, which for these values is JSON with plain strings."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = to_mapping(value)
    return value if isinstance(value, str) and value else json.dumps(value)
