"""Settings: conversion to dataclasses, YAML, overrides, and helpful errors."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest

from data_pipeline.common.config import (
    apply_overrides,
    dump_yaml,
    from_mapping,
    load_yaml,
    parse_yaml,
    to_mapping,
    to_yaml,
)
from data_pipeline.common.errors import ConfigError
from data_pipeline.common.problems import Problems, check_sections, section_problems


@dataclass(frozen=True, kw_only=True)
class Inner:
    lr: float = 1e-3
    steps: int = 10
    kind: Literal["cosine", "flat"] = "cosine"

    def problems(self) -> list[str]:
        found = Problems(self, "inner")
        found.at_least(1, "steps")
        found.above_zero("lr")
        return found.messages


@dataclass(frozen=True, kw_only=True)
class Named:
    name: str
    labels: str = ""


@dataclass(frozen=True, kw_only=True)
class Outer:
    title: str = "run"
    on: bool = False
    pair: tuple[float, float] = (0.0, 1.0)
    names: tuple[str, ...] = ()
    limit: int | None = None
    amount: float | int = 0
    inner: Inner = field(default_factory=Inner)
    sets: tuple[Named, ...] = ()
    weights: dict[str, float] = field(default_factory=dict)


def test_values_are_converted_to_field_types() -> None:
    config = from_mapping(
        Outer,
        {
            "title": "x",
            "on": True,
            "pair": [1, 2.5],
            "names": ["a"],
            "limit": 3,
            "inner": {"lr": 1, "steps": 7},
            "sets": [{"name": "s"}],
            "weights": {"a": 1},
        },
    )
    assert config == Outer(
        title="x",
        on=True,
        pair=(1.0, 2.5),
        names=("a",),
        limit=3,
        inner=Inner(lr=1.0, steps=7),
        sets=(Named(name="s"),),
        weights={"a": 1.0},
    )
    assert type(config.inner.lr) is float and type(config.pair[0]) is float


def test_union_keeps_the_exact_type() -> None:
    assert type(from_mapping(Outer, {"amount": 3}).amount) is int
    assert type(from_mapping(Outer, {"amount": 3.0}).amount) is float
    assert from_mapping(Outer, {"limit": None}).limit is None


def test_yaml_round_trip(tmp_path: Path) -> None:
    config = Outer(
        title="3e-4",
        names=("yes", "010", "null", "1:30", "", "é"),
        pair=(1e-8, 1e20),
        limit=0,
        sets=(Named(name="s", labels="l"),),
        inner=Inner(lr=3e-4),
    )
    path = tmp_path / "run.yaml"
    path.write_text(dump_yaml(config), encoding="utf-8")
    assert from_mapping(Outer, load_yaml(path)) == config
    assert from_mapping(Outer, to_mapping(config)) == config


@pytest.mark.parametrize(
    ("mapping", "key", "parts"),
    [
        ({"titel": "x"}, "titel", ["no such setting", "'title'"]),
        ({"inner": {"stepz": 1}}, "inner.stepz", ["no such setting", "'inner.steps'"]),
        ({"lr": 1.0}, "lr", ["no such setting", "'inner.lr'"]),
        ({"inner": {"zzzz": 1}}, "inner.zzzz", ["no such setting", "inner has lr, steps, kind"]),
        ({"on": 1}, "on", ["true or false", "found 1"]),
        ({"inner": {"steps": True}}, "inner.steps", ["integer", "found true"]),
        ({"inner": {"steps": 1.0}}, "inner.steps", ["integer", "found 1.0"]),
        ({"inner": {"lr": "fast"}}, "inner.lr", ["number", "found 'fast'"]),
        ({"inner": {"lr": float("nan")}}, "inner.lr", ["finite", "found nan"]),
        ({"inner": {"kind": "cosin"}}, "inner.kind", ["one of 'cosine', 'flat'", "found 'cosin'"]),
        ({"inner": {"kind": "cosin"}}, "inner.kind", ["did you mean 'cosine'?"]),
        ({"inner": 3}, "inner", ["section", "found 3"]),
        ({"inner": {"steps": 0}}, "inner.steps", ["is 0", "at least 1"]),
        ({"title": 3}, "title", ["string", "found 3", "quotes"]),
        ({"pair": [1]}, "pair", ["list of 2", "found 1 item: [1]"]),
        ({"names": "a"}, "names", ["list", "found 'a'", "write it as ['a']"]),
        ({"names": ["a", 1]}, "names[1]", ["string", "found 1", "quotes"]),
        ({"limit": "many"}, "limit", ["integer or null", "found 'many'"]),
        ({"sets": [{"labels": "x"}]}, "sets[0].name", ["required"]),
        ({"weights": {"a": "b"}}, "weights.a", ["number", "found 'b'"]),
    ],
)
def test_error_of_one_problem(mapping: dict[str, Any], key: str, parts: list[str]) -> None:
    with pytest.raises(ConfigError) as error:
        from_mapping(Outer, mapping)
    message = str(error.value)
    assert message.startswith(key) and "\n" not in message
    assert [part for part in parts if part not in message] == []


def test_all_problems_are_reported_together() -> None:
    with pytest.raises(ConfigError) as error:
        from_mapping(
            Outer, {"on": 1, "inner": {"lr": "x", "stepz": 2}, "nope": 1}, source="run.yaml"
        )
    text = str(error.value)
    assert text.startswith("run.yaml: 4 problems:\n")
    for message in ("on: expected", "inner.lr: expected", "inner.stepz: no such", "nope: no such"):
        assert message in text


def test_problems_of_sections_are_reported_with_unknown_keys() -> None:
    with pytest.raises(ConfigError) as error:
        from_mapping(Outer, {"titel": "x", "inner": {"steps": 0, "lr": 0}}, source="run.yaml")
    text = str(error.value)
    assert text.startswith("run.yaml: 3 problems:\n")
    for setting in ("titel", "inner.steps is 0", "inner.lr is 0"):
        assert setting in text


def test_sections_are_checked_on_demand() -> None:
    config = from_mapping(Outer, {"inner": {"steps": 0}}, check=False)
    assert section_problems(config) == Inner(steps=0).problems() != []
    with pytest.raises(ConfigError, match=r"run: inner\.steps is 0"):
        check_sections(Outer(), config, source="run")
    check_sections(Outer())


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("3e-4", 3e-4),
        ("1E5", 1e5),
        (".5", 0.5),
        ("-1.5e+3", -1500.0),
        ("1_000", 1000),
        ("0x10", 16),
        ("010", "010"),
        ("yes", "yes"),
        ("off", "off"),
        ("true", True),
        ("1:30", "1:30"),
        ("2024-01-01", "2024-01-01"),
        ("~", None),
        ("[1, 2.0]", [1, 2.0]),
        ("{a: 1}", {"a": 1}),
        ("", None),
    ],
)
def test_yaml_scalars(text: str, value: object) -> None:
    parsed = parse_yaml(text, source="test")
    assert parsed == value and type(parsed) is type(value)
    assert parse_yaml(to_yaml({"k": value}), source="test") == {"k": value}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb: 2\na: 3\n", "line 3: the key 'a'"),
        ("o:\n  a: 1\n  a: 2\n", "line 3: the key 'a'"),
        ("1: x\n", "the key 1 is not a string"),
        ("a: [1,\n", "invalid YAML"),
        ("- 1\n- 2\n", "found a list"),
        ("a: !!python/object/apply:os.system ['true']\n", "invalid YAML"),
        ("extends: 3\n", "`extends`"),
        ("extends: [a, 3]\n", "['a', 3]"),
        ("extends: nowhere.yaml\n", "extends 'nowhere.yaml'"),
    ],
)
def test_invalid_files(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as error:
        load_yaml(path)
    assert message in str(error.value) and str(path) in str(error.value)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot read .*absent\.yaml"):
        load_yaml(tmp_path / "absent.yaml")


def test_extends_path_and_name(tmp_path: Path) -> None:
    (tmp_path / "presets").mkdir()
    (tmp_path / "presets" / "small.yaml").write_text("inner: {lr: 1e-2, steps: 5}\nnames: [a, b]\n")
    (tmp_path / "base.yaml").write_text("extends: small\ninner: {steps: 6}\n")
    (tmp_path / "run.yaml").write_text("extends: base.yaml\nnames: [c]\ntitle: mine\n")

    def resolve(name: str) -> Path | None:
        path = tmp_path / "presets" / f"{name}.yaml"
        return path if path.is_file() else None

    assert load_yaml(tmp_path / "run.yaml", resolve) == {
        "inner": {"lr": 0.01, "steps": 6},
        "names": ["c"],
        "title": "mine",
    }


def test_extends_list_in_order(tmp_path: Path) -> None:
    (tmp_path / "one.yaml").write_text("a: 1\nb: {x: 1, y: 1}\n")
    (tmp_path / "two.yaml").write_text("b: {y: 2, z: 2}\nc: 2\n")
    (tmp_path / "run.yaml").write_text("extends: [one.yaml, two.yaml]\nc: 3\n")
    assert load_yaml(tmp_path / "run.yaml") == {"a": 1, "b": {"x": 1, "y": 2, "z": 2}, "c": 3}


def test_circular_extends(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("extends: b.yaml\n")
    (tmp_path / "b.yaml").write_text("extends: a.yaml\n")
    with pytest.raises(ConfigError, match=r"a\.yaml: `extends`.*b\.yaml"):
        load_yaml(tmp_path / "a.yaml")


def test_overrides_do_not_modify_the_mapping() -> None:
    mapping: dict[str, Any] = {"inner": {"lr": 1.0, "steps": 3}}
    merged = apply_overrides(
        mapping, ["inner.lr=3e-4", "title=a=b", "names=[x, y]", "on=true", "sets=", "inner.lr=2"]
    )
    assert merged == {
        "inner": {"lr": 2, "steps": 3},
        "title": "a=b",
        "names": ["x", "y"],
        "on": True,
        "sets": "",
    }
    assert mapping == {"inner": {"lr": 1.0, "steps": 3}}


def test_override_of_part_of_a_section() -> None:
    assert apply_overrides({"inner": {"lr": 1.0, "steps": 3}}, ["inner={steps: 4}"]) == {
        "inner": {"lr": 1.0, "steps": 4}
    }


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("inner.lr", "`=value` is missing; write inner.lr=VALUE"),
        ("=3", "write it as key=value"),
        ("a..b=3", "write it as key=value"),
        ("title.x=3", "title is 'run', not a section"),
        ("names=[a", "invalid YAML"),
    ],
)
def test_invalid_overrides(override: str, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        apply_overrides({"title": "run"}, [override])
    assert message in str(error.value) and override in str(error.value)
