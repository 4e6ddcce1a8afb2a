"""Memory that tensors give back stays with the process."""

from __future__ import annotations

import subprocess
import sys

import pytest

PROGRAM = """
import resource, sys
import torch
from pretrain.parallel.environment import keep_freed_memory
if sys.argv[1] == "keep":
    keep_freed_memory()
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(3 << 22)  # 48 MiB: more than the C library ever keeps of its own accord
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(min(faults() for _ in range(20)))  # the heap needs a few rounds to settle
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's knobs")
def test_pages_of_a_freed_tensor_are_used_again() -> None:
    found = {
        how: int(
            subprocess.run(
                [sys.executable, "-c", PROGRAM, how], check=True, capture_output=True, text=True
            ).stdout
        )
        for how in ("keep", "return")
    }
    assert found["keep"] < 100 < found["return"]
