"""Every preset of balancing trains a tiny model and brings a collapsed router back; without
balancing it stays so."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from data_pipeline.order.state import LoaderState
from data_pipeline.samples import Batch
from pretrain.config.presets import load_run
from pretrain.config.schema import RunConfig
from pretrain.model import VisionLanguageModel, build_model
from pretrain.model.vision_language import valid_positions
from pretrain.parallel.layout import Layout
from pretrain.parallel.plain_engine import PlainEngine, model_inputs
from pretrain.train.metrics import Window, routing_metrics
from pretrain.train.reporter import Reporter
from pretrain.train.state import TrainState
from pretrain.train.step import StepResult, train_step

PAIRS, STEPS, PATCHES = 32, 100, 16


def pairs(step: int) -> Batch:
    """Noisy pictures of twelve kinds, each kind with its words."""
    fixed, fresh = torch.Generator().manual_seed(99), torch.Generator().manual_seed(step)
    pictures = torch.randint(0, 256, (12, 3, 16, 16), generator=fixed).float()
    words = torch.randint(4, 60, (12, 8), generator=fixed)
    kinds = torch.randint(0, 12, (PAIRS,), generator=fresh)
    images = (0.7 * pictures[kinds] + 76 * torch.rand(PAIRS, 3, 16, 16, generator=fresh)).to(
        torch.uint8
    )
    lengths = torch.randint(4, 9, (PAIRS,), generator=fresh)
    ids = words[kinds] * (torch.arange(8) < lengths.unsqueeze(1))
    rows = torch.arange(PAIRS)
    return Batch(
        images,
        ids,
        lengths,
        valid_positions(lengths, 8),
        kinds,
        (),
        (),
        (),
        0.0,
        PAIRS * step + rows,
        rows,
    )


def small_run(folder: Path, presets: str, *settings: str) -> RunConfig:
    path = folder / "run.yaml"
    path.write_text(f"extends: {presets}\n")
    return load_run(
        path,
        [
            "model={width: 32, num_layers: 3, num_heads: 2, pool_heads: 2, ffn_width: 48, image_size: 16, patch_size: 4, "
            "vocab_size: 64, context_length: 8, embed_dim: 32}",
            "moe.expert_width=16",
            f"batch={{global_batch_size: {PAIRS}, micro_batch_size: {PAIRS}}}",
            f"schedule.total_steps={STEPS}",
            "schedule.warmup_steps=0",
            *settings,
        ],
    )


def collapse(model: VisionLanguageModel) -> None:
    """Let the first expert of each pool win nearly every token: a router that has collapsed."""
    model.eval()
    for layer in model.moe_layers():
        seen: list[torch.Tensor] = []
        hook = layer.register_forward_pre_hook(lambda _, inputs, seen=seen: seen.append(inputs[0]))
        with torch.no_grad():
            model(*model_inputs(pairs(1000), torch.device("cpu")))
            hook.remove()
            border = PAIRS * PATCHES
            for modality, x_TD in enumerate((seen[0][:border], seen[0][border:])):
                mean_D = x_TD.mean(0)
                layer.gate.weight[layer.config.pool(modality).start] += (
                    2 * mean_D / mean_D.square().sum()
                )
    model.train()


def train(run: RunConfig) -> list[StepResult]:
    model = build_model(run)
    collapse(model)
    layout = Layout(
        world_size=1,
        expert_parallel_size=1,
        zero_stage=-1,
        precision="fp32",
        num_experts=run.moe.num_experts,
    )
    engine = PlainEngine(model, run.optim, layout, torch.device("cpu"))
    return [
        train_step(engine, [pairs(step)], run, step=step, learning_rate=1e-2)
        for step in range(STEPS)
    ]


def busiest(run: RunConfig, results: list[StepResult]) -> float:
    """Load of the busiest expert of any layer as a multiple of its pool's mean."""
    load_LE = sum(result.choices_LME.sum(dim=1) for result in results)
    assert isinstance(load_LE, torch.Tensor)
    return max(
        float((load_LE[:, pool].amax(1) / load_LE[:, pool].mean(1)).max())
        for pool in run.moe.pool_slices()
    )


@pytest.mark.parametrize("preset", ["switch", "vmoe", "limoe", "vl_moe", "deepseek", "ours"])
def test_a_preset_learns_and_brings_a_collapsed_router_back(preset: str, tmp_path: Path) -> None:
    # Biases are made for runs of many thousand steps: they may go faster in one of a hundred.
    run = small_run(tmp_path, f"[tiny, {preset}]", "balance.bias_rate=0.01")
    results = train(run)
    before, after = busiest(run, results[:1]), busiest(run, results[-10:])
    assert before > 2.5
    assert after < 0.6 * before
    assert sum(r.choices_LME.sum(dim=1) for r in results[-10:]).min() > 0  # type: ignore[union-attr]
    metrics = routing_metrics(results[-1], run)
    pool = run.moe.image_pool
    for name in ("image", "text"):
        experts = torch.tensor(metrics[f"moe/mean_entropy/layer_02/{name}"]).exp()
        assert float(experts) > 0.6 * (
            pool if name == "image" else run.moe.num_experts - pool or pool
        ), name
    assert results[-1].losses["caption"] < 0.1 * results[0].losses["caption"]
    assert results[-1].losses["contrastive"] < 0.1


def test_without_balancing_a_collapsed_router_stays_collapsed(tmp_path: Path) -> None:
    run = small_run(tmp_path, "[tiny, switch]", "balance.balance_weight=0", "moe.capacity_factor=0")
    results = train(run)
    assert busiest(run, results[-10:]) > 0.65 * busiest(run, results[:1])


def test_what_is_drawn_belongs_to_the_step(tmp_path: Path) -> None:
    """The same weights and batch choose otherwise in another step, and alike in the same one."""
    run = small_run(tmp_path, "tiny", "moe.routing=sampled")
    layout = Layout(
        world_size=1, expert_parallel_size=1, zero_stage=-1, precision="fp32", num_experts=8
    )
    choices = []
    for step in (3, 3, 4):
        engine = PlainEngine(build_model(run), run.optim, layout, torch.device("cpu"))
        choices.append(
            train_step(engine, [pairs(0)], run, step=step, learning_rate=0.0).choices_LME
        )
    assert torch.equal(choices[0], choices[1])
    assert not torch.equal(choices[0], choices[2])


def test_biases_are_told(tmp_path: Path) -> None:
    run = small_run(tmp_path, "[tiny, ours]", "balance.bias_rate=0.5")
    layout = Layout(
        world_size=1, expert_parallel_size=1, zero_stage=-1, precision="fp32", num_experts=32
    )
    engine = PlainEngine(build_model(run), run.optim, layout, torch.device("cpu"))
    result = train_step(engine, [pairs(0)], run, step=0, learning_rate=0.0)
    load_E = result.choices_LME[1, 1]
    expected = 0.5 * float((load_E.max() - load_E.min()) / load_E.std(correction=0))
    assert routing_metrics(result, run)["moe/bias_range/layer_02/text"] == pytest.approx(
        expected, rel=1e-4
    )
    resting = train_step(engine, [pairs(0)], run, step=STEPS - 1, learning_rate=0.0)
    assert torch.equal(resting.biases, result.biases)


def test_the_busiest_expert_is_measured_within_its_pool(tmp_path: Path) -> None:
    """Patches outnumber words, but an expert for patches that gets a fair share of them is not
    busy."""
    run = small_run(tmp_path, "[tiny, vl_moe]", "moe.image_experts=2")
    window, device = Window(run, 1, torch.device("cpu")), torch.device("cpu")
    engine = PlainEngine(
        build_model(run),
        run.optim,
        Layout(
            world_size=1, expert_parallel_size=1, zero_stage=-1, precision="fp32", num_experts=8
        ),
        device,
    )
    result = train_step(engine, [pairs(0)], run, step=0, learning_rate=0.0)
    # Experts 0 and 1 serve patches, the six others words.
    load_E = torch.tensor([[300, 100, 0, 0, 0, 0, 0, 0], [0, 0, 20, 10, 10, 10, 10, 0]]).double()
    router = result.router._replace(choices_ME=load_E.expand(2, 2, 8))
    window.add(result._replace(router=router), 0.0, [])
    metrics, tables = window.summary(TrainState(loader=LoaderState()), [window.rank_report()], 1e-3)
    assert metrics["moe/max_over_mean_load/layer_01"] == pytest.approx(2.0)
    assert metrics["moe/min_over_mean_load/layer_01"] == 0.0
    reporter = Reporter(tmp_path, run, 0)
    reporter.step(1, metrics, tables)
    reporter.close()
    row = json.loads((tmp_path / "metrics.jsonl").read_text())
    assert row["moe/max_over_mean_load/layer_01"] == pytest.approx(2.0)
    assert row["moe/max_over_mean_load/layer_02/image"] == pytest.approx(1.5)
    assert row["moe/max_over_mean_load/layer_02/text"] == pytest.approx(2.0)


def test_dropped_choices_are_told(tmp_path: Path) -> None:
    run = small_run(tmp_path, "[tiny, switch]", "moe.capacity_factor=0.5")
    model = build_model(run)
    engine = PlainEngine(
        model,
        run.optim,
        Layout(
            world_size=1, expert_parallel_size=1, zero_stage=-1, precision="fp32", num_experts=8
        ),
        torch.device("cpu"),
    )
    result = train_step(engine, [pairs(0)], run, step=0, learning_rate=0.0, coactivation=True)
    metrics = routing_metrics(result, run)
    kept, choices = result.router.kept_ME, result.router.choices_ME
    assert metrics["moe/dropped/layer_01/image"] == pytest.approx(
        1 - float(kept[0, 0].sum() / choices[0, 0].sum())
    )
    assert metrics["moe/dropped/layer_01/image"] > 0.3
    assert metrics["moe/top1_share/layer_02/text"] == pytest.approx(
        float(result.router.first_ME[1, 1].max() / result.tokens_M[1])
    )
    assert torch.equal(result.router.coactivation_EE.diagonal(dim1=1, dim2=2), kept.sum(dim=1))
