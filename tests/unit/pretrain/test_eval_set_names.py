"""Evaluation sets that are given as addresses only, and their names."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import strategies as st

from data_pipeline.common.config import dump_yaml
from data_pipeline.common.errors import ConfigError
from pretrain.config.evaluation import set_names
from pretrain.config.paths import normalized_address
from pretrain.config.presets import load_run
from pretrain.config.schema import EvalSet
from tests.support.properties import check_property, num_examples


@pytest.mark.parametrize(
    ("address", "name"),
    [
        ("data/val", "val"),
        ("data/val/", "val"),
        ("./val/manifest.json", "val"),
        ("s3://bucket/coco.2017", "coco.2017"),
        ("s3://bucket", "bucket"),
        ("https://host/val/manifest.json?signature=secret", "val"),
        ("data/val.tar", "val"),
        ("data/val-{000..007}.tar", "val"),
        ("data/val/{000..007}.tar", "val"),
        ("s3://bucket/val/*.tar", "val"),
        ("data/../val", "val"),
        ("data/my-manifest.json", "my-manifest"),
        ("@lists/val.txt", "val"),
        ("data/my own set", "my-own-set"),
        ("data/日本", "set"),
        ("/", "set"),
        ("", "set"),
    ],
)
def test_the_name_is_the_last_component(address: str, name: str) -> None:
    assert set_names([address]) == [name]


def test_names_of_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine").mkdir()
    monkeypatch.chdir(tmp_path / "mine")
    assert set_names(["."]) == ["mine"]
    # Where it is not needed, it does not change a name.
    addresses = ["a", "b", "x/b", "y/c", "z/c"]
    assert set_names(addresses)[3:] == ["y-c", "z-c"]
    assert set_names(addresses)[:3] == ["a", "mine-b", "x-b"]
    assert set_names(["x/{0..9}.tar", "y/x/{0..9}.tar"]) == ["x", "y-x"]


def test_equal_components_are_distinguished_by_parent_folders() -> None:
    assert set_names(["x/a", "y/a", "b"]) == ["x-a", "y-a", "b"]
    assert set_names(["s3://one/x/a", "s3://two/x/a"]) == ["one-x-a", "two-x-a"]
    assert set_names(["y/a"], taken=["a"]) == ["y-a"]
    assert set_names(["/a b", "/a-b", "/a?b"]) == ["a-b", "a-b-2", "a-b-3"]
    assert set_names(["/a", "/a"]) == ["a", "a"]
    assert set_names(["s", "s/", "s/manifest.json", "./s", "t/../s", "b"]) == [*"sssss", "b"]


@num_examples
def test_names_are_valid_and_distinct(examples: int) -> None:
    def check(addresses: list[str], taken: set[str]) -> None:
        names = set_names(addresses, taken)
        assert len({*names, *taken}) == len(names) + len(taken)
        for name in names:
            assert EvalSet(name=name, shards="x").problems() == []

    texts = st.text("ab /.-{:?@é", max_size=8)
    check_property(
        check,
        examples,
        st.lists(texts, unique_by=normalized_address),
        st.sets(st.text("ab-", min_size=1)),
    )


def test_an_address_is_the_same_as_a_section(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    path = tmp_path / "run.yaml"
    path.write_text("eval: {sets: [data, 's3://b/val', {name: own, shards: x, labels: l}]}\n")
    run = load_run(path)
    assert run.eval.sets == (
        EvalSet(name="data", shards=str(tmp_path / "data")),
        EvalSet(name="val", shards="s3://b/val"),
        EvalSet(name="own", shards="x", labels="l"),
    )
    (tmp_path / "config.yaml").write_text(dump_yaml(run))
    assert load_run(tmp_path / "config.yaml") == run
    by_override = load_run("tiny", ["eval.sets=[s3://b/val]"])
    assert by_override.eval.sets == (EvalSet(name="val", shards="s3://b/val"),)


@pytest.mark.parametrize(
    ("value", "parts"),
    [
        ("x", ["eval.sets: expected a list", "['x']"]),
        ("[x, 3]", ["eval.sets[1]: expected a section", "found 3"]),
        ("[x, [y]]", ["eval.sets[1]: expected a section"]),
        ("[x, {shards: y}]", ["eval.sets[1].name: is required"]),
        ("[x, {name: 3, shards: y}]", ["eval.sets[1].name: expected a string"]),
        ("[x, {name: y, shard: y}]", ["eval.sets[1].shard: no such setting", "shards"]),
        ("[x, '']", ["eval.sets 'set' has no shards"]),
        ("[x/a, x/a]", ["eval.sets has 2 sets named 'a'"]),
        ("[x/a, x/a/manifest.json]", ["eval.sets has 2 sets named 'a'"]),
        ("['s3://user:secret@b/val']", ["eval.sets 'val'", "s3://b/val", "password"]),
    ],
)
def test_errors_name_the_entry(value: str, parts: list[str]) -> None:
    with pytest.raises(ConfigError) as error:
        load_run("tiny", [f"eval.sets={value}"])
    for part in [*parts, "on the command line"]:
        assert part in str(error.value)
    assert "secret" not in str(error.value)
