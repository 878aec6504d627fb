"""Random access to the texts of a JSON Lines file that is too large to hold in memory."""

import tempfile
import zlib
from array import array
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from exl2jax.calibration.documents import BLOCK, DEFAULT_FIELD, opened, parsed_json, text_field
from exl2jax.errors import CalibrationError

MAX_UNPACKED = 8 << 30
"""Bytes that a packed file may take on the temporary disk; the shards of C4 take less than one."""


class JsonlIndex:
    """The `text` fields of an open JSON Lines file by position; blank lines are not counted."""

    def __init__(self, file: IO[bytes], path: Path) -> None:
        self._file = file
        self._path = path
        self._starts = array("q")
        position = 0
        for line in file:
            if line.strip():
                self._starts.append(position)
            position += len(line)

    def __len__(self) -> int:
        return len(self._starts)

    def text(self, index: int) -> str:
        """The `text` field of one document."""
        where = f"{self._path}, document {index}"
        self._file.seek(self._starts[index])
        try:
            line = self._file.readline().decode("utf-8")
        except UnicodeDecodeError as error:
            raise CalibrationError(f"{where}: not valid UTF-8; restore the file") from error
        return text_field(parsed_json(line, where), (DEFAULT_FIELD,), where)


def _unpack(source: IO[bytes], target: IO[bytes], path: Path) -> None:
    """Copy a packed file's content to the start of `target`, as long as it stays within `MAX_UNPACKED`."""
    while block := source.read(BLOCK):
        target.write(block)
        if target.tell() > MAX_UNPACKED:
            raise CalibrationError(f"{path}: unpacks to more than {MAX_UNPACKED >> 30} GB; unpack it and give a part")
    target.seek(0)


@contextmanager
def open_jsonl_index(path: Path) -> Iterator[JsonlIndex]:
    """Index a JSON Lines file; one packed with gzip is unpacked to a temporary file for as long as it is in use.

    Raises `CalibrationError` if the file is unreadable or has no lines.
    """
    with opened(path) as source, tempfile.TemporaryFile() as unpacked:
        try:
            if path.suffix == ".gz":
                _unpack(source, unpacked, path)
            index = JsonlIndex(unpacked if path.suffix == ".gz" else source, path)
        except (OSError, EOFError, zlib.error) as error:
            raise CalibrationError(f"{path}: not readable ({error})") from error
        if not len(index):
            raise CalibrationError(f"{path}: has no lines; restore the file")
        yield index
