"""Configuration of a run: every setting that affects training results, as typed dataclasses.

The YAML file of a run is read into `RunConfig`. DeepSpeed settings for memory and communication
(ZeRO stage, buckets, offload) are in `ds_configs/*.json`; a key that is set in both is an error.
Every section lists its own problems; `pretrain.config.validate` adds those across sections and
reports all at once.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from data_pipeline.common.problems import Problems
from data_pipeline.settings import DataConfig
from pretrain.config.evaluation import EvalConfig as EvalConfig
from pretrain.config.evaluation import EvalSet as EvalSet
from pretrain.config.experts import BalanceConfig, MoEConfig
from pretrain.config.model import ModelConfig as ModelConfig


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

    def problems(self) -> list[str]:
        """Invalid weights, and an objective without any loss."""
        found = Problems(self, "loss")
        found.at_least(0, "contrastive_weight", "caption_weight")
        found.require(
            self.contrastive_weight != 0 or self.caption_weight != 0,
            "loss.contrastive_weight and loss.caption_weight are both 0, so there is no training "
            "objective",
        )
        found.require(
            0 < self.logit_scale_init < self.logit_scale_max,
            f"loss.logit_scale_init is {self.logit_scale_init}, but must be above 0 and below "
            f"loss.logit_scale_max ({self.logit_scale_max})",
        )
        return found.messages


@dataclass(frozen=True, kw_only=True)
class BatchConfig:
    """Batch sizes; the number of accumulation steps follows from them and the number of ranks."""

    global_batch_size: int = 256
    """Pairs per optimizer step, over all ranks (G); a multiple of `micro_batch_size` x ranks."""
    micro_batch_size: int = 64
    """Pairs per forward pass of one rank (B)."""

    def problems(self) -> list[str]:
        """Sizes below 1; `plan_batch` checks the split over ranks."""
        found = Problems(self, "batch")
        found.at_least(1, "global_batch_size", "micro_batch_size")
        return found.messages


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

    def problems(self) -> list[str]:
        """Numbers that are out of range."""
        found = Problems(self, "optim")
        found.above_zero("lr", "eps")
        found.at_least(0, "weight_decay")
        found.at_least(0, "clip_norm", note=" (0 turns it off)")
        found.require(
            all(0 <= beta < 1 for beta in self.betas),
            f"optim.betas is {list(self.betas)}, but must be in 0..1, 1 excluded",
        )
        return found.messages


_DEFAULT_WARMUP_STEPS = 100


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """Length of the run and learning-rate schedule."""

    kind: Literal["cosine", "wsd", "constant"] = "cosine"
    """Schedule after warm-up: cosine decay, `wsd` (warm-up-stable-decay), or constant."""
    total_steps: int = 1000
    """Optimizer steps of the run."""
    warmup_steps: int | None = None
    """Steps of linear warm-up; null uses `warmup_ratio`, or 100 if that is null too."""
    warmup_ratio: float | None = None
    """Linear warm-up as a fraction of `total_steps`, instead of `warmup_steps`."""
    min_lr_ratio: float = 0.0
    """Learning rate at the end of the decay, as a fraction of the peak."""
    decay_ratio: float = 0.2
    """Last fraction of the run in which the learning rate decays linearly (`wsd` only)."""

    def problems(self) -> list[str]:
        """Ratios out of range, and a run that is too short for its warm-up and decay."""
        found = Problems(self, "schedule")
        found.at_least(1, "total_steps")
        found.within(0, 1, "min_lr_ratio", "decay_ratio")
        if self.warmup_steps is not None:
            found.at_least(0, "warmup_steps")
        if self.warmup_ratio is not None:
            found.within(0, 1, "warmup_ratio")
        found.require(
            self.warmup_steps is None or self.warmup_ratio is None,
            f"schedule.warmup_steps is {self.warmup_steps} and schedule.warmup_ratio is "
            f"{self.warmup_ratio}, but only one of them can be set; set "
            f"schedule.warmup_steps=null or schedule.warmup_ratio=null",
        )
        return found.messages or self._warmup_problems()

    @property
    def num_warmup_steps(self) -> int:
        """Steps of linear warm-up, from whichever setting has them."""
        if self.warmup_ratio is not None:
            return round(self.warmup_ratio * self.total_steps)
        return _DEFAULT_WARMUP_STEPS if self.warmup_steps is None else self.warmup_steps

    def _warmup_problems(self) -> list[str]:
        """Warm-up and decay that are longer than the run, with numbers that fit."""
        steps, warmup_steps = self.total_steps, self.num_warmup_steps
        decay_steps = round(self.decay_ratio * steps) if self.kind == "wsd" else 0
        if warmup_steps + decay_steps <= steps:
            return []
        fitting = min(steps // 10, steps - decay_steps)
        warmup = f"schedule.warmup_steps is {warmup_steps}"
        hint = f"set schedule.warmup_steps={fitting}"
        if self.warmup_ratio is not None:
            warmup = f"schedule.warmup_ratio is {self.warmup_ratio:g} ({warmup_steps} steps)"
            hint = f"set schedule.warmup_ratio={fitting / steps:g}"
        if warmup_steps > steps:
            return [
                f"{warmup}, but must be in 0..schedule.total_steps ({steps}); {hint}, or train "
                f"for more steps"
            ]
        return [
            f"{warmup}, which together with the decay (schedule.decay_ratio x total_steps = "
            f"{decay_steps}) exceeds schedule.total_steps ({steps}); {hint}, or reduce "
            f"schedule.decay_ratio"
        ]


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

    def problems(self) -> list[str]:
        """Numbers that are out of range."""
        found = Problems(self, "parallel")
        found.at_least(1, "expert_parallel_size")
        found.above_zero("timeout_seconds")
        return found.messages


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """Checkpoints, from which a run resumes."""

    every_steps: int = 500
    """Steps between checkpoints, besides the one at the end of the run; 0 writes only that one."""
    every_minutes: float = 0.0
    """Save also when this much time has passed since the last checkpoint; 0 disables that."""
    keep: int = 2
    """Number of most recent checkpoints to keep."""

    def problems(self) -> list[str]:
        """Numbers that are out of range."""
        found = Problems(self, "checkpoint")
        found.at_least(0, "every_steps", "every_minutes")
        found.at_least(1, "keep")
        return found.messages


@dataclass(frozen=True, kw_only=True)
class GuardConfig:
    """What happens if loss or gradient norm are not finite, or suddenly large.

    Such a step does not update the weights, moments or routing biases.
    """

    max_skipped_steps: int = 10
    """Number of steps in a row without an update after which the run goes back to its last
    checkpoint and leaves out the data of these steps; 0 never goes back."""
    max_rewinds: int = 3
    """The run stops with an error if it would go back more often than this."""
    spike_zscore: float = 0.0
    """Also skip a step whose loss or gradient norm is more than this many robust standard
    deviations above the median of the last steps; 0 disables that."""
    spike_window: int = 200
    """Number of last steps of that median."""

    def problems(self) -> list[str]:
        """Numbers that are out of range."""
        found = Problems(self, "guard")
        found.at_least(0, "max_skipped_steps", "max_rewinds", "spike_zscore")
        found.at_least(50, "spike_window")
        return found.messages


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

    def problems(self) -> list[str]:
        """Numbers that are out of range."""
        found = Problems(self, "log")
        found.at_least(1, "every_steps")
        found.at_least(0, "captions_every_steps", "routing_every_steps", "num_captions")
        return found.messages


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
    guard: GuardConfig = field(default_factory=GuardConfig)
    log: LogConfig = field(default_factory=LogConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)

    def problems(self) -> list[str]:
        """An invalid seed."""
        found = Problems(self, "")
        found.at_least(0, "seed")
        return found.messages
