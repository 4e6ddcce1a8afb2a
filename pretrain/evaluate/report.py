"""Evaluation results as text and JSON."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pretrain.evaluate.captions import same_caption
from pretrain.evaluate.retrieval import RECALL_AT


def format_table(results: Mapping[str, Mapping[str, Any]]) -> str:
    """A table of the results of each set; recalls and accuracies in percent."""
    return "\n\n".join("\n".join(_set_lines(name, result)) for name, result in results.items())


def format_examples(result: Mapping[str, Any]) -> str:
    """Generated captions, one image per line; exact matches are marked with `=`."""
    lines = []
    for example in result["examples"]:
        generated, reference = example["generated"], example["reference"]
        if same_caption(generated, reference):
            lines.append(f"  = {reference}")
        else:
            lines.append(f"    {reference}   -> generated: {generated}")
    return "\n".join(lines)


def write_json(path: Path, results: Mapping[str, Any]) -> None:
    """Write results as JSON, atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    temporary.write_text(json.dumps(results, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(temporary, path)


def _set_lines(name: str, result: Mapping[str, Any]) -> list[str]:
    head = f"{name}: {result['images']:,} images, {result['texts']:,} texts"
    lines = [
        f"{head:<34}" + "".join(f"{f'R@{k}':>9}" for k in RECALL_AT),
        _row("image to text", result["image_to_text"]),
        _row("  chance", result["chance"]),
        _row("text to image", result["text_to_image"]),
        _row("  chance", result["chance_text_to_image"]),
        f"  captions: {result['caption_exact']:.1f} % exact matches "
        f"(of {result['caption_samples']}), {result['caption_token_accuracy']:.1f} % of tokens",
    ]
    if result["corrupt_samples"]:
        lines.append(f"  skipped: {result['corrupt_samples']} corrupt samples")
    return lines


def _row(label: str, recalls: Mapping[str, float]) -> str:
    return f"  {label:<32}" + "".join(f"{recalls[f'R@{k}']:>9.2f}" for k in RECALL_AT)
