"""Reads YAML files into plain mappings, strictly.

Three differences from PyYAML's safe loader avoid common mistakes in settings: a duplicate key is
an error; `3e-4` is a number (YAML 1.1 reads a string); and `yes`, `no`, `on`, `off`, dates and
`1:30` stay strings. A file can inherit from another one with `extends: OTHER`, a path relative to
the file or a name that the caller's `resolve` knows; in a list, `extends: [FIRST, SECOND]`, later
files override earlier ones.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any, ClassVar

import yaml

from data_pipeline.common.errors import ConfigError

Resolve = Callable[[str], Path | None]
"""Returns the file for a name in `extends:`; None if the name is unknown."""

_FLOAT = re.compile(
    r"[-+]?(?:\.[0-9]+|[0-9]+\.[0-9]*)(?:[eE][-+]?[0-9]+)?$"
    r"|[-+]?[0-9]+[eE][-+]?[0-9]+$"
    r"|[-+]?\.(?:inf|Inf|INF)$|\.(?:nan|NaN|NAN)$"
)
_INTEGER = re.compile(r"[-+]?(?:0|[1-9][0-9_]*)$|0x[0-9a-fA-F]+$")


class _Loader(yaml.SafeLoader):
    """The safe loader with scalars as in YAML 1.2."""

    # Overrides the table of PyYAML, which would be inherited.
    yaml_implicit_resolvers: ClassVar[  # type: ignore[misc]
        dict[str, list[tuple[str, re.Pattern[str]]]]
    ] = {}


class _Dumper(yaml.SafeDumper):
    """Quotes strings that `_Loader` would read as numbers."""


for _tag, _pattern, _first in (
    ("bool", re.compile(r"true$|True$|TRUE$|false$|False$|FALSE$"), "tTfF"),
    ("int", _INTEGER, "-+0123456789"),
    ("float", _FLOAT, "-+0123456789."),
    ("null", re.compile(r"~$|null$|Null$|NULL$|$"), ("~", "n", "N", "")),
    ("merge", re.compile(r"<<$"), "<"),
):
    # PyYAML keys its table by a scalar's first character; "" stands for an empty scalar.
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", _pattern, list(_first))
_Dumper.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+0123456789."))


def _construct_mapping(loader: _Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    """A mapping in which every key is a string and occurs once."""
    seen: set[str] = set()
    for key_node, _ in node.value:
        line = f"line {key_node.start_mark.line + 1}"
        if key_node.tag == "tag:yaml.org,2002:merge":
            continue
        key = loader.construct_object(key_node)
        if not isinstance(key, str):
            raise yaml.constructor.ConstructorError(
                problem=f"{line}: the key {key!r} is not a string; put it in quotes"
            )
        if key in seen:
            raise yaml.constructor.ConstructorError(
                problem=f"{line}: the key {key!r} is given twice; keep one of them"
            )
        seen.add(key)
    loader.flatten_mapping(node)
    return {
        loader.construct_object(k): loader.construct_object(v, deep=True) for k, v in node.value
    }


_Loader.add_constructor("tag:yaml.org,2002:map", _construct_mapping)


def parse_yaml(text: str, *, source: str) -> Any:
    """Parse a YAML document.

    Args:
        text: One YAML document.
        source: Where it comes from, for error messages.

    Raises:
        ConfigError: The text is not valid YAML, or a key occurs twice.
    """
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        position = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        problem = getattr(error, "problem", error)
        raise ConfigError(f"{source}{position}: invalid YAML: {problem}") from error


def to_yaml(mapping: dict[str, Any]) -> str:
    """YAML that `parse_yaml` reads back to an equal mapping; keys keep their order."""
    return yaml.dump(mapping, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)


def load_yaml(path: str | Path, resolve: Resolve | None = None) -> dict[str, Any]:
    """Read the mapping in a YAML file, merged over the files that it extends.

    For arguments and errors see `load_layers`.

    Returns:
        A new mapping without the key `extends`.
    """
    return merge_layers(load_layers(path, resolve))


def load_layers(
    path: str | Path, resolve: Resolve | None = None
) -> list[tuple[Path, dict[str, Any]]]:
    """Read a YAML file and the files that it extends.

    Args:
        path: A local file.
        resolve: Returns the path for a name in `extends:` that is not a file, or None if the name
            is unknown.

    Returns:
        The files with their mappings, without the key `extends`; later ones override earlier ones.

    Raises:
        ConfigError: A file is missing, is not YAML, is not a mapping, or extends itself.
    """
    return list(_layers(Path(path), resolve, ()))


def merge_layers(layers: Iterable[tuple[Path, dict[str, Any]]]) -> dict[str, Any]:
    """One mapping of all files of `load_layers`."""
    merged: dict[str, Any] = {}
    for _, mapping in layers:
        merged = merge(merged, mapping)
    return merged


def _layers(
    path: Path, resolve: Resolve | None, chain: tuple[Path, ...]
) -> Iterator[tuple[Path, dict[str, Any]]]:
    resolved = path.resolve()
    if resolved in chain:
        cycle = " -> ".join(str(p) for p in (*chain, resolved))
        raise ConfigError(f"{path}: `extends` is circular: {cycle}")

    mapping = _read_mapping(path)
    names = mapping.pop("extends", [])
    names = names if isinstance(names, list) else [names]
    if not all(isinstance(name, str) for name in names):
        raise ConfigError(
            f"{path}: `extends` must be a path or a name, or a list of them, found {names!r}"
        )
    for name in names:
        yield from _layers(_base_path(path, name, resolve), resolve, (*chain, resolved))
    yield path, mapping


def _read_mapping(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read the settings file {path}: {error}") from error
    mapping = parse_yaml(text, source=str(path))
    if mapping is None:
        mapping = {}
    if not isinstance(mapping, dict):
        found = "a list" if isinstance(mapping, list) else repr(mapping)
        raise ConfigError(f"{path}: expected a mapping of settings, found {found}")
    return mapping


def _base_path(path: Path, name: str, resolve: Resolve | None) -> Path:
    """The file that `extends: name` in `path` refers to."""
    relative = path.parent / name
    if relative.is_file():
        return relative
    preset = resolve(name) if resolve else None
    if preset is None:
        raise ConfigError(
            f"{path}: extends {name!r}, but there is no file {relative}"
            + (" and no preset of that name" if resolve else "")
        )
    return preset


def merge(base: dict[str, Any], top: dict[str, Any]) -> dict[str, Any]:
    """`top` merged over `base`: mappings are merged key by key, other values are replaced."""
    merged = deepcopy(base)
    for key, value in top.items():
        merged[key] = _merged(merged.get(key), value)
    return merged


def _merged(old: Any, value: Any) -> Any:
    both = isinstance(old, dict) and isinstance(value, dict)
    return merge(old, value) if both else deepcopy(value)


def apply_overrides(mapping: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """A copy of `mapping` with overrides of the form `optim.lr=3e-4` applied.

    Args:
        mapping: Settings as read from YAML; not modified.
        overrides: `dotted.key=value`, the value in YAML (`[1, 2]` is a list, nothing after `=` is
            an empty string). Later ones win. `from_mapping` checks whether the keys exist.

    Raises:
        ConfigError: An override has no `=value`, an empty key, a value that is not YAML, or a
            prefix that is not a section.
    """
    result = deepcopy(mapping)
    for override in overrides:
        key, equals, text = override.partition("=")
        parts = key.strip().split(".")
        if not all(parts):
            raise ConfigError(
                f"{override!r} is not a setting; write it as key=value, such as optim.lr=3e-4"
            )
        if not equals:
            raise ConfigError(
                f"{override!r} has no value: `=value` is missing; write {key}=VALUE, such as "
                f"optim.lr=3e-4"
            )
        value = parse_yaml(text, source=f"the value of {override!r}") if text.strip() else ""
        section = result
        for depth, part in enumerate(parts[:-1], start=1):
            section = section.setdefault(part, {})
            if not isinstance(section, dict):
                raise ConfigError(
                    f"{override!r}: {'.'.join(parts[:depth])} is {section!r}, not a section"
                )
        section[parts[-1]] = _merged(section.get(parts[-1]), value)
    return result
