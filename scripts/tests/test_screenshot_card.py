"""The page of a card, and its picture."""

import struct
import subprocess
import sys
from pathlib import Path

import pytest

from exl2jax.testing.browser import find_browser
from scripts.screenshot_card import card_page

CARD = """---
base_model: org/tiny
---

# tiny, EXL2

| bits | GB |
| --- | --- |
| 4.00 | 0.133 |

```
hf download --flag <name>
```
"""


def test_the_page_shows_the_card_without_its_head() -> None:
    page = card_page(CARD)
    assert "base_model" not in page and "<title>tiny, EXL2</title>" in page
    assert "<td>0.133</td>" in page and "hf download --flag &lt;name&gt;" in page
    assert "<h1>tiny, EXL2</h1>" in card_page(CARD.split("---\n", 2)[2])


@pytest.mark.skipif(find_browser() is None, reason="no Chromium: install it to take pictures of cards")
def test_the_picture_has_the_size_asked_for(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text(CARD, encoding="utf-8")
    picture = tmp_path / "card.png"
    flags = ["--out", str(picture), "--width", "500", "--height", "300"]
    command = [sys.executable, "-m", "scripts.screenshot_card", str(tmp_path / "README.md"), *flags]
    said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert said == f"{picture}: {picture.stat().st_size} bytes\n"
    header = picture.read_bytes()[:24]
    assert header[:8] == b"\x89PNG\r\n\x1a\n" and struct.unpack(">II", header[16:]) == (500, 300)
