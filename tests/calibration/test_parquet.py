import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from exl2jax.calibration import CalibrationConfig, Tokenizer, load_rows
from exl2jax.calibration.parquet import first_cells, parquet_texts
from exl2jax.errors import CalibrationError

ROOT = Path(__file__).parents[2]
FOREIGN = Path(__file__).parent / "data" / "fastparquet_4_groups.parquet"
"""Four row groups of 8, 8, 8 and 6 rows, written by fastparquet 2026.9; columns as in `foreign_row`."""


def foreign_row(i: int) -> tuple[str, str | None, str]:
    body = f"In note {i} the keeper counted {3 * i + 1} boats, {'ü' if i % 2 else 'é'} and {i % 5} gulls."
    return f"Note {i}", None if i % 7 == 3 else body, ("spring", "summer", "autumn", "winter")[i % 4]


def test_a_file_of_another_library_with_row_groups(tokenizer: Tokenizer) -> None:
    assert pq.ParquetFile(FOREIGN).num_row_groups == 4
    texts = [" ".join(cell for cell in foreign_row(i) if cell) for i in range(30)]
    assert list(parquet_texts(FOREIGN, ())) == texts
    bodies = [foreign_row(i)[1] for i in range(30)]
    assert list(parquet_texts(FOREIGN, ("body",))) == [body for body in bodies if body]
    assert list(parquet_texts(FOREIGN, ("season", "title")))[1] == "summer Note 1"
    ids = [i for text in texts for i in tokenizer.encode(text).tolist()]
    rows = load_rows(CalibrationConfig(source=FOREIGN, rows=4, length=30), tokenizer, vocab_size=512)
    assert rows.input_ids.ravel().tolist() == ids[:120]
    assert rows.domains == ("parquet",) * 4


@pytest.mark.parametrize(
    "kind", [pa.string(), pa.large_string(), pa.string_view(), pa.dictionary(pa.int32(), pa.string()), pa.binary()]
)
def test_every_string_type(tmp_path: Path, kind: pa.DataType) -> None:
    column = pa.array(["äb", None, "", "水"], pa.string()).cast(kind)
    pq.write_table(pa.table({"n": [1, 2, 3, 4], "t": column}), tmp_path / "a.parquet")
    assert list(parquet_texts(tmp_path / "a.parquet", ())) == ["äb", "水"]
    assert list(parquet_texts(tmp_path / "a.parquet", ("t",))) == ["äb", "水"]
    assert first_cells(tmp_path / "a.parquet", "t", 3) == ["äb", "", ""]


def test_row_groups_are_read_one_after_the_other(tmp_path: Path) -> None:
    """Damage in the last row group shows only when it is reached."""
    path = tmp_path / "a.parquet"
    cells = [f"row {i} " + "abc" * 50 for i in range(512)]
    pq.write_table(pa.table({"t": cells}), path, row_group_size=128, compression="none", use_dictionary=False)
    metadata = pq.read_metadata(path)
    start = metadata.row_group(3).column(0).data_page_offset
    content = bytearray(path.read_bytes())
    content[start : start + 40] = b"\xff" * 40
    path.write_bytes(content)
    texts = parquet_texts(path, ())
    assert [next(texts) for _ in range(384)] == cells[:384]
    with pytest.raises(CalibrationError, match=r"a\.parquet: the Parquet file is damaged"):
        list(texts)


def table(**columns: object) -> Callable[[Path], None]:
    return lambda path: pq.write_table(pa.table(columns), path)


@pytest.mark.parametrize(
    ("make", "columns", "message"),
    [
        (table(t=pa.array([], pa.string())), (), "the Parquet file has no rows"),
        (table(n=[1, 2], x=[0.5, 1.5]), (), r"no column holds text; it has n \(int64\), x \(double\)"),
        (table(n=[1, 2], t=["a", "b"]), ("u",), r"no column 'u'; it has n \(int64\), t \(string\)"),
        (table(n=[1, 2], t=["a", "b"]), ("n",), "column 'n' holds int64, not text"),
        (table(t=pa.array([b"ab", b"\xff"], pa.binary())), (), "not valid UTF-8"),
        (table(t=["", None]), (), "0 tokens are there, 4 are needed"),
        (table(t=["a"]), (), "1 tokens are there, 4 are needed"),
        (lambda path: path.write_bytes(b"PAR1 not really"), (), "not a readable Parquet file"),
        (lambda path: path.write_bytes(b""), (), "not a readable Parquet file"),
    ],
)
def test_files_that_do_not_serve(
    tmp_path: Path, tokenizer: Tokenizer, make: Callable[[Path], object], columns: tuple[str, ...], message: str
) -> None:
    path = tmp_path / "a.parquet"
    make(path)
    config = CalibrationConfig(source=path, rows=2, length=2, columns=columns)
    with pytest.raises(CalibrationError, match=message):
        load_rows(config, tokenizer, vocab_size=512)


def test_invalid_utf8_in_a_string_column(tmp_path: Path) -> None:
    raw = pa.array([b"fine", b"\xff\xfe"], pa.binary())
    broken = pa.Array.from_buffers(pa.string(), 2, raw.buffers())
    pq.write_table(pa.table({"t": broken}), tmp_path / "a.parquet")
    with pytest.raises(CalibrationError, match=r"a\.parquet: a column of t holds bytes that are not valid UTF-8"):
        list(parquet_texts(tmp_path / "a.parquet", ()))


READ = """
import re, sys
from pathlib import Path
from exl2jax.calibration import CalibrationConfig, load_rows, load_tokenizer
from exl2jax.calibration.parquet import parquet_texts
tokenizer = load_tokenizer(Path(sys.argv[2]))
load_rows(CalibrationConfig(source=sys.argv[1], rows=100, length=2048), tokenizer, vocab_size=512)
print(sum(len(text) for text in parquet_texts(Path(sys.argv[1]), ())))
print(int(re.search(r"VmHWM:\\s*(\\d+)", Path("/proc/self/status").read_text())[1]) // 1024)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")
@pytest.mark.parametrize("group_rows", [100, 10**9])
def test_a_gigabyte_is_read_in_half_a_gigabyte_of_memory(
    tmp_path: Path, tokenizer_dirs: dict[str, Path], group_rows: int
) -> None:
    """Many row groups, and one that holds the whole file."""
    path = tmp_path / "big.parquet"
    letters = np.random.default_rng(0).integers(97, 123, 1 << 20, dtype=np.uint8).tobytes().decode()
    chunk = pa.array([letters[i : i + 60_000] for i in range(0, 900_000, 500)])
    cells = pa.table({"t": pa.chunked_array([chunk] * 10)})
    pq.write_table(cells, path, row_group_size=group_rows, compression="none", use_dictionary=False)
    assert path.stat().st_size > 10**9
    command = [sys.executable, "-c", READ, str(path), str(tokenizer_dirs["bos"])]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    finally:
        path.unlink()
    characters, megabytes = map(int, done.stdout.split())
    assert characters == 60_000 * cells.num_rows
    assert megabytes < 500
