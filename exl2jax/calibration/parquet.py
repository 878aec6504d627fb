"""Texts of Parquet files, streamed row group by row group."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from exl2jax.errors import CalibrationError

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq

BATCH_ROWS = 8
"""Rows decoded at once: few, since a cell may hold a whole book."""

PAGE_BUFFER = 1 << 20
"""Bytes of a column read from disk at once, so that a row group need not fit into memory."""


def parquet_texts(path: Path, columns: Sequence[str]) -> Iterator[str]:
    """The text of each row: its string columns (or the chosen ones) joined by spaces, empty cells left out.

    Any string type will do, plain, large, view or dictionary; bytes are taken for UTF-8 where a file has no string
    column or where they are chosen. Reads only as far as the caller iterates. Raises `CalibrationError` for files that
    are unreadable, empty or without text and for columns that do not exist or hold no text.
    """
    import pyarrow as pa

    file = _opened(path)
    with file:
        if file.metadata.num_rows == 0:
            raise CalibrationError(f"{path}: the Parquet file has no rows; give one with text")
        chosen = _chosen(path, file.schema_arrow, columns)
        try:
            for batch in file.iter_batches(batch_size=BATCH_ROWS, columns=chosen, use_threads=False):
                yield from _rows(batch.select(chosen), path)
        except (pa.ArrowException, OSError) as error:
            raise CalibrationError(f"{path}: the Parquet file is damaged ({error})") from error


def first_cells(path: Path, column: str, count: int) -> list[str]:
    """The first `count` cells of one text column, empty ones as empty strings."""
    import pyarrow as pa

    with _opened(path) as file:
        chosen = _chosen(path, file.schema_arrow, (column,))
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


def _chosen(path: Path, schema: "pa.Schema", columns: Sequence[str]) -> list[str]:
    """Names of the columns to read."""
    import pyarrow.types as kinds

    held = ", ".join(f"{field.name} ({field.type})" for field in schema)
    for name in columns:
        if name not in schema.names:
            raise CalibrationError(f"{path}: no column {name!r}; it has {held}")
        if not _is_text(schema.field(name).type, binary=True):
            raise CalibrationError(f"{path}: column {name!r} holds {schema.field(name).type}, not text; it has {held}")
    if columns:
        return list(columns)
    strings = [field.name for field in schema if _is_text(field.type, binary=False)]
    strings = strings or [field.name for field in schema if kinds.is_binary(field.type)]
    if not strings:
        raise CalibrationError(f"{path}: no column holds text; it has {held or 'no columns'}")
    return strings


def _is_text(kind: "pa.DataType", *, binary: bool) -> bool:
    import pyarrow.types as kinds

    if kinds.is_dictionary(kind):
        kind = kind.value_type
    plain = kinds.is_string(kind) or kinds.is_large_string(kind) or kinds.is_string_view(kind)
    return plain or (binary and (kinds.is_binary(kind) or kinds.is_large_binary(kind) or kinds.is_binary_view(kind)))


def _rows(batch: "pa.RecordBatch", path: Path) -> Iterator[str]:
    try:
        cells = [[_decoded(cell) for cell in column.to_pylist()] for column in batch.columns]
    except UnicodeDecodeError as error:
        raise CalibrationError(
            f"{path}: a column of {', '.join(batch.schema.names)} holds bytes that are not valid UTF-8 ({error.reason})"
        ) from error
    for row in zip(*cells, strict=True):
        text = " ".join(cell for cell in row if cell)
        if text:
            yield text


def _decoded(cell: str | bytes | None) -> str:
    if cell is None:
        return ""
    return cell.decode("utf-8") if isinstance(cell, bytes) else cell
