"""The choice of a table's columns to calibrate on: conversations first, then text; identifiers only by name."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

CHAT_NAMES = ("messages", "conversations")
"""Names under which data sets keep conversations; the second is ShareGPT's."""

LOOKED_AT = 256
"""Cells of each column that are looked at."""
LONGEST_IDENTIFIER = 64
FEWEST = 8
"""Characters of an identifier at most, and cells that it takes to tell one from text."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Chosen:
    """The columns taken, and a note for the user where others were left; `chat` says that they are conversations."""

    columns: tuple[str, ...]
    chat: bool = False
    note: str = ""


def choose_columns(texts: Mapping[str, Sequence[str | None]], chats: Sequence[str], where: str) -> Chosen:
    """Choose among columns of text, given by their first cells, and columns of conversations.

    A conversation is taken alone, since text columns beside it repeat it. Otherwise all text columns are taken except
    identifiers; a single text column is always taken.
    """
    known = [name for name in CHAT_NAMES if name in chats]
    if known:
        left = [name for name in (*texts, *chats) if name != known[0]]
        return Chosen(columns=(known[0],), chat=True, note=_note(where, [known[0]], left, []))
    identifiers = [name for name, cells in texts.items() if is_identifier(cells)]
    taken = [name for name in texts if name not in identifiers] or list(texts)[:1]
    left = [name for name in texts if name not in taken]
    note = _note(where, taken, [], left) if len(texts) > 1 else ""
    return Chosen(columns=tuple(taken), note=note)


def is_identifier(cells: Sequence[Any]) -> bool:
    """Whether cells look like identifiers: all different, short, without white space."""
    found = [cell for cell in cells if cell]
    if len(found) < FEWEST or len(set(found)) < len(found):
        return False
    return all(len(cell) <= LONGEST_IDENTIFIER and not any(c.isspace() for c in cell) for cell in found)


def _note(where: str, taken: Sequence[str], left: Sequence[str], identifiers: Sequence[str]) -> str:
    parts = [f"{where}: text of {', '.join(taken)}"]
    parts += [f"not of {', '.join(left)}"] if left else []
    parts += [f"not of {', '.join(identifiers)}, which looks like identifiers"] if identifiers else []
    return "; ".join(parts) + "; choose others with `cal_columns`"
