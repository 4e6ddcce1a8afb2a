"""Results of evaluation sets for people and for programs."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pretrain.evaluate.captions import same_caption
from pretrain.evaluate.retrieval import RECALL_AT


def format_table(results: Mapping[str, Mapping[str, Any]]) -> str:
    """Results by name of the set as lines for a terminal; percent throughout."""
    return "\n\n".join("\n".join(_set_lines(name, result)) for name, result in results.items())


def format_examples(result: Mapping[str, Any]) -> str:
    """What the model wrote, one picture a line, right ones marked."""
    lines = []
    for example in result["examples"]:
        written, true = example["written"], example["true"]
        lines.append(
            f"  = {true}" if same_caption(written, true) else f"    {true}   <- it wrote: {written}"
        )
    return "\n".join(lines)


def write_json(path: Path, results: Mapping[str, Any]) -> None:
    """Write results as JSON, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    temporary.write_text(json.dumps(results, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(temporary, path)


def _set_lines(name: str, result: Mapping[str, Any]) -> list[str]:
    head = f"{name}: {result['images']:,} images, {result['texts']:,} texts"
    lines = [f"{head:<34}" + "".join(f"{f'R@{k}':>9}" for k in RECALL_AT)]
    lines.append(_row("image to text", result["image_to_text"]))
    lines.append(_row("  by chance", result["chance"]))
    lines.append(_row("text to image", result["text_to_image"]))
    lines.append(_row("  by chance", result["chance_text_to_image"]))
    lines.append(
        f"  captions: {result['caption_exact']:.1f} % exactly right (of {result['caption_samples']}), "
        f"{result['caption_token_accuracy']:.1f} % of tokens"
    )
    if result["bad_samples"]:
        lines.append(f"  left out: {result['bad_samples']} bad samples")
    return lines


def _row(label: str, recalls: Mapping[str, float]) -> str:
    return f"  {label:<32}" + "".join(f"{recalls[f'R@{k}']:>9.2f}" for k in RECALL_AT)
