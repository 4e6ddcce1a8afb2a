"""Configuration of a run: every setting that affects training results, as typed dataclasses.

The YAML file of a run is read into `RunConfig`. DeepSpeed settings for memory and communication
(ZeRO stage, buckets, offload) are in `ds_configs/*.json`; a key that is set in both is an error.
Checks of a single section are in its `__post_init__`. Checks across sections are in
`pretrain.config.validate`, which reports all problems at once.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from data_pipeline.common.addresses import reject_userinfo
from data_pipeline.common.errors import require
from data_pipeline.settings import DataConfig
from pretrain.config.experts import BalanceConfig, MoEConfig


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The transformer trunk, shared by image patches and text tokens, with its stem and heads."""

    width: int = 128
    """Hidden size of the trunk (D)."""
    num_layers: int = 4
    """Number of transformer blocks."""
    num_heads: int = 4
    """Number of attention heads (H); `width / num_heads` must be a multiple of 4."""
    ffn_width: int = 256
    """Hidden width of the SwiGLU networks in dense blocks."""
    fusion_layer: int = 2
    """Index of the first block in which text attends to the patches of its image."""
    image_size: int = 48
    """Side of the square input image, pixels."""
    patch_size: int = 8
    """Side of a patch, pixels; must divide `image_size`."""
    stem: Literal["linear", "conv"] = "linear"
    """Map from pixels to patch tokens: one linear map, or strided convolutions, with which small
    models learn faster. `conv` needs a `patch_size` that is a power of two."""
    vocab_size: int = 32000
    """Size of the text vocabulary (V); must equal that of the tokenizer."""
    context_length: int = 64
    """Maximum number of text tokens of a caption, start and end tokens included (S)."""
    embed_dim: int = 128
    """Dimension of the shared image-text embedding."""
    pool_heads: int = 4
    """Number of heads of the attention pooling for the image embedding."""
    rope_theta: float = 10000.0
    """Base of the rotary position frequencies."""
    activation_checkpointing: bool = False
    """Recompute the activations of the blocks in the backward pass to save memory."""

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
        self._check_image()
        require(
            1 <= self.fusion_layer < self.num_layers,
            f"model.fusion_layer is {self.fusion_layer}, but must be in 1..num_layers-1 "
            f"({self.num_layers - 1}): the text embedding is computed before that block, captions "
            f"after it",
        )
        require(
            self.width % self.pool_heads == 0,
            f"model.width is {self.width}, not a multiple of model.pool_heads ({self.pool_heads})",
        )
        require(
            self.context_length >= 2,
            f"model.context_length is {self.context_length}; start and end tokens need 2",
        )
        require(
            self.vocab_size > 4, f"model.vocab_size is {self.vocab_size}; four ids are reserved"
        )

    def _check_image(self) -> None:
        require(
            self.patch_size > 0 and self.image_size % self.patch_size == 0,
            f"model.image_size is {self.image_size}, not a multiple of model.patch_size "
            f"({self.patch_size})",
        )
        require(
            self.stem == "linear" or self.patch_size & (self.patch_size - 1) == 0,
            f"model.patch_size is {self.patch_size}, but each convolution of model.stem=conv "
            f"halves the image: use a power of two, or model.stem=linear",
        )

    @property
    def num_patches(self) -> int:
        """Number of patches per image (P)."""
        return (self.image_size // self.patch_size) ** 2

    @property
    def stem_channels(self) -> tuple[int, ...]:
        """Channels of the convolutional stem: 3 for the pixels, then a quarter, half and all of the
        trunk's width (at least 8)."""
        num_convs = self.patch_size.bit_length() - 1
        return (3, *(max(8, self.width >> max(0, 2 - index)) for index in range(num_convs)))


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """The objective: contrastive and caption losses. Auxiliary losses are in `balance`."""

    contrastive_weight: float = 1.0
    """Weight of the image-text contrastive loss (InfoNCE over the global batch)."""
    caption_weight: float = 2.0
    """Weight of the caption loss (next-token cross-entropy, mean over the caption tokens of the
    global batch)."""
    mask_equal_captions: bool = True
    """Do not use pairs with the same caption as negatives of each other."""
    logit_scale_init: float = 14.285714
    """Initial value of the learned contrastive scale (inverse temperature)."""
    logit_scale_max: float = 100.0
    """Upper bound of the contrastive scale, as a soft cap."""


@dataclass(frozen=True, kw_only=True)
class BatchConfig:
    """Batch sizes; the number of accumulation steps follows from them and the number of ranks."""

    global_batch_size: int = 256
    """Pairs per optimizer step, over all ranks (G); a multiple of `micro_batch_size` x ranks."""
    micro_batch_size: int = 64
    """Pairs per forward pass of one rank (B)."""


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """The AdamW optimizer."""

    lr: float = 1e-3
    """Peak learning rate."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Decay rates of the first and second moments."""
    eps: float = 1e-8
    """Added to the square root of the second moment."""
    weight_decay: float = 0.1
    """Decoupled weight decay of matrices; norms, biases, embeddings and the contrastive scale have
    none."""
    clip_norm: float = 1.0
    """Maximum of the global gradient norm; 0 turns clipping off."""


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """Length of the run and learning-rate schedule."""

    kind: Literal["cosine", "wsd", "constant"] = "cosine"
    """Schedule after warm-up: cosine decay, `wsd` (warm-up-stable-decay), or constant."""
    total_steps: int = 1000
    """Optimizer steps of the run."""
    warmup_steps: int = 100
    """Steps of linear warm-up."""
    min_lr_ratio: float = 0.0
    """Learning rate at the end of the decay, as a fraction of the peak."""
    decay_ratio: float = 0.2
    """Last fraction of the run in which the learning rate decays linearly (`wsd` only)."""

    def __post_init__(self) -> None:
        require(
            self.total_steps >= 1,
            f"schedule.total_steps is {self.total_steps}, but must be at least 1",
        )
        require(
            0 <= self.warmup_steps <= self.total_steps,
            f"schedule.warmup_steps is {self.warmup_steps}, but must be in 0..total_steps "
            f"({self.total_steps})",
        )


@dataclass(frozen=True, kw_only=True)
class PrecisionConfig:
    """Numeric precision."""

    compute: Literal["fp32", "bf16"] = "fp32"
    """Dtype of activations and matrix products. Master weights, optimizer states, router logits and
    losses are fp32. With DeepSpeed ZeRO stages 1 to 3 and bf16, the forward pass uses bf16 copies
    of all weights, including those of routers and norms."""


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """Parallelism and training engine."""

    expert_parallel_size: int = 1
    """Number of ranks over which the experts are split; must divide the world size and
    `moe.num_experts`."""
    engine: Literal["deepspeed", "plain"] = "deepspeed"
    """Training engine; `plain` is a single process without DeepSpeed, used as reference."""
    deepspeed: str = "zero1"
    """DeepSpeed profile: the name of a file in `ds_configs/`, or the path of a JSON file."""
    timeout_seconds: float = 600.0
    """Timeout of collective operations, after which the run stops with an error."""


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """Checkpoints, from which a run resumes."""

    every_steps: int = 500
    """Steps between checkpoints, besides the one at the end of the run; 0 writes only that one."""
    keep: int = 2
    """Number of most recent checkpoints to keep."""


@dataclass(frozen=True, kw_only=True)
class LogConfig:
    """Intervals of logs, metrics and figures."""

    every_steps: int = 10
    """Steps between console lines, TensorBoard scalars and rows of metrics.jsonl."""
    captions_every_steps: int = 500
    """Steps between figures of sample images with generated captions; 0 turns them off."""
    num_captions: int = 8
    """Number of images in such a figure."""
    routing_every_steps: int = 500
    """Steps between routing figures: load by layer and expert, and coactivation of experts; 0 turns
    them off."""


@dataclass(frozen=True, kw_only=True)
class EvalSet:
    """A held-out set of shards."""

    name: str
    """Name of the set in tables and TensorBoard."""
    shards: str
    """Its manifest, or the folder that contains it."""
    labels: str = ""
    """Text file with one candidate caption per line for retrieval; empty means the captions of the
    set."""

    def __post_init__(self) -> None:
        reject_userinfo(self.shards, f"eval.sets {self.name!r}")


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """Evaluation on held-out sets."""

    sets: tuple[EvalSet, ...] = ()
    """Held-out sets; `vlmoe settings eval.sets` lists the settings of a set."""
    batch_size: int = 128
    """Pairs per forward pass during evaluation."""
    caption_samples: int = 200
    """Number of images per set for which captions are generated and compared with the
    references."""


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """One training run."""

    name: str = "run"
    """Name of the run in logs."""
    seed: int = 0
    """Seed of all random numbers: initialization, data order, augmentation, routing."""
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
