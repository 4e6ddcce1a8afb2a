"""Run files and presets: loading, extending, and errors."""

from __future__ import annotations

import argparse
import re
from pathlib import Path

import pytest

from data_pipeline.common.config import dump_yaml, load_yaml
from data_pipeline.common.errors import ConfigError
from pretrain.cli.common import add_run_arguments
from pretrain.config.presets import load_run, load_unchecked_run, preset_names, preset_path
from pretrain.config.schema import RunConfig
from pretrain.config.validate import problems

RUN_PRESETS = ("b16", "first", "h14", "l16", "quickstart", "s16", "tiny")
METHOD_PRESETS = ("deepseek", "limoe", "ours", "switch", "vl_moe", "vmoe")
"""Methods of routing and balancing, to be combined with a run preset."""


def test_preset_names() -> None:
    assert set(preset_names()) == {*RUN_PRESETS, *METHOD_PRESETS}


@pytest.mark.parametrize("name", RUN_PRESETS)
def test_run_preset_is_valid_and_survives_a_round_trip(name: str, tmp_path: Path) -> None:
    run = load_run(name)
    assert run.name == name
    assert problems(run, {"first": 1, "tiny": 2, "quickstart": 2}.get(name, 8)) == []
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
def test_documented_settings(name: str, lr: float, global_batch_size: int, top_k: int) -> None:
    run = load_run(name)
    assert (run.optim.lr, run.batch.global_batch_size) == (lr, global_batch_size)
    assert (run.moe.shared_experts, run.moe.top_k) == (1, top_k)
    assert (run.model.vocab_size, run.model.context_length) == (32000, 64)


def test_extending_a_preset_and_overriding(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("extends: tiny\nname: mine\noptim: {lr: 2e-3, weight_decay: 0.2}\n")
    run = load_run(path, ["optim.lr=3e-4", "data.train=[a, b]"])
    assert (run.name, run.optim.lr, run.optim.weight_decay) == ("mine", 3e-4, 0.2)
    assert run.data.train == ("a", "b")
    assert run.model == load_run("tiny").model


@pytest.mark.parametrize("method", METHOD_PRESETS)
@pytest.mark.parametrize("size", ["tiny", "b16"])
def test_combining_a_run_and_a_method(size: str, method: str, tmp_path: Path) -> None:
    assert set(load_yaml(preset_path(method) or method)) == {"moe", "balance"}
    path = tmp_path / "run.yaml"
    path.write_text(f"extends: [{size}, {method}]\nname: mine\n")
    run, method_run, base_run = load_run(path), load_run(method), load_run(size)
    assert problems(run, 2 if size == "tiny" else 8) == []

    assert (run.model, run.optim, run.name) == (base_run.model, base_run.optim, "mine")
    assert run.balance == method_run.balance
    for setting in ("routing", "score_func", "pools"):
        assert getattr(run.moe, setting) == getattr(method_run.moe, setting), setting
    assert run.moe.expert_width == base_run.moe.expert_width


def test_file_takes_precedence_over_preset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("tiny").write_text("name: local\n")
    assert load_run("tiny").name == "local"


def test_empty_file_gives_the_defaults(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("")
    assert load_run(tmp_path / "run.yaml") == RunConfig()


def test_unknown_preset() -> None:
    with pytest.raises(ConfigError, match=r"^b61: .*did you mean 'b16'\?"):
        load_run("b61")
    assert preset_path("../schema") is None


def test_unknown_setting_in_a_file(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("moe: {top_kk: 2}\n")
    with pytest.raises(ConfigError) as error:
        load_run(path)
    for part in (f"{path}: moe.top_kk", "'moe.top_k'"):
        assert part in str(error.value)


def test_unknown_setting_on_the_command_line() -> None:
    with pytest.raises(ConfigError, match=r"^preset tiny: lr: .*'optim\.lr'.*command line\)$"):
        load_run("tiny", ["lr=1"])


def test_errors_say_where_values_were_set(tmp_path: Path) -> None:
    """In the file that the error names first, in one that it extends, or on the command line."""
    base, path = tmp_path / "base.yaml", tmp_path / "run.yaml"
    base.write_text("extends: tiny\nseed: -1\noptim: {eps: 0, weight_decay: -1}\n")
    path.write_text("extends: base.yaml\nmoe: {top_k: 9}\noptim: {weight_decay: -2}\n")
    with pytest.raises(ConfigError) as error:
        load_run(path, ["optim.lr=0", "schedule.total_steps=20", "loss={contrastive_weight: -1}"])
    heading, *lines = str(error.value).splitlines()
    assert heading == f"{path}: 7 problems:"
    endings = {
        "seed is -1": f"at least 0 (set in {base})",
        "optim.eps": f"above 0 (set in {base})",
        "optim.weight_decay is -2": "at least 0",
        "moe.top_k": f"(set: moe.top_k in {path}, moe.num_experts in preset tiny)",
        "optim.lr": "above 0 (set on the command line)",
        "schedule.warmup_steps": "(set: schedule.warmup_steps in preset tiny, "
        "schedule.total_steps on the command line)",
        "loss.contrastive_weight": "at least 0 (set on the command line)",
    }
    for start, end in endings.items():
        (line,) = [line for line in lines if line.startswith(f"  - {start}")]
        assert line.endswith(end)


def test_defaults_and_suggestions_are_not_set_anywhere(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("optim: {lr: 1}\n")
    run, origins = load_unchecked_run(path, ["data.train=[a]", "batch.micro_batch_size=3"])
    assert run.batch.micro_batch_size == 3
    for message in (
        "optim.lr is 1.0",  # in the file itself
        "data.tokenizer is empty; set data.tokenizer=t, such as runs/data.train, 'data.train'",
    ):
        assert origins.annotate(message) == message
    both = "data.train and batch.micro_batch_size"
    assert origins.annotate(both) == f"{both} (set on the command line)"
    assert origins.annotate("batch.micro_batch_size (3) x 2, batch.global_batch_size").endswith(
        "(set: batch.micro_batch_size on the command line, batch.global_batch_size by default)"
    )


@pytest.mark.parametrize(
    ("entry", "suggestion"),
    [("{shards: t, wieght: 3}", "weight"), ("{shards: t, dropp: d}", "drop")],
)
def test_unknown_setting_of_a_source(entry: str, suggestion: str) -> None:
    with pytest.raises(ConfigError, match=rf"data\.train\[0\]\.\w+: .*{suggestion}'"):
        load_run("tiny", [f"data.train=[{entry}]"])


def test_the_help_of_commands_lists_the_run_presets() -> None:
    parser = argparse.ArgumentParser()
    add_run_arguments(parser)
    listed = re.search(r"preset:([^-]*)", " ".join(parser.format_help().split()))
    assert listed and set(RUN_PRESETS) <= set(re.split(r"[ ,]+", listed[1]))
