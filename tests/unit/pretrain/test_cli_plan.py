"""`vlmoe plan`: JSON values, text and errors."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from pretrain.cli.main import main


def plan_text(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(["plan", *arguments]) == 0
    return capsys.readouterr().out


@pytest.mark.parametrize(
    ("preset", "world_size"), [("tiny", 2), ("s16", 8), ("b16", 64), ("l16", 64), ("h14", 64)]
)
def test_json_values_are_consistent(
    preset: str, world_size: int, capsys: pytest.CaptureFixture[str]
) -> None:
    values = json.loads(plan_text(capsys, preset, "--world-size", str(world_size), "--json"))
    batch, layout, params = values["batch"], values["layout"], values["params"]
    pairs = batch["micro_batch_size"] * world_size * batch["accumulation_steps"]
    assert pairs == batch["global_batch_size"]
    assert layout["expert_copies"] * layout["expert_parallel_size"] == world_size
    assert params["total"] > params["active"] > params["trunk_active"]
    assert values["deepspeed"]["train_batch_size"] == batch["global_batch_size"]
    flops = values["flops_per_pair"]
    assert flops["training"] == pytest.approx(3 * flops["forward"], abs=3)


def test_text_shows_size_batch_and_layout(capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--world-size", "16", "parallel.expert_parallel_size=8"]
    text = plan_text(capsys, "b16", *options)
    lines = {line[:10].strip(): line[12:] for line in text.splitlines()}
    assert lines["parameters"].startswith("488.7M total")
    assert "461.5M total, 85.22M active per token" in lines["trunk"]
    assert all(part in lines["batch"] for part in ("16,384", "256", "16 ranks", "4 accumulation"))
    assert all(part in lines["layout"] for part in ("4 experts", "2 copies", "ranks 0-7, 8-15"))
    assert '"stage": 1' in text
    assert lines["DeepSpeed"] == "ds_configs/zero1.json"


def test_text_without_deepspeed(capsys: pytest.CaptureFixture[str]) -> None:
    assert "not used (parallel.engine is plain)" in plan_text(
        capsys, "tiny", "parallel.engine=plain"
    )


def test_the_default_world_size_is_that_of_expert_parallelism(
    capsys: pytest.CaptureFixture[str],
) -> None:
    text = plan_text(capsys, "quickstart", "--offline")
    assert " 64 per micro-batch x 2 ranks" in text


def test_text_shows_routing_and_balancing(capsys: pytest.CaptureFixture[str]) -> None:
    text = plan_text(capsys, "quickstart", "--offline")
    assert "routing     softmax scores, top_k routing, renormalized, dropless\n" in text
    assert "balancing   sign bias per modality, rate 0.001\n" in text

    text = plan_text(
        capsys,
        "tiny",
        "moe={pools: modality, capacity_factor: 1.5, top_k: 1}",
        "balance={local_entropy_weight: {text: 0.01}, balance_weight: 0}",
    )
    assert "raw weights, capacity 1.5 by position, 4 experts for patches\n" in text
    assert "balancing   router_z 0.001, local_entropy text 0.01\n" in text


def test_text_of_a_dense_run_has_no_experts(capsys: pytest.CaptureFixture[str]) -> None:
    text = plan_text(capsys, "tiny", "moe.stop=0")
    assert "experts" not in text.split("layout")[0].replace("with experts", "")


def test_all_problems_are_reported(capsys: pytest.CaptureFixture[str]) -> None:
    settings = ["parallel.expert_parallel_size=16", "optim.lr=0"]
    assert main(["plan", "tiny", "--world-size", "3", *settings]) == 2
    error = capsys.readouterr().err
    assert "3 problems:" in error
    for name in ("parallel.expert_parallel_size", "8 experts", "batch.", "optim.lr"):
        assert name in error


@pytest.mark.parametrize("size", [0, -2])
def test_invalid_expert_parallel_size_is_not_a_number_of_ranks(
    size: int, capsys: pytest.CaptureFixture[str]
) -> None:
    """The default number of ranks follows from this setting, which is the only problem."""
    assert main(["plan", "tiny", f"parallel.expert_parallel_size={size}"]) == 2
    assert capsys.readouterr().err == (
        f"error: preset tiny: parallel.expert_parallel_size is {size}, but must be at least 1 "
        f"(set on the command line)\n"
    )


def test_other_problems_beside_an_invalid_expert_parallel_size(
    capsys: pytest.CaptureFixture[str],
) -> None:
    settings = ["batch={global_batch_size: 1, micro_batch_size: 1}", "optim.lr=0"]
    assert main(["plan", "tiny", "parallel.expert_parallel_size=0", *settings]) == 2
    error = capsys.readouterr().err
    assert "3 problems:" in error and "number of ranks" not in error
    for name in ("parallel.expert_parallel_size", "the contrastive loss", "optim.lr"):
        assert name in error


def test_plan_imports_neither_torch_nor_deepspeed() -> None:
    code = (
        "import sys; from pretrain.cli.main import main\n"
        "status = main(['plan', 'h14', '--world-size', '64'])\n"
        "print([name for name in ('torch', 'deepspeed', 'numpy') if name in sys.modules])\n"
        "sys.exit(status)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.splitlines()[-1] == "[]"
