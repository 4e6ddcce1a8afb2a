"""The HTML report: text is escaped, images are embedded, nothing is loaded."""

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
from pretrain.evaluate.routing.counts import RoutingCounts
from pretrain.evaluate.routing.grids import Grid, load_grids
from pretrain.evaluate.routing.html_page import PageImage, crop, routing_page
from pretrain.evaluate.routing.report import routing_report
from pretrain.evaluate.routing.svg import MAX_TOOLTIPS, svg_grid

MARKUP = "<script>alert('x')</script>\"&'</style>"


class Reader(HTMLParser):
    """Collects tags and text; asserts that tags are closed."""

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


def make_image(side: int = 32) -> np.ndarray[Any, Any]:
    return np.random.default_rng(0).integers(0, 256, (3, side, side), dtype=np.uint8)


def make_page(
    word: str = MARKUP, image: PageImage | None = None, title: str = MARKUP
) -> tuple[str, Reader]:
    """A page of one layer whose expert 0 has one word and a patch of sample 7."""
    counts = RoutingCounts(1, 2, patches=1)
    counts.pairs, counts.tokens_M = 2, np.array([8, 20])
    counts.load_LME[0] = [[8, 2], [12, 8]]
    counts.words_W, counts.words_LEW = (
        np.array([10, 10]),
        np.array([[[10, 2], [0, 8]]], dtype=np.int32),
    )
    counts.patch_sample_LEX[0], counts.patch_index_LEX[0] = [[7], [9]], [[6], [0]]
    counts.patch_weight_LEX[0] = [[0.75], [0.5]]
    moe = MoEConfig(num_experts=2)
    report = routing_report(counts, [word, "b"], moe, (1,))
    images = {7: image or PageImage(make_image(), MARKUP, MARKUP)}
    grids = [grid._replace(title=title) for grid in load_grids(counts.load_LME, (1,), moe)]
    text = routing_page(report, grids, images, patch_size=8, title=title)
    reader = Reader()
    reader.feed(text)
    reader.close()
    return text, reader


def test_captions_are_escaped() -> None:
    text, reader = make_page()
    assert reader.open == []
    assert not [tag for tag, _ in reader.tags if tag in ("script", "iframe", "object", "link")]
    assert MARKUP not in text and "<script" not in text.lower()
    assert text.count("</style>") == 1
    assert reader.text.count(MARKUP) == 5  # twice the title, above two grids, and the word
    titles = [attributes.get("title") for tag, attributes in reader.tags if tag == "span"]
    assert f"{MARKUP} ({MARKUP}); weight 0.75" in titles
    assert not [
        name for _, attributes in reader.tags for name in attributes if name.startswith("on")
    ]


def test_no_external_resources_are_loaded() -> None:
    text, reader = make_page("http://example.com/a.png")
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
    assert all(url.startswith("data:image/") for url in re.findall(r"url\(([^)]*)\)", text))


def test_a_patch_is_shown_with_its_image() -> None:
    image = PageImage(make_image(), "a fox", "k1")
    text, reader = make_page("fox", image)
    source = next(attributes["src"] for tag, attributes in reader.tags if tag == "img")
    shown = np.asarray(Image.open(io.BytesIO(base64.b64decode(str(source).partition(",")[2]))))
    # Patch 6 of 4 x 4: second row, third column.
    assert np.array_equal(shown, image.image[:, 8:16, 16:24].transpose(1, 2, 0))
    embedded = re.findall(r"\.p7\{background-image:url\(data:image/png;base64,([^)]*)\)\}", text)
    assert len(embedded) == 1
    assert np.array_equal(
        np.asarray(Image.open(io.BytesIO(base64.b64decode(embedded[0])))),
        image.image.transpose(1, 2, 0),
    )
    assert any(attributes.get("class") == "image p7" for _, attributes in reader.tags)
    # The image of sample 9 is missing.
    assert len([tag for tag, _ in reader.tags if tag == "img"]) == 1


def test_positions_of_bars_and_frames() -> None:
    _, reader = make_page("fox")
    bars: list[str | None] = []
    frames: list[str | None] = []
    for (_, parent), (tag, attributes) in zip(reader.tags, reader.tags[1:], strict=False):
        if tag == "i":
            (bars if parent.get("class") == "bar" else frames).append(attributes["style"])
    # Fractions 1.0 and 0.6, then 0.25 and 0.4: preferences -0.25 (image) and 0.23 (text).
    assert bars == ["left:38%", "left:61%"]
    # Patch 6 of 4 x 4: second row, third column, of an image shown 72 pixels wide.
    assert frames == ["left:36.0px;top:18.0px;width:18.0px;height:18.0px"]


def test_large_images_are_scaled_down() -> None:
    text, _ = make_page("fox", PageImage(make_image(512), "a", "k"))
    (embedded,) = re.findall(
        r"\.p7\{background-image:url\(data:image/jpeg;base64,([^)]*)\)\}", text
    )
    assert Image.open(io.BytesIO(base64.b64decode(embedded))).size == (160, 160)


def test_loads_and_fractions_are_shown() -> None:
    _, reader = make_page("fox", title="Routing")
    assert "2 pairs: 8 patches and 20 text tokens" in reader.text
    assert "image: max load 1.60 x mean" in reader.text
    assert "100.0%" in reader.text and "60.0%" in reader.text
    assert "fox" in reader.text and "x1.7" in reader.text


@pytest.mark.parametrize("patch", [0, 3, 15])
def test_patches_are_in_row_major_order(patch: int) -> None:
    image, (row, column) = make_image(), divmod(patch, 4)
    expected = image[:, 8 * row : 8 * row + 8, 8 * column : 8 * column + 8]
    assert np.array_equal(crop(image, patch, 8), expected.transpose(1, 2, 0))


def test_svg_draws_every_cell() -> None:
    ratio_RC = np.array([[0.0, 1.0, np.nan], [4.0, 0.25, 2.0]])
    drawing = ElementTree.fromstring(
        svg_grid(Grid(MARKUP, ratio_RC, ("<a>", "b&"), ("0", "1", "2")))
    )
    cells = drawing.findall("rect")
    assert [cell.get("fill") for cell in cells[:4]] == ["#215299", "#ffffff", "#dedede", "#b2182b"]
    assert len(cells) == 6
    assert drawing.get("aria-label") == MARKUP
    assert cells[0].findtext("title") == "<a>, 0: 0.00" and cells[2].find("title") is None
    assert [text.text for text in drawing.findall("text[@class='r']")] == ["<a>", "b&"]


def test_svg_of_many_cells_has_fewer_labels_and_no_tooltips() -> None:
    drawing = ElementTree.fromstring(
        svg_grid(Grid("", np.ones((64, 64)), ("<",) * 64, ("<",) * 64))
    )
    # Cells of 13 pixels.
    num_labels = [len(drawing.findall(f"text[@class='{name}']")) for name in "rl"]
    assert num_labels == [64, 32]

    grid = Grid("", np.ones((2, MAX_TOOLTIPS)), ("a", "b"), ("0",) * MAX_TOOLTIPS)
    drawing = ElementTree.fromstring(svg_grid(grid))
    assert len(drawing.findall("rect")) == 2 * MAX_TOOLTIPS
    assert drawing.find("rect/title") is None
