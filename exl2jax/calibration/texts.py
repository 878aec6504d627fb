"""The texts of the standard set: the package's own, or a directory with the stock converter's file names."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path

from exl2jax.calibration import composition as domains
from exl2jax.errors import CalibrationError

_PACKAGE_NAMES = {
    domains.WEB: "web.utf8",
    domains.WIKI: "wiki.utf8",
    domains.CODE: "code.utf8",
    domains.TINY: "tiny.utf8",
    domains.MULTILINGUAL: "multilingual.utf8",
    domains.TECHNICAL: "technical.utf8",
}
_STOCK_NAMES = {**_PACKAGE_NAMES, domains.WEB: "c4.utf8"}


@dataclass(frozen=True, kw_only=True, slots=True)
class StandardTexts:
    """One text per domain of `TEXT_DOMAINS`, and where they came from.

    `spread` says whether rows are taken evenly over a whole text (the package's own texts, which are short and hold
    many languages and subjects one after the other) or from its start (as the stock converter reads its files).
    """

    texts: Mapping[str, str]
    origin: str
    spread: bool


def package_texts() -> StandardTexts:
    """The texts that this package ships."""
    folder = resources.files("exl2jax.calibration") / "data"
    return StandardTexts(texts=_read_all(folder, _PACKAGE_NAMES), origin="the built-in texts", spread=True)


def directory_texts(folder: Path) -> StandardTexts:
    """Texts of a directory with `c4.utf8 wiki.utf8 code.utf8 tiny.utf8 multilingual.utf8 technical.utf8`."""
    if not folder.is_dir():
        raise CalibrationError(f"{folder}: no such directory; standard:DIR needs one with {_listed(_STOCK_NAMES)}")
    missing = [name for name in _STOCK_NAMES.values() if not (folder / name).is_file()]
    if missing:
        raise CalibrationError(
            f"{folder}: {', '.join(missing)} missing; standard:DIR needs a directory with {_listed(_STOCK_NAMES)}"
        )
    return StandardTexts(texts=_read_all(folder, _STOCK_NAMES), origin=str(folder), spread=False)


def _listed(names: Mapping[str, str]) -> str:
    return " ".join(names.values())


def _read_all(folder: Path | Traversable, names: Mapping[str, str]) -> dict[str, str]:
    texts = {}
    for domain, name in names.items():
        file = folder / name
        try:
            text = file.read_bytes().decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise CalibrationError(f"{file}: not valid UTF-8 at byte {error.start}; save the file as UTF-8") from error
        except OSError as error:
            raise CalibrationError(f"{file}: not readable ({error})") from error
        texts[domain] = text.replace("\r\n", "\n").replace("\r", "\n")
    return texts


def web_text(text: str) -> str:
    """One document per line becomes one text, the lines (each with its newline) a blank line further apart."""
    return "\n\n".join(line for line in re.split(r"(?<=\n)", text) if line)


def wiki_articles(text: str) -> list[str]:
    """Articles of `<doc ...>` ... `</doc>` text: each from the line after its opening tag."""
    return [_after_first_line(article) for article in re.split(r"</doc>(?:\n|\Z)", text) if article.strip()]


def _after_first_line(article: str) -> str:
    _, newline, rest = article.partition("\n")
    return rest if newline else article


def stories(text: str) -> list[str]:
    """Stories of `<|endoftext|>`-separated text, without the white space around them."""
    return [story for piece in text.split("<|endoftext|>") if (story := piece.strip())]
