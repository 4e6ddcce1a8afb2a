"""The layers that are measured: sizes that people train, small enough for a CPU or large enough for
a GPU."""

from __future__ import annotations

from typing import NamedTuple


class Bounds(NamedTuple):
    """What is asked of a ratio; None asks nothing."""

    floor: float | None = None
    goal: float | None = None


EVEN, UNEVEN = "even", "uneven"
LOADS = {
    EVEN: "every expert is as likely as any other, so the busiest has 1.1 to 1.3 times the mean",
    UNEVEN: "chances fall evenly from the first expert to the last: the busiest has about twice the mean, the idlest a "
    "few percent of it (in docs/balancing.md a balance loss leaves 1.5, no balancing 3.1 times the mean)",
}
"""How tokens are spread over the experts."""


class Shape(NamedTuple):
    """One MoE layer and its tokens."""

    name: str
    tokens: int
    width: int
    hidden: int
    """Hidden width of one SwiGLU expert."""
    experts: int
    k: int
    """Experts each token visits."""
    faster: Bounds = Bounds()
    """Speed against DeepSpeed's own layer."""
    overhead: Bounds = Bounds()
    """Time against a dense network of equal active FLOPs."""
    load: str = EVEN
    """How tokens are spread over the experts, one of `LOADS`."""
    whole_tokens: int = 0
    """Tokens of the whole shape, where these are fewer of them; 0 for the whole shape itself."""

    @property
    def label(self) -> str:
        """Name and load; and the number of tokens where it is not that of the whole shape."""
        return f"{self.name}, {self.load}" + (
            f", {self.tokens:,} tokens" if self.whole_tokens else ""
        )

    def with_fewer(self, tokens: int) -> Shape:
        """The same layer with fewer tokens, asked as much."""
        return self._replace(tokens=tokens, whole_tokens=self.whole_tokens or self.tokens)

    def words(self) -> str:
        """For tables."""
        return (
            f"{self.tokens:,} tokens of {self.width}, {self.experts} experts of {self.hidden}, "
            f"{self.k} a token"
        )

    @property
    def flops(self) -> float:
        """Of one forward and backward pass: matrix products of the chosen experts and the
        router."""
        return (
            6.0 * self.tokens * (3 * self.width * self.hidden * self.k + self.width * self.experts)
        )

    def bytes(self, element: int) -> float:
        """Least traffic of one forward and backward pass, for numbers of so many bytes.

        Weights are read twice and their gradients written once; tokens are read twice, answers and
        the gradient of the tokens written and the gradient of the answers read once.
        """
        weights = 3 * self.experts * self.width * self.hidden + self.experts * self.width
        return float(element * (3 * weights + 5 * self.tokens * self.width))


EVERY_CPU = Bounds(1.0, None), Bounds(1.30, None)
CPU_SHAPES = (
    Shape("small", 1024, 256, 512, 8, 2, *EVERY_CPU),
    Shape("wide", 2048, 384, 1536, 16, 2, *EVERY_CPU),
    Shape("fine", 2048, 384, 512, 32, 4, *EVERY_CPU),
    Shape("many", 4096, 256, 512, 64, 2, *EVERY_CPU),
)
LEAST_TOKENS = 2048
"""A layer that runs out of memory is not tried with fewer tokens than these."""
CPU_MEAN = Bounds(1.3, 1.5), Bounds(None, 1.15)
"""Of the geometric mean over the CPU's shapes: speed, overhead."""
GPU_SHAPES = (
    Shape("wide", 32768, 1024, 4096, 8, 2, Bounds(1.2, 1.4), Bounds(1.25, 1.15)),
    Shape("fine", 32768, 2048, 2048, 64, 4, Bounds(1.5, 2.0), Bounds(1.45, 1.25)),
    Shape("many", 32768, 2048, 768, 128, 8, Bounds(2.0, 3.0), Bounds(2.0, 1.5)),
)
GROUPED_PEERS = Bounds(0.95, 1.15)
"""Speed against the other layers with grouped products, on GPU."""
QUICK_SHAPES = (Shape("tried", 96, 32, 24, 4, 2), Shape("tried also", 64, 32, 16, 8, 3))
"""To try the machinery; figures mean nothing."""
