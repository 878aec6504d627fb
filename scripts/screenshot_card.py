#!/usr/bin/env python3
"""Take a picture of a rendered model card: `python -m scripts.screenshot_card work/README.md --out docs/card.png`.

The card's Markdown becomes a page by the library that the documentation is built with, and Chromium draws it. The
YAML head is left out, as the Hub does not show it as text either. Needs Chromium.
"""

import argparse
import html
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import markdown

from exl2jax.testing.browser import BROWSERS, find_browser

STYLE = """
body { max-width: 760px; margin: 24px auto; font: 15px/1.5 sans-serif; color: #1f2328; background: #fff }
table { border-collapse: collapse; margin: 12px 0; font-size: 13px }
th, td { border: 1px solid #d1d9e0; padding: 5px 11px }
tr:nth-child(even) { background: #f6f8fa }
code { background: #eff1f3; padding: 2px 4px; border-radius: 4px; font-size: 85%; overflow-wrap: anywhere }
pre { background: #f6f8fa; padding: 12px; border-radius: 6px; overflow: hidden }
pre code { background: none; padding: 0 }
img { max-width: 100% }
"""


def card_page(card: str) -> str:
    """The page that shows a card: its Markdown without the YAML head."""
    parts = card.split("---\n", 2)
    body = parts[2] if card.startswith("---\n") and len(parts) == 3 else card
    title = next((line.lstrip("# ") for line in body.splitlines() if line.startswith("# ")), "Card")
    shown = markdown.markdown(body, extensions=["tables", "fenced_code"])
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f"<style>{STYLE}</style><body>{shown}</body></html>"
    )


def take(card: Path, picture: Path, browser: str, *, width: int, height: int) -> None:
    """Draw the card into a PNG of the given size; images are looked for beside the card."""
    with tempfile.TemporaryDirectory() as folder:
        for image in card.parent.glob("*.png"):
            shutil.copy(image, folder)
        page = Path(folder) / "card.html"
        page.write_text(card_page(card.read_text(encoding="utf-8")), encoding="utf-8")
        size = f"--window-size={width},{height}"
        flags = ("--headless", "--no-sandbox", "--hide-scrollbars", size, f"--screenshot={picture.resolve()}")
        subprocess.run([browser, *flags, page.as_uri()], check=True, capture_output=True, timeout=120)


def main() -> int:
    """Take the picture that the command line asks for."""
    parser = argparse.ArgumentParser(description="Take a picture of a rendered model card.")
    parser.add_argument("card", type=Path, help="README.md of a directory or of a set")
    parser.add_argument("--out", type=Path, required=True, help="PNG to write")
    parser.add_argument("--width", type=int, default=900)
    parser.add_argument("--height", type=int, default=1000)
    arguments = parser.parse_args()
    browser = find_browser()
    if browser is None:
        print(f"no browser: install one of {', '.join(BROWSERS)}", file=sys.stderr)
        return 1
    take(arguments.card, arguments.out, browser, width=arguments.width, height=arguments.height)
    print(f"{arguments.out}: {arguments.out.stat().st_size} bytes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
