"""Where each setting was set, for error messages.

Settings come from the file that a command names, from files that it extends, and from the command
line; a setting that none of them has keeps its default. An error names the file, and `annotate`
adds to each message what was set elsewhere.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from data_pipeline.common.yaml_file import apply_overrides

COMMAND_LINE = "on the command line"
_DEFAULT = "by default"
# Not in quotes and not before `=`, where it is a suggestion. `0..schedule.total_steps` is a range.
_SETTING = re.compile(r"(?<![\w/'])(?<![^.]\.)[a-z_]\w*(?:\.[a-z_]\w*)*(?!\.?\w|[=/'])")


@dataclass(frozen=True, kw_only=True)
class Origins:
    """Where the settings of a file with its overrides were set."""

    source: str
    """The file that the command names; at the start of an error."""
    where: Mapping[str, str]
    """Dotted name of a setting -> `in FILE` or `on the command line`."""
    names: frozenset[str]
    """All settings that exist, sections excluded."""

    def annotate(self, message: str) -> str:
        """The message, followed by where its settings were set, unless all are in `source` or all
        have their defaults."""
        found = {name: self.where.get(name, _DEFAULT) for name in self._settings_in(message)}
        if set(found.values()) <= {f"in {self.source}"} or set(found.values()) == {_DEFAULT}:
            return message
        if len(set(found.values())) == 1:
            return f"{message} (set {next(iter(found.values()))})"
        return f"{message} (set: {', '.join(f'{name} {where}' for name, where in found.items())})"

    def _settings_in(self, message: str) -> Iterator[str]:
        for match in _SETTING.finditer(message):
            # Names without a dot are also words; only at the start they are settings.
            is_setting = match[0] in self.where or match[0] in self.names
            if is_setting and ("." in match[0] or match.start() == 0):
                yield match[0]


def find_origins(
    layers: Iterable[tuple[str, Mapping[str, Any]]], overrides: Sequence[str]
) -> dict[str, str]:
    """`Origins.where` of files and of overrides.

    Args:
        layers: Name and settings of each file; later ones override earlier ones.
        overrides: Settings of the command line, such as `optim.lr=3e-4`.

    Raises:
        ConfigError: An override is invalid.
    """
    where: dict[str, str] = {}
    for file, mapping in layers:
        where |= dict.fromkeys(_setting_names(mapping), f"in {file}")
    return where | dict.fromkeys(_setting_names(apply_overrides({}, overrides)), COMMAND_LINE)


def _setting_names(mapping: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for key, value in mapping.items():
        if isinstance(value, Mapping) and value:
            yield from _setting_names(value, f"{prefix}{key}.")
        else:
            yield prefix + key
