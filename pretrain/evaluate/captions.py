"""Caption metrics: exact match of generated captions, and token accuracy.

Exact match compares generated captions with the reference captions. Token accuracy is measured with
teacher forcing: the model predicts each token from the reference tokens before it, so it improves
long before complete captions match.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from data_pipeline.content.captions import clean_caption


def same_caption(generated: str, reference: str) -> bool:
    """Whether two captions are equal after whitespace cleaning; case-sensitive."""
    return clean_caption(generated) == clean_caption(reference)


def exact_match_percent(generated: Sequence[str], reference: Sequence[str]) -> float:
    """Percentage of captions that match exactly; 0 without captions."""
    hits = sum(same_caption(a, b) for a, b in zip(generated, reference, strict=True))
    return 100 * hits / max(1, len(reference))


def token_accuracy_percent(counts: Iterable[tuple[int, int]]) -> float:
    """Percentage of correct tokens, from the (correct, total) counts of each batch.

    Every token has the same weight, whatever the size of its batch. 0 without tokens.
    """
    correct, total = 0, 0
    for batch_correct, batch_total in counts:
        correct, total = correct + batch_correct, total + batch_total
    return 100 * correct / max(1, total)
