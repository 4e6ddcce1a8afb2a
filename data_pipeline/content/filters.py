"""Filters on image size, caption length and JSON fields.

A condition on a JSON field is a string, an entry of `data.filters.require`:

    json:similarity >= 0.28
    json:clip.aesthetic > 5          a nested field
    json:"NSFW score" < 0.1          a quoted name
    json:license in ["cc0", "cc-by"]
    json:title exists

It consists of a field name, one of the operators `== != < <= > >= in exists`, and a JSON value.
Numbers are compared with numbers and strings with strings; values of other types support only `==`,
`!=` and `in`. A condition never matches a sample that lacks the field. A field that is null matches
only `== null` and `in` with a list that contains null. Conditions are parsed by a small parser;
nothing is evaluated as code.
"""

from __future__ import annotations

import json
import operator
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, NoReturn

from data_pipeline.common.errors import ConfigError, DataError
from data_pipeline.content.json_fields import MISSING, get_field
from data_pipeline.settings import FilterConfig

_COMPARISONS: dict[str, Callable[[Any, Any], bool]] = {
    "==": operator.eq,
    "!=": operator.ne,
    "<=": operator.le,
    ">=": operator.ge,
    "<": operator.lt,
    ">": operator.gt,
}
_ORDERINGS = frozenset(("<=", ">=", "<", ">"))
_NAME = re.compile(r"[A-Za-z0-9_-]+")
_OPERATOR = re.compile(r"==|!=|<=|>=|<|>|(?:in|exists)\b")
_SPACES = re.compile(r"[ \t]*")


class Condition(NamedTuple):
    """A parsed condition on a field of the `.json` member."""

    path: tuple[str, ...]
    """Field names, outermost first."""
    op: str
    """One of `== != < <= > >= in exists`."""
    value: Any
    """Right-hand side: a string, number, bool or None; a list of these for `in`."""

    @property
    def field(self) -> str:
        """The field's dotted name, for reports."""
        return ".".join(self.path)

    def matches(self, fields: dict[str, object]) -> bool:
        """Whether a sample with these JSON fields fulfills the condition."""
        actual = get_field(fields, self.path)
        if actual is MISSING:
            return False
        if self.op == "in":
            return any(_equal(actual, value) for value in self.value)
        if self.op == "exists":
            return actual is not None
        if actual is None and self.value is not None:
            return False
        if _kind(actual) != _kind(self.value):
            return self.op == "!="
        return _COMPARISONS[self.op](actual, self.value)


def parse_conditions(texts: Sequence[str]) -> tuple[Condition, ...]:
    """Parse the conditions of `data.filters.require`.

    Raises:
        ConfigError: A condition has a syntax error; the message gives its position.
    """
    return tuple(_Parser(text).parse() for text in texts)


def check_image_size(width: int, height: int, filters: FilterConfig) -> None:
    """Reject an image that is too small or too elongated.

    Raises:
        DataError: The image is rejected (slug `filter:min-side` or `filter:max-aspect`).
    """
    short, long = (width, height) if width < height else (height, width)
    if short < filters.min_side:
        raise DataError(
            f"image of {width} x {height} pixels; data.filters.min_side is {filters.min_side}",
            slug="filter:min-side",
        )
    if filters.max_aspect and long > filters.max_aspect * short:
        raise DataError(
            f"image of {width} x {height} pixels; data.filters.max_aspect is "
            f"{filters.max_aspect:g}",
            slug="filter:max-aspect",
        )


def caption_length_allowed(caption: str, filters: FilterConfig) -> bool:
    """Whether the length of a clean caption is within the limits."""
    max_chars = filters.max_caption_chars or len(caption)
    return filters.min_caption_chars <= len(caption) <= max_chars


def caption_length_error(caption: str, filters: FilterConfig) -> DataError:
    """The error for a caption that is too short or too long.

    Its slug is `filter:min-caption-chars` or `filter:max-caption-chars`.
    """
    bound = "min" if len(caption) < filters.min_caption_chars else "max"
    limit = getattr(filters, f"{bound}_caption_chars")
    return DataError(
        f"caption of {len(caption)} characters; data.filters.{bound}_caption_chars is {limit}",
        slug=f"filter:{bound}-caption-chars",
    )


def check_fields(fields: dict[str, object], conditions: Sequence[Condition]) -> None:
    """Reject a sample whose fields do not match every condition.

    Raises:
        DataError: A condition does not match (slug `filter:FIELD`).
    """
    for condition in conditions:
        if condition.matches(fields):
            continue
        actual = get_field(fields, condition.path)
        state = "is missing" if actual is MISSING else f"is {_abbreviate(actual)}"
        requirement = "exist"
        if condition.op != "exists":
            requirement = f"be {condition.op} {_abbreviate(condition.value)}"
        raise DataError(
            f"json:{condition.field} {state}, but must {requirement} (data.filters.require)",
            slug=f"filter:{condition.field}",
        )


class _Parser:
    """Recursive-descent parser of one condition."""

    def __init__(self, text: str) -> None:
        self._text, self._position = text, 0

    def parse(self) -> Condition:
        self._skip_spaces()
        if not self._text.startswith("json:", self._position):
            self._fail("expected 'json:' and the name of a field")
        self._position += len("json:")

        path = [self._parse_field_name()]
        while self._text.startswith(".", self._position):
            self._position += 1
            path.append(self._parse_field_name())
        self._skip_spaces()

        match = _OPERATOR.match(self._text, self._position)
        if match is None:
            self._fail("expected one of == != < <= > >= in exists")
        op = match[0]
        self._position = match.end()
        self._skip_spaces()

        value = None if op == "exists" else self._parse_value(op)
        self._skip_spaces()
        if self._position != len(self._text):
            self._fail(
                "expected the end of the condition; write each condition as a separate list entry"
            )
        return Condition(tuple(path), op, value)

    def _parse_field_name(self) -> str:
        if self._text.startswith('"', self._position):
            name = self._parse_json_value()
            assert isinstance(name, str)
            return name
        match = _NAME.match(self._text, self._position)
        if match is None:
            self._fail(
                "expected the name of a field: letters, digits, _ and -, or a string in double "
                "quotes"
            )
        self._position = match.end()
        return match[0]

    def _parse_value(self, op: str) -> Any:
        start = self._position
        value = self._parse_json_value()
        # The errors below give the position of the value.
        end, self._position = self._position, start
        if op == "in":
            if not isinstance(value, list) or not value:
                self._fail('expected a list of values after in, such as ["cc0", "cc-by"]')
            if any(isinstance(entry, (list, dict)) for entry in value):
                self._fail("list entries must be strings, numbers, true, false or null")
        elif isinstance(value, (list, dict)):
            self._fail("expected a string in double quotes, a number, true, false or null")
        elif op in _ORDERINGS and _kind(value) not in ("number", "string"):
            self._fail(f"expected a number or a string after {op}")
        self._position = end
        return value

    def _parse_json_value(self) -> Any:
        try:
            value, self._position = _DECODER.raw_decode(self._text, self._position)
        except (ValueError, RecursionError):
            self._fail(
                'expected a JSON value: a "string" in double quotes, 0.5, true, false or null'
            )
        return value

    def _skip_spaces(self) -> None:
        match = _SPACES.match(self._text, self._position)
        self._position = match.end() if match else self._position

    def _fail(self, problem: str) -> NoReturn:
        rest = self._text[self._position : self._position + 30]
        where = f"at {rest!r}" if rest else "at the end"
        raise ConfigError(
            f"data.filters.require: {self._text!r}, character {self._position + 1} ({where}): "
            f"{problem}"
        )


def _reject_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


_DECODER = json.JSONDecoder(parse_constant=_reject_constant)  # rejects NaN and Infinity


def _kind(value: object) -> str:
    """Type for comparisons: true differs from 1, but 1 equals 1.0."""
    if isinstance(value, bool):
        return "bool"
    if isinstance(value, (int, float)):
        return "number"
    return "string" if isinstance(value, str) else type(value).__name__


def _equal(left: object, right: object) -> bool:
    return _kind(left) == _kind(right) and left == right


def _abbreviate(value: object) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."
