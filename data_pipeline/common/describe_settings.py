"""Describes the settings of a dataclass: YAML with all defaults, with docstrings as comments."""

from __future__ import annotations

import ast
import dataclasses
import difflib
import inspect
import json
import textwrap
import typing
from typing import Any

from data_pipeline.common.config import is_required, to_mapping
from data_pipeline.common.errors import ConfigError
from data_pipeline.common.yaml_file import to_yaml

_WIDTH = 110


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setting:
    """One field of a settings dataclass."""

    name: str
    description: str
    """The docstring below the field, or of its section; ends with the values of a `Literal`."""
    section: type | None
    """The dataclass, if the setting is a section."""
    entry: type | None
    """The dataclass of one entry, if the setting is a list of sections."""
    is_required: bool
    default: Any
    """None for a section and for a required setting."""


def settings_of(cls: type) -> list[Setting]:
    """The settings of a dataclass in order, those of its sections not included."""
    hints, docs = typing.get_type_hints(cls), field_docs(cls)
    settings = []
    for field in dataclasses.fields(cls):
        hint, description = hints[field.name], docs.get(field.name, "")
        inner = _section_type(hint)
        section = inner if inner is hint else None
        if section is not None:
            description = description or (inspect.getdoc(section) or "").splitlines()[0]
        has_default = section is None and not is_required(field)
        settings.append(
            Setting(
                name=field.name,
                description=description + _allowed_values(hint),
                section=section,
                entry=None if section else inner,
                is_required=section is None and not has_default,
                default=_default(field) if has_default else None,
            )
        )
    return settings


def describe_settings(cls: type, section: str = "") -> str:
    """The settings of a dataclass, or of one of its sections, as commented YAML.

    Args:
        cls: The root dataclass.
        section: Dotted name of a section or of one setting; for a list of sections, one entry is
            described.

    Raises:
        ConfigError: There is no such section or setting.
    """
    section_cls, path = cls, list[str]()
    names = list(filter(None, section.split(".")))
    for index, name in enumerate(names):
        hints = typing.get_type_hints(section_cls)
        inner = _section_type(hints.get(name))
        if inner is None and name in hints and index == len(names) - 1:
            return "\n".join(_lines(section_cls, 0, only=name)) + "\n"
        if inner is None:
            sections = [key for key, hint in hints.items() if _section_type(hint)]
            raise _no_such_name(".".join([*path, name]), name, sections, list(hints))
        section_cls, path = inner, [*path, name]
    return "\n".join(_lines(section_cls, 0)) + "\n"


def field_docs(cls: type) -> dict[str, str]:
    """The docstring below each field of a dataclass, as one line."""
    body = ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0]
    assert isinstance(body, ast.ClassDef)
    docs: dict[str, str] = {}
    for statement, following in zip(body.body, body.body[1:], strict=False):
        if (
            isinstance(statement, ast.AnnAssign)
            and isinstance(statement.target, ast.Name)
            and isinstance(following, ast.Expr)
            and isinstance(following.value, ast.Constant)
        ):
            docs[statement.target.id] = " ".join(str(following.value.value).split())
    return docs


def _no_such_name(
    full_name: str, name: str, sections: list[str], settings: list[str]
) -> ConfigError:
    matches = difflib.get_close_matches(name, settings, n=1)
    if matches:
        hint = f"did you mean {matches[0]!r}?"
    elif sections:
        hint = f"the sections are {', '.join(sections)}"
    else:
        hint = f"the settings are {', '.join(settings)}"
    return ConfigError(f"{full_name}: no such section or setting; {hint}")


def _lines(cls: type, depth: int, only: str = "") -> list[str]:
    """The settings of a dataclass (or only one) as lines of YAML, indented by `depth` levels."""
    indent, lines = "  " * depth, list[str]()
    for setting in settings_of(cls):
        if only and setting.name != only:
            continue
        comment = _comment(setting.description, indent)
        if setting.section is not None:
            lines += ["", *comment, f"{indent}{setting.name}:", *_lines(setting.section, depth + 1)]
        elif setting.is_required:
            lines += [*comment, f"{indent}# {setting.name}: required"]
        else:
            lines += [*comment, *(indent + line for line in _yaml(setting.name, setting.default))]
    return lines


def _comment(text: str, indent: str) -> list[str]:
    return [f"{indent}# {line}" for line in textwrap.wrap(text, _WIDTH - len(indent))]


def _allowed_values(hint: Any) -> str:
    """The values of a `Literal`; empty for other types."""
    if typing.get_origin(hint) is not typing.Literal:
        return ""
    return f" One of {', '.join(map(str, typing.get_args(hint)))}."


def _yaml(name: str, value: Any) -> list[str]:
    """`name: value` in YAML; lists of scalars on one line."""
    if isinstance(value, list) and all(isinstance(item, int | float | str) for item in value):
        return [f"{name}: {json.dumps(value)}"]
    return to_yaml({name: value}).splitlines()


def _section_type(hint: Any) -> type | None:
    """The dataclass that a type is, or that it contains (as a list of sections does)."""
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        return hint
    return next(filter(None, map(_section_type, typing.get_args(hint))), None)


def _default(field: dataclasses.Field[Any]) -> Any:
    factory = field.default_factory
    value = field.default if factory is dataclasses.MISSING else factory()
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return to_mapping(value)
    return list(value) if isinstance(value, tuple) else value
