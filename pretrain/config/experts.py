"""Settings of the sparse layers: `moe` for experts and routing, `balance` for load balancing."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from data_pipeline.common.problems import Problems
from data_pipeline.common.tables import counted


@dataclass(frozen=True, kw_only=True)
class MoEConfig:
    """The sparse feed-forward layers of the trunk."""

    num_experts: int = 8
    """Number of routed experts per MoE layer, over all ranks (E)."""
    top_k: int = 2
    """Number of routed experts per token (K)."""
    expert_width: int = 64
    """Hidden width of one SwiGLU expert."""
    shared_experts: int = 1
    """Number of experts that process every token, in addition to the routed ones."""
    score_func: Literal["softmax", "sigmoid"] = "softmax"
    """Function that turns router logits into gate scores: `softmax` normalizes over the experts,
    `sigmoid` scores each expert independently."""
    temperature: float = 1.0
    """Factor on the router logits before `score_func`: score_func(temperature x logits)."""
    norm_topk_prob: bool = True
    """Normalize the weights of a token's top-k experts to a sum of 1. With `top_k: 1` the raw score
    is used in any case, so that the router has a gradient."""
    router_input: Literal["token", "caption"] = "token"
    """Input of the router: `token` is the token's hidden state. `caption` adds, for text tokens in
    blocks from `model.fusion_layer` on, logits computed from the caption up to that token. Patches
    never use the caption, so an image embedding does not depend on it."""
    routing: Literal["top_k", "sampled", "noisy_top_k", "expert_choice"] = "top_k"
    """How experts are assigned. `top_k`: the experts with the largest scores of each token.
    `sampled`: k experts sampled in proportion to the scores, without replacement (Gumbel top-k).
    `noisy_top_k`: the largest scores of logits with Gaussian noise (V-MoE). `expert_choice`: each
    expert takes its best patches of each image; text tokens use `top_k`, because expert choice is
    not causal. Noise and sampling apply to training only."""
    noise_std: float = 1.0
    """Standard deviation of the noise of `routing: noisy_top_k`, in units of 1 / num_experts."""
    capacity_factor: float = 0.0
    """Capacity of an expert during training, relative to its number of tokens under perfectly
    balanced load; assignments beyond the capacity are dropped. 0 means no limit. Evaluation never
    drops assignments."""
    capacity_priority: Literal["position", "random", "batch"] = "position"
    """Order in which assignments fill the capacity. `position`: by pair, within a pair patches
    first. `random`: a random order. `batch`: largest gate score first (batch prioritized routing,
    V-MoE). In all cases, the top-1 assignments of all tokens come before the second ones."""
    capacity_group_size: int = 8
    """Number of consecutive pairs of the global batch that share one capacity; must divide
    `batch.micro_batch_size`."""
    pools: Literal["shared", "modality"] = "shared"
    """Expert pools: `shared` routes both modalities to all experts, `modality` has separate experts
    for patches and for text."""
    image_experts: int = 0
    """Number of experts for patches with `pools: modality` (those with the lowest indices); 0 means
    half of `num_experts`."""
    start: int = 1
    """Index of the first MoE block."""
    every: int = 1
    """Distance between MoE blocks: 1 makes every block from `start` on sparse, 2 every other
    one."""
    stop: int = -1
    """Index at which the MoE blocks end (exclusive); -1 means that the last block is included."""
    backend: Literal["auto", "grouped", "loop"] = "auto"
    """Implementation of the experts: `grouped` uses one grouped matrix product, `loop` computes one
    expert after the other, and `auto` selects the faster one."""

    def problems(self) -> list[str]:
        """Numbers out of range, and options that contradict one another."""
        found = Problems(self, "moe")
        found.at_least(1, "num_experts", "every", "expert_width", "capacity_group_size")
        found.at_least(0, "shared_experts", "start")
        found.above_zero("temperature", "noise_std")
        found.at_least(0, "capacity_factor", note=" (0 means no limit)")
        found.require(
            1 <= self.top_k <= self.num_experts,
            f"moe.top_k is {self.top_k}, but must be in 1..moe.num_experts ({self.num_experts})",
        )
        found.require(
            self.stop >= -1,
            f"moe.stop is {self.stop}, but negative indices are not supported; give the index of "
            f"the block before which the MoE blocks end, or set moe.stop=-1 for no limit",
        )
        found.require(
            not (self.routing == "expert_choice" and self.uses_capacity),
            f"moe.routing is expert_choice, where all experts have equal load, but "
            f"moe.capacity_factor is {self.capacity_factor}; set moe.capacity_factor=0",
        )
        return found.messages + self._pool_problems()

    def _pool_problems(self) -> list[str]:
        found, num_text_experts = Problems(self, "moe"), self.num_experts - self.num_image_experts
        found.require(
            self.pools == "shared" or min(self.num_image_experts, num_text_experts) >= self.top_k,
            f"moe.pools is modality with {counted(self.num_image_experts, 'expert')} for patches "
            f"and {num_text_experts} for text; each pool needs at least moe.top_k ({self.top_k})",
        )
        found.require(
            self.pools == "modality" or self.image_experts == 0,
            f"moe.image_experts is {self.image_experts}, which only moe.pools=modality uses",
        )
        return found.messages

    @property
    def num_image_experts(self) -> int:
        """Number of experts for patches; all of them if the pool is shared."""
        if self.pools == "shared":
            return self.num_experts
        return self.image_experts or self.num_experts // 2

    def pool(self, modality: int) -> slice:
        """Indices of the experts for a modality (0 image, 1 text)."""
        if self.pools == "shared":
            return slice(0, self.num_experts)
        if modality == 0:
            return slice(0, self.num_image_experts)
        return slice(self.num_image_experts, self.num_experts)

    def pool_slices(self) -> tuple[slice, ...]:
        """The distinct expert pools."""
        return (self.pool(0),) if self.pools == "shared" else (self.pool(0), self.pool(1))

    @property
    def logit_noise_std(self) -> float:
        """Standard deviation of the noise that is added to the logits."""
        return self.noise_std / self.num_experts

    @property
    def uses_capacity(self) -> bool:
        """Whether the capacity of the experts is limited during training."""
        return self.capacity_factor > 0

    @property
    def uses_noise(self) -> bool:
        """Whether noise is added to the router logits during training."""
        return self.routing == "noisy_top_k"

    @property
    def is_random(self) -> bool:
        """Whether routing uses random numbers during training."""
        has_random_priority = self.uses_capacity and self.capacity_priority == "random"
        return self.uses_noise or self.routing == "sampled" or has_random_priority

    def patches_per_expert(self, num_patches: int) -> int:
        """Number of patches of an image that each expert takes with `routing: expert_choice`:
        ceil(num_patches x top_k / experts), at most `num_patches`."""
        return min(num_patches, -(-num_patches * self.top_k // self.num_image_experts))

    def blocks(self, num_layers: int) -> tuple[int, ...]:
        """Indices of the MoE blocks in a trunk of `num_layers` blocks."""
        stop = num_layers if self.stop < 0 else min(self.stop, num_layers)
        return tuple(range(self.start, stop, self.every))


@dataclass(frozen=True, kw_only=True)
class PerModality:
    """One value per modality."""

    image: float = 0.0
    """Value for patches."""
    text: float = 0.0
    """Value for text tokens."""


@dataclass(frozen=True, kw_only=True)
class BalanceConfig:
    """Load balancing of the experts: auxiliary losses and expert biases.

    The losses are functions of statistics of the global batch, averaged over the MoE layers; the L1
    terms are sums over the layers. A weight of 0 turns a loss off.
    """

    balance_weight: float = 1e-3
    """Weight of the load-balancing loss of Switch Transformer and GShard; its value is 1.0 for
    uniform routing."""
    router_z_weight: float = 1e-3
    """Weight of the router z-loss of ST-MoE: mean of logsumexp(logits) squared."""
    importance_weight: float = 0.0
    """Weight of V-MoE's importance loss: squared coefficient of variation of the experts' summed
    gate scores."""
    load_weight: float = 0.0
    """Weight of V-MoE's load loss: squared coefficient of variation of the experts' expected load
    if the noise is resampled. Needs `moe.routing: noisy_top_k` and `bias: none`."""
    local_entropy_weight: PerModality = field(default_factory=PerModality)
    """Weight of LIMoE's local entropy loss: mean entropy of a token's gate scores; reduces the
    entropy, so that the router becomes more confident."""
    global_entropy_weight: PerModality = field(default_factory=PerModality)
    """Weight of LIMoE's global entropy loss: max(0, log S - entropy of a modality's mean gate
    scores); makes the modality use at least about S experts."""
    global_entropy_experts: PerModality = field(default_factory=PerModality)
    """S of the global entropy loss, at least 1; 0 means half of `moe.num_experts` for patches and a
    quarter for text, at most the size of the pool."""
    expert_l1_weight: float = 0.0
    """Weight of the L1 norm of the routed experts of all layers (a Laplace prior of scale 1 /
    weight)."""
    router_l1_weight: float = 0.0
    """Weight of the L1 norm of the routers of all layers."""
    bias: Literal["none", "sign", "zscore"] = "none"
    """Expert biases, added to the scores for expert selection only and updated from the load after
    each step: `sign` by a fixed amount (DeepSeek-V3), `zscore` in proportion to the z-score of the
    expert's load (MoE-ViE). With `moe.routing: expert_choice` they apply to text only; patches are
    balanced by construction."""
    bias_rate: float = 1e-3
    """Update rate of the expert biases per step."""
    bias_per_modality: bool = False
    """Separate biases for patches and text, each updated from the load of its modality."""
    bias_freeze_ratio: float = 0.03
    """Last fraction of the run in which the biases are not updated."""

    def problems(self) -> list[str]:
        """Numbers out of range, and options that contradict one another."""
        found = Problems(self, "balance")
        found.at_least(
            0,
            *("balance_weight", "router_z_weight", "importance_weight", "load_weight"),
            *("expert_l1_weight", "router_l1_weight"),
        )
        for name in ("local_entropy_weight", "global_entropy_weight", "global_entropy_experts"):
            per_modality = Problems(getattr(self, name), f"balance.{name}")
            per_modality.at_least(0, "image", "text")
            found.messages += per_modality.messages
        for modality, target in vars(self.global_entropy_experts).items():
            found.require(
                not 0 < target < 1,
                f"balance.global_entropy_experts.{modality} is {target:g}, but below 1 the loss is "
                f"always 0; use at least 1, or 0 for the default",
            )
        found.require(
            not (self.load_weight and self.uses_bias),
            f"balance.load_weight is {self.load_weight}, but the expected load is computed without "
            f"balance.bias ({self.bias}), which affects the selection; set balance.bias=none, or "
            f"balance.load_weight=0",
        )
        found.require(
            self.uses_bias or not self.bias_per_modality,
            "balance.bias_per_modality is true, but balance.bias is none; set balance.bias=sign or "
            "zscore, or balance.bias_per_modality=false",
        )
        found.above_zero("bias_rate", note=" (balance.bias=none turns biases off)")
        found.within(0, 1, "bias_freeze_ratio")
        return found.messages

    @property
    def uses_losses(self) -> bool:
        """Whether any auxiliary loss or weight penalty has a weight above 0."""
        scalars = (
            *(self.balance_weight, self.router_z_weight, self.importance_weight, self.load_weight),
            *(self.expert_l1_weight, self.router_l1_weight),
        )
        entropies = (self.local_entropy_weight, self.global_entropy_weight)
        return any(scalars) or any(weight.image or weight.text for weight in entropies)

    @property
    def uses_bias(self) -> bool:
        """Whether the layers have expert biases."""
        return self.bias != "none"
