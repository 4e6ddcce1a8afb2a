"""The page: whatever captions say is text, pictures are in it, and nothing comes from elsewhere."""

from __future__ import annotations

import base64
import io
import re
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pretrain.config.experts import MoEConfig
from pretrain.evaluate.routing.grids import Grid, load_grids
from pretrain.evaluate.routing.page import PagePicture, crop, routing_page
from pretrain.evaluate.routing.report import routing_report
from pretrain.evaluate.routing.svg import TOLD, svg_grid
from pretrain.evaluate.routing.tally import Tally

EVIL = "<script>alert('x')</script>\"&'</style>"


class Reader(HTMLParser):
    """Collects tags and text; complains about tags that are not closed."""

    VOID = frozenset({"meta", "img", "br", "rect"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID or tag == "rect":
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def image(side: int = 32) -> np.ndarray[Any, Any]:
    return np.random.default_rng(0).integers(0, 256, (3, side, side), dtype=np.uint8)


def page(
    word: str = EVIL, picture: PagePicture | None = None, title: str = EVIL
) -> tuple[str, Reader]:
    """A page of one layer whose expert 0 sees one word and a patch of sample 7."""
    tally = Tally(1, 2, patches=1)
    tally.pairs, tally.tokens_M = 2, np.array([8, 20])
    tally.visits_LME[0] = [[8, 2], [12, 8]]
    tally.words_W, tally.words_LEW = (
        np.array([10, 10]),
        np.array([[[10, 2], [0, 8]]], dtype=np.int32),
    )
    tally.patch_sample_LEX[0], tally.patch_place_LEX[0] = [[7], [9]], [[6], [0]]
    tally.patch_weight_LEX[0] = [[0.75], [0.5]]
    moe = MoEConfig(num_experts=2)
    report = routing_report(tally, [word, "b"], moe, (1,))
    pictures = {7: picture or PagePicture(image(), EVIL, EVIL)}
    grids = [grid._replace(title=title) for grid in load_grids(tally.visits_LME, (1,), moe)]
    text = routing_page(report, grids, pictures, patch_size=8, title=title)
    reader = Reader()
    reader.feed(text)
    reader.close()
    return text, reader


def test_nothing_from_captions_becomes_markup() -> None:
    text, reader = page()
    assert reader.open == []
    assert not [tag for tag, _ in reader.tags if tag in ("script", "iframe", "object", "link")]
    assert EVIL not in text and "<script" not in text.lower()
    assert text.count("</style>") == 1
    assert reader.text.count(EVIL) == 5  # the title twice, and above two grids, and the word
    titles = [attributes.get("title") for tag, attributes in reader.tags if tag == "span"]
    assert f"{EVIL} ({EVIL}); weight 0.75" in titles
    assert not [
        name for _, attributes in reader.tags for name in attributes if name.startswith("on")
    ]


def test_nothing_is_loaded_from_elsewhere() -> None:
    text, reader = page("http://example.com/a.png")
    policy = next(
        attributes["content"] for tag, attributes in reader.tags if "http-equiv" in attributes
    )
    assert policy == "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    addresses = [
        attributes[name]
        for _, attributes in reader.tags
        for name in ("src", "href")
        if name in attributes
    ]
    assert addresses and all(
        str(address).startswith("data:image/png;base64,") for address in addresses
    )
    assert all(found.startswith("data:image/") for found in re.findall(r"url\(([^)]*)\)", text))


def test_the_patch_is_the_one_that_the_expert_saw_with_its_picture_beside() -> None:
    picture = PagePicture(image(), "a fox", "k1")
    text, reader = page("fox", picture)
    source = next(attributes["src"] for tag, attributes in reader.tags if tag == "img")
    shown = np.asarray(Image.open(io.BytesIO(base64.b64decode(str(source).partition(",")[2]))))
    # Patch 6 of 4 x 4: second row, third column.
    assert np.array_equal(shown, picture.image[:, 8:16, 16:24].transpose(1, 2, 0))
    whole = re.findall(r"\.p7\{background-image:url\(data:image/png;base64,([^)]*)\)\}", text)
    assert len(whole) == 1
    assert np.array_equal(
        np.asarray(Image.open(io.BytesIO(base64.b64decode(whole[0])))),
        picture.image.transpose(1, 2, 0),
    )
    assert any(attributes.get("class") == "whole p7" for _, attributes in reader.tags)
    assert (
        len([1 for tag, _ in reader.tags if tag == "img"]) == 1
    )  # that of sample 9 could not be read


def test_bars_and_frames_lie_where_they_belong() -> None:
    _, reader = page("fox")
    bars: list[str | None] = []
    frames: list[str | None] = []
    for (_, parent), (tag, attributes) in zip(reader.tags, reader.tags[1:], strict=False):
        if tag == "i":
            (bars if parent.get("class") == "bar" else frames).append(attributes["style"])
    # Shares 1.0 and 0.6, then 0.25 and 0.4: a lean of -0.25 to the left, of 0.23 to the right.
    assert bars == ["left:38%", "left:61%"]
    # Patch 6 of 4 x 4: second row, third column, of a picture drawn 72 pixels wide.
    assert frames == ["left:36.0px;top:18.0px;width:18.0px;height:18.0px"]


def test_large_pictures_are_shrunk() -> None:
    text, _ = page("fox", PagePicture(image(512), "a", "k"))
    (whole,) = re.findall(r"\.p7\{background-image:url\(data:image/jpeg;base64,([^)]*)\)\}", text)
    assert Image.open(io.BytesIO(base64.b64decode(whole))).size == (160, 160)


def test_numbers_are_there_for_people() -> None:
    _, reader = page("fox", title="Routing")
    assert "2 pairs: 8 patches and 20 text tokens" in reader.text
    assert "image: busiest 1.60 x fair" in reader.text
    assert "100.0%" in reader.text and "60.0%" in reader.text
    assert "fox" in reader.text and "x1.7" in reader.text


@pytest.mark.parametrize("patch", [0, 3, 15])
def test_patches_are_counted_row_by_row(patch: int) -> None:
    picture, (row, column) = image(), divmod(patch, 4)
    expected = picture[:, 8 * row : 8 * row + 8, 8 * column : 8 * column + 8]
    assert np.array_equal(crop(picture, patch, 8), expected.transpose(1, 2, 0))


def test_a_drawing_has_every_cell_and_is_well_formed() -> None:
    ratio_RC = np.array([[0.0, 1.0, np.nan], [4.0, 0.25, 2.0]])
    drawing = ElementTree.fromstring(svg_grid(Grid(EVIL, ratio_RC, ("<a>", "b&"), ("0", "1", "2"))))
    cells = drawing.findall("rect")
    assert [cell.get("fill") for cell in cells[:4]] == ["#215299", "#ffffff", "#dedede", "#b2182b"]
    assert len(cells) == 6
    assert drawing.get("aria-label") == EVIL
    assert cells[0].findtext("title") == "<a>, 0: 0.00" and cells[2].find("title") is None
    assert [text.text for text in drawing.findall("text[@class='r']")] == ["<a>", "b&"]
    narrow = ElementTree.fromstring(svg_grid(Grid("", np.ones((64, 64)), ("<",) * 64, ("<",) * 64)))
    assert [len(narrow.findall(f"text[@class='{name}']")) for name in "rl"] == [
        64,
        32,
    ]  # 13 pixels each
    heavy = ElementTree.fromstring(
        svg_grid(Grid("", np.ones((2, TOLD)), ("a", "b"), ("0",) * TOLD))
    )
    assert len(heavy.findall("rect")) == 2 * TOLD and heavy.find("rect/title") is None
