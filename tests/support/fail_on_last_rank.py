"""The last rank fails at once, the others hang: `torchrun ... -m
tests.support.fail_on_last_rank`."""

from __future__ import annotations

import os
import sys
import time

if __name__ == "__main__":
    if int(os.environ["RANK"]) == int(os.environ["WORLD_SIZE"]) - 1:
        sys.exit("this rank fails, as the test wants")
    time.sleep(600)
