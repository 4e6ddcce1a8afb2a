"""Run files and presets: each loads, and mistakes are told with their nearest right form."""

from __future__ import annotations

from pathlib import Path

import pytest

from data_pipeline.common.config import dump_yaml, load_yaml
from data_pipeline.common.errors import ConfigError
from pretrain.config.presets import load_run, preset_names, preset_path
from pretrain.config.schema import RunConfig
from pretrain.config.validate import problems

RUNS = ("b16", "h14", "l16", "quickstart", "s16", "tiny")
WAYS = ("deepseek", "limoe", "ours", "switch", "vl_moe", "vmoe")
"""Ways of routing and balancing, to be put after a size."""


def test_the_presets_are_there() -> None:
    assert set(preset_names()) == {*RUNS, *WAYS}


@pytest.mark.parametrize("name", RUNS)
def test_a_preset_loads_fits_its_ranks_and_survives_a_round_trip(name: str, tmp_path: Path) -> None:
    run = load_run(name)
    assert run.name == name
    assert problems(run, 2 if name in ("tiny", "quickstart") else 8) == []
    (tmp_path / "config.yaml").write_text(dump_yaml(run))
    assert load_run(tmp_path / "config.yaml") == run


@pytest.mark.parametrize(
    ("name", "lr", "global_batch_size", "top_k"),
    [
        ("tiny", 1e-3, 256, 2),
        ("s16", 1e-3, 8192, 3),
        ("b16", 1e-3, 16384, 3),
        ("l16", 5e-4, 32768, 3),
        ("h14", 4e-4, 32768, 7),
    ],
)
def test_the_numbers_of_the_table_of_sizes(
    name: str, lr: float, global_batch_size: int, top_k: int
) -> None:
    run = load_run(name)
    assert (run.optim.lr, run.batch.global_batch_size) == (lr, global_batch_size)
    assert (run.moe.shared_experts, run.moe.top_k) == (1, top_k)
    assert (run.model.vocab_size, run.model.context_length) == (32000, 64)


def test_a_run_file_extends_a_preset_and_the_command_line_wins(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("extends: tiny\nname: mine\noptim: {lr: 2e-3, weight_decay: 0.2}\n")
    run = load_run(path, ["optim.lr=3e-4", "data.train=[a, b]"])
    assert (run.name, run.optim.lr, run.optim.weight_decay) == ("mine", 3e-4, 0.2)
    assert run.data.train == ("a", "b")
    assert run.model == load_run("tiny").model


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("size", ["tiny", "b16"])
def test_a_way_of_balancing_goes_on_top_of_a_size(size: str, way: str, tmp_path: Path) -> None:
    assert set(load_yaml(preset_path(way) or way)) == {"moe", "balance"}
    path = tmp_path / "run.yaml"
    path.write_text(f"extends: [{size}, {way}]\nname: mine\n")
    run, alone, base = load_run(path), load_run(way), load_run(size)
    assert problems(run, 2 if size == "tiny" else 8) == []
    assert (run.model, run.optim, run.name) == (base.model, base.optim, "mine")
    assert run.balance == alone.balance
    assert (run.moe.routing, run.moe.score_func, run.moe.pools) == (
        alone.moe.routing,
        alone.moe.score_func,
        alone.moe.pools,
    )
    assert run.moe.expert_width == base.moe.expert_width


def test_a_file_wins_over_a_preset_of_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("tiny").write_text("name: local\n")
    assert load_run("tiny").name == "local"


def test_an_empty_file_is_the_defaults(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("")
    assert load_run(tmp_path / "run.yaml") == RunConfig()


def test_an_unknown_preset_names_the_nearest() -> None:
    with pytest.raises(
        ConfigError, match=r"b61: no such file, and no preset either .*did you mean 'b16'\?"
    ):
        load_run("b61")
    assert preset_path("../schema") is None


def test_an_unknown_key_names_the_nearest_and_the_file(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("moe: {experts_per_tokn: 2}\n")
    with pytest.raises(ConfigError) as caught:
        load_run(path)
    assert (
        str(caught.value) == f"{path}: moe.experts_per_tokn: no such setting; did you mean 'top_k'?"
    )


def test_an_unknown_key_of_the_command_line_is_told_too() -> None:
    with pytest.raises(
        ConfigError, match=r"command line: lr: no such setting; did you mean 'optim.lr'\?"
    ):
        load_run("tiny", ["lr=1"])
