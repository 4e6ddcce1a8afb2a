"""Samples that are left out on purpose: by the picture's size, the caption's length, or JSON
fields.

A condition on a field is one line of text:

    json:similarity >= 0.28
    json:clip.aesthetic > 5          a field of a field
    json:"NSFW score" < 0.1          a name that is no single word
    json:license in ["cc0", "cc-by"]
    json:title exists

A name, one of `== != < <= > >= in exists`, and a value as JSON writes it. Numbers compare with
numbers, text with text, anything else is only equal or not; a sample without the field (or with
null in it, unless that is what is asked for) never holds a condition. Conditions are read by hand:
nothing in them is run.
"""

from __future__ import annotations

import json
import operator
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, NoReturn

from data_pipeline.common.errors import ConfigError, DataError
from data_pipeline.content.fields import MISSING, look_up
from data_pipeline.settings import FilterConfig

_OPERATORS: dict[str, Callable[[Any, Any], bool]] = {
    "==": operator.eq,
    "!=": operator.ne,
    "<=": operator.le,
    ">=": operator.ge,
    "<": operator.lt,
    ">": operator.gt,
}
_ORDERING = frozenset(("<=", ">=", "<", ">"))
_WORD = re.compile(r"[A-Za-z0-9_-]+")
_SIGN = re.compile(r"==|!=|<=|>=|<|>|(?:in|exists)\b")
_BLANKS = re.compile(r"[ \t]*")


class Condition(NamedTuple):
    """One requirement on a field of the `.json` member, ready to be asked."""

    path: tuple[str, ...]
    """Names of the fields from the outside in."""
    sign: str
    """`== != < <= > >= in exists`."""
    value: Any
    """What the field is compared with: text, a number, true, false, null, or a list of these for
    `in`."""

    @property
    def field(self) -> str:
        """The field as reports name it."""
        return ".".join(self.path)

    def holds(self, fields: dict[str, object]) -> bool:
        """Whether a sample with these JSON fields fulfils it."""
        found = look_up(fields, self.path)
        if found is MISSING:
            return False
        if self.sign == "in":
            return any(_kind(found) == _kind(value) and found == value for value in self.value)
        if self.sign == "exists":
            return found is not None
        if found is None and self.value is not None:
            return False
        if _kind(found) != _kind(self.value):
            return self.sign == "!="
        return _OPERATORS[self.sign](found, self.value)


def compile_conditions(texts: Sequence[str]) -> tuple[Condition, ...]:
    """Conditions as they stand in `data.filters.require`, made ready.

    Raises:
        ConfigError: One is not a condition; the message shows where.
    """
    return tuple(_Parser(text).condition() for text in texts)


def check_size(width: int, height: int, filters: FilterConfig) -> None:
    """Leave out a picture that is too small or too elongated.

    Raises:
        DataError: It is (slug `filter:min-side`, `filter:max-aspect`).
    """
    short, long = (width, height) if width < height else (height, width)
    if short < filters.min_side:
        raise DataError(
            f"{width} x {height} pixels, less than data.filters.min_side ({filters.min_side})",
            slug="filter:min-side",
        )
    if filters.max_aspect and long > filters.max_aspect * short:
        raise DataError(
            f"{width} x {height} pixels, longer than data.filters.max_aspect ({filters.max_aspect:g}) allows",
            slug="filter:max-aspect",
        )


def fits(caption: str, filters: FilterConfig) -> bool:
    """Whether a clean caption is of an allowed length."""
    longest = filters.max_caption_chars or len(caption)
    return filters.min_caption_chars <= len(caption) <= longest


def unfit_caption(caption: str, filters: FilterConfig) -> DataError:
    """The reason why a caption does not fit (slug `filter:min-caption-chars`,
    `filter:max-caption-chars`)."""
    which = "min" if len(caption) < filters.min_caption_chars else "max"
    limit = getattr(filters, f"{which}_caption_chars")
    return DataError(
        f"a caption of {len(caption)} characters, but data.filters.{which}_caption_chars is {limit}",
        slug=f"filter:{which}-caption-chars",
    )


def check_fields(fields: dict[str, object], conditions: Sequence[Condition]) -> None:
    """Leave out a sample whose fields do not hold every condition.

    Raises:
        DataError: One does not hold (slug `filter:` and its field).
    """
    for condition in conditions:
        if not condition.holds(fields):
            found = look_up(fields, condition.path)
            what = "is not there" if found is MISSING else f"is {_short(found)}"
            raise DataError(
                f"json:{condition.field} {what}, but data.filters.require asks for "
                f"{condition.sign} {'' if condition.sign == 'exists' else _short(condition.value)}".rstrip(),
                slug=f"filter:{condition.field}",
            )


class _Parser:
    """Reads one condition from left to right."""

    def __init__(self, text: str) -> None:
        self._text, self._at = text, 0

    def condition(self) -> Condition:
        self._skip_blanks()
        if not self._text.startswith("json:", self._at):
            self._fail("expected 'json:' and the name of a field")
        self._at += len("json:")
        path = [self._name()]
        while self._text.startswith(".", self._at):
            self._at += 1
            path.append(self._name())
        self._skip_blanks()
        sign = _SIGN.match(self._text, self._at)
        if sign is None:
            self._fail("expected one of == != < <= > >= in exists")
        self._at = sign.end()
        self._skip_blanks()
        value = None if sign[0] == "exists" else self._value(sign[0])
        self._skip_blanks()
        if self._at != len(self._text):
            self._fail(
                "the condition should end here; write each condition as one entry of the list"
            )
        return Condition(tuple(path), sign[0], value)

    def _name(self) -> str:
        if self._text.startswith('"', self._at):
            name = self._json()
            assert isinstance(name, str)
            return name
        word = _WORD.match(self._text, self._at)
        if word is None:
            self._fail(
                "expected the name of a field: letters, digits, _ and -, or any text in double quotes"
            )
        self._at = word.end()
        return word[0]

    def _value(self, sign: str) -> Any:
        start = self._at
        value = self._json()
        self._at, end = start, self._at  # errors below point at the value
        if sign == "in":
            if not isinstance(value, list) or not value:
                self._fail('expected a list of values after in, such as ["cc0", "cc-by"]')
            if any(isinstance(entry, (list, dict)) for entry in value):
                self._fail("the values of a list are text, numbers, true, false or null")
        elif isinstance(value, (list, dict)):
            self._fail("expected text in double quotes, a number, true, false or null")
        elif sign in _ORDERING and _kind(value) not in ("number", "text"):
            self._fail(f"expected a number or text after {sign}")
        self._at = end
        return value

    def _json(self) -> Any:
        try:
            value, self._at = _DECODER.raw_decode(self._text, self._at)
        except (ValueError, RecursionError):
            self._fail(
                'expected a value as JSON writes it: "text" in double quotes, 0.5, true, false or null'
            )
        return value

    def _skip_blanks(self) -> None:
        blanks = _BLANKS.match(self._text, self._at)
        self._at = blanks.end() if blanks else self._at

    def _fail(self, what: str) -> NoReturn:
        rest = self._text[self._at : self._at + 30]
        raise ConfigError(
            f"data.filters.require: {self._text!r}, character {self._at + 1} "
            f"({'at ' + repr(rest) if rest else 'the end'}): {what}"
        )


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON")


_DECODER = json.JSONDecoder(parse_constant=_no_constant)


def _kind(value: object) -> str:
    """Values of different kinds are never equal and have no order: 1 is not true, "1" is not 1."""
    if isinstance(value, bool):
        return "truth"
    if isinstance(value, (int, float)):
        return "number"
    return "text" if isinstance(value, str) else type(value).__name__


def _short(value: object) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."
