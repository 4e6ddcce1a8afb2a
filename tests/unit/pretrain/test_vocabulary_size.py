"""`model.vocab_size: 0` takes the size of the tokenizer."""

from __future__ import annotations

from pathlib import Path

import pytest

from data_pipeline.common.config import dump_yaml
from data_pipeline.common.errors import ConfigError
from pretrain.cli.main import main
from pretrain.config.presets import load_run, load_unchecked_run, with_vocab_size
from pretrain.config.validate import check_run, problems, vocabulary_problems
from pretrain.parity.case_runs import run_problems
from pretrain.parity.scale_down import MAX_VOCABULARY, shrink
from pretrain.plan.input_files import input_file_problems
from tests.support.shape_dataset import ShapeDataset

ZERO = "model.vocab_size=0"


def test_the_size_is_that_of_the_tokenizer(shapes: ShapeDataset, tmp_path: Path) -> None:
    data = [f"data.train=[{shapes.folder}]", f"data.tokenizer={shapes.tokenizer}"]
    run, origins = load_unchecked_run("tiny", [*data, ZERO])
    assert run.model.vocab_size == 0
    run = with_vocab_size(run)
    assert run.model.vocab_size == shapes.vocab_size
    check_run(run, 1, source=origins, more=input_file_problems(run))
    (tmp_path / "run.yaml").write_text(f"extends: tiny\ndata: {{tokenizer: {shapes.tokenizer}}}\n")
    assert load_run(tmp_path / "run.yaml", [ZERO]).model.vocab_size == shapes.vocab_size
    assert f"vocab_size: {shapes.vocab_size}" in dump_yaml(run)
    assert load_run("tiny", data).model.vocab_size == 32000


def test_a_missing_tokenizer_is_one_problem_of_training(shapes: ShapeDataset) -> None:
    data = [f"data.train=[{shapes.folder}]", "data.tokenizer=missing.model", ZERO]
    run, origins = load_unchecked_run("tiny", data)
    with pytest.raises(ConfigError) as error:
        check_run(run, 1, source=origins, more=input_file_problems(run))
    assert "problems:" not in str(error.value)
    assert "data.tokenizer: cannot read the tokenizer missing.model" in str(error.value)


@pytest.mark.parametrize(
    ("tokenizer", "part"),
    [("missing.model", "missing.model cannot be read"), ("", "that is empty")],
)
def test_commands_without_data_need_the_size(
    tokenizer: str, part: str, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["tiny", ZERO, f"data.tokenizer={tokenizer}"]
    assert main(["plan", *arguments, "--offline"]) == 2
    message = capsys.readouterr().err
    assert "model.vocab_size is 0" in message and part in message and "to a number" in message
    run = load_run(arguments[0], arguments[1:])
    assert problems(run, 1) == []  # the settings are valid
    assert run_problems(run, 1, 8) == vocabulary_problems(run) != []
    assert run_problems(shrink(run), 1, 8) == []
    assert shrink(run).model.vocab_size == MAX_VOCABULARY


@pytest.mark.parametrize("size", [-1, 1, 4])
def test_other_small_sizes_are_invalid(size: int) -> None:
    with pytest.raises(ConfigError, match=rf"model\.vocab_size is {size}; four ids are reserved"):
        load_run("tiny", [f"model.vocab_size={size}"])
