"""Names of things by their addresses: the last component, and as many parent folders as needed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Sequence


def lengthen_equal_names(
    components: Sequence[Sequence[str]],
    join: Callable[[Sequence[str]], str],
    taken: Collection[str] = (),
) -> list[str]:
    """A name for each address; equal ones, or those that are `taken`, get parent folders.

    Names stay equal where the folders do not distinguish them either.

    Args:
        components: The components of each address, at least one.
        join: The name made of the last components of an address.
        taken: Names of other things.
    """
    used = [1] * len(components)
    while True:
        names = [join(parts[-n:]) for parts, n in zip(components, used, strict=True)]
        counts = Counter([*names, *taken])
        longer = [
            index
            for index, name in enumerate(names)
            if counts[name] > 1 and used[index] < len(components[index])
        ]
        if not longer:
            return names
        for index in longer:
            used[index] += 1
