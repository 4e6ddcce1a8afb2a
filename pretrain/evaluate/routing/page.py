"""The routing report as one HTML page: no scripts, nothing loaded from elsewhere, everything
escaped.

A whole picture stands in the page once, in its style sheet, however many experts show a patch of
it.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from pretrain.evaluate.routing.grids import Grid
from pretrain.evaluate.routing.svg import svg_grid
from pretrain.evaluate.routing.text import serves

Report = dict[str, Any]
Array = np.ndarray[Any, Any]

THUMB, CROP = 72, 40
"""Sides of a whole picture and of a patch on the page, pixels."""
LARGEST = 160
"""Side to which larger pictures are shrunk before they go into the page, pixels."""


class PagePicture(NamedTuple):
    """A picture of which the page shows patches."""

    image: Array
    """uint8 `[3, side, side]`."""
    caption: str
    key: str


def routing_page(
    report: Report,
    grids: Sequence[Grid],
    pictures: Mapping[int, PagePicture],
    *,
    patch_size: int,
    title: str,
) -> str:
    """The page.

    Args:
        report: See `routing_report`.
        grids: To draw at the head of the page.
        pictures: By number of the sample, as in the report's `patches`; a missing one is left out.
        patch_size: Side of a patch, pixels of the pictures.
        title: What was looked at, for people.
    """
    shown = dict(sorted(pictures.items()))
    layers = "".join(_layer(layer, shown, patch_size) for layer in report["layers"])
    drawn = "".join(
        f"<figure><figcaption>{escape(grid.title)}</figcaption>{svg_grid(grid)}</figure>"
        for grid in grids
    )
    tokens = report["tokens"]
    return f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<style>{_STYLE}{"".join(_picture_style(sample, picture) for sample, picture in shown.items())}</style></head>
<body><h1>{escape(title)}</h1>
<p>{report["pairs"]:,} pairs: {tokens["image"]:,} patches and {tokens["text"]:,} text tokens, each of which visits
{report["top_k"]} of {report["num_experts"]} experts in every layer\
{" (patches in the mean: experts choose them)" if report["routing"] == "expert_choice" else ""}.
Blue is less than fair, white fair, red more; gray has no value.</p>
<section class="grids">{drawn}</section>{layers}
<footer>{_LEGEND}</footer></body></html>
"""


def data_uri(image: Image.Image, kind: str) -> str:
    """A picture as an address that holds it."""
    stream = io.BytesIO()
    image.save(stream, format=kind, **({"quality": 85} if kind == "JPEG" else {}))
    return f"data:image/{kind.lower()};base64,{base64.b64encode(stream.getvalue()).decode('ascii')}"


def crop(image: Array, patch: int, patch_size: int) -> Array:
    """The pixels of a patch, uint8 `[patch_size, patch_size, 3]`; patches are counted row by
    row."""
    row, column = divmod(patch, image.shape[2] // patch_size)
    top, left = row * patch_size, column * patch_size
    return np.ascontiguousarray(
        image[:, top : top + patch_size, left : left + patch_size].transpose(1, 2, 0)
    )


def _picture_style(sample: int, picture: PagePicture) -> str:
    whole = Image.fromarray(np.ascontiguousarray(picture.image.transpose(1, 2, 0)))
    small = max(whole.size) < LARGEST
    if not small:
        whole.thumbnail((LARGEST, LARGEST))
    # PNG where a picture has few pixels: JPEG would blur them, and its head alone is as large.
    return f".p{sample:d}{{background-image:url({data_uri(whole, 'PNG' if small else 'JPEG')})}}"


def _layer(layer: Report, pictures: Mapping[int, PagePicture], patch_size: int) -> str:
    loads = "; ".join(
        f"{modality}: busiest {load['max_over_mean']:.2f} x fair, like {load['used']:.1f} even experts, entropy "
        f"{load['entropy']:.2f} nats"
        for modality, load in layer["load"].items()
        if load["max_over_mean"] is not None
    )
    pairs = "".join(
        "<li>{} tokens: experts {} and {}, x{:.2f} ({:,} tokens)</li>".format(
            escape(modality), *pair["experts"], pair["lift"], pair["tokens"]
        )
        for modality, found in layer["coactivation"].items()
        for pair in found
    )
    rows = "".join(_expert(expert, pictures, patch_size) for expert in layer["experts"])
    coactivation = (
        f"<details><summary>chosen together most, over chance</summary><ul>{pairs}</ul></details>"
    )
    return (
        f"<section><h2>Layer {layer['block']:02d}</h2><p>{escape(loads)}</p>{coactivation if pairs else ''}"
        f"<table><thead><tr><th>expert</th><th>image</th><th>text</th><th class='serves'>serves</th><th>weight</th>"
        f"<th>entropy</th><th>bits</th><th class='words'>words</th><th class='patches'>patches</th></tr></thead>"
        f"<tbody>{rows}</tbody></table></section>"
    )


def _expert(expert: Report, pictures: Mapping[int, PagePicture], patch_size: int) -> str:
    words = " ".join(
        f'<span class="w"><bdi>{escape(word["word"])}</bdi> <small>x{word["lift"]:.1f}</small></span>'
        for word in expert["words"]
    )
    patches = "".join(
        _patch(patch, pictures[patch["sample"]], patch_size)
        for patch in expert["patches"]
        if patch["sample"] in pictures
    )
    numbers = "".join(
        f"<td>{'-' if value is None else format(value, '.2f')}</td>"
        for value in (expert["weight"], expert["entropy"], expert["word_bits"])
    )
    share = expert["share"]
    return (
        f"<tr><th>{expert['expert']:d}</th><td>{share['image']:.1%}</td><td>{share['text']:.1%}</td>"
        f"<td class='serves'>{_leaning(expert['lean'])}</td>{numbers}<td class='words'>{words}</td>"
        f"<td class='patches'>{patches}</td></tr>"
    )


def _leaning(lean: float | None) -> str:
    """A bar from image (left) to text (right), with the words of it."""
    if lean is None:
        return "nobody"
    return (
        f'<span class="bar"><i style="left:{50 + 46 * lean:.0f}%"></i></span>{escape(serves(lean))}'
    )


def _patch(patch: Report, picture: PagePicture, patch_size: int) -> str:
    """The patch, and beside it the whole picture with a frame around the patch."""
    side = picture.image.shape[2]
    row, column = divmod(patch["patch"], side // patch_size)
    scale = THUMB / side
    frame = (
        f"left:{column * patch_size * scale:.1f}px;top:{row * patch_size * scale:.1f}px;"
        f"width:{patch_size * scale:.1f}px;height:{patch_size * scale:.1f}px"
    )
    pixels = data_uri(Image.fromarray(crop(picture.image, patch["patch"], patch_size)), "PNG")
    words = escape(f"{picture.caption} ({picture.key}); weight {patch['weight']:.2f}")
    return (
        f'<span class="patch" title="{words}"><img src="{pixels}" width="{CROP}" height="{CROP}" alt="{words}">'
        f'<span class="whole p{patch["sample"]:d}"><i style="{frame}"></i></span></span>'
    )


_STYLE = f"""body{{font:14px/1.4 system-ui,sans-serif;margin:24px;color:#222;background:#fff;max-width:1500px}}
table{{border-collapse:collapse;width:100%}}td,th{{padding:4px 8px;border-bottom:1px solid #ddd;text-align:right;
vertical-align:middle}}td{{white-space:nowrap}}.serves{{text-align:left}}.words{{text-align:left;white-space:normal}}
.patches{{text-align:left}}
.w{{white-space:nowrap;margin-right:8px}}small{{color:#777}}
.grids{{display:flex;flex-wrap:wrap;gap:16px}}figure{{margin:0}}figcaption{{font-weight:600}}
svg text{{font-size:10px}}svg .l,svg .v{{text-anchor:middle}}svg .r{{text-anchor:end}}
svg .l,svg .r{{fill:#555}}.patch{{display:inline-flex;align-items:center;gap:2px;margin:2px 10px 2px 0}}
.patch img{{image-rendering:pixelated}}.whole{{position:relative;display:inline-block;width:{THUMB}px;height:{THUMB}px;
background-size:100% 100%;outline:1px solid #ddd}}
.whole i{{position:absolute;box-sizing:border-box;outline:2px solid #e6007e}}
.bar{{display:inline-block;position:relative;width:60px;height:8px;background:linear-gradient(90deg,#4a7ab5,#ddd,#c8553d);
margin-right:6px}}.bar i{{position:absolute;top:-3px;width:3px;height:14px;background:#222}}
footer{{margin-top:24px;color:#555}}"""

_LEGEND = """<b>image, text</b>: share of the modality's tokens that visit the expert. <b>serves</b>: from image
(left) to text (right), by these shares. <b>weight, entropy</b> (nats): means over its visits. <b>bits</b>: how far its
words are from those of all text. <b>words</b>: those it sees more often than chance, times their share of all text.
<b>patches</b>: those with the largest gate weight, at most one of a picture."""
