"""Validation of settings: every section lists its own problems, and one error reports them all.

A section is a dataclass with a method `problems() -> list[str]` beside its fields. Nothing is
checked when a section is created, so that all mistakes of a user are found before the first one is
reported; `from_mapping` and `check_sections` raise.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any, Protocol, runtime_checkable

from data_pipeline.common.errors import ConfigError
from data_pipeline.common.origins import Origins


@runtime_checkable
class Section(Protocol):
    """A dataclass of settings with checks."""

    def problems(self) -> list[str]:
        """One message for every invalid setting, without those of nested sections.

        A message names the setting in full, such as `data.augment.hue`.
        """


@runtime_checkable
class HasShortForms(Protocol):
    """A dataclass of settings of which some values can be written in a shorter form."""

    @classmethod
    def expand_short_forms(cls, mapping: Mapping[str, Any]) -> Mapping[str, Any]:
        """The settings as read, with short forms written in full; invalid values unchanged."""


class Problems:
    """Collects messages about one section."""

    def __init__(self, section: object, path: str) -> None:
        """Start with no problem; `path` is the name of the section, such as `data.augment`."""
        self._section, self._prefix = section, f"{path}." if path else ""
        self.messages: list[str] = []

    def require(self, condition: bool, message: str) -> None:
        """Add `message` if `condition` is false."""
        if not condition:
            self.messages.append(message)

    def at_least(self, minimum: float, *names: str, note: str = "") -> None:
        """Add a message for each of these settings that is below `minimum`."""
        for name, value in self._values(names):
            self._require_range(name, value, value >= minimum, f"at least {minimum}{note}")

    def above_zero(self, *names: str, note: str = "") -> None:
        """Add a message for each of these settings that is 0 or negative."""
        for name, value in self._values(names):
            self._require_range(name, value, value > 0, f"above 0{note}")

    def within(self, low: float, high: float, *names: str) -> None:
        """Add a message for each of these settings that is not in `low..high`."""
        for name, value in self._values(names):
            self._require_range(name, value, low <= value <= high, f"in {low}..{high}")

    def _values(self, names: tuple[str, ...]) -> Iterator[tuple[str, Any]]:
        return ((name, getattr(self._section, name)) for name in names)

    def _require_range(self, name: str, value: Any, is_allowed: bool, allowed: str) -> None:
        self.require(is_allowed, f"{self._prefix}{name} is {value}, but must be {allowed}")


def section_problems(config: object) -> list[str]:
    """The problems of a section and of all sections in its fields, depth first."""
    messages = config.problems() if isinstance(config, Section) else []
    if dataclasses.is_dataclass(config):
        for field in dataclasses.fields(config):
            value = getattr(config, field.name)
            for item in value if isinstance(value, tuple) else (value,):
                messages = messages + section_problems(item)
    return messages


def check_sections(*configs: object, source: str = "") -> None:
    """Raise one error that lists all problems of sections and of the sections in their fields.

    Raises:
        ConfigError: There is at least one problem.
    """
    messages = [message for config in configs for message in section_problems(config)]
    if messages:
        raise ConfigError(join_problems(messages, source))


def join_problems(problems: list[str], source: str | Origins = "") -> str:
    """One message for one or several problems.

    Args:
        problems: The messages.
        source: Put in front, such as the path of a file; `Origins` also says for each problem where
            its settings were set.
    """
    if isinstance(source, Origins):
        problems = [source.annotate(problem) for problem in problems]
        source = source.source
    head = f"{source}: " if source else ""
    if len(problems) == 1:
        return head + problems[0]
    lines = "\n".join(f"  - {problem}" for problem in problems)
    return f"{head}{len(problems)} problems:\n{lines}"
