"""One step: against one written from the definitions, and with a global batch of which nothing is
left."""

from __future__ import annotations

import copy
import math
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from data_pipeline.common.config import apply_overrides, from_mapping
from data_pipeline.samples import Batch
from pretrain.config.schema import RunConfig
from pretrain.model import build_model
from pretrain.model.vision_language import VisionLanguageModel, valid_positions
from pretrain.parallel.layout import Layout
from pretrain.parallel.plain_engine import PlainEngine, model_inputs, routing_facts
from pretrain.train.step import train_step
from tests.unit.pretrain.test_losses import full_matrix

SMALL = [
    "model={width: 32, num_layers: 2, num_heads: 2, pool_heads: 2, ffn_width: 32, fusion_layer: 1, image_size: 16, "
    "patch_size: 8, vocab_size: 64, context_length: 8, embed_dim: 16}",
    "moe={num_experts: 4, expert_width: 8}",
    "balance={bias: sign, bias_per_modality: true, expert_l1_weight: 1e-3}",
    "batch={global_batch_size: 8, micro_batch_size: 4}",
]


def batch(pairs: int) -> Batch:
    lengths = torch.full((pairs,), 5)
    rows = torch.arange(pairs)
    images = torch.randint(0, 256, (pairs, 3, 16, 16), dtype=torch.uint8)
    text_ids = torch.randint(4, 64, (pairs, 8))
    return Batch(
        images, text_ids, lengths, valid_positions(lengths, 8), rows, (), (), (), 0.0, rows, rows
    )


@pytest.mark.parametrize("micro_batches", [1, 2])
def test_a_step_without_any_pair_moves_nothing(micro_batches: int) -> None:
    torch.manual_seed(0)
    run = from_mapping(RunConfig, apply_overrides({}, SMALL))
    layout = Layout(
        world_size=1, expert_parallel_size=1, zero_stage=-1, precision="fp32", num_experts=4
    )
    engine = PlainEngine(build_model(run), run.optim, layout, torch.device("cpu"))

    def step(number: int, pairs: int) -> tuple[int, float, dict[str, torch.Tensor]]:
        batches = [batch(pairs) for _ in range(micro_batches)]
        result = train_step(engine, batches, run, step=number, learning_rate=1e-2)
        return (
            result.pairs,
            result.grad_norm,
            {k: v.clone() for k, v in engine.model.state_dict().items()},
        )

    pairs, norm, before = step(0, 4)  # from here on the moments alone would move the weights
    assert pairs == 4 * micro_batches and norm > 0
    pairs, norm, after = step(1, 0)
    assert pairs == 0 and math.isnan(norm)
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert any("bias" in name and value.abs().sum() > 0 for name, value in before.items())


PAIRS, LAST_MOVING = 8, 7
GLOBAL = [
    *SMALL[:1],
    "moe={num_experts: 4, top_k: 2, expert_width: 8, start: 0}",
    "moe={capacity_factor: 0.5, capacity_group_size: 2}",
    "loss={contrastive_weight: 0.7, caption_weight: 1.3}",
    "schedule={total_steps: 10, warmup_steps: 0}",
    "balance={balance_weight: 0.3, router_z_weight: 0.2, bias: sign, bias_rate: 0.01, bias_freeze_ratio: 0.2}",
    "optim.clip_norm=0",
]
"""Weights that are none of them 1, choices that are not kept, and biases that rest from step 8
on."""


class Slow(NamedTuple):
    """A step by its definitions, from the whole global batch in one piece."""

    losses: dict[str, float]
    gradients: dict[str, Tensor]
    biases: Tensor
    biases_by_kept: Tensor
    """What they would be if choices without a place did not count."""


def slow_step(model: VisionLanguageModel, whole: Batch, run: RunConfig) -> Slow:
    """Losses, gradients and biases of the step, from the model's embeddings and what its routers
    are given."""
    inputs: list[Tensor] = []
    hooks = [
        layer.register_forward_pre_hook(lambda _, given: inputs.append(given[0]))
        for layer in model.moe_layers()
    ]
    cpu = torch.device("cpu")
    output = model(*model_inputs(whole, cpu), routing_facts(whole, run.moe, cpu, 0, False))
    for hook in hooks:
        hook.remove()
    balance, z, biases, by_kept = [], [], [], []
    for number, (layer, x_TD) in enumerate(zip(model.moe_layers(), inputs, strict=True)):
        logits_TE = x_TD @ layer.gate.weight.T
        probs_TE = torch.softmax(logits_TE, 1)
        assert layer.bias is not None
        choices_E, k = torch.zeros(4), run.moe.top_k
        for row in (probs_TE + layer.bias.value).tolist():
            for expert in sorted(range(4), key=lambda e: -row[e])[:k]:
                choices_E[expert] += 1
        balance.append(4 * (choices_E / choices_E.sum() * probs_TE.mean(0)).sum())
        z.append((logits_TE.exp().sum(1).log() ** 2).mean())
        for load_E, found in ((choices_E, biases), (output.router.kept_ME[number].sum(0), by_kept)):
            found.append(layer.bias.value[0] - 0.01 * torch.sign(load_E - load_E.double().mean()))
    terms = {
        "contrastive": full_matrix(
            output.image_embedding,
            output.text_embedding,
            output.logit_scale,
            whole.caption_hashes,
            run.loss.mask_equal_captions,
        ),
        "caption": output.caption_loss_sum / sum(int(length) - 1 for length in whole.text_lengths),
        "balance": sum(balance) / len(balance),
        "router_z": sum(z) / len(z),
    }
    weighted = {
        name: weight * terms[name]
        for name, weight in (
            ("contrastive", 0.7),
            ("caption", 1.3),
            ("balance", 0.3),
            ("router_z", 0.2),
        )
    }
    total = sum(weighted.values())
    parameters = dict(model.named_parameters())
    gradients = torch.autograd.grad(total, list(parameters.values()), allow_unused=True)
    losses = (
        {"total": total} | terms | {f"weighted/{name}": value for name, value in weighted.items()}
    )
    return Slow(
        {name: float(value.detach()) for name, value in losses.items()},
        {name: g for name, g in zip(parameters, gradients, strict=True) if g is not None},
        torch.stack(biases),
        torch.stack(by_kept),
    )


def cut(whole: Batch, micro_batches: int) -> list[Batch]:
    """The global batch in consecutive micro-batches of one rank."""
    size = PAIRS // micro_batches
    parts = []
    for first in range(0, PAIRS, size):
        rows = slice(first, first + size)
        lengths = whole.text_lengths[rows]
        parts.append(
            whole._replace(
                images=whole.images[rows],
                text_ids=whole.text_ids[rows],
                text_lengths=lengths,
                text_positions=valid_positions(lengths, 8),
                caption_hashes=whole.caption_hashes[rows],
                ids=whole.ids[rows],
                slots=torch.arange(size),
            )
        )
    return parts


@pytest.mark.parametrize("micro_batches", [1, 2, 4])
def test_a_step_is_what_the_definitions_say(micro_batches: int) -> None:
    torch.manual_seed(3)
    run = from_mapping(
        RunConfig,
        apply_overrides(
            {},
            [
                *GLOBAL,
                f"batch={{global_batch_size: {PAIRS}, micro_batch_size: {PAIRS // micro_batches}}}",
            ],
        ),
    )
    layout = Layout(
        world_size=1, expert_parallel_size=1, zero_stage=-1, precision="fp32", num_experts=4
    )
    engine = PlainEngine(build_model(run), run.optim, layout, torch.device("cpu"))
    assert len(engine.model.moe_layers()) == 2
    for layer in engine.model.moe_layers():
        assert layer.bias is not None
        layer.bias.value.normal_(std=0.05)
        layer.gate.weight.data.normal_(std=0.5)  # as lopsided as a trained router
    whole = batch(PAIRS)
    whole = whole._replace(
        text_lengths=torch.tensor([5, 8, 3, 6, 2, 7, 4, 8]),
        caption_hashes=torch.tensor([0, 1, 2, 1, 4, 5, 6, 0]),
    )
    whole = whole._replace(text_positions=valid_positions(whole.text_lengths, 8))
    true = slow_step(copy.deepcopy(engine.model), whole, run)
    assert (true.biases != true.biases_by_kept).any(dim=1).all()

    found: dict[str, Tensor] = {}
    take_step = engine.step

    def write_and_step(rate: float) -> float:
        found.update(engine.gradients())
        return take_step(rate)

    engine.step = write_and_step  # type: ignore[method-assign]
    result = train_step(
        engine, cut(whole, micro_batches), run, step=LAST_MOVING, learning_rate=1e-3
    )
    assert result.losses == pytest.approx(true.losses, rel=2e-5)
    torch.testing.assert_close(result.biases[:, 0], true.biases, rtol=0, atol=1e-7)
    torch.testing.assert_close(engine.model.biases()[:, 0], true.biases, rtol=0, atol=1e-7)
    gradients = {name.split("@")[0]: gradient for name, gradient in found.items()}
    assert gradients.keys() == true.gradients.keys()
    for name, right in true.gradients.items():
        difference = float((gradients[name] - right).norm() / right.norm())
        assert difference < 1e-4, (name, difference)
    norm = float(torch.stack([right.norm() for right in true.gradients.values()]).norm())
    assert result.grad_norm == pytest.approx(norm, rel=1e-4)
    # From the next step on biases rest.
    resting = train_step(
        engine, cut(whole, micro_batches), run, step=LAST_MOVING + 1, learning_rate=1e-3
    )
    assert torch.equal(resting.biases, result.biases)


class _CopiesToTheHost(TorchFunctionMode):
    """Counts the copies that a GPU would be waited for, of numbers that lie on the device."""

    READS = (
        Tensor.tolist,
        Tensor.item,
        Tensor.numpy,
        Tensor.__float__,
        Tensor.__int__,
        Tensor.__bool__,
    )

    def __init__(self) -> None:
        super().__init__()
        self.count, self._here = 0, set[int]()
        self._kept: list[Tensor] = []

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is Tensor.cpu:
            self.count += 1
            copied = args[0].clone()
            self._kept.append(copied)
            self._here.add(copied.untyped_storage().data_ptr())
            return copied
        # Whole numbers are read by the experts of the CPU and by the batch, which lies on the host.
        if func in self.READS and args[0].is_floating_point():
            self.count += args[0].untyped_storage().data_ptr() not in self._here
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("micro_batches", [1, 2])
@pytest.mark.parametrize("bias", ["sign", "none"])
def test_all_numbers_of_a_step_come_to_the_host_in_one_copy(bias: str, micro_batches: int) -> None:
    run = from_mapping(
        RunConfig,
        apply_overrides({}, [*SMALL, f"balance={{bias: {bias}, bias_per_modality: false}}"]),
    )
    layout = Layout(
        world_size=1, expert_parallel_size=1, zero_stage=-1, precision="fp32", num_experts=4
    )
    engine = PlainEngine(build_model(run), run.optim, layout, torch.device("cpu"))
    engine.step = lambda rate: 1.0  # type: ignore[method-assign]  # clipping asks for its norm by itself
    with _CopiesToTheHost() as copies:
        result = train_step(
            engine,
            [batch(4) for _ in range(micro_batches)],
            run,
            step=0,
            learning_rate=1e-2,
            coactivation=True,
        )
    assert copies.count == 1
    assert result.biases.shape == ((1, 1, 4) if bias == "sign" else (0, 1, 4))
    assert {field.dtype for field in (*result.router, result.tokens_M)} == {torch.float64}
    assert result.router.coactivation_EE.shape == (1, 4, 4) and result.biases.dtype == torch.float32
