"""The table of a sweep: one Parquet file, a row per cell, columns of a fixed schema."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from exl2jax.errors import StorageError
from exl2jax.storage import write_atomically

STAGES = ("measure", "quantize", "evaluate")
TIME = {b"kind": b"time"}
"""Marks columns that differ from run to run: times, and what follows from them or from the machine's memory."""

_TEXT, _REAL, _COUNT = pa.string(), pa.float64(), pa.int64()
_BY_BLOCK = pa.list_(pa.struct([("module", _TEXT), ("error", _REAL)]))
_BY_DOMAIN = pa.list_(
    pa.struct([("domain", _TEXT), ("perplexity", _REAL), ("kl_divergence", _REAL), ("tokens", _COUNT)])
)

SCHEMA = pa.schema(
    [
        *((name, _TEXT) for name in ("cell", "status", "error", "model", "variant", "preset")),
        *(("bits", _REAL), ("seed", _COUNT), ("settings", _TEXT), ("recipe", _TEXT)),
        *((name, _TEXT) for name in ("version_exl2jax", "version_jax", "version_jaxlib", "version_numpy", "device")),
        *((f"sha256_{name}", _TEXT) for name in ("model", "tokenizer", "calibration", "measurement", "evaluation")),
        *(("output", _TEXT), ("bpw", _REAL), ("head_bits", _COUNT), ("size", _COUNT), ("source_size", _COUNT)),
        *((name, _REAL) for name in ("calibration_perplexity", "calibration_perplexity_full")),
        *((name, _REAL) for name in ("perplexity", "perplexity_se", "perplexity_full")),
        *((name, _REAL) for name in ("kl_divergence", "kl_median", "kl_p90", "kl_p99", "top1_agreement")),
        *(("tokens", _COUNT), ("domains", _BY_DOMAIN), ("block_error", _BY_BLOCK), ("depth_error", _BY_BLOCK)),
        ("warnings", pa.list_(_TEXT)),
        *(
            pa.field(f"{what}_{stage}", kind, metadata=TIME)
            for what, kind in (("seconds", _REAL), ("cpu_seconds", _REAL), ("peak_memory", _COUNT))
            for stage in STAGES
        ),
        pa.field("tokens_per_second", _REAL, metadata=TIME),
    ]
)


def write_results(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write the table; columns a row lacks are null."""
    complete = [{name: row.get(name) for name in SCHEMA.names} for row in rows]
    table = pa.Table.from_pylist(complete, schema=SCHEMA)
    write_atomically(path, lambda temporary: pq.write_table(table, temporary, compression="zstd"))


def read_results(path: Path) -> pa.Table:
    """Read a table that `write_results` wrote; `StorageError` names what is wrong with the file."""
    try:
        table = pq.read_table(path)
    except (OSError, pa.ArrowException) as e:
        raise StorageError(f"{path}: the results cannot be read ({e})") from e
    missing = sorted(set(SCHEMA.names) - set(table.column_names))
    if missing:
        raise StorageError(f"{path}: not the results of a sweep of this version, {missing[0]} is missing")
    return table


def reproducible(table: pa.Table) -> pa.Table:
    """The columns that a rerun on the same machine reproduces byte for byte: all but those of time."""
    return table.select([f.name for f in SCHEMA if (f.metadata or {}).get(b"kind") != b"time"])
