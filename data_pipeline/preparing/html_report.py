"""Self-contained HTML reports: tables, histograms as inline SVG, images as data URIs.

A report has no scripts and no external resources, so it opens from a local disk or an e-mail. All
text is escaped because captions are untrusted; a content security policy also forbids scripts.
"""

from __future__ import annotations

import html
from collections.abc import Sequence

import numpy as np

from data_pipeline.common.escaping import escape_control
from data_pipeline.common.tables import format_count, truncate

_STYLE = """
body { font: 14px/1.45 system-ui, sans-serif; margin: 2em auto; max-width: 75em; padding: 0 1em;
  color: #222; }
h1 { font-size: 1.4em } h2 { font-size: 1.1em; margin-top: 2em }
table { border-collapse: collapse }
td, th { padding: .15em .8em .15em 0; text-align: right; font-weight: normal }
td:first-child, th:first-child { text-align: left } th { border-bottom: 1px solid #999 }
.row { display: flex; flex-wrap: wrap; gap: 1.2em }
figure { margin: 0 } figcaption { font-size: 12px }
.card { width: 160px; overflow-wrap: anywhere }
.card img { max-width: 160px; max-height: 160px; display: block }
.key { color: #777; font-size: 11px }
.group { border-top: 1px solid #ddd; padding: .8em 0 }
svg text { font-size: 11px }
"""
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def html_page(title: str, parts: Sequence[str]) -> bytes:
    """A complete page; `parts` are HTML fragments made by the functions below."""
    head = (
        f'<meta charset="utf-8"><title>{escape(title)}</title>'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        f"<style>{_STYLE}</style>"
    )
    body = "\n".join(parts)
    page = (
        f'<!doctype html><html lang="en"><head>{head}</head>'
        f"<body><h1>{escape(title)}</h1>\n{body}\n</body></html>\n"
    )
    return page.encode()


def escape(text: str) -> str:
    """Text as HTML; control characters and text-direction overrides become escape sequences."""
    return html.escape(escape_control(text, lines=True))


def heading(text: str) -> str:
    """A section heading."""
    return f"<h2>{escape(text)}</h2>"


def paragraph(text: str) -> str:
    """A paragraph."""
    return f"<p>{escape(text)}</p>"


def html_table(headings: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A table; integers get thousands separators."""
    body = "".join(_table_row(row, "td") for row in rows)
    return f"<table>{_table_row(headings, 'th')}{body}</table>"


def _table_row(cells: Sequence[object], tag: str) -> str:
    contents = (f"<{tag}>{escape(format_count(cell))}</{tag}>" for cell in cells)
    return "<tr>" + "".join(contents) + "</tr>"


def flex_row(parts: Sequence[str]) -> str:
    """Fragments side by side."""
    return f'<div class="row">{"".join(parts)}</div>'


def card(image_uri: str, key: str, text: str) -> str:
    """An image with its key and caption; an empty URI shows `no image`."""
    image = f'<img src="{html.escape(image_uri)}" alt="">' if image_uri else "<em>no image</em>"
    return (
        f'<figure class="card">{image}<figcaption>{escape(truncate(text, 300))}<br>'
        f'<span class="key">{escape(key)}</span></figcaption></figure>'
    )


def histogram(title: str, values: np.ndarray, unit: str = "", *, bins: int = 30) -> str:
    """A histogram as SVG; the last bar also counts all values above the 99th percentile."""
    if not len(values):
        return ""

    edges, counts = histogram_bins(values, bins)
    width, height, base, bar_height = 340, 120, 100, 90
    step, max_count = width / len(counts), max(1, int(counts.max()))
    bars = []
    for index, count in enumerate(counts):
        size = bar_height * count / max_count
        label = f"{_number(edges[index])} to {_number(edges[index + 1])}: {int(count):,}"
        bars.append(
            f'<rect x="{index * step:.1f}" y="{base - size:.1f}" '
            f'width="{max(1.0, step - 1):.1f}" height="{size:.1f}" fill="#4878a8">'
            f"<title>{label}</title></rect>"
        )

    median = f"median {_number(float(np.median(values)))} {escape(unit)}"
    axis = (
        f'<text x="0" y="115">{_number(edges[0])}</text>'
        f'<text x="{width / 2}" y="115" text-anchor="middle">{median}</text>'
        f'<text x="{width}" y="115" text-anchor="end">{_number(edges[-1])}</text>'
    )
    return (
        f"<figure><figcaption>{escape(title)}</figcaption>"
        f'<svg width="{width}" height="{height}" viewBox="0 0 {width} {height}" role="img">'
        f"{''.join(bars)}{axis}</svg></figure>"
    )


def histogram_bins(values: np.ndarray, bins: int) -> tuple[np.ndarray, np.ndarray]:
    """Edges `[bins + 1]` and counts `[bins]`; the last bin also counts all larger values."""
    low, high = float(values.min()), float(np.quantile(values, 0.99))
    if np.issubdtype(values.dtype, np.integer):
        bins = int(min(bins, max(1, high - low + 1)))
    if high <= low:
        high = low + 1

    counts, edges = np.histogram(np.minimum(values, high), bins=bins, range=(low, high))
    return edges, counts


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 20 else f"{value:.3g}"
