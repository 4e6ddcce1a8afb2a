"""Paths in run files are found from any working directory."""

from __future__ import annotations

from pathlib import Path

import pytest

from pretrain.config.paths import absolute_paths
from pretrain.config.presets import load_run

RUN = """
extends: tiny
data:
  tokenizer: t.model
  train:
    - data/web
    - {shards: data/own/*.tar, drop: data/drop.json}
    - '@data/list.txt'
    - s3://bucket/pairs
    - /abs/shards
    - nowhere/shards
eval:
  sets: [{name: a, shards: data/web, labels: data/labels.txt}]
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A run file with data beside it."""
    folder = tmp_path / "project"
    for path in ("data/web", "data/own"):
        (folder / path).mkdir(parents=True)
    for path in ("t.model", "data/drop.json", "data/list.txt", "data/labels.txt"):
        (folder / path).write_text("")
    (folder / "run.yaml").write_text(RUN)
    return folder


@pytest.mark.parametrize("start", [".", "project", "project/data"])
def test_paths_are_relative_to_the_run_file(
    start: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path / start)
    run = load_run(folder / "run.yaml")
    assert run.data.tokenizer == f"{folder}/t.model"
    web, own, listed, *others = run.data.train
    assert (web, listed) == (f"{folder}/data/web", f"@{folder}/data/list.txt")
    assert not isinstance(own, str)
    assert (own.shards, own.drop) == (f"{folder}/data/own/*.tar", f"{folder}/data/drop.json")
    assert others == ["s3://bucket/pairs", "/abs/shards", "nowhere/shards"]
    assert run.eval.sets[0].labels == f"{folder}/data/labels.txt"


def test_the_file_that_contains_a_path_decides(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "other.yaml").write_text("extends: project/run.yaml\nname: other\n")
    monkeypatch.chdir(folder)
    assert load_run(tmp_path / "other.yaml").data.tokenizer == f"{folder}/t.model"
    # The command line, presets and what exists only in the working directory are relative to that.
    assert load_run(tmp_path / "other.yaml", ["data.tokenizer=x.model"]).data.tokenizer == "x.model"
    assert load_run("quickstart").data.tokenizer == "data/quickstart/tokenizer.model"
    (tmp_path / "third.yaml").write_text("extends: tiny\ndata: {tokenizer: t.model}\n")
    assert load_run(tmp_path / "third.yaml").data.tokenizer == "t.model"


def test_absolute_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    mapping = {
        "name": "x",
        "data": {"tokenizer": "a", "train": ["b", {"shards": "c/{0..3}.tar", "drop": ""}, 5]},
        "eval": {"sets": [{"name": "n", "shards": "gs://b/c", "labels": "d"}]},
    }
    expected = {
        "name": "x",
        "data": {
            "tokenizer": f"{tmp_path}/a",
            "train": [f"{tmp_path}/b", {"shards": f"{tmp_path}/c/{{0..3}}.tar", "drop": ""}, 5],
        },
        "eval": {"sets": [{"name": "n", "shards": "gs://b/c", "labels": f"{tmp_path}/d"}]},
    }
    assert absolute_paths(mapping) == expected
    assert absolute_paths(expected) == expected


def test_run_file_in_a_folder_with_brackets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "runs [2020] {a,b}"
    (folder / "data [1]").mkdir(parents=True)
    (folder / "run.yaml").write_text(
        "extends: tiny\n"
        "data:\n"
        "  tokenizer: missing.model\n"
        "  train: ['data [1]', 'data [1]/*.tar', 'missing/{0..3}.tar', '{0..3}.tar']\n"
    )
    monkeypatch.chdir(tmp_path)
    data = load_run(folder / "run.yaml").data
    assert data.tokenizer == "missing.model"
    assert data.train == (
        f"{folder}/data [1]",
        f"{folder}/data [1]/*.tar",
        "missing/{0..3}.tar",
        f"{folder}/{{0..3}}.tar",
    )
