"""One self-contained HTML page to look at: tables, histograms as inline SVG, pictures as data URIs.

No script and nothing from elsewhere: the page opens from a disk, by mail, behind a firewall. All
text is escaped, as captions come from strangers; a policy in the head forbids scripts in any case.
"""

from __future__ import annotations

import html
from collections.abc import Sequence

import numpy as np

from data_pipeline.common.harmless import harmless
from data_pipeline.preparing.tables import shortened

_STYLE = """
body { font: 14px/1.45 system-ui, sans-serif; margin: 2em auto; max-width: 75em; padding: 0 1em; color: #222; }
h1 { font-size: 1.4em } h2 { font-size: 1.1em; margin-top: 2em }
table { border-collapse: collapse } td, th { padding: .15em .8em .15em 0; text-align: right; font-weight: normal }
td:first-child, th:first-child { text-align: left } th { border-bottom: 1px solid #999 }
.row { display: flex; flex-wrap: wrap; gap: 1.2em } figure { margin: 0 } figcaption { font-size: 12px }
.card { width: 160px; overflow-wrap: anywhere } .card img { max-width: 160px; max-height: 160px; display: block }
.key { color: #777; font-size: 11px } .group { border-top: 1px solid #ddd; padding: .8em 0 }
svg text { font-size: 11px }
"""
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def page(title: str, parts: Sequence[str]) -> bytes:
    """A whole page; `parts` are HTML made by the functions below."""
    head = (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{escaped(title)}</title>'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}"><style>{_STYLE}</style></head>'
    )
    return (
        f"{head}<body><h1>{escaped(title)}</h1>\n{chr(10).join(parts)}\n</body></html>\n".encode()
    )


def escaped(text: str) -> str:
    """Text as HTML, without control characters or ones that turn the direction of writing."""
    return html.escape(harmless(text, lines=True))


def heading(text: str) -> str:
    """A heading of a section."""
    return f"<h2>{escaped(text)}</h2>"


def paragraph(text: str) -> str:
    """A paragraph."""
    return f"<p>{escaped(text)}</p>"


def html_table(headings: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A table; whole numbers get thousands separators."""

    def cells(row: Sequence[object], tag: str) -> str:
        texts = (f"{cell:,}" if isinstance(cell, int) else str(cell) for cell in row)
        return "<tr>" + "".join(f"<{tag}>{escaped(text)}</{tag}>" for text in texts) + "</tr>"

    return f"<table>{cells(headings, 'th')}{''.join(cells(row, 'td') for row in rows)}</table>"


def row_of(parts: Sequence[str]) -> str:
    """Things side by side."""
    return f'<div class="row">{"".join(parts)}</div>'


def card(picture_uri: str, key: str, text: str) -> str:
    """A picture with its key and caption; an empty address shows that there is none."""
    image = (
        f'<img src="{html.escape(picture_uri)}" alt="">' if picture_uri else "<em>no picture</em>"
    )
    return (
        f'<figure class="card">{image}<figcaption>{escaped(shortened(text, 300))}<br>'
        f'<span class="key">{escaped(key)}</span></figcaption></figure>'
    )


def histogram(title: str, values: np.ndarray, unit: str = "", *, bins: int = 30) -> str:
    """Bars over a range that leaves out the highest hundredth; the last bar holds those."""
    if not len(values):
        return ""
    edges, counts = bars(values, bins)
    width, height, base = 340, 120, 100
    step, top = width / len(counts), max(1, int(counts.max()))
    rects = "".join(
        f'<rect x="{number * step:.1f}" y="{base - 90 * count / top:.1f}" width="{max(1.0, step - 1):.1f}" '
        f'height="{90 * count / top:.1f}" fill="#4878a8"><title>{_number(edges[number])} to '
        f"{_number(edges[number + 1])}: {int(count):,}</title></rect>"
        for number, count in enumerate(counts)
    )
    middle = float(np.median(values))
    axis = (
        f'<text x="0" y="115">{_number(edges[0])}</text><text x="{width / 2}" y="115" text-anchor="middle">'
        f'median {_number(middle)} {escaped(unit)}</text><text x="{width}" y="115" text-anchor="end">'
        f"{_number(edges[-1])}</text>"
    )
    return (
        f'<figure><figcaption>{escaped(title)}</figcaption><svg width="{width}" height="{height}" '
        f'viewBox="0 0 {width} {height}" role="img">{rects}{axis}</svg></figure>'
    )


def bars(values: np.ndarray, bins: int) -> tuple[np.ndarray, np.ndarray]:
    """Edges `[bars + 1]` and counts `[bars]` of a histogram; everything is counted somewhere."""
    low, high = float(values.min()), float(np.quantile(values, 0.99))
    if np.issubdtype(values.dtype, np.integer):
        bins = int(min(bins, max(1, high - low + 1)))
    if high <= low:
        high = low + 1
    counts, edges = np.histogram(np.minimum(values, high), bins=bins, range=(low, high))
    return edges, counts


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 20 else f"{value:.3g}"
