"""Texts of plain text and JSON files, streamed."""

import codecs
import gzip
import io
import json
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any, cast

from exl2jax.calibration.columns import CHAT_NAMES
from exl2jax.errors import CalibrationError

type Render = Callable[[Any, str], str]
"""The text of a conversation; the second argument names its place in messages."""

BLOCK = 1 << 20
"""Bytes read at once."""

DEFAULT_FIELD = "text"


def text_blocks(path: Path) -> Iterator[str]:
    """A UTF-8 text file as consecutive blocks of whole lines, any line ending read as a newline.

    A line longer than `BLOCK` is cut before a space.
    """
    return _blocks(path, between_words=True)


def _blocks(path: Path, *, between_words: bool) -> Iterator[str]:
    """Blocks that end with a line, or (if allowed) before a space where a block holds no end of a line."""
    rest = ""
    for block in _decoded(path):
        text = rest + block
        cut = text.rfind("\n") + 1
        if not cut and between_words:
            cut = max(text.rfind(" "), 0)
        if cut:
            yield text[:cut]
        rest = text[cut:]
    if rest:
        yield rest


def json_lines(path: Path, fields: Sequence[str], render: Render | None = None) -> Iterator[str]:
    """The texts of a JSON Lines file: each line a string, or an object whose `fields` are joined by spaces.

    A null is left out, like an empty cell of a table. `render` makes a text of a conversation.
    """
    number = 0
    for block in _blocks(path, between_words=False):
        # Not splitlines(): JSON strings may hold U+2028 and the like unescaped.
        for line in block.removesuffix("\n").split("\n"):
            number += 1
            where = f"{path}, line {number}"
            if line.strip() and (text := text_field(parsed_json(line, where), fields, where, render)):
                yield text


def json_file(path: Path, fields: Sequence[str], render: Render | None = None) -> Iterator[str]:
    """The texts of one JSON document: a list of strings or objects, or an object of such lists by field.

    A file of JSON lines is read as such, whatever its name.
    """
    text = "".join(text_blocks(path))
    if _is_lines(text):
        yield from json_lines(path, fields, render)
        return
    value = parsed_json(text, str(path))
    if isinstance(value, dict):
        value = _records_of(value, fields, path)
    if not isinstance(value, list):
        raise CalibrationError(
            f"{path}: holds {_kind(value)}; a list of strings or of objects with a text field is needed"
        )
    for index, entry in enumerate(value):
        if text := text_field(entry, fields, f"{path}, entry {index}", render):
            yield text


def _is_lines(text: str) -> bool:
    """Whether a text is no JSON document as a whole, but its first line is one."""
    first, _, rest = text.lstrip().partition("\n")
    if not rest.strip():
        return False
    try:
        json.loads(first)
    except (ValueError, RecursionError):
        return False
    return True


def _records_of(value: dict[str, Any], fields: Sequence[str], path: Path) -> list[Any]:
    """One record per position of an object that holds a list per field, or the object itself as the only record."""
    names = tuple(fields) or (DEFAULT_FIELD,)
    columns = [value.get(name) for name in names]
    if not all(isinstance(column, list) for column in columns):
        return [value]
    if len({len(column) for column in columns if isinstance(column, list)}) != 1:
        raise CalibrationError(f"{path}: the fields {', '.join(names)} have lists of different lengths")
    return [dict(zip(names, entry, strict=True)) for entry in zip(*(c for c in columns if c is not None), strict=True)]


def text_field(value: Any, fields: Sequence[str], where: str, render: Render | None = None) -> str:
    """The text of one record: a string, or an object's fields joined by spaces; empty for a null.

    Without `fields` it is the field `text`, or the conversation of an object that has none.
    """
    if value is None or (isinstance(value, str) and not fields):
        return value or ""
    if not isinstance(value, dict):
        raise CalibrationError(f"{where}: holds {_kind(value)}; an object with a text field is needed")
    chats = [name for name in CHAT_NAMES if name in value] if DEFAULT_FIELD not in value else []
    names = tuple(fields) or tuple(chats[:1]) or (DEFAULT_FIELD,)
    missing = [name for name in names if name not in value]
    if missing:
        held = ", ".join(map(repr, value)) or "none"
        raise CalibrationError(f"{where}: no field {missing[0]!r} (it has {held}); choose one with `cal_columns`")
    return " ".join(text for name in names if (text := _field_text(value[name], name, where, render)))


def _field_text(value: Any, name: str, where: str, render: Render | None) -> str:
    if isinstance(value, list) and render is not None:
        return render(value, f"{where}, field {name!r}")
    if value is not None and not isinstance(value, str):
        raise CalibrationError(f"{where}: field {name!r} holds {_kind(value)}, not text; choose another")
    return value or ""


def parsed_json(text: str, where: str) -> Any:
    """The value of a JSON text; `where` names its place in messages."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CalibrationError(f"{where}: not valid JSON ({error})") from error


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "a truth value", type(None): "null"}
    return names.get(type(value), "a number")


def _decoded(path: Path) -> Iterator[str]:
    """Decoded blocks of a file (unpacked if its name ends in .gz), newlines translated, a byte order mark dropped."""
    decoder = io.IncrementalNewlineDecoder(codecs.getincrementaldecoder("utf-8")(), translate=True)
    position, block = 0, b""
    with opened(path) as file:
        while True:
            try:
                block = file.read(BLOCK)
                text = decoder.decode(block, final=not block)
            except UnicodeDecodeError as error:
                # The decoder may have held back the first bytes of a character from the block before.
                byte = position + len(block) - len(error.object) + error.start
                raise CalibrationError(f"{path}: not valid UTF-8 at byte {byte}; save the file as UTF-8") from error
            except (OSError, EOFError, zlib.error) as error:
                raise CalibrationError(f"{path}: not readable ({error})") from error
            yield text if position else text.removeprefix("\ufeff")
            position += len(block)
            if not block:
                return


def opened(path: Path) -> IO[bytes]:
    """A file's bytes, unpacked if its name ends in .gz; an open file that the caller closes."""
    try:
        return cast(IO[bytes], gzip.open(path, "rb")) if path.suffix == ".gz" else path.open("rb")
    except OSError as error:
        raise CalibrationError(f"{path}: not readable ({error})") from error
