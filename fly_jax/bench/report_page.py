"""The HTML of a report. It is one page with everything in it; every piece of text that comes from a file is escaped."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

from fly_jax.bench.report_tables import Table

# The browser is told, besides, to load and to run nothing.
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
STYLE = """
:root { color-scheme: light dark;
  --text: #1b1b1b; --quiet: #5a5a5a; --page: #ffffff; --line: #d4d4d4; --band: #f5f5f5; }
@media (prefers-color-scheme: dark) {
  :root { --text: #e8e8e8; --quiet: #a8a8a8; --page: #161616; --line: #3c3c3c; --band: #202020; }
}
body { margin: 2rem auto; max-width: 72rem; padding: 0 1rem; background: var(--page); color: var(--text);
  font: 16px/1.5 system-ui, sans-serif; }
section { margin-top: 3rem; border-top: 1px solid var(--line); }
h2, h3 { overflow-wrap: anywhere; }
dl { display: flex; flex-wrap: wrap; gap: 0 1.5rem; color: var(--quiet); font-size: 0.9rem; }
dl div { display: flex; gap: 0.4rem; }
dd { margin: 0; color: var(--text); }
figure { margin: 1.5rem 0; }
/* Pictures are drawn for white paper. */
img { max-width: 100%; background: #ffffff; border-radius: 4px; padding: 0.5rem; box-sizing: border-box; }
figcaption, .quiet { color: var(--quiet); font-size: 0.9rem; overflow-wrap: anywhere; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: 0.85rem; font-variant-numeric: tabular-nums; }
caption { text-align: left; font-weight: 600; padding: 0.75rem 0 0.25rem; }
th, td { padding: 0.2rem 0.6rem; border-bottom: 1px solid var(--line); text-align: left; vertical-align: top; }
th { font-weight: 600; }
tbody tr:nth-child(even) { background: var(--band); }
.number { text-align: right; }
@media print { body { max-width: none; margin: 0; } figure, tr { break-inside: avoid; } }
"""


@dataclass(frozen=True, slots=True)
class Picture:
    """An SVG, what it shows, and where its figures come from."""

    svg: bytes
    caption: str
    source: str


@dataclass(frozen=True, slots=True)
class Section:
    """One result file."""

    name: str
    kind: str
    provenance: Mapping[str, str]
    pictures: Sequence[Picture]
    tables: Sequence[Table]


def page(title: str, sections: Sequence[Section]) -> str:
    """The whole page; the same bytes for the same files."""
    links = "".join(f'<li><a href="#r{n}">{escape(each.name)}</a></li>' for n, each in enumerate(sections, 1))
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<h1>{escape(title)}</h1>\n"
        f"<nav><ol>{links}</ol></nav>\n"
        + "".join(_section(number, each) for number, each in enumerate(sections, 1))
        + "</body>\n</html>\n"
    )


def _section(number: int, section: Section) -> str:
    pictures = "".join(_picture(each) for each in section.pictures)
    tables = "".join(_table(each) for each in section.tables)
    heading = f'<section id="r{number}">\n<h2>{escape(section.name)}</h2>\n'
    kind = f'<p class="quiet">kind: {escape(section.kind)}</p>\n'
    return f"{heading}{kind}{_provenance(section.provenance)}{pictures}{tables}</section>\n"


def _provenance(provenance: Mapping[str, str]) -> str:
    if not provenance:
        return '<p class="quiet">The file does not state date, versions and machine.</p>\n'
    pairs = "".join(f"<div><dt>{escape(key)}</dt><dd>{escape(value)}</dd></div>" for key, value in provenance.items())
    return f"<dl>{pairs}</dl>\n"


def _picture(picture: Picture) -> str:
    """As an image, in which nothing runs and no name clashes with the page's."""
    data = base64.b64encode(picture.svg).decode("ascii")
    caption = escape(picture.caption)
    return (
        f'<figure>\n<img src="data:image/svg+xml;base64,{data}" alt="{caption}">\n'
        f"<figcaption>{caption}<br>{escape(picture.source)}</figcaption>\n</figure>\n"
    )


def _table(table: Table) -> str:
    kinds = [' class="number"' if numeric else "" for numeric in table.numeric]
    head = "".join(
        f'<th scope="col"{kind}>{escape(text)}</th>' for kind, text in zip(kinds, table.headings, strict=True)
    )
    rows = "".join(
        "<tr>" + "".join(f"<td{kind}>{escape(text)}</td>" for kind, text in zip(kinds, row, strict=True)) + "</tr>\n"
        for row in table.rows
    )
    return (
        f'<div class="scroll"><table>\n<caption>{escape(table.title)}</caption>\n'
        f"<thead><tr>{head}</tr></thead>\n<tbody>\n{rows}</tbody>\n</table></div>\n"
    )
