"""Concepts, their canonical captions, and caption variants for training.

Evaluation uses the canonical caption, which the model should learn to generate. Variants add tags
or a category; they are only for training. They connect an image to words that concepts share, which
is the only way to retrieve a concept that is not in the training set. Every variant begins with the
canonical caption, because a model trained on a prefix such as "a drawing of" would generate it.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from data_pipeline.common.seeds import rng
from data_pipeline.content import captions

TAG_VARIANTS = 3
"""Number of variants that add tags to the canonical caption."""
MAX_TAGS = 4
"""Maximum number of tags in a variant."""


@dataclass(frozen=True, kw_only=True)
class Concept:
    """Something that drawings show."""

    caption: str
    """The canonical caption."""
    hexcode: str = ""
    """Code points of its emoji, in upper case, without the FE0F selector; empty if it has none."""
    tags: tuple[str, ...] = ()
    """Related words."""
    group: str = ""
    """Broad category, e.g. `animals & nature`."""
    subgroup: str = ""
    """Narrow category, e.g. `animal-mammal`."""


def concepts_of(
    rows: Iterable[Mapping[str, object]], groups: Mapping[int, str], subgroups: Mapping[int, str]
) -> list[Concept]:
    """Concepts of emojibase's table.

    Components that are not images by themselves are excluded: skin tones and hair (group
    `component`) and single regional letters (no group).

    Args:
        rows: Contents of `en/data.json`.
        groups: Group names by number.
        subgroups: Subgroup names by number.
    """
    concepts = []
    for row in rows:
        group = row.get("group")
        if not isinstance(group, int) or groups[group] == "component":
            continue
        tags, subgroup = row.get("tags"), row.get("subgroup")
        caption = canonical(str(row["label"]))
        clean_tags = [canonical(str(tag)) for tag in tags] if isinstance(tags, list) else []
        distinct_tags = dict.fromkeys(tag for tag in clean_tags if tag and tag != caption)
        concepts.append(
            Concept(
                caption=caption,
                hexcode=strip_variation_selector(str(row["hexcode"])),
                tags=tuple(distinct_tags),
                group=groups[group].replace("-", " "),
                subgroup=subgroups[subgroup] if isinstance(subgroup, int) else "",
            )
        )
    return concepts


def canonical(label: str) -> str:
    """A label as a caption: clean, lower case, ASCII quotation marks, `flag of france`."""
    text = captions.clean_caption(label).lower().translate(str.maketrans("’‘“”", "''\"\""))
    text = re.sub(r"^flag: ", "flag of ", text)
    text = re.sub(r"^keycap: ", "keycap ", text)
    return text.replace('"', "")


def caption_of_icon(icon: str) -> str:
    """The caption in an icon's name: `skateboarding-01` is `skateboarding`."""
    return canonical(re.sub(r"-0\d+$", "", icon).replace("-", " "))


def strip_variation_selector(hexcode: str) -> str:
    """Code points in upper case without FE0F, which vendors use inconsistently."""
    return "-".join(part for part in hexcode.upper().split("-") if part != "FE0F")


def match_name(text: str) -> str:
    """Normalize a caption or an icon's name for comparison: letters and digits, no accents.

    Vendors use `flag-for-norway`, `flag-for-flag-norway` and `flag-norway` for `flag of norway`.
    """
    plain = unicodedata.normalize("NFKD", text.lower()).encode("ascii", "ignore").decode()
    return re.sub(r"[^a-z0-9]", "", re.sub(r"^flag[ -](for|of)[ -](flag-)?", "flag-", plain))


def variants(concept: Concept, withheld: PhraseSet | None = None) -> list[str]:
    """Captions for training, the canonical one first; deterministic.

    Args:
        concept: The concept of the image.
        withheld: Captions of held-out concepts. Tags and categories that contain one of them are
            excluded; the canonical caption never is.
    """
    tags = [tag for tag in concept.tags if withheld is None or tag not in withheld]
    generator = rng("quickstart captions", concept.caption)
    texts = [concept.caption]
    for _ in range(TAG_VARIANTS if tags else 0):
        count = int(generator.integers(1, min(MAX_TAGS, len(tags)) + 1))
        selected = [tags[index] for index in generator.permutation(len(tags))[:count]]
        texts.append(", ".join([concept.caption, *selected]))
    for category in (concept.subgroup.replace("-", " "), concept.group):
        if category and (withheld is None or category not in withheld):
            texts.append(f"{concept.caption}, {category}")
    return list(dict.fromkeys(texts))


class PhraseSet:
    """A set of phrases; `text in phrases` tests whether `text` contains one as whole words."""

    def __init__(self, phrases: Iterable[str]) -> None:
        self._phrases = {tuple(_words(phrase)) for phrase in phrases}
        self._lengths = sorted({len(phrase) for phrase in self._phrases})

    def __contains__(self, text: str) -> bool:
        words = _words(text)
        return any(
            tuple(words[start : start + length]) in self._phrases
            for length in self._lengths
            for start in range(len(words) - length + 1)
        )


def _words(text: str) -> list[str]:
    return re.findall(r"[^\W_]+|[^\w\s,:]", text.casefold())
