"""Random numbers that are a pure function of what they are for: no generator, no state.

A number is a hash of (the step's draw, the layer, what it is for, the token, the expert). So a
token draws the same on any rank, in any micro-batch and when its activations are computed again;
and the hash is made of whole numbers, so its bits are the same on CPU and GPU. The hash is the
finalizer of SplitMix64 (Steele, Lea and Flood 2014, doi:10.1145/2660193.2660195).

Shapes: B pairs, T tokens, E experts.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

CHOICE, PRIORITY = 1, 2
"""What a number is for: the choice of experts, the order in which they are filled."""

_GOLDEN = 0x9E3779B97F4A7C15
_FACTORS = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
_TEXT = 1 << 32
"""Positions of text tokens begin here, those of patches at 0."""


def step_draw(seed: int, step: int) -> int:
    """The number that decides everything random about routing in one step, in `[0, 2**63)`."""
    return mix_int(mix_int(seed) + step) >> 1


def token_identity(
    pair_ids_B: Tensor, num_patches: int, text_positions: Tensor, context_length: int
) -> Tensor:
    """A hash of every token of the flat list, int64 `[tokens]`.

    Args:
        pair_ids_B: Numbers of the samples in the whole data, int64.
        num_patches: Patches of a picture; their places are numbered row by row.
        text_positions: Flat indices b x S + s of the valid text tokens, int64.
        context_length: S.
    """
    sample_B = mix(pair_ids_B * _signed(_GOLDEN))
    places_P = torch.arange(num_patches, device=pair_ids_B.device)
    patches = (sample_B.unsqueeze(1) + places_P).flatten()
    if not context_length:
        return mix(patches)
    sample_T = sample_B.index_select(
        0, torch.div(text_positions, context_length, rounding_mode="floor")
    )
    return mix(torch.cat([patches, sample_T + (text_positions % context_length + _TEXT)]))


def hash_numbers(
    identity_T: Tensor, *, draw: int, block: int, purpose: int, size: int = 1
) -> Tensor:
    """`size` hashes of every token, int64 `[tokens, size]`, evenly spread over all 2**64 values."""
    key = mix_int(mix_int(mix_int(draw) + block) + purpose)
    columns = torch.arange(1, size + 1, device=identity_T.device) * _signed(_GOLDEN)
    return mix(mix(identity_T ^ _signed(key)).unsqueeze(1) + columns)


def uniform(identity_T: Tensor, *, draw: int, block: int, purpose: int, size: int) -> Tensor:
    """Uniform numbers, 0 and 1 left out, float32 `[tokens, size]`: odd multiples of 2**-24."""
    bits = _shift(hash_numbers(identity_T, draw=draw, block=block, purpose=purpose, size=size), 41)
    return (bits.to(torch.float32) + 0.5) * 2.0**-23


def gumbel(identity_T: Tensor, *, draw: int, block: int, size: int) -> Tensor:
    """Standard Gumbel numbers for choices, float32 `[tokens, size]`."""
    return -torch.log(
        -torch.log(uniform(identity_T, draw=draw, block=block, purpose=CHOICE, size=size))
    )


def normal(identity_T: Tensor, *, draw: int, block: int, size: int) -> Tensor:
    """Standard normal numbers for choices, float32 `[tokens, size]`."""
    u = uniform(identity_T, draw=draw, block=block, purpose=CHOICE, size=size)
    return torch.erfinv(2 * u - 1) * math.sqrt(2)


def mix(x: Tensor) -> Tensor:
    """Scramble every int64 of `x`; one-to-one. Products wrap around, which torch's do."""
    x = (x ^ _shift(x, 30)) * _signed(_FACTORS[0])
    x = (x ^ _shift(x, 27)) * _signed(_FACTORS[1])
    return x ^ _shift(x, 31)


def mix_int(x: int) -> int:
    """`mix` of one whole number, as unsigned 64 bits."""
    x &= _ALL
    x = ((x ^ (x >> 30)) * _FACTORS[0]) & _ALL
    x = ((x ^ (x >> 27)) * _FACTORS[1]) & _ALL
    return x ^ (x >> 31)


_ALL = (1 << 64) - 1


def _shift(x: Tensor, bits: int) -> Tensor:
    """Logical shift to the right; torch's own copies the sign."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _signed(x: int) -> int:
    """The int64 with the same 64 bits."""
    return x - (1 << 64) if x >> 63 else x
