"""Texts of Parquet files, streamed row group by row group."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from exl2jax.calibration.columns import CHAT_NAMES, LOOKED_AT, Chosen, choose_columns
from exl2jax.calibration.documents import Render
from exl2jax.errors import CalibrationError

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq

BATCH_ROWS = 8
"""Rows decoded at once: few, since a cell may hold a whole book."""

OPENING = 128
"""Characters of a cell that tell text from identifiers."""

PAGE_BUFFER = 1 << 20
"""Bytes of a column read from disk at once, so that a row group need not fit into memory."""


def parquet_texts(path: Path, columns: Sequence[str], render: Render | None = None) -> Iterator[str]:
    """The text of each row: its columns of text (or the chosen ones) joined by spaces, empty cells left out.

    `chosen_columns` says which ones; `render` makes a text of a conversation.

    Any string type will do, plain, large, view or dictionary; bytes are taken for UTF-8 where a file has no string
    column or where they are chosen. Reads only as far as the caller iterates. Raises `CalibrationError` for files that
    are unreadable, empty or without text and for columns that do not exist or hold no text.
    """
    import pyarrow as pa

    file = _opened(path)
    with file:
        if file.metadata.num_rows == 0:
            raise CalibrationError(f"{path}: the Parquet file has no rows; give one with text")
        chosen = list(_choose(path, file, columns).columns)
        try:
            for batch in file.iter_batches(batch_size=BATCH_ROWS, columns=chosen, use_threads=False):
                yield from _rows(batch.select(chosen), path, render)
        except (pa.ArrowException, OSError) as error:
            raise CalibrationError(f"{path}: the Parquet file is damaged ({error})") from error


def chosen_columns(path: Path, columns: Sequence[str]) -> Chosen:
    """The columns that `parquet_texts` takes, and what to tell the user of the others."""
    with _opened(path) as file:
        return _choose(path, file, columns)


def first_cells(path: Path, column: str, count: int) -> list[str]:
    """The first `count` cells of one text column, empty ones as empty strings."""
    import pyarrow as pa

    with _opened(path) as file:
        chosen = _named(path, file.schema_arrow, (column,))
        try:
            batches = file.iter_batches(batch_size=count, columns=chosen, use_threads=False)
            cells = next(iter(batches)).column(0).to_pylist()
        except (pa.ArrowException, OSError, StopIteration) as error:
            raise CalibrationError(f"{path}: the Parquet file is empty or damaged ({error})") from error
    return [_decoded(cell) for cell in cells]


def _opened(path: Path) -> "pq.ParquetFile":
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return pq.ParquetFile(path, buffer_size=PAGE_BUFFER, pre_buffer=False)
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise CalibrationError(f"{path}: not a readable Parquet file ({error})") from error


def _named(path: Path, schema: "pa.Schema", columns: Sequence[str]) -> list[str]:
    """The columns that the user names, checked."""
    held = _held(schema)
    for name in columns:
        if name not in schema.names:
            raise CalibrationError(f"{path}: no column {name!r}; it has {held}")
        kind = schema.field(name).type
        if not _is_text(kind, binary=True) and not _is_chat(kind):
            raise CalibrationError(f"{path}: column {name!r} holds {kind}, not text; it has {held}")
    return list(columns)


def _choose(path: Path, file: "pq.ParquetFile", columns: Sequence[str]) -> Chosen:
    """The columns to read: those that the user names, else by what they hold."""
    import pyarrow.types as kinds

    schema = file.schema_arrow
    if columns:
        return Chosen(columns=tuple(_named(path, schema, columns)))
    chats = [field.name for field in schema if _is_chat(field.type)]
    strings = [field.name for field in schema if _is_text(field.type, binary=False)]
    strings = strings or [field.name for field in schema if kinds.is_binary(field.type)]
    if not strings and not any(name in CHAT_NAMES for name in chats):
        raise CalibrationError(f"{path}: no column holds text; it has {_held(schema) or 'no columns'}")
    if len(strings) == 1 and not chats:
        return Chosen(columns=tuple(strings))
    return choose_columns(_first_texts(path, file, strings), chats, str(path))


def _first_texts(path: Path, file: "pq.ParquetFile", names: list[str]) -> dict[str, list[str]]:
    """The first cells of columns of text."""
    import pyarrow as pa

    found: dict[str, list[str]] = {name: [] for name in names}
    if not names:
        return found
    try:
        for batch in file.iter_batches(batch_size=BATCH_ROWS, columns=names, use_threads=False):
            for name in names:
                found[name] += [_decoded(cell)[:OPENING] for cell in batch.column(name).to_pylist()]
            if all(len(cells) >= LOOKED_AT for cells in found.values()):
                break
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise CalibrationError(f"{path}: the Parquet file is damaged ({error})") from error
    return found


def _held(schema: "pa.Schema") -> str:
    return ", ".join(f"{field.name} ({field.type})" for field in schema)


def _is_chat(kind: "pa.DataType") -> bool:
    """Whether a column holds lists of messages, in either spelling."""
    import pyarrow.types as kinds

    if not (kinds.is_list(kind) or kinds.is_large_list(kind)) or not kinds.is_struct(kind.value_type):
        return False
    names = {field.name for field in kind.value_type}
    return {"role", "content"} <= names or {"from", "value"} <= names


def _is_text(kind: "pa.DataType", *, binary: bool) -> bool:
    import pyarrow.types as kinds

    if kinds.is_dictionary(kind):
        kind = kind.value_type
    plain = kinds.is_string(kind) or kinds.is_large_string(kind) or kinds.is_string_view(kind)
    return plain or (binary and (kinds.is_binary(kind) or kinds.is_large_binary(kind) or kinds.is_binary_view(kind)))


def _rows(batch: "pa.RecordBatch", path: Path, render: Render | None) -> Iterator[str]:
    try:
        cells = [[_cell(cell, path, render) for cell in column.to_pylist()] for column in batch.columns]
    except UnicodeDecodeError as error:
        raise CalibrationError(
            f"{path}: a column of {', '.join(batch.schema.names)} holds bytes that are not valid UTF-8 ({error.reason})"
        ) from error
    for row in zip(*cells, strict=True):
        text = " ".join(cell for cell in row if cell)
        if text:
            yield text


def _cell(cell: Any, path: Path, render: Render | None) -> str:
    if not isinstance(cell, list):
        return _decoded(cell)
    if render is None:
        raise CalibrationError(
            f"{path}: holds conversations, which need a model's chat template; choose another column"
        )
    return render(cell, str(path)) if cell else ""


def _decoded(cell: str | bytes | None) -> str:
    if cell is None:
        return ""
    return cell.decode("utf-8") if isinstance(cell, bytes) else cell
