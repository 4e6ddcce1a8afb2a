"""Expert widths that validation accepts, against those that torch's grouped product supports."""

from __future__ import annotations

import contextlib

import pytest
import torch

from pretrain.config.presets import load_run
from pretrain.config.validate import problems
from pretrain.moe.experts import grouped_swiglu


@pytest.mark.parametrize(
    ("compute", "width", "backend"),
    [
        ("bf16", 60, "loop"),
        ("fp32", 61, "loop"),
        ("fp32", 60, "auto"),
        ("fp32", 60, "grouped"),
        ("bf16", 56, "grouped"),
    ],
)
def test_supported_expert_widths(compute: str, width: int, backend: str) -> None:
    moe = f"moe={{expert_width: {width}, backend: {backend}}}"
    run = load_run("tiny", [f"precision.compute={compute}", moe])
    assert problems(run, 1) == []


@pytest.mark.parametrize(
    ("dtype", "width", "is_supported"),
    [
        (torch.float32, 62, False),
        (torch.float32, 60, True),
        (torch.bfloat16, 60, False),
        (torch.bfloat16, 56, True),
    ],
)
def test_expert_widths_that_grouped_mm_supports(
    dtype: torch.dtype, width: int, is_supported: bool
) -> None:
    """The validated widths are those that torch's grouped matrix product accepts."""
    shapes = ((width, 16), (16, width), (width, 16))
    weights = [torch.randn(2, *shape, dtype=dtype) for shape in shapes]
    expectation = (
        contextlib.nullcontext()
        if is_supported
        else pytest.raises(RuntimeError, match="multiple of 16 bytes")
    )
    with expectation:
        grouped_swiglu(torch.randn(6, 16, dtype=dtype), torch.tensor([4, 2]), *weights)
