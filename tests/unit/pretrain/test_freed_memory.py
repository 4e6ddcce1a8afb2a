"""`retain_freed_memory`: memory of freed tensors is reused without page faults."""

from __future__ import annotations

import subprocess
import sys

import pytest

PROGRAM = """
import resource, sys
import torch
from pretrain.parallel.environment import retain_freed_memory
if sys.argv[1] == "keep":
    retain_freed_memory()
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(3 << 22)  # 48 MiB, above the largest default mmap threshold of glibc
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(min(faults() for _ in range(20)))  # the heap stabilizes after a few allocations
"""


@pytest.mark.skipif(sys.platform != "linux", reason="needs glibc's mallopt")
def test_pages_of_a_freed_tensor_are_reused() -> None:
    faults = {}
    for mode in ("keep", "return"):
        command = [sys.executable, "-c", PROGRAM, mode]
        result = subprocess.run(command, check=True, capture_output=True, text=True)
        faults[mode] = int(result.stdout)
    assert faults["keep"] < 100 < faults["return"]
