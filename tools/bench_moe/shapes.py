"""Sizes of the benchmarked layers: like those in training, scaled for a CPU or a GPU."""

from __future__ import annotations

from typing import NamedTuple


class Bounds(NamedTuple):
    """Floor and goal of a ratio; None means no bound."""

    floor: float | None = None
    goal: float | None = None


EVEN, UNEVEN = "even", "uneven"
LOADS = {
    EVEN: "all experts are equally likely; the busiest has 1.1 to 1.3 times the mean load",
    UNEVEN: "probabilities decrease linearly from the first expert to the last; the busiest has "
    "about twice the mean load, the least used a few percent of it (in docs/balancing.md: 1.5 "
    "times the mean with a balance loss, 3.1 times without balancing)",
}
"""Distributions of tokens over the experts."""


class Shape(NamedTuple):
    """Size of one MoE layer and its input."""

    name: str
    tokens: int
    width: int
    hidden: int
    """Hidden width of one SwiGLU expert."""
    experts: int
    k: int
    """Experts per token."""
    speedup: Bounds = Bounds()
    """Bounds of the speed relative to DeepSpeed's layer."""
    overhead: Bounds = Bounds()
    """Bounds of the time relative to a dense network with equal active FLOPs."""
    load: str = EVEN
    """Distribution of tokens over the experts, one of `LOADS`."""
    full_tokens: int = 0
    """Original number of tokens of a reduced shape; 0 if the shape is not reduced."""

    @property
    def label(self) -> str:
        """Name and load; for a reduced shape also the number of tokens."""
        label = f"{self.name}, {self.load}"
        return f"{label}, {self.tokens:,} tokens" if self.full_tokens else label

    def with_tokens(self, tokens: int) -> Shape:
        """The same layer with fewer tokens and the same bounds."""
        return self._replace(tokens=tokens, full_tokens=self.full_tokens or self.tokens)

    def describe(self) -> str:
        """One-line description for tables."""
        return (
            f"{self.tokens:,} tokens of width {self.width}, {self.experts} experts of width "
            f"{self.hidden}, top-{self.k}"
        )

    @property
    def flops(self) -> float:
        """FLOPs of one forward and backward pass: matrix products of the active experts and the
        router."""
        weights_per_token = 3 * self.width * self.hidden * self.k + self.width * self.experts
        return 6.0 * self.tokens * weights_per_token

    def bytes(self, element_size: int) -> float:
        """Minimum memory traffic of one forward and backward pass.

        Weights are read twice and their gradients written once. Of the tensors `[tokens, width]`,
        the input is read twice, the output and the input gradient are written, and the output
        gradient is read.

        Args:
            element_size: Bytes per element.
        """
        weights = 3 * self.experts * self.width * self.hidden + self.experts * self.width
        return float(element_size * (3 * weights + 5 * self.tokens * self.width))


CPU_BOUNDS = Bounds(1.0, None), Bounds(1.30, None)
"""Bounds of every single CPU shape: speedup, overhead."""
CPU_SHAPES = (
    Shape("small", 1024, 256, 512, 8, 2, *CPU_BOUNDS),
    Shape("wide", 2048, 384, 1536, 16, 2, *CPU_BOUNDS),
    Shape("fine", 2048, 384, 512, 32, 4, *CPU_BOUNDS),
    Shape("many", 4096, 256, 512, 64, 2, *CPU_BOUNDS),
)
MIN_TOKENS = 2048
"""A layer that runs out of memory is not retried with fewer tokens than this."""
CPU_MEAN = Bounds(1.3, 1.5), Bounds(None, 1.15)
"""Bounds of the geometric means over all CPU shapes: speedup, overhead."""
GPU_SHAPES = (
    Shape("wide", 32768, 1024, 4096, 8, 2, Bounds(1.2, 1.4), Bounds(1.25, 1.15)),
    Shape("fine", 32768, 2048, 2048, 64, 4, Bounds(1.5, 2.0), Bounds(1.45, 1.25)),
    Shape("many", 32768, 2048, 768, 128, 8, Bounds(2.0, 3.0), Bounds(2.0, 1.5)),
)
GROUPED_PEERS = Bounds(0.95, 1.15)
"""Bounds of the speed relative to other layers with grouped matrix products, on a GPU."""
QUICK_SHAPES = (Shape("tiny 1", 96, 32, 24, 4, 2), Shape("tiny 2", 64, 32, 16, 8, 3))
"""Minimal shapes to test that the benchmark runs; their measurements are meaningless."""
