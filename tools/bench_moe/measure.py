"""Benchmark of one shape: build the implementations, compare them with the reference, time them."""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor

from tools.bench_moe.deepspeed_layers import auto_ep, native
from tools.bench_moe.implementations import (
    Implementation,
    Unavailable,
    Weights,
    dense,
    ours,
    sample_tokens,
    sample_weights,
)
from tools.bench_moe.limits import peak_tensor_bytes, stopwatch_of
from tools.bench_moe.reference import TOLERANCES, reference_layer, tensor_errors
from tools.bench_moe.results import AUTO_EP, DEEPSPEED, DENSE, OURS, TORCHTITAN, ShapeResult
from tools.bench_moe.shapes import MIN_TOKENS, Shape
from tools.bench_moe.torchtitan_layer import torchtitan
from tools.reporting import log_progress
from tools.timing import interleave

OUT_OF_MEMORY = "out of memory"
Build = Callable[[Shape, Weights], Implementation]
PEERS: Mapping[str, Build] = {DEEPSPEED: native, AUTO_EP: auto_ep, TORCHTITAN: torchtitan}


def measure(
    shape: Shape,
    device: torch.device,
    dtype: torch.dtype,
    *,
    repeats: int,
    peers: Mapping[str, Build] = PEERS,
) -> list[ShapeResult]:
    """Measure a shape, and smaller ones for peers that run out of memory.

    Those peers are measured again, with this project's layer and the dense network, with half as
    many tokens until they fit.
    """
    full = measure_shape(shape, device, dtype, repeats=repeats, peers=peers)
    results, pending, tokens = [full], full.out_of_memory, shape.tokens // 2
    while pending and tokens >= MIN_TOKENS:
        reduced = measure_shape(
            shape.with_tokens(tokens),
            device,
            dtype,
            repeats=repeats,
            peers={name: peers[name] for name in pending},
        )
        for name in pending:
            outcome = reduced.not_measured.get(name, "measured")
            full.not_measured[name] = f"{OUT_OF_MEMORY}; with {tokens:,} tokens: {outcome}"
        if set(pending) - set(reduced.out_of_memory):
            results.append(reduced)
        pending, tokens = reduced.out_of_memory, tokens // 2
    return results


def measure_shape(
    shape: Shape,
    device: torch.device,
    dtype: torch.dtype,
    *,
    repeats: int,
    peers: Mapping[str, Build] = PEERS,
) -> ShapeResult:
    """Build, compare and time all implementations; a reduced shape is timed only if a peer fits."""
    result = ShapeResult(shape)
    weights = sample_weights(shape, device, dtype)
    x_TD, grad_TD = sample_tokens(shape, weights)
    layers = _build_correct(result, {OURS: ours, **peers}, weights, x_TD, grad_TD)
    layers[DENSE] = dense(shape, device, dtype)
    _remove_out_of_memory(result, layers, x_TD, grad_TD)

    omitted = "".join(f"; no {name} ({reason})" for name, reason in result.not_measured.items())
    if shape.full_tokens and not layers.keys() & peers.keys():
        log_progress(f"{shape.label}: not measured{omitted}")
        return result
    log_progress(f"{shape.label}: {', '.join(layers)} interleaved{omitted}")
    work = {name: partial(layer.run, x_TD, grad_TD) for name, layer in layers.items()}
    result.seconds = interleave(work, repeats=repeats, stopwatch=stopwatch_of(device))

    for name, layer in layers.items():
        # Memory allocated before the measurement must not include gradients of another layer.
        for other in layers.values():
            other.module.zero_grad(set_to_none=True)
        x_TD.grad = None
        result.peak_bytes[name] = peak_tensor_bytes(partial(layer.run, x_TD, grad_TD), device)
    del layers, work
    gc.collect()
    return result


def _build_correct(
    result: ShapeResult,
    builders: Mapping[str, Build],
    weights: Weights,
    x_TD: Tensor,
    grad_TD: Tensor,
) -> dict[str, Implementation]:
    """Build the implementations that agree with the reference; record problems in `result`."""
    reference = reference_layer(x_TD, grad_TD, weights, result.shape.k)
    tolerance = TOLERANCES[x_TD.dtype]
    layers: dict[str, Implementation] = {}

    def build_and_compare(build: Build) -> tuple[Implementation, dict[str, float]]:
        layer = build(result.shape, weights)
        return layer, tensor_errors(layer, x_TD, grad_TD, reference)

    for name, build in builders.items():
        try:
            layers[name], errors = build_and_compare(build)
        except Unavailable as error:
            result.not_measured[name] = str(error)
        except Exception as error:  # any failure of another project's layer is only recorded
            if name == OURS:
                raise
            _record_failure(result, name, error)
        else:
            result.errors[name] = errors
            worst = max(errors, key=errors.__getitem__)
            if errors[worst] > tolerance:
                result.incorrect.append(name)
                result.not_measured[name] = (
                    f"incorrect: relative error of {worst} is {errors[worst]:.1e}, tolerance "
                    f"{tolerance:.0e}"
                )
                del layers[name]
        _free_memory_after(result, name, x_TD)
    return layers


def _remove_out_of_memory(
    result: ShapeResult, layers: dict[str, Implementation], x_TD: Tensor, grad_TD: Tensor
) -> None:
    """Remove the layers that run out of memory while the weights and gradients of all others are
    allocated, as during timing."""
    for name in reversed(list(layers)):  # the dense network, built last, has no gradients yet
        try:
            layers[name].run(x_TD, grad_TD)
        except torch.OutOfMemoryError as error:
            if name in (OURS, DENSE):
                raise
            del layers[name]
            _record_failure(result, name, error)
        _free_memory_after(result, name, x_TD)


def _record_failure(result: ShapeResult, name: str, error: Exception) -> None:
    if isinstance(error, torch.OutOfMemoryError):
        result.out_of_memory.append(name)
        result.not_measured[name] = OUT_OF_MEMORY
    else:
        result.not_measured[name] = f"{type(error).__name__}: {error}".splitlines()[0]


def _free_memory_after(result: ShapeResult, name: str, x_TD: Tensor) -> None:
    """Free all memory of a layer that ran out of it.

    Call it after the `except` block: the exception references the layer's frames and tensors.
    """
    if name in result.out_of_memory:
        x_TD.grad = None
        gc.collect()
        torch.cuda.empty_cache()
