"""Settings in words: a dataclass as YAML with every default, each under the text that the code has
for it."""

from __future__ import annotations

import ast
import dataclasses
import difflib
import inspect
import json
import textwrap
import typing
from typing import Any

from data_pipeline.common.config import to_mapping
from data_pipeline.common.errors import ConfigError
from data_pipeline.common.yaml_file import to_yaml

_WIDTH = 110


def explain(cls: type, section: str = "") -> str:
    """The settings of a dataclass, or of a section in it, as commented YAML.

    Args:
        cls: The dataclass at the top.
        section: Dotted name of a section; of a list of sections, what one of its entries may have.

    Raises:
        ConfigError: There is no such section.
    """
    found, names = cls, list[str]()
    for name in filter(None, section.split(".")):
        hints = typing.get_type_hints(found)
        inner = _section_in(hints.get(name))
        if inner is None:
            known = [key for key, hint in hints.items() if _section_in(hint)]
            near = difflib.get_close_matches(name, known, n=1)
            where = ".".join([*names, name])
            raise ConfigError(
                f"{where}: no such section; "
                + (
                    f"did you mean {near[0]!r}?"
                    if near
                    else f"there are {', '.join(known)}"
                    if known
                    else "there are none below it"
                )
            )
        found, names = inner, [*names, name]
    return "\n".join(_lines(found, 0)) + "\n"


def _lines(cls: type, depth: int) -> list[str]:
    indent, hints, texts = "  " * depth, typing.get_type_hints(cls), field_texts(cls)
    lines: list[str] = []
    for field in dataclasses.fields(cls):
        hint = hints[field.name]
        if dataclasses.is_dataclass(hint) and isinstance(hint, type):
            said = texts.get(field.name) or (inspect.getdoc(hint) or "").splitlines()[0]
            heading = [f"{indent}# {line}" for line in textwrap.wrap(said, _WIDTH - len(indent))]
            lines += ["", *heading, f"{indent}{field.name}:", *_lines(hint, depth + 1)]
            continue
        comment = textwrap.wrap(texts.get(field.name, "") + _possible(hint), _WIDTH - len(indent))
        lines += [f"{indent}# {line}" for line in comment]
        if _has_default(field):
            lines += [indent + line for line in _setting(field.name, _default(field))]
        else:
            lines.append(f"{indent}# {field.name}: must be given")
    return lines


def _possible(hint: Any) -> str:
    """The values that a setting may have, where there are only some."""
    if typing.get_origin(hint) is not typing.Literal:
        return ""
    return f" One of {', '.join(map(str, typing.get_args(hint)))}."


def _setting(name: str, value: Any) -> list[str]:
    """`name: value` in YAML; short lists in one line."""
    if isinstance(value, list) and all(isinstance(item, int | float | str) for item in value):
        return [f"{name}: {json.dumps(value)}"]
    return to_yaml({name: value}).splitlines()


def field_texts(cls: type) -> dict[str, str]:
    """The string under each field of a dataclass, as one line."""
    body = ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0]
    assert isinstance(body, ast.ClassDef)
    texts: dict[str, str] = {}
    for statement, after in zip(body.body, body.body[1:], strict=False):
        if (
            isinstance(statement, ast.AnnAssign)
            and isinstance(statement.target, ast.Name)
            and isinstance(after, ast.Expr)
            and isinstance(after.value, ast.Constant)
        ):
            texts[statement.target.id] = " ".join(str(after.value.value).split())
    return texts


def _section_in(hint: Any) -> type | None:
    """The dataclass that a type is, or is made of."""
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        return hint
    return next(filter(None, map(_section_in, typing.get_args(hint))), None)


def _has_default(field: dataclasses.Field[Any]) -> bool:
    return (
        field.default is not dataclasses.MISSING or field.default_factory is not dataclasses.MISSING
    )


def _default(field: dataclasses.Field[Any]) -> Any:
    factory = field.default_factory
    value = field.default if factory is dataclasses.MISSING else factory()
    return (
        to_mapping(value)
        if dataclasses.is_dataclass(value) and not isinstance(value, type)
        else (list(value) if isinstance(value, tuple) else value)
    )
