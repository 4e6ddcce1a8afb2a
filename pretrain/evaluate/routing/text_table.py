"""The routing report as tables for a terminal."""

from __future__ import annotations

import unicodedata
from typing import Any

from data_pipeline.common.tables import format_rows, format_table

Report = dict[str, Any]

MAX_WORDS = 5
"""Words listed for each expert."""
MIN_PREFERENCE = 0.05
"""Smaller modality preferences are shown as `both`."""
_HEADER = ("expert", "image", "text", "modality", "weight", "entropy", "bits", "words")
_LEGEND = """\
image, text: fraction of the modality's tokens that the expert processes (uniform: {uniform})
modality: the larger of these fractions, and the preference from 0 (equal) to 1 (only that one)
weight, entropy (nats): means over the expert's tokens
bits: divergence of its words from all text; words: frequency relative to all text"""


def routing_table(report: Report) -> str:
    """A table for each layer, and a legend."""
    uniform = ", ".join(
        f"{modality} {load['uniform_fraction']:.1%}"
        for modality, load in report["layers"][0]["load"].items()
        if load["uniform_fraction"] is not None
    )
    layers = ["\n".join(_layer_lines(layer)) for layer in report["layers"]]
    return "\n\n".join([*layers, _LEGEND.format(uniform=uniform)])


def _layer_lines(layer: Report) -> list[str]:
    loads = [
        (f"  {modality}", load_text(load))
        for modality, load in layer["load"].items()
        if load["max_over_mean"] is not None
    ]
    lines = [f"layer {layer['block']:02d}", *format_rows(loads).splitlines()]
    rows = [_expert_row(expert) for expert in layer["experts"]]
    lines.append(format_table(_HEADER, rows, align="rrrlrrrl", rule=False))
    for modality, pairs in layer["coactivation"].items():
        if pairs:
            listed = ", ".join(
                "{}+{} x{:.2f} ({:,})".format(*pair["experts"], pair["lift"], pair["tokens"])
                for pair in pairs
            )
            lines.append(f"  {modality} tokens: coactivation relative to chance (tokens): {listed}")
    return lines


def load_text(load: Report) -> str:
    """The load of a layer in one line."""
    return (
        f"max load {load['max_over_mean']:.2f} x mean, min {load['min_over_mean']:.2f} x mean; "
        f"{load['effective_experts']:.1f} effective experts; entropy {load['entropy']:.2f} nats"
    )


def _expert_row(expert: Report) -> list[str]:
    words = "  ".join(
        f"{replace_control(word['word'])} x{word['lift']:.1f}"
        for word in expert["words"][:MAX_WORDS]
    )
    fraction = expert["token_fraction"]
    return [
        str(expert["expert"]),
        f"{fraction['image']:.1%}",
        f"{fraction['text']:.1%}",
        preference_text(expert["modality_preference"]),
        *(_number(expert[name]) for name in ("weight", "entropy", "word_bits")),
        words,
    ]


def preference_text(preference: float | None) -> str:
    """A modality preference as text: `image 0.83`."""
    if preference is None:
        return "no tokens"
    if abs(preference) < MIN_PREFERENCE:
        return "both"
    return f"{'text' if preference > 0 else 'image'} {abs(preference):.2f}"


def replace_control(word: str) -> str:
    """A word with control characters replaced: captions are untrusted."""
    return "".join(
        "\N{REPLACEMENT CHARACTER}" if unicodedata.category(character)[0] == "C" else character
        for character in word
    )


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"
