"""Sources of the drawings: packages with exact versions and hashes, authors, and licenses.

All licenses permit use, modification and redistribution with attribution (`ATTRIBUTION.md` is
generated from this table).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class Package:
    """A published npm package at one version."""

    name: str
    """npm name, e.g. `@iconify-json/noto`."""
    version: str
    """Exact version."""
    integrity: str
    """`sha512-...` of the tarball, in npm's notation."""

    @property
    def spec(self) -> str:
        """Argument of `npm pack`."""
        return f"{self.name}@{self.version}"

    @property
    def filename(self) -> str:
        """File name of the tarball that `npm pack` writes."""
        return f"{self.name.removeprefix('@').replace('/', '-')}-{self.version}.tgz"


@dataclass(frozen=True, kw_only=True)
class Source:
    """One set of drawings, all in one style."""

    key: str
    """Short name; prefix of its sample keys."""
    title: str
    """Official name."""
    package: Package
    """Package that contains it."""
    kind: Literal["code-points", "names", "webp", "words"]
    """How drawings are matched with concepts: SVG with a table of code points; SVG by the icon's
    name; WebP files named by code points; or SVG by name, where a name without concept becomes the
    caption."""
    author: str
    """Name for the attribution."""
    url: str
    """Project page."""
    license: str
    """SPDX identifier."""
    license_url: str
    """URL of the license text."""


EMOJIBASE = Package(
    name="emojibase-data",
    version="17.0.0",
    integrity="sha512-Yvgb5AWoHViHV/gq1qr5ZAarcBip+B27/ZLRsUJkbgAEaLlZ/fof9g882LTpmEpyhBNEC0m2SEmItljHsTygjA==",
)
"""English names, tags and groups of all emoji: the concepts. MIT, Miles Johnson."""

_CC = "https://creativecommons.org/licenses"

SOURCES = (
    Source(
        key="noto",
        title="Noto Emoji",
        package=Package(
            name="@iconify-json/noto",
            version="1.2.9",
            integrity="sha512-DQiuXENbun41ch+XPSV55H9FaWKpHTyz46YIKtSaKYD4fIDDzL1tR6H4np/T38jfrTAeI3rcKF0mqHYeZVAuaw==",
        ),
        kind="code-points",
        author="Google Inc",
        url="https://github.com/googlefonts/noto-emoji",
        license="Apache-2.0",
        license_url="https://github.com/googlefonts/noto-emoji/blob/main/svg/LICENSE",
    ),
    Source(
        key="noto-v1",
        title="Noto Emoji (v1)",
        package=Package(
            name="@iconify-json/noto-v1",
            version="1.2.5",
            integrity="sha512-/DsVMius69Q0fRS53z7QK1TROSuar606jiIx+laXtdsYGMXpf6LtHBx6CGfoo3UHHb/XpBsw+1L1x3eyPqMuVA==",
        ),
        kind="names",
        author="Google Inc",
        url="https://github.com/googlefonts/noto-emoji",
        license="Apache-2.0",
        license_url="https://github.com/googlefonts/noto-emoji/blob/main/svg/LICENSE",
    ),
    Source(
        key="fluent-flat",
        title="Fluent Emoji Flat",
        package=Package(
            name="@iconify-json/fluent-emoji-flat",
            version="1.2.6",
            integrity="sha512-RY47RgPb47fYUiyrA64sIOL0+UU02s29sXpNBbIQRBUlPlfNFTKUmZDERGuxDs/7yNGWqQYvuaSYM1M4fRXlUw==",
        ),
        kind="code-points",
        author="Microsoft Corporation",
        url="https://github.com/microsoft/fluentui-emoji",
        license="MIT",
        license_url="https://github.com/microsoft/fluentui-emoji/blob/main/LICENSE",
    ),
    Source(
        key="fluent-3d",
        title="Fluent Emoji 3D",
        package=Package(
            name="@lobehub/fluent-emoji-3d",
            version="1.1.0",
            integrity="sha512-Wlq2lVStTnr8BDpIJ0pEnTKO4LuDxxqTEhTvRtD1DLRF0me7ogeRQjKoehDHXuVJ2Qaecgl5wRBv60lUAG3h7g==",
        ),
        kind="webp",
        author="Microsoft Corporation, packed by LobeHub",
        url="https://github.com/microsoft/fluentui-emoji",
        license="MIT",
        license_url="https://github.com/microsoft/fluentui-emoji/blob/main/LICENSE",
    ),
    Source(
        key="openmoji",
        title="OpenMoji",
        package=Package(
            name="@iconify-json/openmoji",
            version="1.2.29",
            integrity="sha512-vXdhkqcXVSO6suy+m9LbcUM3OdVyuNOtpV8/als/WqfkQIRxevL5Geb/g+6GH/Qwnq1OqksEmaDGTCmZ5nFKJQ==",
        ),
        kind="code-points",
        author="OpenMoji",
        url="https://github.com/hfg-gmuend/openmoji",
        license="CC-BY-SA-4.0",
        license_url=f"{_CC}/by-sa/4.0/",
    ),
    Source(
        key="emojione",
        title="Emoji One (Colored)",
        package=Package(
            name="@iconify-json/emojione",
            version="1.2.3",
            integrity="sha512-T9+T3HIbJNLKKsmxYKlaYhvnHYkz/HNYTV7SHCXVZPfeUi4FqskY70YeN8yYAZT8cCv7w5vJxS4Q1m8zb9CMMg==",
        ),
        kind="names",
        author="Emoji One",
        url="https://github.com/EmojiTwo/emojitwo",
        license="CC-BY-4.0",
        license_url=f"{_CC}/by/4.0/",
    ),
    Source(
        key="fxemoji",
        title="Firefox OS Emoji",
        package=Package(
            name="@iconify-json/fxemoji",
            version="1.2.2",
            integrity="sha512-UAasRaxzFUKfIGSmLwnoarsssA4LX0VLLuEmplIqM6ZNQqIQRtav8tZ4H1neTlBreXuMQyAifr5jP4kn78DpiQ==",
        ),
        kind="names",
        author="Mozilla",
        url="https://github.com/mozilla/fxemoji",
        license="Apache-2.0",
        license_url="https://mozilla.github.io/fxemoji/LICENSE.md",
    ),
    Source(
        key="streamline",
        title="Streamline Emojis",
        package=Package(
            name="@iconify-json/streamline-emojis",
            version="1.2.4",
            integrity="sha512-iNr9T9XuZVTyQPJO8ZlLxBzPkpi7qMl+z1l0C31vpEMqhPMelth3n7CeWQYtixdetDPdI81yeG4ROqjWpYJE6A==",
        ),
        kind="names",
        author="Streamline",
        url="https://github.com/webalys-hq/streamline-vectors",
        license="CC-BY-4.0",
        license_url=f"{_CC}/by/4.0/",
    ),
    Source(
        key="game-icons",
        title="Game Icons",
        package=Package(
            name="@iconify-json/game-icons",
            version="1.2.4",
            integrity="sha512-/HDDZxowXgDJcOEwPspUCq5RuDdl25OyZKdtxqqiPJQNTrWIym7r4StLzIVs77DyNzOWWhH5wDqwYR3WHeDfkg==",
        ),
        kind="words",
        author="Lorc, Delapouite and other contributors of game-icons.net",
        url="https://github.com/game-icons/icons",
        license="CC-BY-3.0",
        license_url=f"{_CC}/by/3.0/",
    ),
    Source(
        key="twemoji",
        title="Twitter Emoji",
        package=Package(
            name="@iconify-json/twemoji",
            version="1.2.5",
            integrity="sha512-uKpuIEV0v6K5BW3Mjdyl+XKFVAbbcPxAgifKvEMtZoUZB5+YiY5zaMm2uNNCxyXzAWU9yNLlj41WU6/mvgALsw==",
        ),
        kind="code-points",
        author="Twitter, Inc and other contributors",
        url="https://github.com/jdecked/twemoji",
        license="CC-BY-4.0",
        license_url=f"{_CC}/by/4.0/",
    ),
)
"""All sets of drawings."""

UNSEEN_STYLE = "twemoji"
"""Key of the source that is held out from training."""


def packages() -> tuple[Package, ...]:
    """All packages to download."""
    return (EMOJIBASE, *(source.package for source in SOURCES))


def attribution(images: dict[str, int] | None = None) -> str:
    """Authors and licenses as a Markdown page.

    Args:
        images: Number of images used per source, for an additional column.
    """
    header = ["Source", "Author", "License", "Package", "Page"]
    rows = []
    for source in SOURCES:
        license_link = f"[{source.license}]({source.license_url})"
        row = [source.title, source.author, license_link, source.package.spec, source.url]
        if images is not None:
            row.append(str(images.get(source.key, 0)))
        rows.append(row)
    emojibase = [
        "Names, tags and groups: emojibase",
        "Miles Johnson",
        "[MIT](https://opensource.org/license/mit)",
        EMOJIBASE.spec,
        "https://github.com/milesj/emojibase",
    ]
    if images is not None:
        emojibase.append("")
        header.append("Images used")
    rows.append(emojibase)

    lines = ["| " + " | ".join(cells) + " |" for cells in (header, ["---"] * len(header), *rows)]
    return "\n".join(
        [
            "# Attribution",
            "",
            "The images were rendered from these sets of drawings and scaled down, otherwise unchanged.",
            "OpenMoji's license (share-alike) requires derived works to have the same license.",
            "",
            *lines,
            "",
        ]
    )
