"""The documents and the code that cites them agree."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
SOURCES = [p for folder in ("exl2jax", "tests", "scripts") for p in sorted((ROOT / folder).rglob("*.py"))]


def test_every_cited_section_of_the_format_exists() -> None:
    text = (ROOT / "docs" / "format.md").read_text(encoding="utf-8")
    sections = set(re.findall(r"^##+ (\d+(?:\.\d+)?) ", text, re.MULTILINE))
    cited = {
        (str(path.relative_to(ROOT)), section)
        for path in SOURCES
        for section in re.findall(r"docs/format\.md (\S*?)[\s:;.,)]", path.read_text(encoding="utf-8"))
    }
    assert len(cited) > 20
    assert not {(path, section) for path, section in cited if section not in sections}
