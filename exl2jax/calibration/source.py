"""The notation of calibration sources: `standard`, `standard:DIR`, files, named sets, `self`, mixtures with counts."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from exl2jax.calibration.records import STANDARD
from exl2jax.errors import SettingsError

NAMED_SETS = ("wikitext2", "c4", "c4-new")
REFUSED_SETS = ("ptb", "ptb-new")
SELF, RANDOM, STOCK = "self", "random", "exllamav2"

type Kind = Literal["standard", "exllamav2", "self", "random", "named", "parquet", "text", "jsonl", "json", "ready"]

_SUFFIXES: dict[str, Kind] = {
    ".parquet": "parquet",
    ".txt": "text",
    ".txt.gz": "text",
    ".jsonl": "jsonl",
    ".jsonl.gz": "jsonl",
    ".json": "json",
    ".json.gz": "jsonl",
    ".safetensors": "ready",
    ".npz": "ready",
}
_NAMED = ", ".join(("standard", STOCK, "standard:DIR", *NAMED_SETS, SELF, RANDOM))
KNOWN = f"{_NAMED}, or a file ending in {', '.join(_SUFFIXES)}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """One source: its kind, what it names (a path, a directory, a set; empty if nothing) and its count, if given."""

    kind: Kind
    name: str = ""
    count: int | None = None


def parse_source(text: str) -> tuple[Source, ...]:
    """The sources of the setting `cal_dataset`: one, or several separated by commas, each with `:COUNT`.

    A path that exists is taken whole, commas and all. Raises `SettingsError` for unknown names and missing counts.
    """
    if Path(text).is_file():
        return (_single(text),)
    parts = [part.strip() for part in text.split(",")]
    if len(parts) == 1:
        return (_counted(parts[0]),)
    sources = tuple(_counted(part) for part in parts)
    without = [part for part, source in zip(parts, sources, strict=True) if source.count is None]
    if without:
        raise SettingsError(f"calibration source {text!r}: {without[0]!r} has no row count; write {without[0]}:COUNT")
    return sources


def _counted(part: str) -> Source:
    """A source with an optional `:COUNT` at its end."""
    match = re.fullmatch(r"(.+):(\d+)", part, re.DOTALL)
    if match is None:
        return _single(part)
    count = int(match[2])
    if count < 1:
        raise SettingsError(f"calibration source {part!r}: the row count must be at least 1")
    source = _single(match[1])
    return Source(kind=source.kind, name=source.name, count=count)


def _single(part: str) -> Source:
    if part == STANDARD:
        return Source(kind="standard")
    if part.startswith(f"{STANDARD}:") and part != f"{STANDARD}:":
        return Source(kind="standard", name=part.removeprefix(f"{STANDARD}:"))
    if part == STOCK:
        return Source(kind="exllamav2")
    if part in (SELF, RANDOM):
        return Source(kind="self" if part == SELF else "random")
    if part in NAMED_SETS:
        return Source(kind="named", name=part)
    if part in REFUSED_SETS:
        raise SettingsError(f"calibration source {part!r} is not supported, as in Optimum; known are {KNOWN}")
    for suffix, kind in _SUFFIXES.items():
        if part.lower().endswith(suffix):
            return Source(kind=kind, name=part)
    raise SettingsError(f"unknown calibration source {part!r}; known are {KNOWN}")
