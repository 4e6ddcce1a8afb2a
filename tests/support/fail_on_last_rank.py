"""A distributed program whose last rank fails immediately while the others hang."""

from __future__ import annotations

import os
import sys
import time

if __name__ == "__main__":
    if int(os.environ["RANK"]) == int(os.environ["WORLD_SIZE"]) - 1:
        sys.exit("the last rank fails on purpose")
    time.sleep(600)
