"""Reports: the numbers in the page are the table's, and a real browser shows them, light and dark, wide and narrow."""

import re
import subprocess
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from exl2jax import ConversionConfig, cli
from exl2jax.errors import JobError
from exl2jax.report.conversion import conversion_page, read_conversion
from exl2jax.report.page import NumberTable, Page, Section, page_html
from exl2jax.report.plots import DARK, LIGHT, Plot, label, render
from exl2jax.report.tables import folded
from exl2jax.testing.browser import find_browser

PHONE, DESKTOP = (390, 844), (1280, 900)


class Reader(HTMLParser):
    """The tables of a page by id, the alternative texts, and every address in it."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tables: dict[str, list[list[str]]] = {}
        self.alts: list[str] = []
        self.addresses: list[str] = []
        self._rows: list[list[str]] = []
        self._cell = False
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.addresses += [value for name in ("src", "srcset", "href") if (value := found.get(name))]
        if tag == "img":
            self.alts.append(found.get("alt") or "")
        if tag == "table":
            self._rows = self.tables.setdefault(str(found.get("id")), [])
        if tag == "tr":
            self._rows.append([])
        self._cell = tag in ("td", "th")
        if self._cell:
            self._rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        self._cell = False

    def handle_data(self, data: str) -> None:
        if self._cell:
            self._rows[-1][-1] += data


@pytest.fixture(scope="module", params=["stock", "best"])
def work(
    request: pytest.FixtureRequest, tiny_llama: Path, tiny_conversion: Callable[[Path, str], ConversionConfig]
) -> Path:
    return tiny_conversion(tiny_llama, request.param).out_dir


def test_a_report_is_titled_by_its_model(work: Path, tiny_llama: Path) -> None:
    page = conversion_page(read_conversion(work))
    assert page.title == f"{tiny_llama.name} at 4.5 bits" != "model at 4.5 bits"
    assert f"<title>{page.title}</title>" in page_html(page)


def test_page_of_a_conversion(work: Path) -> None:
    found = read_conversion(work)
    page = conversion_page(found)
    html = Reader(page_html(page))
    facts = dict(html.tables["facts"][1:])
    assert facts["bits per weight"].startswith(f"{found.summary['bpw']:.4f}")
    assert [plot.name for plot in page.plots] == ["bits", "curves", "depth", "time"]
    errors = found.summary["rfn_error"] or found.summary["stream_error"]
    assert [float(row[1]) for row in html.tables["data-depth"][1:]] == [round(e, 5) for e in errors.values()]
    assert len(html.tables["data-bits"]) == 1 + 7 and len(html.tables["data-bits"][0]) == 1 + 2
    for key, (xs, ys) in found.curves.items():
        assert len(xs) > 3 and all(np.diff(ys) <= 0), f"{key}: more bits, less error"


def test_a_page_needs_nothing_else(work: Path) -> None:
    html = page_html(conversion_page(read_conversion(work)))
    found = Reader(html)
    assert found.addresses and all(a.startswith("data:image/svg+xml;base64,") for a in found.addresses)
    assert "<script" not in html and "@import" not in html and "url(" not in html
    assert len(found.alts) == 4 and all(len(alt) > 40 for alt in found.alts)


def test_unfinished_work_is_refused(tmp_path: Path) -> None:
    (tmp_path / "job_new.json").write_text('{"records": {}}')
    with pytest.raises(JobError, match="not finished"):
        read_conversion(tmp_path)
    assert cli.main(["report", str(tmp_path / "nowhere")]) == 1


def test_text_is_escaped_and_pictures_are_reproducible() -> None:
    plot = Plot(
        name="p",
        title="a < b",
        alt='say "x"',
        draw=lambda axes, theme: (axes.plot([1, 2], [1, 2]), label(axes, "x", "y")),
        header=("<",),
        rows=[["&"]],
    )
    page = Page(title="<t>", text="&", sections=(Section(title="s", plots=(plot,)),), warnings=("<w>",))
    html = page_html(page)
    assert "<t>" not in html and "<w>" not in html and "a &lt; b" in html and "say &quot;x&quot;" in html
    assert html == page_html(page)
    for kind in ("svg", "png"):
        assert render(plot, LIGHT, kind) == render(plot, LIGHT, kind) != render(plot, DARK, kind)
    table = NumberTable(identity="i", caption="c", header=("h",), rows=[["1"]])
    assert 'id="i"' in page_html(Page(title="", text="", sections=(Section(title="", tables=(table,)),)))


def test_command_writes_page_and_plots(work: Path, tmp_path: Path) -> None:
    assert cli.main(["report", str(work), "--out", str(tmp_path)]) == 0
    assert (tmp_path / "report.html").exists()
    names = {path.name for path in (tmp_path / "plots").iterdir()}
    assert names == {f"{n}.{k}" for n in ("bits", "curves", "depth", "time") for k in ("svg", "png")}
    with Image.open(tmp_path / "plots" / "bits.png") as picture:
        assert picture.size[0] > 600


@pytest.fixture(scope="session")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., str]:
    """Runs headless Chromium on a page and returns the document that it shows."""
    program = find_browser()
    if program is None:
        pytest.skip("no chromium on this machine")
    home = tmp_path_factory.mktemp("chromium")

    def run(page: Path, *more: str, size: tuple[int, int] = DESKTOP) -> str:
        command = [
            program,
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--hide-scrollbars",
            f"--user-data-dir={home}",
        ]
        command += [f"--window-size={size[0]},{size[1]}", "--virtual-time-budget=5000", *more, page.as_uri()]
        return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout

    return run


PROBE = """<script>addEventListener("load", () => {
  const images = [...document.images].map((image) => image.naturalWidth);
  document.body.dataset.images = Math.min(...images);
  document.body.dataset.overflow = document.documentElement.scrollWidth - innerWidth;
  document.body.dataset.ink = getComputedStyle(document.body).color;
})</script>"""


@pytest.mark.parametrize("size", [PHONE, DESKTOP])
def test_a_browser_shows_the_figures(
    work: Path, chromium: Callable[..., str], tmp_path: Path, size: tuple[int, int]
) -> None:
    found = read_conversion(work)
    page = tmp_path / "page.html"
    page.write_text(page_html(conversion_page(found)).replace("</body>", PROBE + "</body>"), encoding="utf-8")
    shown = chromium(page, "--dump-dom", size=size)
    assert dict(Reader(shown).tables["facts"][1:])["bits per weight"].startswith(f"{found.summary['bpw']:.4f}")
    assert float(re.search(r'data-images="([\d.]+)"', shown)[1]) > 300, "every picture is decoded"  # type: ignore[index]
    assert int(re.search(r'data-overflow="(-?\d+)"', shown)[1]) <= 0, "nothing reaches beyond the screen"  # type: ignore[index]


def test_screenshots_in_light_and_dark(work: Path, chromium: Callable[..., str], tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    page.write_text(page_html(conversion_page(read_conversion(work))), encoding="utf-8")
    means = {}
    for theme, setting in (("dark", 0), ("light", 1)):
        path = tmp_path / f"{theme}.png"
        chromium(page, f"--screenshot={path}", f"--blink-settings=preferredColorScheme={setting}", size=(800, 1600))
        with Image.open(path) as image:
            picture = np.asarray(image.convert("L"))
        assert picture.shape == (1600, 800) and picture.std() > 10, "something is drawn"
        means[theme] = picture.mean()
    assert means["dark"] < 90 and means["light"] > 200


def test_warnings_of_one_kind_are_folded() -> None:
    dead = [f"layers.{i}.mlp: {i} of 640 inputs are never active" for i in range(3)]
    other = "layers.1.mlp: damping raised 2 times, to 0.48"
    assert folded([dead[0], other, *dead[1:]]) == [
        f"{dead[0]} (and 2 more of this kind, all in the JSON output)",
        other,
    ]
    assert folded([]) == []
