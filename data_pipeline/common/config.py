"""Turns plain mappings into frozen dataclasses, strictly, and back.

The one idea: the dataclass is the whole truth about what may be set. Every key must be one of its
fields, every value must have the field's type, and all that is wrong is said in one error, so that
a person mends a file once. Reading files, `extends:` and overrides are in `yaml_file`; their names
are offered here too, because callers need them together.
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
from data_pipeline.common.yaml_file import apply_overrides, load_yaml, merge, parse_yaml, to_yaml

__all__ = [
    "apply_overrides",
    "dump_yaml",
    "from_mapping",
    "join_problems",
    "load_yaml",
    "merge",
    "parse_yaml",
    "to_mapping",
]

C = TypeVar("C")


def from_mapping(cls: type[C], mapping: Mapping[str, Any], *, source: str = "") -> C:
    """The dataclass `cls` filled from `mapping`; fields that are not given keep their defaults.

    Args:
        cls: A dataclass whose fields are numbers, text, truth values, `Literal`s, tuples, mappings
            with text keys, unions, or such dataclasses.
        mapping: Plain values as read from YAML or JSON; lists stand for tuples.
        source: Named at the head of the error, such as the path of the file.

    Raises:
        ConfigError: Lists every unknown key, wrong type and failed check.
    """
    problems: list[str] = []
    value = _Reader(cls, problems).section(cls, mapping, "")
    if problems:
        raise ConfigError(join_problems(problems, source))
    return typing.cast(C, value)


def join_problems(problems: list[str], source: str = "") -> str:
    """One message for one or several problems."""
    head = f"{source}: " if source else ""
    if len(problems) == 1:
        return head + problems[0]
    return f"{head}{len(problems)} problems:\n" + "\n".join(
        f"  - {problem}" for problem in problems
    )


def to_mapping(config: Any) -> dict[str, Any]:
    """Plain values of a dataclass, nested, in field order; `from_mapping` reads them back."""
    return {f.name: _plain(getattr(config, f.name)) for f in dataclasses.fields(config)}


def dump_yaml(config: Any) -> str:
    """A dataclass as YAML text, every field written out."""
    return to_yaml(to_mapping(config))


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return to_mapping(value)
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return value


class _Bad:
    """Stands for a value that could not be made; the reason is already in the problems."""


_BAD = _Bad()


class _Reader:
    """Walks a mapping along the types of a dataclass and gathers what does not fit."""

    def __init__(self, root: type, problems: list[str]) -> None:
        self.root = root
        self.problems = problems

    def bad(self, path: str, message: str) -> _Bad:
        self.problems.append(f"{path}: {message}" if path else message)
        return _BAD

    def section(self, cls: type, mapping: Any, path: str) -> Any:
        """A dataclass from a mapping, or `_BAD`."""
        if not isinstance(mapping, Mapping):
            return self.bad(path, f"expected a section with settings, found {mapping!r}")
        # Annotations are text in files that postpone them, so ask for the real types.
        hints = typing.get_type_hints(cls)
        fields = {f.name: f for f in dataclasses.fields(cls) if f.init}
        values: dict[str, Any] = {}
        for key, value in mapping.items():
            where = f"{path}.{key}" if path else str(key)
            if key in fields:
                values[key] = self.value(hints[key], value, where)
            else:
                self.bad(where, f"no such setting{self._suggest(str(key), list(fields), path)}")
        for name, field in fields.items():
            no_default = (
                field.default is dataclasses.MISSING
                and field.default_factory is dataclasses.MISSING
            )
            if no_default and name not in mapping:
                values[name] = self.bad(
                    f"{path}.{name}" if path else name, "must be given, but is missing"
                )
        if any(isinstance(value, _Bad) for value in values.values()):
            return _BAD
        try:
            return cls(**values)
        except ConfigError as error:
            # The section's own checks name their settings in full.
            return self.bad("", str(error))

    def value(self, hint: Any, value: Any, path: str) -> Any:
        """`value` as the type `hint`, or `_BAD`."""
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
            return (
                float(value)
                if math.isfinite(value)
                else self.bad(path, f"expected a finite number, found {value!r}")
            )
        if hint in (bool, str, int) and type(value) is hint:
            return value
        quotes = "; put it in quotes" if hint is str and isinstance(value, int | float) else ""
        return self.bad(path, f"expected {_describe(hint)}, found {_show(value)}{quotes}")

    def _literal(self, allowed: tuple[Any, ...], value: Any, path: str) -> Any:
        if any(value == item and type(value) is type(item) for item in allowed):
            return value
        near = difflib.get_close_matches(str(value), [str(item) for item in allowed], n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        return self.bad(path, f"expected {_describe(Literal[allowed])}, found {_show(value)}{hint}")

    def _tuple(self, items: tuple[Any, ...], value: Any, path: str) -> Any:
        if not isinstance(value, list | tuple):
            return self.bad(
                path, f"expected a list, found {_show(value)}; write it as [{_show(value)}]"
            )
        if len(items) == 2 and items[1] is Ellipsis:
            kinds = [items[0]] * len(value)
        elif len(items) == len(value):
            kinds = list(items)
        else:
            return self.bad(
                path, f"expected a list of {len(items)}, found {len(value)} items: {value!r}"
            )
        made = tuple(
            self.value(kind, item, f"{path}[{i}]")
            for i, (kind, item) in enumerate(zip(kinds, value, strict=True))
        )
        return _BAD if any(isinstance(item, _Bad) for item in made) else made

    def _dict(self, kind: Any, value: Any, path: str) -> Any:
        if not isinstance(value, Mapping):
            return self.bad(path, f"expected a mapping, found {_show(value)}")
        made = {key: self.value(kind, item, f"{path}.{key}") for key, item in value.items()}
        return _BAD if any(isinstance(item, _Bad) for item in made.values()) else made

    def _union(self, kinds: tuple[Any, ...], value: Any, path: str) -> Any:
        attempts: list[list[str]] = []
        # An exact type wins over a conversion: 3 stays whole in `float | int`.
        for kind in sorted(kinds, key=lambda kind: type(value) is not kind):
            trial: list[str] = []
            made = _Reader(self.root, trial).value(kind, value, path)
            if (
                not trial
            ):  # a section may be made though it was given settings that it does not know
                return made
            attempts.append(trial)
        sections = [
            kind for kind in kinds if isinstance(kind, type) and dataclasses.is_dataclass(kind)
        ]
        if isinstance(value, Mapping) and len(sections) == 1:
            return self.section(sections[0], value, path)
        return self.bad(
            path, f"expected {' or '.join(_describe(k) for k in kinds)}, found {_show(value)}"
        )

    def _suggest(self, key: str, names: list[str], path: str) -> str:
        """The section that has a setting of this very name, or the nearest one of this section."""
        elsewhere = [full for full in _all_settings(self.root) if full.rsplit(".", 1)[-1] == key]
        if elsewhere:
            return f"; did you mean {' or '.join(repr(full) for full in elsewhere)}?"
        near = difflib.get_close_matches(key, names, n=1)
        if near:
            return f"; did you mean {near[0]!r}?"
        return f"; {path or 'the top level'} has {', '.join(names)}"


def _all_settings(cls: type, prefix: str = "") -> Iterator[str]:
    """Dotted names of every setting under a dataclass."""
    for name, hint in typing.get_type_hints(cls).items():
        yield prefix + name
        if dataclasses.is_dataclass(hint) and isinstance(hint, type):
            yield from _all_settings(hint, f"{prefix}{name}.")


def _describe(hint: Any) -> str:
    """A type in words a person who writes YAML knows."""
    if typing.get_origin(hint) is Literal:
        return " or ".join(repr(item) for item in typing.get_args(hint))
    words = {
        int: "a whole number",
        float: "a number",
        str: "text",
        bool: "true or false",
        type(None): "null",
    }
    if hint in words:
        return words[hint]
    if dataclasses.is_dataclass(hint):
        return "a section"
    return "a list" if typing.get_origin(hint) is tuple else str(hint)


def _show(value: Any) -> str:
    """A value the way YAML writes it, as far as that helps."""
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else repr(value)
