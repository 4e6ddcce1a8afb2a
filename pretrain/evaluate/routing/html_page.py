"""The routing report as one HTML page without scripts or external resources.

All text is escaped. Each image is embedded once, in the style sheet, however many of its patches
are shown.
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
from pretrain.evaluate.routing.text_table import load_text, preference_text

Report = dict[str, Any]
Array = np.ndarray[Any, Any]

THUMBNAIL, CROP = 72, 40
"""Displayed sides of an image and of a patch, pixels."""
MAX_EMBEDDED = 160
"""Larger images are scaled down to this side before they are embedded, pixels."""


class PageImage(NamedTuple):
    """An image of which the page shows patches."""

    image: Array
    """uint8 `[3, side, side]`."""
    caption: str
    key: str


def routing_page(
    report: Report,
    grids: Sequence[Grid],
    images: Mapping[int, PageImage],
    *,
    patch_size: int,
    title: str,
) -> str:
    """The page.

    Args:
        report: See `routing_report`.
        grids: Drawn at the top of the page.
        images: By sample index, as in the report's `patches`; patches of missing ones are omitted.
        patch_size: Side of a patch in pixels of the images.
        title: Title of the page.
    """
    images = dict(sorted(images.items()))
    image_styles = "".join(_image_style(sample, image) for sample, image in images.items())
    layers = "".join(_layer(layer, images, patch_size) for layer in report["layers"])
    figures = "".join(
        f"<figure><figcaption>{escape(grid.title)}</figcaption>{svg_grid(grid)}</figure>"
        for grid in grids
    )
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    return f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>
<meta http-equiv="Content-Security-Policy" content="{policy}">
<style>{_STYLE}{image_styles}</style></head>
<body><h1>{escape(title)}</h1>
<p>{_summary(report)}
Blue is below the mean, white is the mean, red is above; gray has no value.</p>
<section class="grids">{figures}</section>{layers}
<footer>{_LEGEND}</footer></body></html>
"""


def _summary(report: Report) -> str:
    tokens = report["tokens"]
    average = " (patches on average: experts select them)"
    return (
        f"{report['pairs']:,} pairs: {tokens['image']:,} patches and {tokens['text']:,} text "
        f"tokens, each processed by {report['top_k']} of {report['num_experts']} experts in every "
        f"layer{average if report['routing'] == 'expert_choice' else ''}."
    )


def data_uri(image: Image.Image, image_format: str) -> str:
    """An image as a data URI."""
    stream = io.BytesIO()
    image.save(stream, format=image_format, **({"quality": 85} if image_format == "JPEG" else {}))
    encoded = base64.b64encode(stream.getvalue()).decode("ascii")
    return f"data:image/{image_format.lower()};base64,{encoded}"


def crop(image: Array, patch: int, patch_size: int) -> Array:
    """The pixels of a patch (in row-major order), uint8 `[patch_size, patch_size, 3]`."""
    row, column = divmod(patch, image.shape[2] // patch_size)
    top, left = row * patch_size, column * patch_size
    return np.ascontiguousarray(
        image[:, top : top + patch_size, left : left + patch_size].transpose(1, 2, 0)
    )


def _image_style(sample: int, image: PageImage) -> str:
    pixels = Image.fromarray(np.ascontiguousarray(image.image.transpose(1, 2, 0)))
    is_small = max(pixels.size) < MAX_EMBEDDED
    if not is_small:
        pixels.thumbnail((MAX_EMBEDDED, MAX_EMBEDDED))
    # PNG for small images: JPEG would blur them, and its header alone is as large.
    uri = data_uri(pixels, "PNG" if is_small else "JPEG")
    return f".p{sample:d}{{background-image:url({uri})}}"


def _layer(layer: Report, images: Mapping[int, PageImage], patch_size: int) -> str:
    loads = "; ".join(
        f"{modality}: {load_text(load)}"
        for modality, load in layer["load"].items()
        if load["max_over_mean"] is not None
    )
    rows = "".join(_expert(expert, images, patch_size) for expert in layer["experts"])
    return (
        f"<section><h2>Layer {layer['block']:02d}</h2><p>{escape(loads)}</p>{_pairs(layer)}"
        "<table><thead><tr><th>expert</th><th>image</th><th>text</th><th class='modality'>modality"
        "</th><th>weight</th><th>entropy</th><th>bits</th><th class='words'>words</th>"
        f"<th class='patches'>patches</th></tr></thead><tbody>{rows}</tbody></table></section>"
    )


def _pairs(layer: Report) -> str:
    """The list of coactivated pairs; empty without pairs."""
    items = []
    for modality, pairs in layer["coactivation"].items():
        for pair in pairs:
            items.append(
                "<li>{} tokens: experts {} and {}, x{:.2f} ({:,} tokens)</li>".format(
                    escape(modality), *pair["experts"], pair["lift"], pair["tokens"]
                )
            )
    if not items:
        return ""
    summary = "<summary>highest coactivation relative to chance</summary>"
    return f"<details>{summary}<ul>{''.join(items)}</ul></details>"


def _expert(expert: Report, images: Mapping[int, PageImage], patch_size: int) -> str:
    words = " ".join(
        f'<span class="w"><bdi>{escape(word["word"])}</bdi> '
        f"<small>x{word['lift']:.1f}</small></span>"
        for word in expert["words"]
    )
    patches = "".join(
        _patch(patch, images[patch["sample"]], patch_size)
        for patch in expert["patches"]
        if patch["sample"] in images
    )
    numbers = "".join(
        f"<td>{'-' if value is None else format(value, '.2f')}</td>"
        for value in (expert["weight"], expert["entropy"], expert["word_bits"])
    )
    fraction = expert["token_fraction"]
    return (
        f"<tr><th>{expert['expert']:d}</th><td>{fraction['image']:.1%}</td>"
        f"<td>{fraction['text']:.1%}</td>"
        f"<td class='modality'>{_preference(expert['modality_preference'])}</td>{numbers}"
        f"<td class='words'>{words}</td><td class='patches'>{patches}</td></tr>"
    )


def _preference(preference: float | None) -> str:
    """A bar from image (left) to text (right), and the value as text."""
    text = escape(preference_text(preference))
    if preference is None:
        return text
    return f'<span class="bar"><i style="left:{50 + 46 * preference:.0f}%"></i></span>{text}'


def _patch(patch: Report, image: PageImage, patch_size: int) -> str:
    """The patch, and next to it the whole image with a frame around the patch."""
    side = image.image.shape[2]
    row, column = divmod(patch["patch"], side // patch_size)
    scale = THUMBNAIL / side
    frame = (
        f"left:{column * patch_size * scale:.1f}px;top:{row * patch_size * scale:.1f}px;"
        f"width:{patch_size * scale:.1f}px;height:{patch_size * scale:.1f}px"
    )
    pixels = data_uri(Image.fromarray(crop(image.image, patch["patch"], patch_size)), "PNG")
    text = escape(f"{image.caption} ({image.key}); weight {patch['weight']:.2f}")
    return (
        f'<span class="patch" title="{text}">'
        f'<img src="{pixels}" width="{CROP}" height="{CROP}" alt="{text}">'
        f'<span class="image p{patch["sample"]:d}"><i style="{frame}"></i></span></span>'
    )


_STYLE = f"""\
body{{font:14px/1.4 system-ui,sans-serif;margin:24px;color:#222;background:#fff;max-width:1500px}}
table{{border-collapse:collapse;width:100%}}
td,th{{padding:4px 8px;border-bottom:1px solid #ddd;text-align:right;vertical-align:middle}}
td{{white-space:nowrap}}
.modality,.patches{{text-align:left}}
.words{{text-align:left;white-space:normal}}
.w{{white-space:nowrap;margin-right:8px}}
small{{color:#777}}
.grids{{display:flex;flex-wrap:wrap;gap:16px}}
figure{{margin:0}}
figcaption{{font-weight:600}}
svg text{{font-size:10px}}
svg .l,svg .v{{text-anchor:middle}}
svg .r{{text-anchor:end}}
svg .l,svg .r{{fill:#555}}
.patch{{display:inline-flex;align-items:center;gap:2px;margin:2px 10px 2px 0}}
.patch img{{image-rendering:pixelated}}
.image{{position:relative;display:inline-block;width:{THUMBNAIL}px;height:{THUMBNAIL}px;
background-size:100% 100%;outline:1px solid #ddd}}
.image i{{position:absolute;box-sizing:border-box;outline:2px solid #e6007e}}
.bar{{display:inline-block;position:relative;width:60px;height:8px;margin-right:6px;
background:linear-gradient(90deg,#4a7ab5,#ddd,#c8553d)}}
.bar i{{position:absolute;top:-3px;width:3px;height:14px;background:#222}}
footer{{margin-top:24px;color:#555}}"""

_LEGEND = """\
<b>image, text</b>: fraction of the modality's tokens that the expert processes.
<b>modality</b>: the modality with the larger fraction, from image (left) to text (right).
<b>weight, entropy</b> (nats): means over the expert's tokens.
<b>bits</b>: divergence of its words from those of all text.
<b>words</b>: words more frequent than chance, with their frequency relative to all text.
<b>patches</b>: patches with the largest gate weight, at most one per image."""
