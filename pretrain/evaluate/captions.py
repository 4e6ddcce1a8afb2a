"""Caption metrics: exact match of generated captions, and token accuracy.

Exact match compares a generated caption with all reference captions of its image. Token accuracy is
measured with teacher forcing: the model predicts each token of the first reference from the tokens
before it, so it improves long before complete captions match.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from data_pipeline.content.captions import clean_caption


def same_caption(generated: str, reference: str) -> bool:
    """Whether two captions are equal after whitespace cleaning; case-sensitive."""
    return clean_caption(generated) == clean_caption(reference)


def matching_reference(generated: str, references: Sequence[str]) -> str | None:
    """The first reference that is the `same_caption`, or None."""
    return next((text for text in references if same_caption(generated, text)), None)


def exact_match_percent(generated: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Percentage of captions that equal a reference of their image; 0 without captions."""
    hits = sum(
        matching_reference(caption, texts) is not None
        for caption, texts in zip(generated, references, strict=True)
    )
    return 100 * hits / max(1, len(references))


def token_accuracy_percent(counts: Iterable[tuple[int, int]]) -> float:
    """Percentage of correct tokens, from the (correct, total) counts of each batch.

    Every token has the same weight, whatever the size of its batch. 0 without tokens.
    """
    correct, total = 0, 0
    for batch_correct, batch_total in counts:
        correct, total = correct + batch_correct, total + batch_total
    return 100 * correct / max(1, total)
