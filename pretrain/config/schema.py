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
from data_pipeline.common.errors import require
from data_pipeline.settings import DataConfig
from pretrain.config.experts import BalanceConfig, MoEConfig


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """One trunk over image patches and text tokens."""

    width: int = 128
    """Width of the trunk (D)."""
    num_layers: int = 4
    """Transformer blocks."""
    num_heads: int = 4
    """Attention heads (H); must divide `width` into an even head width."""
    ffn_width: int = 256
    """Hidden width of the dense SwiGLU blocks."""
    fusion_layer: int = 2
    """First block in which text also sees the patches of its image."""
    image_size: int = 48
    """Side of the square picture the model sees, pixels."""
    patch_size: int = 8
    """Side of a patch, pixels; must divide `image_size`."""
    stem: Literal["linear", "conv"] = "linear"
    """From pixels to patch tokens: one linear map, or strided convolutions, which small models
    learn faster with; `conv` needs a `patch_size` that is a power of two."""
    vocab_size: int = 32000
    """Text vocabulary (V); must equal the tokenizer's."""
    context_length: int = 64
    """Most text positions of a caption, start and end marks included (S)."""
    embed_dim: int = 128
    """Width of the shared image-text embedding."""
    pool_heads: int = 4
    """Heads of the attention pooling that makes the image embedding."""
    rope_theta: float = 10000.0
    """Base of the rotary position frequencies."""
    activation_checkpointing: bool = False
    """Recompute the blocks' activations in the backward pass to save memory."""

    def __post_init__(self) -> None:
        require(
            self.num_heads > 0 and self.width % self.num_heads == 0,
            f"model.width is {self.width}, not a multiple of model.num_heads ({self.num_heads})",
        )
        require(
            (self.width // self.num_heads) % 4 == 0,
            f"model.width / model.num_heads is {self.width // self.num_heads}; two-dimensional "
            f"rotary positions need a multiple of 4",
        )
        require(
            self.patch_size > 0 and self.image_size % self.patch_size == 0,
            f"model.image_size is {self.image_size}, not a multiple of model.patch_size "
            f"({self.patch_size})",
        )
        require(
            self.stem == "linear" or self.patch_size & (self.patch_size - 1) == 0,
            f"model.patch_size is {self.patch_size}, but model.stem=conv halves the picture step by step: "
            f"use a power of two, or model.stem=linear",
        )
        require(
            1 <= self.fusion_layer < self.num_layers,
            f"model.fusion_layer is {self.fusion_layer}, but must lie in 1..num_layers-1 "
            f"({self.num_layers - 1}): text is embedded below it and captions are written above it",
        )
        require(
            self.width % self.pool_heads == 0,
            f"model.width is {self.width}, not a multiple of model.pool_heads ({self.pool_heads})",
        )
        require(
            self.context_length >= 2,
            f"model.context_length is {self.context_length}; start and end need 2",
        )
        require(
            self.vocab_size > 4, f"model.vocab_size is {self.vocab_size}; four ids are reserved"
        )

    @property
    def num_patches(self) -> int:
        """Patches of one picture (P)."""
        return (self.image_size // self.patch_size) ** 2

    @property
    def stem_channels(self) -> tuple[int, ...]:
        """Channels of the convolutional stem from the pixels on: a quarter of the trunk's width,
        half, whole."""
        steps = self.patch_size.bit_length() - 1
        return (3, *(max(8, self.width >> max(0, 2 - step)) for step in range(steps)))


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
class BatchConfig:
    """How many pairs make a step; accumulation follows from these and the number of ranks."""

    global_batch_size: int = 256
    """Pairs of one optimizer step over the whole world (G)."""
    micro_batch_size: int = 64
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
    min_lr_ratio: float = 0.0
    """Learning rate at the end, as a share of the peak."""
    decay_ratio: float = 0.2
    """Share of the run spent decaying (`wsd` only)."""

    def __post_init__(self) -> None:
        require(self.total_steps >= 1, f"schedule.total_steps is {self.total_steps}, below 1")
        require(
            0 <= self.warmup_steps <= self.total_steps,
            f"schedule.warmup_steps is {self.warmup_steps}, but must lie in 0..total_steps "
            f"({self.total_steps})",
        )


@dataclass(frozen=True, kw_only=True)
class PrecisionConfig:
    """Number formats."""

    compute: Literal["fp32", "bf16"] = "fp32"
    """Activations and matrix products. Masters, moments, router logits and losses are fp32; with
    DeepSpeed's ZeRO stages 1 to 3 the forward pass reads all weights, those of router and norms
    too, rounded to bf16."""


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """How the run is laid over ranks."""

    expert_parallel_size: int = 1
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
    captions_every_steps: int = 500
    """Steps between sample pictures with the captions the model writes; 0 turns them off."""
    num_captions: int = 8
    """Pictures shown."""
    routing_every_steps: int = 500
    """Steps between pictures of the routing: load by layer and expert, and which experts are chosen
    together; 0 turns them off."""


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
    batch_size: int = 128
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
