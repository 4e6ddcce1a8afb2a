"""One training step: parity with the definitions, and an empty global batch."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor

from data_pipeline.samples import Batch
from pretrain.model.vision_language import valid_positions
from pretrain.parallel.tensor_names import split_name
from pretrain.train.step import train_step
from tests.unit.pretrain.train_step_support import (
    REFERENCE_SETTINGS,
    SMALL,
    make_batch,
    make_engine,
    reference_step,
    split_batch,
)

PAIRS, LAST_STEP_WITH_BIAS_UPDATE = 8, 7


@pytest.mark.parametrize("micro_batches", [1, 2])
def test_step_without_pairs_changes_nothing(micro_batches: int) -> None:
    torch.manual_seed(0)
    engine, run = make_engine(*SMALL)

    def run_step(step: int, pairs: int) -> tuple[int, float, dict[str, Tensor]]:
        batches = [make_batch(pairs) for _ in range(micro_batches)]
        result = train_step(engine, batches, run, step=step, learning_rate=1e-2)
        tensors = {name: value.clone() for name, value in engine.model.state_dict().items()}
        return result.pairs, result.grad_norm, tensors

    pairs, norm, before = run_step(0, 4)  # after this, the moments alone would change weights
    assert pairs == 4 * micro_batches and norm > 0
    pairs, norm, after = run_step(1, 0)
    assert pairs == 0 and math.isnan(norm)
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert any("bias" in name and value.abs().sum() > 0 for name, value in before.items())


def global_batch() -> Batch:
    """A batch with captions of different lengths, some of them equal."""
    batch = make_batch(PAIRS)._replace(
        text_lengths=torch.tensor([5, 8, 3, 6, 2, 7, 4, 8]),
        caption_hashes=torch.tensor([0, 1, 2, 1, 4, 5, 6, 0]),
    )
    return batch._replace(text_positions=valid_positions(batch.text_lengths, 8))


@pytest.mark.parametrize("micro_batches", [1, 2, 4])
def test_step_equals_the_definitions(micro_batches: int) -> None:
    torch.manual_seed(3)
    micro_batch_size = PAIRS // micro_batches
    engine, run = make_engine(
        *REFERENCE_SETTINGS,
        f"batch={{global_batch_size: {PAIRS}, micro_batch_size: {micro_batch_size}}}",
    )
    assert len(engine.model.moe_layers()) == 2
    for layer in engine.model.moe_layers():
        assert layer.bias is not None
        layer.bias.value.normal_(std=0.05)
        layer.gate.weight.data.normal_(std=0.5)  # as unbalanced as a trained router
    batch = global_batch()
    expected = reference_step(copy.deepcopy(engine.model), batch, run)
    assert (expected.biases != expected.biases_from_kept).any(dim=1).all()

    gradients: dict[str, Tensor] = {}

    def observe(named: dict[str, Tensor]) -> None:
        gradients.update({split_name(name)[0]: gradient for name, gradient in named.items()})

    engine.gradient_observer = observe
    batches = split_batch(batch, micro_batches)
    step = LAST_STEP_WITH_BIAS_UPDATE
    result = train_step(engine, batches, run, step=step, learning_rate=1e-3)

    assert result.losses == pytest.approx(expected.losses, rel=2e-5)
    torch.testing.assert_close(result.biases[:, 0], expected.biases, rtol=0, atol=1e-7)
    torch.testing.assert_close(engine.model.biases()[:, 0], expected.biases, rtol=0, atol=1e-7)
    assert gradients.keys() == expected.gradients.keys()
    for name, gradient in expected.gradients.items():
        difference = float((gradients[name] - gradient).norm() / gradient.norm())
        assert difference < 1e-4, (name, difference)
    norms = [gradient.norm() for gradient in expected.gradients.values()]
    assert result.grad_norm == pytest.approx(float(torch.stack(norms).norm()), rel=1e-4)

    # From the next step on, biases are frozen.
    frozen = train_step(engine, batches, run, step=step + 1, learning_rate=1e-3)
    assert torch.equal(frozen.biases, result.biases)
