"""Texts of plain text and JSON files, streamed."""

import codecs
import gzip
import io
import json
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any, cast

from exl2jax.errors import CalibrationError

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


def json_lines(path: Path, fields: Sequence[str]) -> Iterator[str]:
    """The texts of a JSON Lines file: each line a string, or an object whose `fields` are joined by spaces."""
    number = 0
    for block in _blocks(path, between_words=False):
        # Not splitlines(): JSON strings may hold U+2028 and the like unescaped.
        for line in block.removesuffix("\n").split("\n"):
            number += 1
            if line.strip():
                yield text_field(parsed_json(line, f"{path}, line {number}"), fields, f"{path}, line {number}")


def json_file(path: Path, fields: Sequence[str]) -> Iterator[str]:
    """The texts of one JSON document: a list of strings or objects, or an object of such lists by field."""
    value = parsed_json("".join(text_blocks(path)), str(path))
    if isinstance(value, dict):
        value = _records_of(value, fields, path)
    if not isinstance(value, list):
        raise CalibrationError(
            f"{path}: holds {_kind(value)}; a list of strings or of objects with a text field is needed"
        )
    for index, entry in enumerate(value):
        yield text_field(entry, fields, f"{path}, entry {index}")


def _records_of(value: dict[str, Any], fields: Sequence[str], path: Path) -> list[Any]:
    """One record per position of an object that holds a list per field, or the object itself as the only record."""
    names = tuple(fields) or (DEFAULT_FIELD,)
    columns = [value.get(name) for name in names]
    if not all(isinstance(column, list) for column in columns):
        return [value]
    if len({len(column) for column in columns if isinstance(column, list)}) != 1:
        raise CalibrationError(f"{path}: the fields {', '.join(names)} have lists of different lengths")
    return [dict(zip(names, entry, strict=True)) for entry in zip(*(c for c in columns if c is not None), strict=True)]


def text_field(value: Any, fields: Sequence[str], where: str) -> str:
    """The text of one record: a string, or an object's fields (default `text`) joined by spaces."""
    if isinstance(value, str) and not fields:
        return value
    if not isinstance(value, dict):
        raise CalibrationError(f"{where}: holds {_kind(value)}; an object with a text field is needed")
    names = tuple(fields) or (DEFAULT_FIELD,)
    missing = [name for name in names if name not in value]
    if missing:
        held = ", ".join(map(repr, value)) or "none"
        raise CalibrationError(f"{where}: no field {missing[0]!r} (it has {held}); choose one with `cal_columns`")
    wrong = [name for name in names if not isinstance(value[name], str)]
    if wrong:
        raise CalibrationError(f"{where}: field {wrong[0]!r} holds {_kind(value[wrong[0]])}, not text; choose another")
    return " ".join(value[name] for name in names)


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
