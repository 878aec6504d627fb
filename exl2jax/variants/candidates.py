"""Candidate tables: the settings that the linears of a module may have together."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from exl2jax.errors import Exl2JaxError, JobError, SettingsError
from exl2jax.qparams import FORMAT_BITS, QParams
from exl2jax.stock_tables import ATTENTION, MLP, Row
from exl2jax.variants.registry import NoSettings, variant

PARTS = {"attention": ("q", "k", "v", "o"), "mlp": ("gate", "up", "down")}
"""Parts of a table, and the projections of each of their rows."""

SHAPE = (
    f"bits (among {FORMAT_BITS}, falling), bits_prop (shares that sum to 1) and group_size (32, 64 or 128), "
    'like {"bits": [4, 3], "bits_prop": [0.1, 0.9], "group_size": 128}'
)
LARGEST_FILE = 1 << 20


class Table(NamedTuple):
    """Rows of settings: of q, k, v, o, and of gate, up, down."""

    attention: tuple[Row, ...]
    mlp: tuple[Row, ...]


STOCK_TABLE = Table(ATTENTION, MLP)


@dataclass(frozen=True, kw_only=True, slots=True)
class FileSettings:
    """A JSON file; `sha256` is that of its bytes: computed when empty, else compared."""

    file: str = ""
    sha256: str = ""

    def __post_init__(self) -> None:
        """Read and check the file: a wrong row is named before anything runs."""
        found = hashlib.sha256(_bytes(self.file)).hexdigest()
        if self.sha256 and self.sha256 != found:
            raise JobError(f"candidates {self.file}: changed since the job began; start over with `no_resume`")
        object.__setattr__(self, "sha256", found)
        read_table(self.file)


@variant("candidates", "stock")
def stock(settings: NoSettings) -> Table:
    """ExLlamaV2's tables of 19 and 17 rows (docs/format.md 3)."""
    return STOCK_TABLE


@variant("candidates", "free")
def free(settings: NoSettings) -> None:
    """No table: each projection takes any mixture of widths and group sizes of the format, on its own."""


@variant("candidates", "file", FileSettings)
def from_file(settings: FileSettings) -> Table:
    """A table of one's own: `{"attention": [{"q": ..., "k": ..., "v": ..., "o": ...}], "mlp": [{"gate": ...}]}`, each
    projection as stock's `measurement.json` writes it.
    """  # noqa: D205
    return read_table(settings.file)


def parse_candidates(text: str) -> str | Mapping[str, Any]:
    """A choice of candidates from text: the name of a variant, or that of a JSON file."""
    return {"name": "file", "file": text} if text.endswith(".json") else text


def read_table(file: str) -> Table:
    """Read a table; `SettingsError` names the file, the row and what is allowed."""
    where = f"candidates {file}"
    try:
        record = json.loads(_bytes(file))
    except (ValueError, RecursionError) as e:
        raise SettingsError(f"{where}: not a JSON file ({e})") from e
    if not isinstance(record, dict) or set(record) != set(PARTS):
        raise SettingsError(f"{where}: must be an object of {' and '.join(PARTS)}, each a list of rows")
    return Table(**{part: _rows(record[part], part, f"{where}: {part}") for part in PARTS})


def _rows(rows: Any, part: str, where: str) -> tuple[Row, ...]:
    if not isinstance(rows, list) or not rows:
        raise SettingsError(f"{where} must be a list of at least one row")
    return tuple(_row(row, PARTS[part], f"{where}[{i}]") for i, row in enumerate(rows))


def _row(row: Any, names: tuple[str, ...], where: str) -> Row:
    if not isinstance(row, dict) or set(row) != set(names):
        raise SettingsError(f"{where} must hold {', '.join(names)} and nothing else, got {row!r:.80}")
    return tuple(_setting(row[name], f"{where}.{name}") for name in names)


def _setting(record: Any, where: str) -> QParams:
    try:
        return QParams.from_json(record, where)
    except Exl2JaxError as e:
        raise SettingsError(f"{where}: must have {SHAPE} ({e})") from e


def _bytes(file: str) -> bytes:
    try:
        path = Path(file)
        if path.stat().st_size > LARGEST_FILE:
            raise SettingsError(f"candidates {file}: larger than {LARGEST_FILE} bytes; a table has some kilobytes")
        return path.read_bytes()
    except (OSError, ValueError) as e:
        raise SettingsError(f"candidates {file!r}: cannot be read ({e})") from e
