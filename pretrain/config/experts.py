"""Settings of the sparse layers: `moe`, how tokens are routed, and `balance`, what keeps the
experts in use."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from data_pipeline.common.errors import require


@dataclass(frozen=True, kw_only=True)
class MoEConfig:
    """The sparse feed-forward layers of the trunk."""

    num_experts: int = 8
    """Routed experts of a layer, over all ranks (E)."""
    top_k: int = 2
    """Experts each token visits (K)."""
    expert_width: int = 64
    """Hidden width of one SwiGLU expert."""
    shared_experts: int = 1
    """Experts that every token visits, beside the routed ones."""
    score_func: Literal["softmax", "sigmoid"] = "softmax"
    """How router logits become gate scores."""
    temperature: float = 1.0
    """Multiplies the router logits before the score (`a` in softmax(a x logits))."""
    norm_topk_prob: bool = True
    """Let the weights of the chosen experts sum to one."""
    router_input: Literal["token", "caption"] = "token"
    """What the router reads: the token; or also, for text in the blocks from `model.fusion_layer`
    on, the caption so far. Patches never read the caption, so that an image's embedding does not
    depend on it."""
    routing: Literal["top_k", "sampled", "noisy_top_k", "expert_choice"] = "top_k"
    """Who chooses: each token its best experts; experts drawn by their scores (Gumbel top-k); its
    best ones by noisy logits (V-MoE); or every expert its best patches of each image, and text its
    best experts."""
    noise_std: float = 1.0
    """Deviation of the noise of `choice: noisy`, as a multiple of 1 / num_experts."""
    capacity_factor: float = 0.0
    """Places of an expert as a multiple of its fair share while training; 0 means that no choice is
    ever dropped. Judging never drops any."""
    capacity_priority: Literal["position", "random", "batch"] = "position"
    """Who comes first where places are short: earlier pairs, and of a pair its patches; a random
    order; or the surest tokens (V-MoE's batch prioritized routing). First choices of all tokens
    come before second ones."""
    capacity_group_size: int = 8
    """Consecutive pairs of the global batch that share the places; must divide
    `batch.micro_batch_size`."""
    pools: Literal["shared", "modality"] = "shared"
    """Whether all experts serve both modalities, or some serve patches and the others text."""
    image_experts: int = 0
    """Experts that serve patches with `pools: modality`, the first ones; 0 means half of them."""
    start: int = 1
    """First block with experts."""
    every: int = 1
    """Every how many blocks from `start` on."""
    stop: int = -1
    """Block before which the experts end; -1 means all blocks to the last."""
    backend: Literal["auto", "grouped", "loop", "deepspeed"] = "auto"
    """Expert computation: one grouped matrix product, or a loop over the experts; or DeepSpeed's
    own MoE layer while training, to compare with."""

    def __post_init__(self) -> None:
        require(
            self.num_experts >= 1, f"moe.num_experts is {self.num_experts}, but must be at least 1"
        )
        require(
            1 <= self.top_k <= self.num_experts,
            f"moe.top_k is {self.top_k}, but must lie in 1..moe.num_experts ({self.num_experts})",
        )
        require(self.shared_experts >= 0, f"moe.shared_experts is {self.shared_experts}, below 0")
        require(
            self.temperature > 0, f"moe.temperature is {self.temperature}, but must be positive"
        )
        require(self.every >= 1, f"moe.every is {self.every}, but must be at least 1")
        require(self.noise_std > 0, f"moe.noise_std is {self.noise_std}, but must be positive")
        require(
            self.capacity_factor >= 0,
            f"moe.capacity_factor is {self.capacity_factor}, below 0 (0 means no limit)",
        )
        require(
            self.capacity_group_size >= 1,
            f"moe.capacity_group_size is {self.capacity_group_size}, but must be at least 1",
        )
        require(
            not (self.routing == "expert_choice" and self.capacity_factor),
            f"moe.routing is expert_choice, which fills every expert evenly by itself, but moe.capacity_factor is "
            f"{self.capacity_factor}; set moe.capacity_factor=0",
        )
        if self.pools == "modality":
            smaller = min(self.image_pool, self.num_experts - self.image_pool)
            require(
                smaller >= self.top_k,
                f"moe.pools is modality with {self.image_pool} experts for patches and "
                f"{self.num_experts - self.image_pool} for text; each pool needs at least "
                f"moe.top_k ({self.top_k})",
            )
        else:
            require(
                self.image_experts == 0,
                f"moe.image_experts is {self.image_experts}, which only moe.pools=modality uses",
            )

    @property
    def image_pool(self) -> int:
        """Experts that serve patches; all of them when the pool is shared."""
        if self.pools == "shared":
            return self.num_experts
        return self.image_experts or self.num_experts // 2

    def pool(self, modality: int) -> slice:
        """The experts that serve a modality (0 image, 1 text)."""
        if self.pools == "shared":
            return slice(0, self.num_experts)
        return (
            slice(0, self.image_pool) if modality == 0 else slice(self.image_pool, self.num_experts)
        )

    def pool_slices(self) -> tuple[slice, ...]:
        """Every pool once."""
        return (self.pool(0),) if self.pools == "shared" else (self.pool(0), self.pool(1))

    @property
    def noise_deviation(self) -> float:
        """Deviation of the noise on logits."""
        return self.noise_std / self.num_experts

    @property
    def is_random(self) -> bool:
        """Whether anything about training's routing is drawn."""
        by_chance = self.capacity_factor > 0 and self.capacity_priority == "random"
        return self.routing in ("sampled", "noisy_top_k") or by_chance

    def patches_per_expert(self, num_patches: int) -> int:
        """Patches of an image that each expert takes with `choice: expert`: a fair share, rounded
        up."""
        return min(num_patches, -(-num_patches * self.top_k // self.image_pool))

    def blocks(self, num_layers: int) -> tuple[int, ...]:
        """Indices of the blocks that hold experts, in a trunk of `num_layers`."""
        stop = num_layers if self.stop < 0 else min(self.stop, num_layers)
        return tuple(range(self.start, stop, self.every))


@dataclass(frozen=True, kw_only=True)
class ByModality:
    """A number for each modality."""

    image: float = 0.0
    """For patches."""
    text: float = 0.0
    """For text tokens."""


@dataclass(frozen=True, kw_only=True)
class BalanceConfig:
    """What keeps the experts in use: losses on statistics of the global batch, and biases without a
    loss.

    Every loss is averaged over the MoE layers; a weight of 0 turns it off.
    """

    balance_weight: float = 1e-3
    """Balance loss of Switch and GShard (1.0 at perfect balance)."""
    router_z_weight: float = 1e-3
    """Router z-loss of ST-MoE: mean of logsumexp(logits) squared."""
    importance_weight: float = 0.0
    """Squared coefficient of variation of the experts' summed gate scores (V-MoE)."""
    load_weight: float = 0.0
    """The same of the probability of being chosen when the noise is drawn anew; needs `moe.routing:
    noisy`, and no bias."""
    local_entropy_weight: ByModality = field(default_factory=ByModality)
    """Mean entropy of a token's gate scores (LIMoE): with a weight above 0 the router becomes
    surer."""
    global_entropy_weight: ByModality = field(default_factory=ByModality)
    """How far the entropy of a modality's mean gate scores falls short of log S (LIMoE)."""
    global_entropy_experts: ByModality = field(default_factory=ByModality)
    """S: experts that a modality should use at least, about, 1 or more; 0 means half of all for
    patches, a quarter for text."""
    expert_l1_weight: float = 0.0
    """Sum of the absolute weights of the routed experts of all layers (a Laplace prior of scale 1 /
    weight)."""
    router_l1_weight: float = 0.0
    """The same of the routers."""
    bias: Literal["none", "sign", "zscore"] = "none"
    """Biases of the choice that follow the load: not at all, by a fixed step, or by how far an
    expert is off. With `moe.routing: expert_choice` they steer the text: patches are spread evenly by the
    choice itself."""
    bias_rate: float = 1e-3
    """How far a bias moves in one step."""
    bias_per_modality: bool = False
    """One bias for patches and one for text, each from its own load."""
    bias_freeze_ratio: float = 0.03
    """Last part of the run in which biases stay as they are."""
