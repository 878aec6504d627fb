"""One HTML file that needs nothing else: pictures inside, light and dark, for wide screens and phones."""

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from exl2jax.report.plots import DARK, LIGHT, Plot, render
from exl2jax.storage import write_bytes
from exl2jax.version import VERSION

STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --paper: #ffffff; --soft: #5b6570; --line: #d9dde2; --warn: #9a4a00 }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e9ed; --paper: #15181c; --soft: #a3adb8; --line: #3a4048; --warn: #ffb366 } }
* { box-sizing: border-box }
body { margin: 0 auto; padding: 1rem; max-width: 70rem; color: var(--ink); background: var(--paper);
  font: 16px/1.5 system-ui, sans-serif }
h1 { font-size: 1.6rem; margin: .5rem 0 } h2 { font-size: 1.2rem; margin: 2rem 0 .5rem }
p, footer { color: var(--soft); max-width: 45rem } footer { margin-top: 2rem; font-size: .85rem }
.plots { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr)) }
figure { margin: 0; padding: .5rem; border: 1px solid var(--line); border-radius: 8px }
figure img { display: block; width: 100%; height: auto } figcaption { font-weight: 600; margin-bottom: .25rem }
.wide { overflow-x: auto } details { margin-top: .25rem; font-size: .9rem } summary { cursor: pointer }
table { border-collapse: collapse; font-size: .88rem; font-variant-numeric: tabular-nums }
th, td { padding: .25rem .6rem; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap }
th:first-child, td:first-child { text-align: left } caption { text-align: left; color: var(--soft) }
.warnings { color: var(--warn) } .warnings li { overflow-wrap: anywhere }
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class NumberTable:
    """A table of cells that are text already; `identity` is its id in the page."""

    identity: str
    caption: str
    header: tuple[str, ...]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Section:
    """A part of a page: a heading, a sentence, tables, then plots side by side."""

    title: str
    text: str = ""
    tables: tuple[NumberTable, ...] = ()
    plots: tuple[Plot, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class Page:
    """A report; `warnings` stand first, since they qualify the rest."""

    title: str
    text: str
    sections: tuple[Section, ...]
    warnings: tuple[str, ...] = ()

    @property
    def plots(self) -> tuple[Plot, ...]:
        """Every plot of the page."""
        return tuple(plot for section in self.sections for plot in section.plots)


def write_page(page: Page, path: Path) -> None:
    """Write the file."""
    write_bytes(path, page_html(page).encode())


def page_html(page: Page) -> str:
    """The page as HTML."""
    warnings = "".join(f"<li>{escape(text)}</li>" for text in page.warnings)
    listed = f'<section><h2>Warnings</h2><ul class="warnings">{warnings}</ul></section>' if warnings else ""
    body = "".join(map(_section, page.sections))
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(page.title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>\n"
        f"<h1>{escape(page.title)}</h1>\n<p>{escape(page.text)}</p>\n{listed}\n{body}\n</main>\n"
        f"<footer>exl2jax {VERSION}</footer>\n</body>\n</html>\n"
    )


def _section(section: Section) -> str:
    plots = "".join(map(_figure, section.plots))
    return (
        f"<section>\n<h2>{escape(section.title)}</h2>\n"
        + (f"<p>{escape(section.text)}</p>\n" if section.text else "")
        + "".join(map(_table, section.tables))
        + (f'<div class="plots">{plots}</div>\n' if plots else "")
        + "</section>\n"
    )


def _figure(plot: Plot) -> str:
    numbers = _table(NumberTable(identity=f"data-{plot.name}", caption=plot.title, header=plot.header, rows=plot.rows))
    light, dark = (_data(render(plot, theme, "svg")) for theme in (LIGHT, DARK))
    return (
        f'<figure id="{escape(plot.name)}"><figcaption>{escape(plot.title)}</figcaption><picture>'
        f'<source media="(prefers-color-scheme: dark)" srcset="{dark}">'
        f'<img src="{light}" alt="{escape(plot.alt)}" width="480" height="{round(100 * plot.height)}"></picture>'
        f"<details><summary>Numbers</summary>{numbers}</details></figure>"
    )


def _data(svg: bytes) -> str:
    return f"data:image/svg+xml;base64,{base64.b64encode(svg).decode()}"


def _table(table: NumberTable) -> str:
    head = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in table.header)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in table.rows)
    return (
        f'<div class="wide"><table id="{escape(table.identity)}"><caption>{escape(table.caption)}</caption>'
        f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>\n"
    )
