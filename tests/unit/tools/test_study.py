"""Studies: what is done is not done again, numbers of a run by hand, and two real runs of two
steps."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from data_pipeline.common.errors import ConfigError
from pretrain.config.experts import BalanceConfig, MoEConfig
from pretrain.config.presets import load_run
from pretrain.config.schema import ModelConfig, RunConfig
from pretrain.config.validate import problems
from pretrain.train.loop import sees_routing
from pretrain.train.run import train_command
from tests.support.shards import Shapes, make_shapes
from tools import balancing_study, compare_dense_baseline
from tools.balancing_study import columns, main, make_trials, report
from tools.compare_dense_baseline import comparison
from tools.compare_dense_baseline import make_trials as twin_trials
from tools.study import numbers, tables
from tools.study.methods import METHODS, TOPOLOGY
from tools.study.trials import Trial, load_trial, run_trials

RUN = RunConfig(model=ModelConfig(num_layers=3), moe=MoEConfig(num_experts=4))
SMALL = [
    "model={width: 32, num_layers: 3, num_heads: 2, pool_heads: 2, ffn_width: 32, fusion_layer: 1, patch_size: 16, "
    "context_length: 16, embed_dim: 16}",
    "moe={num_experts: 4, expert_width: 16}",
    "data.workers=0",
    "batch={global_batch_size: 16, micro_batch_size: 8}",
    "optim.lr=1e-3",
    "log.every_steps=1",
    "eval.batch_size=32",
    "eval.caption_samples=4",
]


class Counting:
    """Stands for training and judging; may fail at one run."""

    def __init__(self, fail_at: int = 0) -> None:
        self.trained: list[str] = []
        self.fail_at = fail_at

    def train(self, run: RunConfig, folder: Path) -> None:
        self.trained.append(folder.name)
        if len(self.trained) == self.fail_at:
            raise KeyboardInterrupt

    def judge(self, folder: Path) -> dict[str, Any]:
        return {"folder": folder.name}


def study(out: Path, trials: list[Trial], work: Counting) -> dict[str, list[dict[str, Any]]]:
    return run_trials(trials, out, train=work.train, judge=work.judge)


def test_a_study_goes_on_where_it_was_stopped(tmp_path: Path) -> None:
    trials = [Trial(name, replace(RUN, seed=seed)) for seed in (0, 1) for name in ("a", "b")]
    stopped, again, whole = Counting(fail_at=3), Counting(), Counting()
    with pytest.raises(KeyboardInterrupt):
        study(tmp_path, trials, stopped)
    results = study(tmp_path, trials, again)
    assert stopped.trained == ["a-seed0", "b-seed0", "a-seed1"]
    assert again.trained == [
        "a-seed1",
        "b-seed1",
    ]  # the one that was stopped goes on in its own folder
    assert results == study(tmp_path, trials, whole)
    assert whole.trained == []
    assert results == {
        "a": [{"folder": "a-seed0"}, {"folder": "a-seed1"}],
        "b": [{"folder": "b-seed0"}, {"folder": "b-seed1"}],
    }


def test_more_seeds_cost_only_the_new_ones_and_other_settings_are_refused(tmp_path: Path) -> None:
    study(tmp_path, [Trial("a", RUN)], Counting())
    more = Counting()
    study(tmp_path, [Trial("a", RUN), Trial("a", replace(RUN, seed=5))], more)
    assert more.trained == ["a-seed5"]
    other = replace(RUN, moe=replace(RUN.moe, num_experts=8))
    with pytest.raises(ConfigError, match="a-seed0 holds a trial with other settings"):
        study(tmp_path, [Trial("a", other)], Counting())


def test_what_would_be_counted_twice_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    work = Counting()
    with pytest.raises(
        ConfigError,
        match=r"a-seed3 would be counted 2 times.*give every seed and every method once",
    ):
        study(
            tmp_path,
            [Trial(name, replace(RUN, seed=seed)) for seed in (3, 4, 3) for name in ("a", "b")],
            work,
        )
    assert work.trained == []
    ready = ["data.train=[x]", "data.tokenizer=x"]
    assert compare_dense_baseline.main(["--seeds", "0", "0", "--out", str(tmp_path), *ready]) == 2
    assert "sparse-seed0 would be counted 2 times" in capsys.readouterr().err
    assert main(["--methods", "sign", "sign", "--out", str(tmp_path), *ready]) == 2
    assert "sign-seed0 would be counted 2 times" in capsys.readouterr().err


def row(**values: float) -> dict[str, Any]:
    """A row of metrics.jsonl of a run with two sparse layers of four experts."""
    found: dict[str, Any] = {
        "loss/contrastive": 1.0,
        "loss/caption": 2.0,
        "loss/weighted/contrastive": 1.0,
        "loss/weighted/caption": 4.0,
    } | values
    for layer, (image, text) in enumerate(
        (([10, 10, 20, 0], [4, 4, 4, 4]), ([10] * 4, [16, 0, 0, 0])), start=1
    ):
        for modality, load in (("image", image), ("text", text)):
            name = f"layer_{layer:02d}/{modality}"
            found |= {
                f"moe/tokens_per_expert/{name}": load,
                f"moe/entropy/{name}": 1.0 * layer,
                f"moe/mean_entropy/{name}": 1.2,
            }
    return found


def test_the_end_of_a_run_is_its_last_tenth() -> None:
    rows = [row(**{"loss/contrastive": float(step)}) for step in range(40)]
    assert numbers.losses(numbers.end_of_run(rows)) == {
        "main": 5.0,
        "contrastive": 37.5,
        "caption": 2.0,
    }
    assert len(numbers.end_of_run(rows[:3])) == 1


def test_loads_of_experts_by_hand() -> None:
    found = numbers.routing([row(), row()], RUN)
    assert found is not None
    assert (found["dead"], found["experts"]) == (0, 8)
    # Layer 1: 14, 14, 24, 4 of fair 14; layer 2: 26, 10, 10, 10 of fair 14.
    assert found["max_over_mean"] == pytest.approx((24 / 14 + 26 / 14) / 2)
    assert found["image"]["max_over_mean"] == pytest.approx((2 + 1) / 2)
    assert found["text"]["max_over_mean"] == pytest.approx((1 + 4) / 2)
    assert found["image"]["used"] == pytest.approx((np.exp(1.5 * np.log(2)) + 4) / 2)
    assert (found["text"]["entropy"], found["text"]["mean_entropy"], found["text"]["dropped"]) == (
        1.5,
        1.2,
        0.0,
    )


def test_an_expert_is_dead_below_a_hundredth_of_a_fair_share() -> None:
    def dead(load: int) -> int:
        loads = {
            f"moe/tokens_per_expert/layer_{layer:02d}/{modality}": [1000, 1000, 2000 - load, load]
            for layer in (1, 2)
            for modality in ("image", "text")
        }
        found = numbers.routing([row() | loads], RUN)
        assert found is not None
        return int(found["dead"])

    assert [dead(load) for load in (9, 11, 150)] == [2, 0, 0]  # a fair share is 1000


def test_text_tokens_are_what_patches_leave() -> None:
    rows = [
        {"perf/tokens_per_second": tokens, "perf/samples_per_second": 10.0}
        for tokens in (480.0, 500.0)
    ]
    assert RUN.model.num_patches == 36
    assert numbers._text_tokens(rows, RUN) == pytest.approx(49 - 36)


def test_pools_are_judged_by_themselves() -> None:
    pooled = replace(RUN, moe=MoEConfig(num_experts=4, pools="modality"))
    loads = {
        f"moe/tokens_per_expert/layer_{layer:02d}/{modality}": load
        for layer in (1, 2)
        for modality, load in (("image", [30, 0, 0, 0]), ("text", [0, 0, 5, 5]))
    }
    found = numbers.routing([row() | loads], pooled)
    assert found is not None
    assert (found["dead"], found["image"]["max_over_mean"], found["text"]["max_over_mean"]) == (
        2,
        2.0,
        1.0,
    )
    assert numbers.routing([row()], replace(RUN, moe=replace(RUN.moe, stop=0))) is None


def test_spreads_and_paired_differences_by_hand() -> None:
    assert tables.spread([1.0, 2.0, 3.0]) == (2.0, 1.0, 3)
    assert tables.spread([1.0, None]).text() == "1.00"
    assert tables.spread([]).text() == "-"
    # What both seeds share drops out: alone they vary by 10, their difference hardly does.
    difference = tables.paired([11.0, 21.0, 31.2], [10.0, 20.0, 30.0])
    assert difference.mean == pytest.approx(1.0667, abs=1e-3) and difference.deviation < 0.2
    assert difference.text(1, signed=True) == "+1.1 ± 0.1"
    assert tables.pick({"a": {"b": 2}}, ("a", "b")) == 2.0
    assert (
        tables.pick({"a": None}, ("a", "b")) is None
        and tables.pick({"a": {"b": None}}, ("a", "b")) is None
    )


def test_tables_line_up_and_cells_stay_cells() -> None:
    lines = tables.markdown(
        ["method", "loss"], [["a|b", "1.0"], ["long name", "12.5 ± 0.1"]]
    ).splitlines()
    assert len({len(line) for line in lines}) == 1
    assert lines[1] == "| --------- | ---------: |"
    assert lines[2].startswith("| a\\|b ")


def test_every_method_keeps_the_topology_and_differs() -> None:
    trials = make_trials(
        "quickstart", [], methods=[m.name for m in METHODS], seeds=[0, 1], steps=50
    )
    base = load_run("quickstart").moe
    assert len(trials) == 2 * len(METHODS)
    for trial in trials:
        assert problems(trial.run, 1) == []
        assert all(getattr(trial.run.moe, name) == getattr(base, name) for name in TOPOLOGY)
        assert trial.run.schedule.total_steps == 50
        assert trial.run.batch.micro_batch_size == trial.run.batch.global_batch_size == 128
    ways = {(trial.run.moe, trial.run.balance) for trial in trials}
    assert len(ways) == len(METHODS)
    assert [trial.run.seed for trial in trials] == [0] * len(METHODS) + [1] * len(METHODS)
    none = trials[0].run.balance
    assert none == BalanceConfig(balance_weight=0.0, router_z_weight=0.0)
    limoe = next(trial.run for trial in trials if trial.name == "preset-limoe")
    alone = load_run("limoe")
    assert limoe.balance == alone.balance
    assert (limoe.moe.routing, limoe.moe.capacity_factor, limoe.moe.top_k) == (
        "noisy",
        1.25,
        2,
    )
    vl_moe = next(trial.run for trial in trials if trial.name == "preset-vl_moe")
    assert (vl_moe.moe.pools, vl_moe.moe.norm_topk_prob, vl_moe.moe.top_k) == (
        "modality",
        False,
        2,
    )


def test_unknown_methods_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--methods", "swich", "--out", str(tmp_path)]) == 2
    assert "there is no method 'swich'; there are none, balance," in capsys.readouterr().err


def test_a_persons_settings_win() -> None:
    run = load_trial(
        "quickstart", ["batch.micro_batch_size=32", "parallel.engine=deepspeed"], steps=0
    )
    assert (run.batch.micro_batch_size, run.parallel.engine) == (32, "deepspeed")
    assert run.schedule.total_steps == load_run("quickstart").schedule.total_steps


def test_a_trial_warms_up_for_a_tenth_and_draws_nothing() -> None:
    for steps, warmup in ((50, 5), (600, 60), (2400, 100)):
        run = load_trial("quickstart", [], steps=steps)
        assert (run.schedule.total_steps, run.schedule.warmup_steps) == (steps, warmup)
        assert (run.log.routing_every_steps, run.log.captions_every_steps) == (0, 0)


def result(seed: int, loss: float) -> dict[str, Any]:
    """What `judge` gives, for tables."""
    return {
        "seed": seed,
        "pairs": 10,
        "steps": 2,
        "seconds": 1.0,
        "kilo_parameters": 1.0,
        "eval": {},
        "kilo_active_parameters": 1.0,
        "mega_flops_per_pair": 1.0,
        "routing": None,
        "loss": {"main": loss, "contrastive": loss, "caption": 0.0},
    }


def test_a_difference_is_that_of_the_experts_from_the_dense_model() -> None:
    sparse, dense = [result(0, 1.0), result(1, 2.0)], [result(0, 1.5), result(1, 2.7)]
    lines = comparison(sparse, dense).splitlines()
    assert [cell.strip() for cell in lines[0].split("|")[2:-1]] == [
        "sparse",
        "dense twin",
        "sparse - dense",
    ]
    cells = [cell.strip() for cell in lines[2].split("|")[2:-1]]
    assert cells == ["1.5000 ± 0.7071", "2.1000 ± 0.8485", "-0.6000 ± 0.1414"]


def test_both_models_have_every_seed_and_captions_that_can_be(
    capsys: pytest.CaptureFixture[str],
) -> None:
    ready = [
        "data.train=[x]",
        "data.tokenizer=x",
        "model.context_length=12",
        "moe.router_input=caption",
        "moe.num_experts=64",
    ]
    trials = twin_trials("quickstart", ready, seeds=[4, 5], steps=50, text_tokens=1000.0)
    assert [trial.folder for trial in trials] == [
        "sparse-seed4",
        "dense-seed4",
        "sparse-seed5",
        "dense-seed5",
    ]
    assert trials == twin_trials("quickstart", ready, seeds=[4, 5], steps=50, text_tokens=12.0)
    assert trials == twin_trials("quickstart", ready, seeds=[4, 5], steps=50, text_tokens=None)
    assert trials != twin_trials("quickstart", ready, seeds=[4, 5], steps=50, text_tokens=1.0)
    assert compare_dense_baseline.main(["--text-tokens", "-4", *ready]) == 2
    assert "--text-tokens is -4, but must be a finite number" in capsys.readouterr().err


@pytest.mark.parametrize("command", [balancing_study, compare_dense_baseline])
def test_help_has_examples(command: Any, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        command.main(["--help"])
    name = command.__name__
    assert ended.value.code == 0 and f"examples:\n  python -m {name} " in capsys.readouterr().out


def test_pictures_of_the_routing_are_due() -> None:
    run = load_run("tiny", ["log.routing_every_steps=300", "schedule.total_steps=700"])
    assert [step for step in range(1, 701) if sees_routing(run, step)] == [300, 600, 700]
    assert not sees_routing(replace(run, log=replace(run.log, routing_every_steps=0)), 700)
    assert not sees_routing(replace(run, moe=replace(run.moe, stop=0)), 700)


def test_both_models_are_trained_judged_and_compared(tmp_path: Path, shapes: Shapes) -> None:
    held_out = make_shapes(tmp_path / "held", pairs=24)
    settings = [
        *SMALL,
        *shapes.overrides,
        f"eval.sets=[{{name: held, shards: {held_out.folder}}}]",
        "log.routing_every_steps=2",
    ]
    trials = twin_trials("tiny", settings, seeds=[3], steps=2, text_tokens=8)
    results = run_trials(trials, tmp_path, train=train_command)
    sparse, dense = results["sparse"][0], results["dense"][0]
    assert (sparse["pairs"], sparse["steps"], sparse["seed"]) == (
        dense["pairs"],
        dense["steps"],
        dense["seed"],
    )
    assert dense["routing"] is None and sparse["routing"]["experts"] == 8
    assert dense["mega_flops_per_pair"] == pytest.approx(sparse["mega_flops_per_pair"], rel=0.01)
    table = comparison(results["sparse"], results["dense"])
    assert "held: image to text R@1" in table and "32 pairs in 2 steps each" in table
    assert json.loads((tmp_path / "dense-seed3" / "result.json").read_text()) == dense
    shown = columns(trials[0].run)
    assert [head for head, path, *_ in shown if tables.pick(sparse, path) is None] == []
    assert shown[1][1] == ("eval", "held", "image_to_text/R@1")
    assert report({"none": [sparse], "dense": [dense]}, trials[0].run).count("\n| ") == 3
    pictures = {name: _pictures(tmp_path / f"{name}-seed3") for name in ("sparse", "dense")}
    assert pictures == {"sparse": {"moe/load": [2], "moe/coactivation": [2]}, "dense": {}}


def _pictures(run_dir: Path) -> dict[str, list[int]]:
    """Steps of each picture of TensorBoard."""
    events = EventAccumulator(str(run_dir / "tensorboard"), size_guidance={"images": 0}).Reload()
    return {name: [image.step for image in events.Images(name)] for name in events.Tags()["images"]}
