"""Counter-based random numbers for routing: pure functions of their arguments, without generator
state.

A number is a hash of (step seed, block, purpose, token, expert). A token therefore gets the same
numbers on any rank, in any micro-batch, and when its activations are recomputed. The hash uses only
integer arithmetic, so its bits are identical on CPU and GPU.

Source: the hash is the finalizer of SplitMix64 (Steele, Lea and Flood 2014,
doi:10.1145/2660193.2660195).

Shapes: B pairs, P patches, T tokens, E experts.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

SELECTION, PRIORITY = 1, 2
"""Purpose of a number: expert selection, or the order in which tokens fill the capacity."""

# Constants of SplitMix64; the first is 2**64 / golden ratio.
_GOLDEN = 0x9E3779B97F4A7C15
_FACTORS = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
_TEXT_OFFSET = 1 << 32
"""Offset of text positions in token hashes; patch positions start at 0."""
_MASK_64 = (1 << 64) - 1


def derive_step_seed(seed: int, step: int) -> int:
    """Seed of all random routing decisions of one step, in `[0, 2**63)`."""
    return mix_int(mix_int(seed) + step) >> 1


def hash_tokens(
    pair_ids_B: Tensor, num_patches: int, text_positions: Tensor, context_length: int
) -> Tensor:
    """Hash of every token of the flat list, int64 `[tokens]`.

    Args:
        pair_ids_B: Index of each sample in the data set, int64.
        num_patches: Patches per image, in row-major order.
        text_positions: Flat indices b x S + s of the valid text tokens, int64.
        context_length: S.
    """
    sample_B = mix(pair_ids_B * _signed(_GOLDEN))
    position_P = torch.arange(num_patches, device=pair_ids_B.device)
    patches = (sample_B.unsqueeze(1) + position_P).flatten()
    if not context_length:
        return mix(patches)

    pair_T = torch.div(text_positions, context_length, rounding_mode="floor")
    sample_T = sample_B.index_select(0, pair_T)
    text = sample_T + (text_positions % context_length + _TEXT_OFFSET)
    return mix(torch.cat([patches, text]))


def random_int64(
    token_hash_T: Tensor, *, step_seed: int, block_index: int, purpose: int, size: int = 1
) -> Tensor:
    """`size` random integers for every token, int64 `[tokens, size]`, uniform over all 2**64
    values."""
    key = mix_int(mix_int(mix_int(step_seed) + block_index) + purpose)
    columns = torch.arange(1, size + 1, device=token_hash_T.device) * _signed(_GOLDEN)
    return mix(mix(token_hash_T ^ _signed(key)).unsqueeze(1) + columns)


def uniform(
    token_hash_T: Tensor, *, step_seed: int, block_index: int, purpose: int, size: int
) -> Tensor:
    """Uniform numbers in (0, 1), both ends excluded, float32 `[tokens, size]`: odd multiples of
    2**-24."""
    random = random_int64(
        token_hash_T, step_seed=step_seed, block_index=block_index, purpose=purpose, size=size
    )
    return (_shift(random, 41).to(torch.float32) + 0.5) * 2.0**-23


def gumbel(token_hash_T: Tensor, *, step_seed: int, block_index: int, size: int) -> Tensor:
    """Standard Gumbel numbers for expert selection, float32 `[tokens, size]`."""
    u = uniform(
        token_hash_T, step_seed=step_seed, block_index=block_index, purpose=SELECTION, size=size
    )
    return -torch.log(-torch.log(u))


def normal(token_hash_T: Tensor, *, step_seed: int, block_index: int, size: int) -> Tensor:
    """Standard normal numbers for expert selection, float32 `[tokens, size]`."""
    u = uniform(
        token_hash_T, step_seed=step_seed, block_index=block_index, purpose=SELECTION, size=size
    )
    return torch.erfinv(2 * u - 1) * math.sqrt(2)


def mix(x: Tensor) -> Tensor:
    """SplitMix64's finalizer on every int64 of `x`, a bijection; products wrap around modulo
    2**64."""
    x = (x ^ _shift(x, 30)) * _signed(_FACTORS[0])
    x = (x ^ _shift(x, 27)) * _signed(_FACTORS[1])
    return x ^ _shift(x, 31)


def mix_int(x: int) -> int:
    """`mix` for a Python integer, as unsigned 64 bits."""
    x &= _MASK_64
    x = ((x ^ (x >> 30)) * _FACTORS[0]) & _MASK_64
    x = ((x ^ (x >> 27)) * _FACTORS[1]) & _MASK_64
    return x ^ (x >> 31)


def _shift(x: Tensor, bits: int) -> Tensor:
    """Logical right shift; torch's `>>` is arithmetic."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _signed(x: int) -> int:
    """The int64 with the same 64 bits."""
    return x - (1 << 64) if x >> 63 else x
