"""Converts plain mappings to frozen dataclasses, strictly, and back.

The dataclass alone defines which settings exist. Every key must be one of its fields and every
value must have the field's type; one error lists all problems. Reading files, `extends:` and
overrides are in `yaml_file`; its functions are re-exported here because callers use both.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Iterator, Mapping
from typing import Any, Literal, TypeVar, Union

from data_pipeline.common.errors import ConfigError
from data_pipeline.common.origins import Origins
from data_pipeline.common.problems import HasShortForms, Section, join_problems
from data_pipeline.common.tables import counted
from data_pipeline.common.yaml_file import apply_overrides, load_yaml, merge, parse_yaml, to_yaml

__all__ = [
    "apply_overrides",
    "dump_yaml",
    "from_mapping",
    "join_problems",
    "load_yaml",
    "merge",
    "parse_yaml",
    "setting_names",
    "to_mapping",
]

C = TypeVar("C")


def from_mapping(
    cls: type[C], mapping: Mapping[str, Any], *, source: str | Origins = "", check: bool = True
) -> C:
    """Build the dataclass `cls` from `mapping`; missing fields keep their defaults.

    Args:
        cls: A dataclass whose fields are numbers, strings, booleans, `Literal`s, tuples, mappings
            with string keys, unions, or such dataclasses.
        mapping: Plain values as read from YAML or JSON; lists stand for tuples.
        source: See `join_problems`.
        check: Also raise if a section has problems; without it, only keys and types are checked,
            and the caller checks the sections together with what it knows in addition.

    Raises:
        ConfigError: Lists every unknown key, every wrong type and every problem of a section.
    """
    problems: list[str] = []
    converter = _Converter(cls, problems)
    value = converter.section(cls, mapping, "")
    if problems or check:
        problems += [message for section in converter.sections for message in section.problems()]
    if problems:
        raise ConfigError(join_problems(problems, source))
    return typing.cast(C, value)


def to_mapping(config: Any) -> dict[str, Any]:
    """A dataclass as nested plain values, in field order; `from_mapping` reads them back."""
    return {f.name: _plain(getattr(config, f.name)) for f in dataclasses.fields(config)}


def dump_yaml(config: Any) -> str:
    """A dataclass as YAML, including fields that have their default."""
    return to_yaml(to_mapping(config))


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return to_mapping(value)
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return value


class _Invalid:
    """Placeholder for a value that could not be converted; the reason is in the problems."""


_INVALID = _Invalid()


class _Converter:
    """Converts a mapping according to the types of a dataclass and collects problems."""

    def __init__(self, root: type, problems: list[str]) -> None:
        self.root = root
        self.problems = problems
        self.sections: list[Section] = []

    def invalid(self, path: str, message: str) -> _Invalid:
        self.problems.append(f"{path}: {message}" if path else message)
        return _INVALID

    def section(self, cls: type, mapping: Any, path: str) -> Any:
        """A dataclass from a mapping, or `_INVALID`."""
        if not isinstance(mapping, Mapping):
            return self.invalid(path, f"expected a section with settings, found {mapping!r}")
        if issubclass(cls, HasShortForms):
            mapping = cls.expand_short_forms(mapping)
        # Resolves annotations that are strings (`from __future__ import annotations`).
        hints = typing.get_type_hints(cls)
        fields = {f.name: f for f in dataclasses.fields(cls) if f.init}

        values: dict[str, Any] = {}
        for key, value in mapping.items():
            full_key = f"{path}.{key}" if path else str(key)
            if key in fields:
                values[key] = self.value(hints[key], value, full_key)
            else:
                hint = self._suggest(str(key), list(fields), path)
                self.invalid(full_key, f"no such setting{hint}")

        for name, field in fields.items():
            if name not in mapping and is_required(field):
                full_key = f"{path}.{name}" if path else name
                values[name] = self.invalid(full_key, "is required, but missing")

        if any(isinstance(value, _Invalid) for value in values.values()):
            return _INVALID
        section = cls(**values)
        if isinstance(section, Section):
            self.sections.append(section)
        return section

    def value(self, hint: Any, value: Any, path: str) -> Any:
        """`value` as the type `hint`, or `_INVALID`."""
        if dataclasses.is_dataclass(hint) and isinstance(hint, type):
            return self.section(hint, value, path)
        origin = typing.get_origin(hint)
        if origin in (Union, types.UnionType):
            return self._union(typing.get_args(hint), value, path)
        if origin is tuple:
            return self._tuple(typing.get_args(hint), value, path)
        if origin is dict:
            return self._dict(typing.get_args(hint)[1], value, path)
        if origin is Literal:
            return self._literal(typing.get_args(hint), value, path)
        return self._scalar(hint, value, path)

    def _scalar(self, hint: Any, value: Any, path: str) -> Any:
        if hint is Any or hint is object:
            return value
        if hint in (type(None), None) and value is None:
            return None
        if hint is float and isinstance(value, int | float) and not isinstance(value, bool):
            if math.isfinite(value):
                return float(value)
            return self.invalid(path, f"expected a finite number, found {value!r}")
        if hint in (bool, str, int) and type(value) is hint:
            return value
        quotes = "; put it in quotes" if hint is str and isinstance(value, int | float) else ""
        return self.invalid(path, f"expected {_type_name(hint)}, found {_yaml_repr(value)}{quotes}")

    def _literal(self, allowed: tuple[Any, ...], value: Any, path: str) -> Any:
        if any(value == item and type(value) is type(item) for item in allowed):
            return value
        matches = difflib.get_close_matches(str(value), [str(item) for item in allowed], n=1)
        hint = f"; did you mean {matches[0]!r}?" if matches else ""
        expected = _type_name(Literal[allowed])
        return self.invalid(path, f"expected {expected}, found {_yaml_repr(value)}{hint}")

    def _tuple(self, item_types: tuple[Any, ...], value: Any, path: str) -> Any:
        if not isinstance(value, list | tuple):
            text = _yaml_repr(value)
            return self.invalid(path, f"expected a list, found {text}; write it as [{text}]")
        if len(item_types) == 2 and item_types[1] is Ellipsis:
            expected = [item_types[0]] * len(value)
        elif len(item_types) == len(value):
            expected = list(item_types)
        else:
            return self.invalid(
                path,
                f"expected a list of {len(item_types)}, found {counted(len(value), 'item')}: "
                f"{value!r}",
            )
        items = tuple(
            self.value(item_type, item, f"{path}[{i}]")
            for i, (item_type, item) in enumerate(zip(expected, value, strict=True))
        )
        return _INVALID if any(isinstance(item, _Invalid) for item in items) else items

    def _dict(self, item_type: Any, value: Any, path: str) -> Any:
        if not isinstance(value, Mapping):
            return self.invalid(path, f"expected a mapping, found {_yaml_repr(value)}")
        items = {key: self.value(item_type, item, f"{path}.{key}") for key, item in value.items()}
        return _INVALID if any(isinstance(item, _Invalid) for item in items.values()) else items

    def _union(self, members: tuple[Any, ...], value: Any, path: str) -> Any:
        # An exact type is preferred to a conversion: 3 stays an integer in `float | int`.
        for member in sorted(members, key=lambda member: type(value) is not member):
            problems: list[str] = []
            converter = _Converter(self.root, problems)
            converted = converter.value(member, value, path)
            # `converted` alone is not enough: a section with unknown settings is created too.
            if not problems:
                self.sections += converter.sections
                return converted
        sections = [
            member
            for member in members
            if isinstance(member, type) and dataclasses.is_dataclass(member)
        ]
        if isinstance(value, Mapping) and len(sections) == 1:
            return self.section(sections[0], value, path)
        expected = " or ".join(map(_type_name, members))
        return self.invalid(path, f"expected {expected}, found {_yaml_repr(value)}")

    def _suggest(self, key: str, names: list[str], path: str) -> str:
        """A hint for an unknown key: sections that have it, or names that this section has."""
        elsewhere = [full for full in _all_settings(self.root) if full.rsplit(".", 1)[-1] == key]
        if elsewhere:
            return f"; did you mean {' or '.join(repr(full) for full in elsewhere)}?"
        matches = difflib.get_close_matches(key, names, n=1)
        if matches:
            full = f"{path}.{matches[0]}" if path else matches[0]
            return f"; did you mean {full!r}?"
        return f"; {path or 'the top level'} has {', '.join(names)}"


def is_required(field: dataclasses.Field[Any]) -> bool:
    """Whether a setting has no default."""
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def setting_names(cls: type) -> frozenset[str]:
    """Dotted names of all settings of a dataclass and its sections, without the sections."""
    names = set(_all_settings(cls))
    return frozenset(names - {name.rpartition(".")[0] for name in names})


def _all_settings(cls: type, prefix: str = "") -> Iterator[str]:
    """Dotted names of all settings of a dataclass and its sections, and of the sections."""
    for name, hint in typing.get_type_hints(cls).items():
        yield prefix + name
        if dataclasses.is_dataclass(hint) and isinstance(hint, type):
            yield from _all_settings(hint, f"{prefix}{name}.")


def _type_name(hint: Any) -> str:
    """A type in the terms of YAML."""
    if typing.get_origin(hint) is Literal:
        return f"one of {', '.join(repr(item) for item in typing.get_args(hint))}"
    names = {
        int: "an integer",
        float: "a number",
        str: "a string",
        bool: "true or false",
        type(None): "null",
    }
    if hint in names:
        return names[hint]
    if dataclasses.is_dataclass(hint):
        return "a section"
    return "a list" if typing.get_origin(hint) is tuple else str(hint)


def _yaml_repr(value: Any) -> str:
    """A value approximately as YAML writes it."""
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else repr(value)
