"""The pages that scripts write or rewrite."""

from pathlib import Path

import pytest

from scripts import documentation
from scripts.architectures import render

ROOT = Path(__file__).parents[2]


def test_the_page_of_architectures_is_current() -> None:
    written = (ROOT / "docs" / "architectures.md").read_text(encoding="utf-8")
    assert written == render(), "run `python -m scripts.architectures`"


def test_every_module_of_the_package_has_a_place_in_the_documentation() -> None:
    shown = {module.removesuffix(".__init__") for _, modules in documentation.rooms() for module in modules}
    files = {".".join(path.relative_to(ROOT).with_suffix("").parts) for path in (ROOT / "exl2jax").rglob("*.py")}
    assert shown == {name.removesuffix(".__init__") for name in files} - {"exl2jax.__main__"}


@pytest.mark.parametrize(
    ("page", "link", "target"),
    [
        ("index.md", "docs/quality.md#presets", "quality.md#presets"),
        ("index.md", "LICENSE", "license.txt"),
        ("changelog.md", "docs/architectures.md", "architectures.md"),
        ("laboratory.md", "../examples/lab.toml", "examples/lab.toml"),
        ("laboratory.md", "../README.md", "index.md"),
        ("quality.md", "quality.png", "quality.png"),
        ("api/ops.md", "https://example.org/docs/a.md", "https://example.org/docs/a.md"),
        ("format.md", "#12-codes", "#12-codes"),
    ],
)
def test_links_of_the_repository_become_links_of_the_site(page: str, link: str, target: str) -> None:
    assert documentation.site_links(f"See [this]({link}).", page) == f"See [this]({target})."
