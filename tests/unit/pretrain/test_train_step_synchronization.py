"""A training step copies all values to the host at once: each copy synchronizes with the GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from pretrain.train.step import train_step
from tests.unit.pretrain.train_step_support import SMALL, make_batch, make_engine


class _CountSynchronizations(TorchFunctionMode):
    """Counts the calls that would wait for a GPU if the tensors were on one."""

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
        self.count, self._on_host = 0, set[int]()
        self._copies: list[Tensor] = []  # kept alive, so that storages are not reused

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is Tensor.cpu:
            self.count += 1
            copied = args[0].clone()
            self._copies.append(copied)
            self._on_host.add(copied.untyped_storage().data_ptr())
            return copied
        # Integers are not counted: the CPU path of the experts and the batch on the host read them.
        if func in self.READS and args[0].is_floating_point():
            self.count += args[0].untyped_storage().data_ptr() not in self._on_host
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("micro_batches", [1, 2])
@pytest.mark.parametrize("bias", ["sign", "none"])
def test_step_synchronizes_once(bias: str, micro_batches: int) -> None:
    engine, run = make_engine(*SMALL, f"balance={{bias: {bias}, bias_per_modality: false}}")
    engine.step = lambda rate, norm_limit: 1.0  # type: ignore[method-assign]  # clipping reads its norm
    batches = [make_batch(4) for _ in range(micro_batches)]
    with _CountSynchronizations() as synchronizations:
        result = train_step(engine, batches, run, step=0, learning_rate=1e-2, coactivation=True)
    assert synchronizations.count == 1
    assert result.biases.shape == ((1, 1, 4) if bias == "sign" else (0, 1, 4))
    assert {field.dtype for field in (*result.router, result.tokens_M)} == {torch.float64}
    assert result.router.coactivation_EE.shape == (1, 4, 4) and result.biases.dtype == torch.float32
