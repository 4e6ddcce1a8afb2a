"""Quickstart data: sources, concepts, captions, the split, and matching drawings with concepts."""

from __future__ import annotations

import base64
import hashlib
import re
from dataclasses import replace
from pathlib import Path

import pytest

from data_pipeline.common.errors import DataError
from tests.unit.tools.quickstart_packages import (
    CODES,
    GROUPS,
    NAMES,
    ROWS,
    write_tarball,
    write_tarballs,
)
from tools.quickstart_data.captions import (
    Concept,
    PhraseSet,
    canonical,
    caption_of_icon,
    concepts_of,
    match_name,
    variants,
)
from tools.quickstart_data.collect import collect, load_concepts
from tools.quickstart_data.sources import EMOJIBASE, SOURCES, attribution, packages
from tools.quickstart_data.split import is_held_out, split_of


def test_sources_are_pinned_and_attributed() -> None:
    for package in packages():
        assert len(base64.b64decode(package.integrity.removeprefix("sha512-"), validate=True)) == 64
        assert re.fullmatch(r"\d+\.\d+\.\d+", package.version)
    assert len({source.key for source in SOURCES}) == len(SOURCES) == 10
    assert len({package.integrity for package in packages()}) == 11

    table = attribution({"noto": 7})
    for source in SOURCES:
        assert source.author in table
        assert source.license_url in table
        assert source.package.spec in table
    assert re.search(r"Noto Emoji \|.*\| 7 \|", table)


def test_one_in_ten_concepts_is_held_out_by_md5() -> None:
    codes = [f"{code:X}" for code in range(0x1F000, 0x20000)]
    expected = [
        int.from_bytes(hashlib.md5(code.encode()).digest(), "big") % 10 == 0 for code in codes
    ]
    assert [is_held_out(code) for code in codes] == expected
    assert 0.08 < sum(expected) / len(expected) < 0.12
    assert not is_held_out("")

    held_out, kept = codes[expected.index(True)], codes[expected.index(False)]
    sources = ("noto", "twemoji")
    assert [split_of(source, held_out) for source in sources] == ["unseen_concept"] * 2
    assert [split_of(source, kept) for source in sources] == ["train", "unseen_style"]


def test_canonical_captions() -> None:
    assert canonical("flag: Côte d’Ivoire") == "flag of côte d'ivoire"
    assert canonical("Japanese “vacancy”  button") == "japanese vacancy button"
    assert canonical("keycap: 10") == "keycap 10"
    assert caption_of_icon("skateboarding-02") == "skateboarding"
    assert caption_of_icon("battery-25") == "battery 25"


def test_names_match_across_vendors() -> None:
    same = (
        "flag of côte d'ivoire",
        "flag-for-cote-divoire",
        "flag-cote-divoire",
        "flag-for-flag-cote-divoire",
    )
    assert {match_name(name) for name in same} == {"flagcotedivoire"}
    assert match_name("ok hand") == match_name("okhand") != match_name("ok-hand-2")


def test_concepts_exclude_components() -> None:
    groups, subgroups = (
        {int(key): name for key, name in GROUPS[kind].items()} for kind in ("groups", "subgroups")
    )
    concepts = concepts_of(ROWS, groups, subgroups)
    assert [concept.caption for concept in concepts] == [canonical(name) for name in NAMES]
    assert concepts[3].hexcode == CODES[3] and concepts[3].subgroup == "face-smiling"
    assert "thing" in concepts[3].tags and concepts[3].caption not in concepts[3].tags


def test_variants_begin_with_the_caption_and_are_deterministic() -> None:
    concept = Concept(
        caption="red heart", tags=("love", "heart", "emotion", "ruby"), group="smileys emotion"
    )
    texts = variants(concept)
    assert texts == variants(replace(concept)) and len(set(texts)) == len(texts) >= 4
    assert texts[0] == "red heart"
    assert all(text.startswith("red heart") for text in texts)
    words = set(re.findall(r"\w+", " ".join(texts)))
    assert {"red", "heart", "emotion"} < words
    assert words <= {"red", "heart", "love", "emotion", "ruby", "smileys"}

    without = variants(concept, PhraseSet(["heart", "emotion"]))
    assert "emotion" not in " ".join(without)
    assert all("heart" not in text.replace("red heart", "") for text in without)


def test_phrases_match_whole_words() -> None:
    phrases = PhraseSet(["cat", "red heart", "flag of norway"])
    texts = [
        "cat",
        "a Cat, sitting",
        "cattle",
        "red",
        "red, heart",
        "a red heart",
        "heart red",
        "flag of norway",
        "",
    ]
    pattern = re.compile(r"\b(cat|red,? heart|flag of norway)\b", re.IGNORECASE)
    assert [text in phrases for text in texts] == [bool(pattern.search(text)) for text in texts]


def test_every_kind_of_source_is_matched(tmp_path: Path) -> None:
    tarballs = write_tarballs(tmp_path)
    concepts = load_concepts(tarballs[EMOJIBASE])
    for source in SOURCES:
        drawings = collect(source, tarballs[source.package], concepts)
        captions = {drawing.concept.caption for drawing in drawings}
        # One drawing per concept: no skin tones, no duplicates.
        assert len(captions) == len({drawing.key for drawing in drawings}) == len(drawings)
        for drawing in drawings:
            assert drawing.key.startswith(f"{source.key}_") and "." not in drawing.key

        names = NAMES if source.kind in ("webp", "code-points") else NAMES[::2]
        icon_names = {"magic wand", "skateboarding"} if source.kind == "words" else set()
        assert captions == {canonical(name) for name in names} | icon_names


def test_package_without_a_file_is_rejected(tmp_path: Path) -> None:
    path = write_tarball(tmp_path / "x.tgz", {"icons.json": {}})
    with pytest.raises(DataError, match=r"x\.tgz.*chars\.json"):
        collect(SOURCES[0], path, [])
