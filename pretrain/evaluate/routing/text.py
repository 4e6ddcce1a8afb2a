"""The routing report as tables for a terminal. Pure."""

from __future__ import annotations

import unicodedata
from typing import Any

Report = dict[str, Any]

WORDS = 5
"""Words named of each expert."""
_HEAD = f"{'expert':>6}  {'image':>7}  {'text':>7}  {'serves':<10}  {'weight':>6}  {'entropy':>7}  {'bits':>5}  words"


def routing_table(report: Report) -> str:
    """Each layer with its experts, then what the columns mean."""
    fair = ", ".join(
        f"{modality} {load['fair']:.1%}"
        for modality, load in report["layers"][0]["load"].items()
        if load["fair"] is not None
    )
    parts = ["\n".join(_layer_lines(layer)) for layer in report["layers"]]
    legend = (
        f"image, text: share of the modality's tokens that visit the expert (fair: {fair})   "
        f"serves: which of these is larger, from 0 (alike) to 1 (only that one)\n"
        f"weight, entropy (nats): means over its visits   "
        f"bits: how far its words are from those of all text   words: times their share of all text"
    )
    return "\n\n".join([*parts, legend])


def _layer_lines(layer: Report) -> list[str]:
    lines = [f"layer {layer['block']:02d}"]
    for modality, load in layer["load"].items():
        if load["max_over_mean"] is not None:
            lines.append(
                f"  {modality:<5}  busiest {load['max_over_mean']:.2f} x fair, idlest "
                f"{load['min_over_mean']:.2f}; like {load['used']:.1f} even experts; entropy "
                f"{load['entropy']:.2f} nats"
            )
    lines += [_HEAD, *(_expert_line(expert) for expert in layer["experts"])]
    for modality, pairs in layer["coactivation"].items():
        if pairs:
            named = ", ".join(
                "{}+{} x{:.2f} ({:,})".format(*pair["experts"], pair["lift"], pair["tokens"])
                for pair in pairs
            )
            lines.append(f"  {modality} tokens choose together, over chance (tokens): {named}")
    return lines


def _expert_line(expert: Report) -> str:
    words = "  ".join(
        f"{printable(word['word'])} x{word['lift']:.1f}" for word in expert["words"][:WORDS]
    )
    return (
        f"{expert['expert']:>6}  {expert['share']['image']:>7.1%}  {expert['share']['text']:>7.1%}  "
        f"{serves(expert['lean']):<10}  {_number(expert['weight'], 6)}  {_number(expert['entropy'], 7)}  "
        f"{_number(expert['word_bits'], 5)}  {words}"
    ).rstrip()


def serves(lean: float | None) -> str:
    """A lean in words: `image 0.83`."""
    if lean is None:
        return "nobody"
    if abs(lean) < 0.05:
        return "both"
    return f"{'text' if lean > 0 else 'image'} {abs(lean):.2f}"


def printable(word: str) -> str:
    """A word without anything that a terminal would obey."""
    return "".join(
        "\N{REPLACEMENT CHARACTER}" if unicodedata.category(letter)[0] == "C" else letter
        for letter in word
    )


def _number(value: float | None, width: int) -> str:
    return f"{'-' if value is None else format(value, '.2f'):>{width}}"
