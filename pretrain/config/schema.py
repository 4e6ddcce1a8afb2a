"""What a run is: every number that changes what is learned, each in one typed place.

The YAML of a run is read into `RunConfig`. Memory and wires (ZeRO stage, buckets, offload) are
not here: they live in `ds_configs/*.json`, and a key owned by both is an error.
Checks that need one section live in its `__post_init__`; checks across sections are in
`pretrain.config.validate`, which reports all problems at once.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from data_pipeline.common.addresses import refuse_user
from data_pipeline.common.errors import ConfigError
from data_pipeline.settings import DataConfig


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """One trunk over image patches and text tokens."""

    width: int = 128
    """Width of the trunk (D)."""
    num_blocks: int = 4
    """Transformer blocks."""
    num_heads: int = 4
    """Attention heads (H); must divide `width` into an even head width."""
    ffn_width: int = 256
    """Hidden width of the dense SwiGLU blocks."""
    fusion_start: int = 2
    """First block in which text also sees the patches of its image."""
    image_size: int = 48
    """Side of the square picture the model sees, pixels."""
    patch_size: int = 8
    """Side of a patch, pixels; must divide `image_size`."""
    stem: Literal["linear", "conv"] = "linear"
    """From pixels to patch tokens: one linear map, or strided convolutions, which small models learn
    faster with; `conv` needs a `patch_size` that is a power of two."""
    vocab_size: int = 32000
    """Text vocabulary (V); must equal the tokenizer's."""
    text_length: int = 64
    """Most text positions of a caption, start and end marks included (S)."""
    embed_dim: int = 128
    """Width of the shared image-text embedding."""
    pool_heads: int = 4
    """Heads of the attention pooling that makes the image embedding."""
    rope_theta: float = 10000.0
    """Base of the rotary position frequencies."""
    recompute: bool = False
    """Recompute the blocks' activations in the backward pass to save memory."""

    def __post_init__(self) -> None:
        _require(self.num_heads > 0 and self.width % self.num_heads == 0,
                 f"model.width is {self.width}, not a multiple of model.num_heads ({self.num_heads})")
        _require((self.width // self.num_heads) % 4 == 0,
                 f"model.width / model.num_heads is {self.width // self.num_heads}; two-dimensional "
                 f"rotary positions need a multiple of 4")
        _require(self.patch_size > 0 and self.image_size % self.patch_size == 0,
                 f"model.image_size is {self.image_size}, not a multiple of model.patch_size "
                 f"({self.patch_size})")
        _require(self.stem == "linear" or self.patch_size & (self.patch_size - 1) == 0,
                 f"model.patch_size is {self.patch_size}, but model.stem=conv halves the picture step by step: "
                 f"use a power of two, or model.stem=linear")
        _require(1 <= self.fusion_start < self.num_blocks,
                 f"model.fusion_start is {self.fusion_start}, but must lie in 1..num_blocks-1 "
                 f"({self.num_blocks - 1}): text is embedded below it and captions are written above it")
        _require(self.width % self.pool_heads == 0,
                 f"model.width is {self.width}, not a multiple of model.pool_heads ({self.pool_heads})")
        _require(self.text_length >= 2, f"model.text_length is {self.text_length}; start and end need 2")
        _require(self.vocab_size > 4, f"model.vocab_size is {self.vocab_size}; four ids are reserved")

    @property
    def num_patches(self) -> int:
        """Patches of one picture (P)."""
        return (self.image_size // self.patch_size) ** 2

    @property
    def stem_channels(self) -> tuple[int, ...]:
        """Channels of the convolutional stem from the pixels on: a quarter of the trunk's width, half, whole."""
        steps = self.patch_size.bit_length() - 1
        return (3, *(max(8, self.width >> max(0, 2 - step)) for step in range(steps)))


@dataclass(frozen=True, kw_only=True)
class MoEConfig:
    """The sparse feed-forward layers of the trunk."""

    num_experts: int = 8
    """Routed experts of a layer, over all ranks (E)."""
    experts_per_token: int = 2
    """Experts each token visits (K)."""
    expert_width: int = 64
    """Hidden width of one SwiGLU expert."""
    shared_experts: int = 1
    """Experts that every token visits, beside the routed ones."""
    score: Literal["softmax", "sigmoid"] = "softmax"
    """How router logits become gate scores."""
    temperature: float = 1.0
    """Multiplies the router logits before the score (`a` in softmax(a x logits))."""
    renormalise: bool = True
    """Let the weights of the chosen experts sum to one."""
    gate: Literal["token", "caption"] = "token"
    """What the router reads: the token; or also, for text in the blocks from `model.fusion_start` on, the
    caption so far. Patches never read the caption, so that an image's embedding does not depend on it."""
    choice: Literal["topk", "sampled", "noisy", "expert"] = "topk"
    """Who chooses: each token its best experts; experts drawn by their scores (Gumbel top-k); its best ones by
    noisy logits (V-MoE); or every expert its best patches of each image, and text its best experts."""
    noise: float = 1.0
    """Deviation of the noise of `choice: noisy`, as a multiple of 1 / num_experts."""
    capacity_factor: float = 0.0
    """Places of an expert as a multiple of its fair share while training; 0 means that no choice is ever dropped.
    Judging never drops any."""
    capacity_priority: Literal["position", "random", "batch"] = "position"
    """Who comes first where places are short: earlier pairs, and of a pair its patches; a random order; or the surest
    tokens (V-MoE's batch prioritised routing). First choices of all tokens come before second ones."""
    capacity_group: int = 8
    """Consecutive pairs of the global batch that share the places; must divide `batch.pairs_per_forward`."""
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
    """Expert computation: one grouped matrix product, or a loop over the experts; or DeepSpeed's own MoE layer
    while training, to compare with."""

    def __post_init__(self) -> None:
        _require(self.num_experts >= 1, f"moe.num_experts is {self.num_experts}, but must be at least 1")
        _require(1 <= self.experts_per_token <= self.num_experts,
                 f"moe.experts_per_token is {self.experts_per_token}, but must lie in "
                 f"1..moe.num_experts ({self.num_experts})")
        _require(self.shared_experts >= 0, f"moe.shared_experts is {self.shared_experts}, below 0")
        _require(self.temperature > 0, f"moe.temperature is {self.temperature}, but must be positive")
        _require(self.every >= 1, f"moe.every is {self.every}, but must be at least 1")
        _require(self.noise > 0, f"moe.noise is {self.noise}, but must be positive")
        _require(self.capacity_factor >= 0,
                 f"moe.capacity_factor is {self.capacity_factor}, below 0 (0 means no limit)")
        _require(self.capacity_group >= 1, f"moe.capacity_group is {self.capacity_group}, but must be at least 1")
        _require(not (self.choice == "expert" and self.capacity_factor),
                 f"moe.choice is expert, which fills every expert evenly by itself, but moe.capacity_factor is "
                 f"{self.capacity_factor}; set moe.capacity_factor=0")
        if self.pools == "modality":
            smaller = min(self.image_pool, self.num_experts - self.image_pool)
            _require(smaller >= self.experts_per_token,
                     f"moe.pools is modality with {self.image_pool} experts for patches and "
                     f"{self.num_experts - self.image_pool} for text; each pool needs at least "
                     f"moe.experts_per_token ({self.experts_per_token})")
        else:
            _require(self.image_experts == 0,
                     f"moe.image_experts is {self.image_experts}, which only moe.pools=modality uses")

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
        return slice(0, self.image_pool) if modality == 0 else slice(self.image_pool, self.num_experts)

    def pool_slices(self) -> tuple[slice, ...]:
        """Every pool once."""
        return (self.pool(0),) if self.pools == "shared" else (self.pool(0), self.pool(1))

    @property
    def noise_deviation(self) -> float:
        """Deviation of the noise on logits."""
        return self.noise / self.num_experts

    @property
    def is_random(self) -> bool:
        """Whether anything about training's routing is drawn."""
        by_chance = self.capacity_factor > 0 and self.capacity_priority == "random"
        return self.choice in ("sampled", "noisy") or by_chance

    def patches_per_expert(self, num_patches: int) -> int:
        """Patches of an image that each expert takes with `choice: expert`: a fair share, rounded up."""
        return min(num_patches, -(-num_patches * self.experts_per_token // self.image_pool))

    def blocks(self, num_blocks: int) -> tuple[int, ...]:
        """Indices of the blocks that hold experts, in a trunk of `num_blocks`."""
        stop = num_blocks if self.stop < 0 else min(self.stop, num_blocks)
        return tuple(range(self.start, stop, self.every))


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """The objective: what each term weighs."""

    contrastive_weight: float = 1.0
    """Weight of image-text contrast (InfoNCE over the global batch)."""
    caption_weight: float = 2.0
    """Weight of next-token captioning."""
    mask_equal_captions: bool = True
    """Do not use pairs with the same caption as negatives of each other."""
    logit_scale_init: float = 14.285714
    """First value of the contrastive scale (inverse temperature)."""
    logit_scale_max: float = 100.0
    """Ceiling that the contrastive scale may come near."""


@dataclass(frozen=True, kw_only=True)
class ByModality:
    """A number for each modality."""

    image: float = 0.0
    """For patches."""
    text: float = 0.0
    """For text tokens."""


@dataclass(frozen=True, kw_only=True)
class BalanceConfig:
    """What keeps the experts in use: losses on statistics of the global batch, and biases without a loss.

    Every loss is averaged over the MoE layers; a weight of 0 turns it off.
    """

    balance_weight: float = 1e-3
    """Balance loss of Switch and GShard (1.0 at perfect balance)."""
    router_z_weight: float = 1e-3
    """Router z-loss of ST-MoE: mean of logsumexp(logits) squared."""
    importance_weight: float = 0.0
    """Squared coefficient of variation of the experts' summed gate scores (V-MoE)."""
    load_weight: float = 0.0
    """The same of the probability of being chosen when the noise is drawn anew; needs `moe.choice: noisy`, and no
    bias."""
    local_entropy_weight: ByModality = field(default_factory=ByModality)
    """Mean entropy of a token's gate scores (LIMoE): with a weight above 0 the router becomes surer."""
    global_entropy_weight: ByModality = field(default_factory=ByModality)
    """How far the entropy of a modality's mean gate scores falls short of log S (LIMoE)."""
    global_entropy_experts: ByModality = field(default_factory=ByModality)
    """S: experts that a modality should use at least, about, 1 or more; 0 means half of all for patches, a quarter
    for text."""
    expert_l1_weight: float = 0.0
    """Sum of the absolute weights of the routed experts of all layers (a Laplace prior of scale 1 / weight)."""
    router_l1_weight: float = 0.0
    """The same of the routers."""
    bias: Literal["none", "sign", "zscore"] = "none"
    """Biases of the choice that follow the load: not at all, by a fixed step, or by how far an expert is off. With
    `moe.choice: expert` they steer the text: patches are spread evenly by the choice itself."""
    bias_rate: float = 1e-3
    """How far a bias moves in one step."""
    bias_per_modality: bool = False
    """One bias for patches and one for text, each from its own load."""
    bias_freeze_share: float = 0.03
    """Last part of the run in which biases stay as they are."""


@dataclass(frozen=True, kw_only=True)
class BatchConfig:
    """How many pairs make a step; accumulation follows from these and the number of ranks."""

    pairs_per_step: int = 256
    """Pairs of one optimizer step over the whole world (G)."""
    pairs_per_forward: int = 64
    """Pairs of one forward pass of one rank (B)."""


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """AdamW."""

    lr: float = 1e-3
    """Peak learning rate."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Decay of the first and second moment."""
    eps: float = 1e-8
    """Added to the root of the second moment."""
    weight_decay: float = 0.1
    """Decoupled decay; none on norms, biases, embeddings and the temperature."""
    clip_norm: float = 1.0
    """Largest global gradient norm; 0 turns clipping off."""


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """Length of the run and the learning rate over it."""

    kind: Literal["cosine", "wsd", "constant"] = "cosine"
    """Shape after warm-up: cosine, warm-up-stable-decay, or constant."""
    total_steps: int = 1000
    """Optimizer steps of the whole run."""
    warmup_steps: int = 100
    """Steps of linear warm-up."""
    final_share: float = 0.0
    """Learning rate at the end, as a share of the peak."""
    decay_share: float = 0.2
    """Share of the run spent decaying (`wsd` only)."""

    def __post_init__(self) -> None:
        _require(self.total_steps >= 1, f"schedule.total_steps is {self.total_steps}, below 1")
        _require(0 <= self.warmup_steps <= self.total_steps,
                 f"schedule.warmup_steps is {self.warmup_steps}, but must lie in 0..total_steps "
                 f"({self.total_steps})")


@dataclass(frozen=True, kw_only=True)
class PrecisionConfig:
    """Number formats."""

    compute: Literal["fp32", "bf16"] = "fp32"
    """Activations and matrix products. Masters, moments, router logits and losses are fp32; with DeepSpeed's ZeRO
    stages 1 to 3 the forward pass reads all weights, those of router and norms too, rounded to bf16."""


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """How the run is laid over ranks."""

    expert_parallel: int = 1
    """Ranks that share one copy of the experts; must divide the world and `moe.num_experts`."""
    engine: Literal["deepspeed", "plain"] = "deepspeed"
    """`plain` is one process without DeepSpeed: the reference."""
    deepspeed: str = "zero1"
    """A profile of `ds_configs/` by name, or the path of a JSON file."""
    timeout_seconds: float = 600.0
    """Longest wait in a collective before the run stops with an error."""


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """What is kept to go on from."""

    every_steps: int = 500
    """Steps between checkpoints; one is always written at the end. 0 means only at the end."""
    keep: int = 2
    """Newest checkpoints kept."""


@dataclass(frozen=True, kw_only=True)
class LogConfig:
    """What people see."""

    every_steps: int = 10
    """Steps between console lines, TensorBoard scalars and rows of metrics.jsonl."""
    pictures_every_steps: int = 500
    """Steps between sample pictures with the captions the model writes; 0 turns them off."""
    num_pictures: int = 8
    """Pictures shown."""
    routing_every_steps: int = 500
    """Steps between pictures of the routing: load by layer and expert, and which experts are chosen together;
    0 turns them off."""


@dataclass(frozen=True, kw_only=True)
class EvalSet:
    """A held-out set of shards."""

    name: str
    """How it is called in tables and TensorBoard."""
    shards: str
    """Its manifest, or the folder that holds it."""
    labels: str = ""
    """A file with one caption a line to rank against; empty means the set's own captions."""

    def __post_init__(self) -> None:
        refuse_user(self.shards, f"eval.sets {self.name!r}")


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """Judging the model."""

    sets: tuple[EvalSet, ...] = ()
    """Held-out sets."""
    pairs_per_forward: int = 128
    """Pairs of one forward pass while judging."""
    caption_samples: int = 200
    """Pictures of a set for which captions are written and compared."""


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """One training run."""

    name: str = "run"
    """Shown in logs."""
    seed: int = 0
    """Everything random follows from it."""
    model: ModelConfig = field(default_factory=ModelConfig)
    moe: MoEConfig = field(default_factory=MoEConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    balance: BalanceConfig = field(default_factory=BalanceConfig)
    data: DataConfig = field(default_factory=DataConfig)
    batch: BatchConfig = field(default_factory=BatchConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    precision: PrecisionConfig = field(default_factory=PrecisionConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    log: LogConfig = field(default_factory=LogConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
