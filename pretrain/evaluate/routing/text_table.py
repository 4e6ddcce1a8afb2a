"""The routing report as tables for a terminal."""

from __future__ import annotations

import unicodedata
from typing import Any

Report = dict[str, Any]

MAX_WORDS = 5
"""Words listed for each expert."""
MIN_PREFERENCE = 0.05
"""Smaller modality preferences are shown as `both`."""
_HEAD = (
    f"{'expert':>6}  {'image':>7}  {'text':>7}  {'modality':<10}  {'weight':>6}  {'entropy':>7}  "
    f"{'bits':>5}  words"
)
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
    lines = [f"layer {layer['block']:02d}"]
    for modality, load in layer["load"].items():
        if load["max_over_mean"] is not None:
            lines.append(f"  {modality:<5}  {load_text(load)}")
    lines += [_HEAD, *(_expert_line(expert) for expert in layer["experts"])]
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


def _expert_line(expert: Report) -> str:
    words = "  ".join(
        f"{replace_control(word['word'])} x{word['lift']:.1f}"
        for word in expert["words"][:MAX_WORDS]
    )
    fraction = expert["token_fraction"]
    return (
        f"{expert['expert']:>6}  {fraction['image']:>7.1%}  {fraction['text']:>7.1%}  "
        f"{preference_text(expert['modality_preference']):<10}  {_number(expert['weight'], 6)}  "
        f"{_number(expert['entropy'], 7)}  {_number(expert['word_bits'], 5)}  {words}"
    ).rstrip()


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


def _number(value: float | None, width: int) -> str:
    return f"{'-' if value is None else format(value, '.2f'):>{width}}"
