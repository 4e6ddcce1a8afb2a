"""The concepts, the one caption each is known by, and other ways to say it.

The canonical caption is what the model is judged by and should learn to write. The others are for
training only: with tags, with the class. They tie a drawing to words it shares with other concepts,
which is all that a concept never seen in training can be found by. Every one begins with the
canonical caption: a model that also learns to write must not be taught to begin with "a drawing
of".
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from data_pipeline.common.seeds import rng
from data_pipeline.content import captions

TAG_MIXES = 3
"""Captions that add tags to the canonical one."""


@dataclass(frozen=True, kw_only=True)
class Concept:
    """One thing that is drawn."""

    caption: str
    """The canonical caption."""
    hexcode: str = ""
    """Its emoji's code points, in upper case, without the FE0F selector; empty for words."""
    tags: tuple[str, ...] = ()
    """Words that go with it."""
    group: str = ""
    """Wide class, e.g. `animals & nature`."""
    subgroup: str = ""
    """Narrow class, e.g. `animal-mammal`."""


def concepts_of(
    rows: Iterable[Mapping[str, object]], groups: Mapping[int, str], subgroups: Mapping[int, str]
) -> list[Concept]:
    """Concepts from emojibase's table.

    Parts that are no picture of a thing by themselves are left out: skin tones and hair (group
    `component`) and single regional letters (no group at all).

    Args:
        rows: `en/data.json`.
        groups: Names of groups by number.
        subgroups: Names of subgroups by number.
    """
    concepts = []
    for row in rows:
        group = row.get("group")
        if not isinstance(group, int) or groups[group] == "component":
            continue
        tags, subgroup = row.get("tags"), row.get("subgroup")
        caption = canonical(str(row["label"]))
        words = [canonical(str(tag)) for tag in tags] if isinstance(tags, list) else []
        concepts.append(
            Concept(
                caption=caption,
                hexcode=without_selector(str(row["hexcode"])),
                tags=tuple(dict.fromkeys(word for word in words if word and word != caption)),
                group=groups[group].replace("-", " "),
                subgroup=subgroups[subgroup] if isinstance(subgroup, int) else "",
            )
        )
    return concepts


def canonical(label: str) -> str:
    """A label as a caption: clean, lower case, plain quotation marks, `flag of france`."""
    text = captions.clean(label).lower().translate(str.maketrans("’‘“”", "''\"\""))
    text = re.sub(r"^flag: ", "flag of ", text)
    text = re.sub(r"^keycap: ", "keycap ", text)
    return text.replace('"', "")


def words_of(icon: str) -> str:
    """The caption inside an icon's name: `skateboarding-01` is `skateboarding`."""
    return canonical(re.sub(r"-0\d+$", "", icon).replace("-", " "))


def without_selector(hexcode: str) -> str:
    """Code points in upper case without FE0F, which vendors put or leave as they like."""
    return "-".join(part for part in hexcode.upper().split("-") if part != "FE0F")


def match_name(text: str) -> str:
    """What is left of a caption or an icon's name to compare: letters and digits, accents off.

    Vendors say `flag-for-norway`, `flag-for-flag-norway` and `flag-norway` for `flag of norway`.
    """
    plain = unicodedata.normalize("NFKD", text.lower()).encode("ascii", "ignore").decode()
    return re.sub(r"[^a-z0-9]", "", re.sub(r"^flag[ -](for|of)[ -](flag-)?", "flag-", plain))


def variants(concept: Concept, withheld: Phrases | None = None) -> list[str]:
    """Captions for training, the canonical one first; the same on every call.

    Args:
        concept: What the picture shows.
        withheld: Captions of concepts that training must not hear of; parts that contain one of
            them are left out (never the concept's own caption).
    """
    kept = [tag for tag in concept.tags if withheld is None or tag not in withheld]
    draw = rng("quickstart captions", concept.caption)
    own = concept.caption
    found = [own]
    for _ in range(TAG_MIXES if kept else 0):
        count = int(draw.integers(1, min(4, len(kept)) + 1))
        found.append(", ".join([own, *(kept[i] for i in draw.permutation(len(kept))[:count])]))
    kind = concept.subgroup.replace("-", " ")
    for part in (kind, concept.group):
        if part and (withheld is None or part not in withheld):
            found.append(f"{own}, {part}")
    return list(dict.fromkeys(found))


class Phrases:
    """A set of phrases; `text in phrases` is whether any stands in `text` as whole words."""

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
