"""Random states of a process, as JSON."""

from __future__ import annotations

from typing import Any

import torch


def get_random_state() -> dict[str, Any]:
    """States of torch's generators on CPU and on this rank's GPU, in hexadecimal.

    Data order, augmentation and initialization use named seeds and need no state.
    """
    state = {"torch_cpu": bytes(torch.get_rng_state().tolist()).hex()}
    if torch.cuda.is_available():
        state["torch_cuda"] = bytes(torch.cuda.get_rng_state().tolist()).hex()
    return state


def set_random_state(state: dict[str, Any]) -> None:
    """Restore what `get_random_state` returned on the same type of device."""
    torch.set_rng_state(torch.frombuffer(bytearray.fromhex(state["torch_cpu"]), dtype=torch.uint8))
    if "torch_cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(
            torch.frombuffer(bytearray.fromhex(state["torch_cuda"]), dtype=torch.uint8)
        )
