"""Files that training needs: all that are missing are in the same error as invalid settings."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from pretrain.cli.main import main
from pretrain.config.presets import load_run, load_unchecked_run, with_vocab_size
from pretrain.plan.input_files import input_file_problems, with_saved_tokenizer
from tests.support.small_shards import make_shards, make_tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`indexed` has shards with a manifest, `bare` without, `empty` none; a tokenizer."""
    path = tmp_path_factory.mktemp("files")
    make_shards(path / "indexed", count=7)
    make_shards(path / "bare", count=7)
    (path / "bare" / "manifest.json").unlink()
    (path / "empty").mkdir()
    (path / "list.txt").write_text(f"{path}/bare\n")
    make_shards(path / "b[1]{a}" / "x", count=7)
    make_tokenizer(path)
    return path


def find_problems(folder: Path, *overrides: str) -> list[str]:
    tokenizer = [f"data.tokenizer={folder}/tokenizer.model", "model.vocab_size=300"]
    return input_file_problems(load_run("tiny", [*tokenizer, *overrides]))


@pytest.mark.parametrize(
    "shards",
    [
        "{}/indexed",
        "{}/indexed/manifest.json",
        "file:{}/bare",
        "{}/bare/*.tar",
        "{}/b[1]{{a}}/x",
        "{}/b[1]{{a}}/x/{{shard-000000,none}}.tar",
        "@{}/list.txt",
        "s3://bucket/not-checked-here",
        "http://localhost/manifest.json",
    ],
)
def test_shards_exist(folder: Path, shards: str) -> None:
    assert find_problems(folder, f"data.train=['{shards.format(folder)}']") == []


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("data.train=['{}/no']", ["data.train: ", "/no: No such file"]),
        ("data.train=['{}/empty']", ["data.train: no shards at", "/empty"]),
        ("data.train=['{}/no/*.tar']", ["data.train: no shards at", "/no/*.tar"]),
        ("data.train=['{}/no.tar']", ["data.train: the shard", "no.tar does not exist"]),
        ("data.train=['{}/no.json']", ["data.train: no manifest", "no.json", "vlmoe data index"]),
        ("data.train=['@{}/no.txt']", ["data.train: cannot read", "no.txt"]),
        (
            "data.train=[{{shards: '{}/indexed', drop: no.json}}]",
            ["data.train: the drop-list no.json does not exist"],
        ),
        ("data.tokenizer=no.model", ["data.tokenizer: ", "no.model", "vlmoe tokenizer train"]),
        ("model.vocab_size=999", ["model.vocab_size is 999", "model.vocab_size=300"]),
        (
            "eval.sets=[{{name: a, shards: '{}/empty'}}]",
            ["eval.sets: no shards at", "/empty"],
        ),
        ("parallel.deepspeed=zero9", ["parallel.deepspeed is 'zero9'"]),
    ],
)
def test_missing_files(folder: Path, override: str, parts: list[str]) -> None:
    (problem,) = find_problems(folder, override.format(folder))
    for part in parts:
        assert part in problem


def test_tokenizer_of_the_run_folder(folder: Path, tmp_path: Path) -> None:
    def used(*overrides: str) -> str:
        return with_saved_tokenizer(load_run("tiny", list(overrides)), tmp_path).data.tokenizer

    given = str(folder / "tokenizer.model")
    assert used("data.tokenizer=gone.model") == "gone.model" and used() == ""
    saved = shutil.copy(given, tmp_path / "tokenizer.model")
    assert used("data.tokenizer=gone.model") == "gone.model"  # not trained with it
    (tmp_path / "checkpoints" / "step-00000001").mkdir(parents=True)
    assert used("data.tokenizer=gone.model") == used() == str(saved)
    assert used(f"data.tokenizer={given}") == given
    run = load_unchecked_run("tiny", ["data.tokenizer=gone.model", "model.vocab_size=0"])[0]
    resolved = with_vocab_size(with_saved_tokenizer(run, tmp_path))
    assert resolved.model.vocab_size == 300 and input_file_problems(resolved) == []
    assert used("data.tokenizer=s3://bucket/t.model") == "s3://bucket/t.model"


def test_files_that_training_does_not_read(folder: Path) -> None:
    assert find_problems(folder, "parallel.engine=plain", "parallel.deepspeed=zero9") == []
    no_figures = "log.captions_every_steps=0"
    assert find_problems(folder, "eval.sets=[{name: a, shards: no}]", no_figures) == []


def test_train_reports_settings_and_files_in_one_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(f"extends: tiny\ndata: {{train: [{tmp_path}/no]}}\noptim: {{lr: 0}}\n")
    out = tmp_path / "run"
    settings = ["data.tokenizer=no.model", "batch.global_batch_size=7"]
    assert main(["train", str(path), "--out", str(out), *settings]) == 2
    heading, *problems = capsys.readouterr().err.splitlines()
    assert heading == f"error: {path}: 4 problems:"
    for problem, (start, is_in_file) in zip(
        problems,
        [
            ("optim.lr is 0", True),
            ("batch.global_batch_size is 7", False),
            ("data.train: cannot read", True),
            ("data.tokenizer: cannot read the tokenizer no.model", False),
        ],
        strict=True,
    ):
        assert problem.startswith(f"  - {start}")
        assert ("on the command line" in problem) != is_in_file
    assert not out.exists()
