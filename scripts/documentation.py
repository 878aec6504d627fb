"""Hooks of mkdocs: a page for every room of the package, and the documents and examples of the repository's root.

A page of the site stands for a file of the repository. Links between the files work in the repository as they are;
here they are rewritten to the places that the files have in the site.
"""

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from posixpath import normpath, relpath

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "exl2jax"

ROOT_DOCUMENTS = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "SECURITY.md": "security.md",
    "LICENSE": "license.txt",
}
"""Documents of the root and their places in the site."""

LINK = re.compile(r"(?<=\]\()(?![a-z]+:|#)([^)#\s]+)")


def rooms() -> Iterator[tuple[str, list[str]]]:
    """The package itself and every room of it, each with its modules in order."""
    yield "exl2jax", ["exl2jax"]
    for path in sorted(PACKAGE.iterdir()):
        if path.suffix == ".py" and not path.stem.startswith("__"):
            yield path.stem, [f"exl2jax.{path.stem}"]
        elif (path / "__init__.py").is_file():
            files = sorted(path.rglob("*.py"), key=lambda p: (p.stem != "__init__", p))
            yield path.name, [".".join(p.relative_to(ROOT).with_suffix("").parts) for p in files]


def only_gathers(module: str) -> bool:
    """Whether a module is the `__init__` of a room and defines nothing; its names are shown where they are defined."""
    if not module.endswith(".__init__"):
        return False
    tree = ast.parse((ROOT / module.replace(".", "/")).with_suffix(".py").read_text(encoding="utf-8"))
    return not any(isinstance(node, ast.FunctionDef | ast.ClassDef) for node in tree.body)


def room_page(name: str, modules: list[str]) -> str:
    """The page of one room in Markdown."""
    out = [f"# {name}"]
    for module in modules:
        out.append(f"::: {module.removesuffix('.__init__')}")
        if only_gathers(module):
            out[-1] += "\n    options:\n      members: false"
    return "\n\n".join(out) + "\n"


def place(source: str) -> str:
    """Where a file of the repository is in the site."""
    return ROOT_DOCUMENTS.get(source, source.removeprefix("docs/"))


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the generated pages and the files from outside `docs/`."""
    for name, modules in rooms():
        files.append(File.generated(config, f"api/{name}.md", content=room_page(name, modules)))
    others = [*ROOT_DOCUMENTS, *(f"examples/{p.name}" for p in sorted((ROOT / "examples").iterdir()) if p.is_file())]
    for source in others:
        files.append(File.generated(config, place(source), abs_src_path=str(ROOT / source)))
    return files


def site_links(markdown: str, here: str) -> str:
    """The text of the page `here` with links to files of the repository rewritten to their places in the site."""
    source = next((s for s, p in ROOT_DOCUMENTS.items() if p == here), f"docs/{here}")
    folder = source.rpartition("/")[0]

    def moved(match: re.Match[str]) -> str:
        target = normpath(f"{folder}/{match[1]}" if folder else match[1])
        return relpath(place(target), here.rpartition("/")[0] or ".")

    return LINK.sub(moved, markdown)


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Rewrite the links of a page."""
    return site_links(markdown, page.file.src_uri)
