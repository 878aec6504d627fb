"""The texts that the package ships: how much there is, how varied it is, and that nothing stands there twice."""

import re
import unicodedata
from collections import Counter
from importlib import resources

import pytest

from exl2jax.calibration.texts import package_texts, stories, wiki_articles

TEXTS = package_texts().texts

MARKS = {
    "Python": r"^def \w+\(.*\).*:$",
    "Rust": r"^\s*(pub )?fn \w+.*\{$",
    "SQL": r"^CREATE TABLE ",
    "C": r"^#include <stddef\.h>",
    "TypeScript": r"^export (interface|type|class) ",
    "Go": r"^func (\(.*\) )?\w+\(",
    "Haskell": r"^module \w+ \(",
    "shell": r"^#!/usr/bin/env bash",
    "Java": r"^import java\.util\.",
    "C++": r"^#include <string_view>",
    "JavaScript": r"^import \{.*\} from \"\./.*\.js\";",
}
"""A line that each programming language has and hardly any other."""

COMMON_WORDS = {
    "French": "les", "German": "und", "Spanish": "los", "Italian": "della", "Portuguese": "não", "Polish": "się",
    "Russian": "не", "Greek": "και", "Turkish": "bir", "Arabic": "من", "Hebrew": "של", "Hindi": "में",
    "Vietnamese": "không", "Swahili": "kwa", "Dutch": "het", "Swedish": "och", "Ukrainian": "і",
    "Indonesian": "yang", "Persian": "را", "Czech": "pokud", "Finnish": "oli",
}  # fmt: skip
"""A word that a text of the language cannot do without."""


def test_there_is_enough_of_it() -> None:
    assert sum(len(text.encode()) for text in TEXTS.values()) >= 250_000
    assert len(wiki_articles(TEXTS["wiki"])) >= 50
    assert len(stories(TEXTS["tiny"])) >= 30


@pytest.mark.parametrize("language", MARKS)
def test_code_has_many_languages(language: str) -> None:
    assert re.search(MARKS[language], TEXTS["code"], re.MULTILINE)


@pytest.mark.parametrize("language", COMMON_WORDS)
def test_prose_has_many_languages(language: str) -> None:
    assert re.search(rf"(?<!\w){COMMON_WORDS[language]}(?!\w)", TEXTS["multilingual"], re.IGNORECASE)


def test_prose_has_many_scripts() -> None:
    letters = Counter(unicodedata.name(c).split()[0] for c in TEXTS["multilingual"] if c.isalpha())
    scripts = {script for script, count in letters.items() if count >= 200}
    expected = {"LATIN", "CYRILLIC", "GREEK", "ARABIC", "HEBREW", "DEVANAGARI", "BENGALI", "THAI", "HANGUL", "HIRAGANA"}
    assert expected | {"CJK"} <= scripts


def runs(text: str) -> Counter[tuple[str, ...]]:
    """Every eight words in a row that hold at least five real ones (tables of figures repeat themselves by right)."""
    words = text.lower().split()
    found = zip(*(words[i:] for i in range(8)), strict=False)
    return Counter(run for run in found if sum(word.isalpha() for word in run) >= 5)


@pytest.mark.parametrize("domain", sorted(set(TEXTS) - {"code"}))
def test_nothing_is_made_from_a_template(domain: str) -> None:
    """No eight words in a row occur twice, which is what templates and copies give away."""
    assert not [run for run, count in runs(TEXTS[domain]).items() if count > 1]


def test_the_held_out_text_is_not_calibrated_on() -> None:
    held_out = (resources.files("exl2jax.calibration") / "data" / "heldout.utf8").read_text(encoding="utf-8")
    assert not [domain for domain, text in TEXTS.items() if runs(text).keys() & runs(held_out).keys()]
