"""What a built documentation site asks for from outside, and which of its links lead nowhere."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

_LOADED = {  # attributes whose address the browser asks for by itself
    "audio": ("src",),
    "embed": ("src",),
    "iframe": ("src",),
    "image": ("href", "xlink:href"),
    "img": ("src", "srcset"),
    "input": ("src",),
    "link": ("href",),
    "object": ("data",),
    "script": ("src",),
    "source": ("src", "srcset"),
    "track": ("src",),
    "use": ("href", "xlink:href"),
    "video": ("src", "poster"),
}
_NOT_LOADED = {"canonical", "prev", "next", "alternate"}  # relations of <link> that only name a page


@dataclass
class Page(HTMLParser):
    """One page: the addresses that it loads or links to, and its anchors."""

    loaded: list[str] = field(default_factory=list)
    linked: list[str] = field(default_factory=list)
    anchors: set[str] = field(default_factory=set)
    styles: list[str] = field(default_factory=list)
    _in_style: bool = False

    def __post_init__(self) -> None:
        super().__init__()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attrs}
        self.anchors |= {values[name] for name in ("id", "name") if values.get(name)}
        self.styles.append(values.get("style", ""))
        self._in_style = tag == "style"
        if tag == "a" and "href" in values:
            self.linked.append(values["href"])
        if tag == "link" and set(values.get("rel", "").split()) <= _NOT_LOADED:
            return
        self.loaded += [values[name] for name in _LOADED.get(tag, ()) if values.get(name)]

    def handle_data(self, data: str) -> None:
        if self._in_style:
            self.styles.append(data)
            self._in_style = False


def read_pages(site: Path) -> dict[Path, Page]:
    """The pages of a site: file -> what is in it."""
    pages = {}
    for file in sorted(site.rglob("*.html")):
        pages[file] = Page()
        pages[file].feed(file.read_text(encoding="utf-8"))
    return pages


def _is_outside(address: str) -> bool:
    parts = urlsplit(address.strip())
    return bool(parts.netloc) or parts.scheme in ("http", "https", "ws", "wss", "ftp")


def _style_addresses(text: str) -> list[str]:
    return re.findall(r"""url\(\s*['"]?([^'")]+)""", text) + re.findall(r"""@import\s+['"]([^'"]+)""", text)


def outside_requests(site: Path) -> list[str]:
    """Everything that a browser would ask another host for when it opens a page, style sheets included."""
    found = []
    for file, page in read_pages(site).items():
        asked = page.loaded + [address for style in page.styles for address in _style_addresses(style)]
        found += [f"{file.relative_to(site)}: {address}" for address in asked if _is_outside(address)]
    for file in sorted(site.rglob("*.css")):
        asked = _style_addresses(file.read_text(encoding="utf-8"))
        found += [f"{file.relative_to(site)}: {address}" for address in asked if _is_outside(address)]
    return found


def dead_links(site: Path) -> list[str]:
    """Links and loaded files inside the site that are not there, anchors included."""
    pages = read_pages(site)
    found = []
    for file, page in pages.items():
        if file.name == "404.html":  # served for any path, so its addresses start at the site's own
            continue
        for address in [*page.linked, *page.loaded]:
            parts = urlsplit(address)
            if _is_outside(address) or parts.scheme in ("data", "mailto"):
                continue
            target = (file.parent / unquote(parts.path)).resolve() if parts.path else file
            target = target / "index.html" if target.is_dir() else target
            anchor = unquote(parts.fragment)
            if not target.is_file():
                found.append(f"{file.relative_to(site)}: {address}")
            elif anchor and target in pages and anchor not in pages[target].anchors:
                found.append(f"{file.relative_to(site)}: {address} (no such anchor)")
    return found
