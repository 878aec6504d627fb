"""Ready token rows: `input_ids [rows, length]` from a safetensors or npz file, or from an array."""

import math
import zipfile
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open

from exl2jax.calibration.records import RowBlock
from exl2jax.errors import CalibrationError

TOKENS = "tokens"

MAX_UNPACKED = 2**30
"""Bytes that an array of token rows may unpack to: a hundred million tokens."""


def read_ready(path: Path, *, rows: int | None, length: int | None) -> RowBlock:
    """Read the first `rows` rows and `length` tokens of a file of token rows; None takes all.

    The file holds `input_ids` of any integer type and may hold an `attention_mask` of the same shape. Raises
    `CalibrationError` if the file is unreadable or has fewer rows or tokens than asked.
    """
    tensors = _read_safetensors(path) if path.suffix == ".safetensors" else _read_npz(path)
    if "input_ids" not in tensors:
        held = ", ".join(sorted(tensors)) or "nothing"
        raise CalibrationError(
            f"{path}: no tensor 'input_ids' (it holds {held}); ready rows are input_ids [rows, length]"
        )
    return ready_rows(tensors["input_ids"], tensors.get("attention_mask"), where=str(path), rows=rows, length=length)


def ready_rows(
    ids: np.ndarray, mask: np.ndarray | None, *, where: str, rows: int | None, length: int | None
) -> RowBlock:
    """Check an array of token rows and cut it to size; `where` names it in messages.

    Padding may stand on either side of a row; the result has it at the end, where no real token attends to it.
    """
    if ids.ndim != 2 or not np.issubdtype(ids.dtype, np.integer) or ids.size == 0:
        raise CalibrationError(
            f"{where}: input_ids is {ids.dtype} {list(ids.shape)}; integers [rows, length] are needed"
        )
    if mask is not None and mask.shape != ids.shape:
        raise CalibrationError(
            f"{where}: attention_mask is {list(mask.shape)}, input_ids {list(ids.shape)}; they must agree"
        )
    have_rows, have_length = ids.shape
    if rows is not None and rows > have_rows:
        raise CalibrationError(f"{where}: {have_rows} rows are there, {rows} are needed; ask for fewer rows")
    if length is not None and length > have_length:
        raise CalibrationError(
            f"{where}: rows of {have_length} tokens are there, {length} are needed; ask for a length of {have_length}"
        )
    ids = ids[:rows]
    if ids.min() < np.iinfo(np.int32).min or ids.max() > np.iinfo(np.int32).max:
        raise CalibrationError(f"{where}: input_ids exceed 32 bits; these are no token ids")
    ids = np.ascontiguousarray(ids, dtype=np.int32)
    if mask is None or bool(np.all(mask[:rows] == 1)):
        return RowBlock(domain=TOKENS, ids=ids[:, :length])
    ids, mask = _padding_last(ids, mask[:rows], where)
    return RowBlock(domain=TOKENS, ids=ids[:, :length], mask=mask[:, :length])


def _padding_last(ids: np.ndarray, mask: np.ndarray, where: str) -> tuple[np.ndarray, np.ndarray]:
    """Move each row's run of real tokens to its start."""
    real = mask.astype(bool)
    moved, counts = np.empty_like(ids), real.sum(axis=1)
    for row, count in enumerate(counts):
        first = int(np.argmax(real[row]))
        if count == 0 or not real[row, first : first + count].all():
            raise CalibrationError(
                f"{where}: attention_mask of row {row} is not one unbroken run of ones; pad rows on one side only"
            )
        moved[row] = np.roll(ids[row], -first)
    return moved, (np.arange(ids.shape[1]) < counts[:, None]).astype(np.int32)


def _read_safetensors(path: Path) -> dict[str, np.ndarray]:
    try:
        with safe_open(path, framework="numpy") as file:
            return {name: file.get_tensor(name) for name in file.keys() if name in ("input_ids", "attention_mask")}  # noqa: SIM118
    except (OSError, SafetensorError, TypeError) as error:
        raise CalibrationError(f"{path}: not a readable safetensors file ({error})") from error


def _require_honest(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> None:
    """Refuse an array that unpacks to more than `MAX_UNPACKED` or whose header promises more than it holds."""
    if member.file_size > MAX_UNPACKED:
        raise ValueError(f"{member.filename} unpacks to {member.file_size} bytes, more than the {MAX_UNPACKED} read")
    if not member.filename.endswith(".npy"):
        return
    with archive.open(member) as file:
        version = np.lib.format.read_magic(file)
        header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, dtype = header(file)
        held = member.file_size - file.tell()
    if math.prod(shape) * dtype.itemsize != held:
        raise ValueError(f"{member.filename} announces {dtype} {list(shape)}, {held} bytes are there")


def _read_npz(path: Path) -> dict[str, np.ndarray]:
    try:
        with zipfile.ZipFile(path) as archive:
            for member in archive.infolist():
                _require_honest(archive, member)
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in file.files if name in ("input_ids", "attention_mask")}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise CalibrationError(f"{path}: not a readable npz file ({error})") from error
