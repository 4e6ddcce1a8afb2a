"""Settings: what is read, what is refused, and whether the refusal helps."""

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


@dataclass(frozen=True, kw_only=True)
class Inner:
    lr: float = 1e-3
    steps: int = 10
    kind: Literal["cosine", "flat"] = "cosine"

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ConfigError(f"inner.steps is {self.steps}, below 1")


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


def test_values_arrive_with_their_types() -> None:
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


def test_a_union_keeps_the_exact_type() -> None:
    assert type(from_mapping(Outer, {"amount": 3}).amount) is int
    assert type(from_mapping(Outer, {"amount": 3.0}).amount) is float
    assert from_mapping(Outer, {"limit": None}).limit is None


def test_write_and_read_back(tmp_path: Path) -> None:
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
    ("mapping", "message"),
    [
        ({"titel": "x"}, "titel: no such setting; did you mean 'title'?"),
        ({"inner": {"stepz": 1}}, "inner.stepz: no such setting; did you mean 'steps'?"),
        ({"lr": 1.0}, "lr: no such setting; did you mean 'inner.lr'?"),
        ({"inner": {"zzzz": 1}}, "inner.zzzz: no such setting; inner has lr, steps, kind"),
        ({"on": 1}, "on: expected true or false, found 1"),
        ({"inner": {"steps": True}}, "inner.steps: expected a whole number, found true"),
        ({"inner": {"steps": 1.0}}, "inner.steps: expected a whole number, found 1.0"),
        ({"inner": {"lr": "fast"}}, "inner.lr: expected a number, found 'fast'"),
        ({"inner": {"lr": float("nan")}}, "inner.lr: expected a finite number, found nan"),
        (
            {"inner": {"kind": "cosin"}},
            "inner.kind: expected 'cosine' or 'flat', found 'cosin'; did you mean 'cosine'?",
        ),
        ({"inner": 3}, "inner: expected a section with settings, found 3"),
        ({"inner": {"steps": 0}}, "inner.steps is 0, below 1"),
        ({"title": 3}, "title: expected text, found 3; put it in quotes"),
        ({"pair": [1]}, "pair: expected a list of 2, found 1 items: [1]"),
        ({"names": "a"}, "names: expected a list, found 'a'; write it as ['a']"),
        ({"names": ["a", 1]}, "names[1]: expected text, found 1; put it in quotes"),
        ({"limit": "many"}, "limit: expected a whole number or null, found 'many'"),
        ({"sets": [{"labels": "x"}]}, "sets[0].name: must be given, but is missing"),
        ({"weights": {"a": "b"}}, "weights.a: expected a number, found 'b'"),
    ],
)
def test_one_problem_is_one_clear_line(mapping: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        from_mapping(Outer, mapping)
    assert str(caught.value) == message


def test_all_problems_are_said_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        from_mapping(
            Outer, {"on": 1, "inner": {"lr": "x", "stepz": 2}, "nope": 1}, source="run.yaml"
        )
    text = str(caught.value)
    assert text.startswith("run.yaml: 4 problems:\n")
    for part in ("on: expected", "inner.lr: expected", "inner.stepz: no such", "nope: no such"):
        assert part in text


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
def test_scalars(text: str, value: object) -> None:
    found = parse_yaml(text, source="test")
    assert found == value and type(found) is type(value)
    assert parse_yaml(to_yaml({"k": value}), source="test") == {"k": value}


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("a: 1\nb: 2\na: 3\n", "line 3: the key 'a' is given twice"),
        ("o:\n  a: 1\n  a: 2\n", "line 3: the key 'a' is given twice"),
        ("1: x\n", "the key 1 is not text"),
        ("a: [1,\n", "not usable YAML"),
        ("- 1\n- 2\n", "expected a mapping of settings, found a list"),
        ("a: !!python/object/apply:os.system ['true']\n", "not usable YAML"),
        ("extends: 3\n", "`extends` must be a path or a name, or a list of them"),
        ("extends: [a, 3]\n", "or a list of them, found ['a', 3]"),
        ("extends: nowhere.yaml\n", "extends 'nowhere.yaml', but there is no file"),
    ],
)
def test_files_that_are_refused(tmp_path: Path, text: str, part: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_yaml(path)
    assert part in str(caught.value) and str(path) in str(caught.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot read the settings file .*absent\.yaml"):
        load_yaml(tmp_path / "absent.yaml")


def test_extends_a_path_and_a_name(tmp_path: Path) -> None:
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


def test_extends_a_list_from_left_to_right(tmp_path: Path) -> None:
    (tmp_path / "one.yaml").write_text("a: 1\nb: {x: 1, y: 1}\n")
    (tmp_path / "two.yaml").write_text("b: {y: 2, z: 2}\nc: 2\n")
    (tmp_path / "run.yaml").write_text("extends: [one.yaml, two.yaml]\nc: 3\n")
    assert load_yaml(tmp_path / "run.yaml") == {"a": 1, "b": {"x": 1, "y": 2, "z": 2}, "c": 3}


def test_extends_in_a_circle(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("extends: b.yaml\n")
    (tmp_path / "b.yaml").write_text("extends: a.yaml\n")
    with pytest.raises(ConfigError, match="round in a circle"):
        load_yaml(tmp_path / "a.yaml")


def test_overrides_win_and_leave_the_original_alone() -> None:
    mapping: dict[str, Any] = {"inner": {"lr": 1.0, "steps": 3}}
    found = apply_overrides(
        mapping, ["inner.lr=3e-4", "title=a=b", "names=[x, y]", "on=true", "sets=", "inner.lr=2"]
    )
    assert found == {
        "inner": {"lr": 2, "steps": 3},
        "title": "a=b",
        "names": ["x", "y"],
        "on": True,
        "sets": "",
    }
    assert mapping == {"inner": {"lr": 1.0, "steps": 3}}


def test_an_override_may_set_part_of_a_section() -> None:
    assert apply_overrides({"inner": {"lr": 1.0, "steps": 3}}, ["inner={steps: 4}"]) == {
        "inner": {"lr": 1.0, "steps": 4}
    }


@pytest.mark.parametrize(
    ("override", "part"),
    [
        ("lr", "write it as key=value"),
        ("=3", "write it as key=value"),
        ("a..b=3", "write it as key=value"),
        ("title.x=3", "title is 'run', not a section"),
        ("names=[a", "not usable YAML"),
    ],
)
def test_overrides_that_are_refused(override: str, part: str) -> None:
    with pytest.raises(ConfigError) as caught:
        apply_overrides({"title": "run"}, [override])
    assert part in str(caught.value) and override in str(caught.value)
