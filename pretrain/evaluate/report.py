"""Evaluation results as text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from data_pipeline.common.escaping import escape_control
from data_pipeline.common.tables import counted, format_table
from pretrain.evaluate.captions import matching_reference
from pretrain.evaluate.retrieval import RECALL_AT


def format_results(results: Mapping[str, Mapping[str, Any]]) -> str:
    """A table of the results of each set; recalls and accuracies in percent."""
    return "\n\n".join("\n".join(_set_lines(name, result)) for name, result in results.items())


def format_examples(result: Mapping[str, Any]) -> str:
    """Generated captions, one image per line; exact matches are marked with `=`."""
    lines = []
    for example in result["examples"]:
        generated, references = example["generated"], example["references"]
        match = matching_reference(generated, references)
        if match is None:
            line = f"    {references[0]}   -> generated: {generated}"
        else:
            line = f"  = {match}"
        lines.append(escape_control(line))
    return "\n".join(lines)


def _set_lines(name: str, result: Mapping[str, Any]) -> list[str]:
    head = f"{name}: {counted(result['images'], 'image')}, {counted(result['texts'], 'text')}"
    recalls = [
        ("  image to text", result["image_to_text"]),
        ("    chance", result["chance"]),
        ("  text to image", result["text_to_image"]),
        ("    chance", result["chance_text_to_image"]),
    ]
    names = [f"R@{k}" for k in RECALL_AT]
    rows = [(label, *(f"{values[name]:.2f}" for name in names)) for label, values in recalls]
    lines = [
        format_table([head, *names], rows, rule=False),
        f"  captions: {result['caption_exact']:.1f} % exact matches "
        f"(of {result['caption_samples']}), {result['caption_token_accuracy']:.1f} % of tokens",
    ]
    if result["corrupt_samples"]:
        lines.append(f"  skipped: {counted(result['corrupt_samples'], 'corrupt sample')}")
    return lines
