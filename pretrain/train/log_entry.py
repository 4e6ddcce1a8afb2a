"""What a run logs about the steps since its last log entry, and the names of these metrics.

`LogEntry.scalars` and `LogEntry.expert_loads` are the only place that builds metric names, and
`LogEntry.from_row` is the only place that reads them; everything else uses the fields.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from data_pipeline.common.errors import DataError

T = TypeVar("T")
Row = Mapping[str, Any]

TOKENS_PER_EXPERT = "moe/tokens_per_expert"
_MAX_LOAD, _MIN_LOAD = "moe/max_over_mean_load", "moe/min_over_mean_load"


@dataclass(frozen=True, kw_only=True)
class Losses:
    """Losses, means over the steps (`loss/...`)."""

    total: float
    """Sum of the weighted terms."""
    terms: Mapping[str, float]
    """Each term without its weight."""
    weighted: Mapping[str, float]
    """Each term times its weight."""


@dataclass(frozen=True, kw_only=True)
class Throughput:
    """Speed and memory (`perf/...`)."""

    samples_per_second: float
    tokens_per_second: float
    seconds_per_step: float
    flops_per_second: float
    memory_gib: float
    """Largest peak memory of any rank."""
    mfu: float | None = None
    """Model FLOPs utilization; None if the peak FLOP/s of the device are unknown."""


@dataclass(frozen=True, kw_only=True)
class DataMetrics:
    """Consumed data (`data/...`)."""

    wait_seconds: float
    """Mean time per step that the slowest rank waited for data."""
    samples_seen: float
    epoch_position: float
    filtered: Mapping[str, float] = field(default_factory=dict)
    """Fraction of read samples that each filter excluded; filters without any are omitted."""
    skipped: Mapping[str, float] = field(default_factory=dict)
    """Fraction of the read samples of each source that were skipped: filtered or corrupt."""
    truncated: float = 0.0
    """Fraction of the captions that have more tokens than the context length."""
    epochs: Mapping[str, float] = field(default_factory=dict)
    """Completed epochs of each source."""
    sample_ratio: Mapping[str, float] = field(default_factory=dict)
    """Fraction of all samples so far that came from each source."""
    corrupt: Mapping[str, float] = field(default_factory=dict)
    """Corrupt samples so far, by reason."""


@dataclass(frozen=True, kw_only=True)
class RouterMetrics:
    """Routing of one layer and modality in the last step (`moe/NAME/layer_LL/MODALITY`)."""

    entropy: float
    """Mean entropy of a token's scores, nats."""
    mean_entropy: float
    """Entropy of the mean scores, nats."""
    top_probability: float
    """Mean of a token's largest score."""
    top1_ratio: float
    """Fraction of tokens whose best expert is the most common best expert."""
    dropped: float | None = None
    """Fraction of assignments dropped by the capacity limit; None without a capacity."""
    bias_range: float | None = None
    """Largest minus smallest routing bias; None without biases."""


@dataclass(frozen=True, kw_only=True)
class ModalityMetrics:
    """One modality in one layer."""

    tokens_per_expert: tuple[int, ...]
    """Assignments of each expert over the steps."""
    max_over_mean_load: float
    """Largest over mean load of the modality's pool; 0 without tokens."""
    router: RouterMetrics | None
    """None if the last step had no tokens of this modality."""


@dataclass(frozen=True, kw_only=True)
class LayerMetrics:
    """One MoE layer."""

    block: int
    """Index of the block in the model."""
    max_over_mean_load: float
    """Largest load over the mean load of the expert's pool, both modalities."""
    min_over_mean_load: float
    """Smallest load over the mean load of the expert's pool, both modalities."""
    modalities: Mapping[str, ModalityMetrics]


@dataclass(frozen=True, kw_only=True)
class LogEntry:
    """One row of metrics.jsonl."""

    step: int
    """Completed optimizer steps."""
    losses: Losses
    logit_scale: float
    learning_rate: float
    grad_norm: float
    """Global gradient norm before clipping, mean over the steps. Like the losses, without the steps
    that did not update the weights, if there are others."""
    skipped_updates: int = 0
    """Steps that did not update the weights."""
    throughput: Throughput
    data: DataMetrics
    layers: tuple[LayerMetrics, ...]

    def scalars(self) -> dict[str, float]:
        """All numbers by metric name, such as `loss/total`."""
        names = {
            "loss/total": self.losses.total,
            **{f"loss/{name}": value for name, value in self.losses.terms.items()},
            **{f"loss/weighted/{name}": value for name, value in self.losses.weighted.items()},
            "loss/logit_scale": self.logit_scale,
            "optim/lr": self.learning_rate,
            "optim/grad_norm": self.grad_norm,
            "optim/skipped_updates": self.skipped_updates,
        }
        names |= _flatten(self.throughput, lambda name: f"perf/{name}")
        names |= _flatten(self.data, lambda name: f"data/{name}")
        for layer in self.layers:
            label = _label(layer.block)
            names[f"{_MAX_LOAD}/{label}"] = layer.max_over_mean_load
            names[f"{_MIN_LOAD}/{label}"] = layer.min_over_mean_load
            for modality, metrics in layer.modalities.items():
                names[f"{_MAX_LOAD}/{label}/{modality}"] = metrics.max_over_mean_load
                if metrics.router is not None:
                    names |= _flatten(metrics.router, _router_names(layer.block, modality))
        return names

    def expert_loads(self) -> dict[str, tuple[int, ...]]:
        """Assignments of each expert, by metric name."""
        return {
            f"{TOKENS_PER_EXPERT}/{_label(layer.block)}/{modality}": metrics.tokens_per_expert
            for layer in self.layers
            for modality, metrics in layer.modalities.items()
        }

    def to_row(self) -> dict[str, Any]:
        """The row of metrics.jsonl."""
        loads = {name: list(load) for name, load in self.expert_loads().items()}
        return {"step": self.step} | self.scalars() | loads

    @staticmethod
    def from_row(row: Row) -> LogEntry:
        """Parse the result of `to_row`; NaN and infinity may be numbers or strings.

        Raises:
            DataError: A metric is missing, as in rows of other versions.
        """
        try:
            return _parse(row)
        except KeyError as error:
            raise DataError(
                f"the log entry of step {row.get('step', '?')} has no {error.args[0]}; it was "
                f"written by another version of this program"
            ) from error


def _parse(row: Row) -> LogEntry:
    weighted = _group(row, "loss/weighted/")
    labels = _group(row, f"{_MIN_LOAD}/")
    return LogEntry(
        step=int(row["step"]),
        losses=Losses(
            total=float(row["loss/total"]),
            terms={name: float(row[f"loss/{name}"]) for name in weighted},
            weighted=weighted,
        ),
        logit_scale=float(row["loss/logit_scale"]),
        learning_rate=float(row["optim/lr"]),
        grad_norm=float(row["optim/grad_norm"]),
        skipped_updates=int(row.get("optim/skipped_updates", 0)),
        throughput=_unflatten(Throughput, row, lambda name: f"perf/{name}"),
        data=_unflatten(DataMetrics, row, lambda name: f"data/{name}"),
        layers=tuple(_parse_layer(row, int(label.removeprefix("layer_"))) for label in labels),
    )


def _parse_layer(row: Row, block: int) -> LayerMetrics:
    label = _label(block)
    modalities = {}
    for modality, max_load in _group(row, f"{_MAX_LOAD}/{label}/").items():
        names = _router_names(block, modality)
        has_router = names("entropy") in row
        modalities[modality] = ModalityMetrics(
            tokens_per_expert=tuple(row[f"{TOKENS_PER_EXPERT}/{label}/{modality}"]),
            max_over_mean_load=max_load,
            router=_unflatten(RouterMetrics, row, names) if has_router else None,
        )
    return LayerMetrics(
        block=block,
        max_over_mean_load=float(row[f"{_MAX_LOAD}/{label}"]),
        min_over_mean_load=float(row[f"{_MIN_LOAD}/{label}"]),
        modalities=modalities,
    )


def _label(block: int) -> str:
    return f"layer_{block:02d}"


def _router_names(block: int, modality: str) -> Callable[[str], str]:
    return lambda name: f"moe/{name}/{_label(block)}/{modality}"


def _group(row: Row, prefix: str) -> dict[str, float]:
    """The metrics below a prefix, by the rest of their names."""
    return {
        name.removeprefix(prefix): float(value)
        for name, value in row.items()
        if name.startswith(prefix)
    }


def _flatten(group: Any, name_of: Callable[[str], str]) -> dict[str, float]:
    """The fields of a dataclass by metric name; None is omitted."""
    flat: dict[str, float] = {}
    for key, value in vars(group).items():
        if isinstance(value, Mapping):
            flat |= {f"{name_of(key)}/{name}": number for name, number in value.items()}
        elif value is not None:
            flat[name_of(key)] = value
    return flat


def _unflatten(kind: type[T], row: Row, name_of: Callable[[str], str]) -> T:
    """The inverse of `_flatten`; fields with a default may be missing."""
    values: dict[str, Any] = {}
    for item in dataclasses.fields(kind):  # type: ignore[arg-type]
        name = name_of(item.name)
        if item.default_factory is not dataclasses.MISSING:
            values[item.name] = _group(row, f"{name}/")
        elif name in row or item.default is dataclasses.MISSING:
            values[item.name] = float(row[name])
    return kind(**values)
