"""The user's request (`CalibrationConfig`) and the rows that the stages get (`CalibrationRows`)."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np

from exl2jax.errors import SettingsError

type Examples = Sequence[str] | Sequence[Sequence[int]] | Sequence[Mapping[str, Any]] | np.ndarray
"""Calibration data given from Python: texts, token lists, tokenizer outputs, or an array `[rows, length]`."""

type Sampler = Callable[[Sequence[Sequence[int]], int, int, int], np.ndarray]
"""`sampler(prompts, n_rows, length, seed) -> ids [n_rows, length]`: row r starts with `prompts[r]`, the rest is
drawn from the full-precision model. `prompts` has `n_rows` entries; none is empty and none longer than `length`."""

NOISE_ID = -1
"""Stands for a position that the embedding replaces by noise; only noise rows hold it."""

STANDARD, EXAMPLES = "standard", "examples"


@dataclass(frozen=True, kw_only=True, slots=True)
class CalibrationConfig:
    """Which calibration rows to build.

    `source` is `standard`, `exllamav2`, `standard:DIR`, a file, a named set, `self`, `random`, a mixture `A:60,B:40`,
    or data given from Python (`Examples`). `rows=None` takes what the source calls for: the composition of the
    standard set (19 rows to measure, 115 to quantize), every row of ready rows, else 16 and 100. `length=None` takes
    the length of ready rows, else 2048 tokens.

    `columns` picks columns of Parquet or fields of JSON. `cal_dir` is a folder with local copies of the named sets,
    `split` their split. `noise_rows` rows of `NOISE_ID` are added to a standard set (None: as many as the model's
    architecture asks for). `fill_with_self` makes the model write the rows that the texts of a standard set
    cannot fill (None: those of the built-in set).
    `batch_size` and `pad_token_id` are Optimum's.
    """

    source: str | Path | Examples = STANDARD
    rows: int | None = None
    length: int | None = None
    seed: int = 0
    measure: bool = False
    columns: tuple[str, ...] = ()
    cal_dir: Path | None = None
    split: str = "train"
    noise_rows: int | None = None
    fill_with_self: bool | None = None
    batch_size: int = 1
    pad_token_id: int | None = None

    def __post_init__(self) -> None:
        """Refuse settings that no source could serve."""
        for name, value, least in (
            ("rows", self.rows, 1),
            ("length", self.length, 1),
            ("seed", self.seed, 0),
            ("noise_rows", self.noise_rows, 0),
            ("batch_size", self.batch_size, 1),
            ("pad_token_id", self.pad_token_id, 0),
        ):
            if value is not None and value < least:
                raise SettingsError(f"calibration: {name} is {value}; it must be at least {least}")
        if self.split not in ("train", "validation"):
            raise SettingsError(f"calibration: split is {self.split!r}; it must be 'train' or 'validation'")

    @property
    def name(self) -> str:
        """The source and every choice about it that is not the usual one, on one line; `examples` for Python data."""
        plain = CalibrationConfig()
        chosen = ("columns", "cal_dir", "split", "noise_rows", "fill_with_self", "batch_size", "pad_token_id")
        said = [f"{key}={getattr(self, key)}" for key in chosen if getattr(self, key) != getattr(plain, key)]
        source = str(self.source) if isinstance(self.source, str | Path) else EXAMPLES
        return " ".join([source, *said])


@dataclass(frozen=True, kw_only=True, slots=True)
class RowBlock:
    """Rows of one domain: `ids [n, length]` int32, and `mask [n, length]` int32 (1 = a real token) where padded."""

    domain: str
    ids: np.ndarray
    mask: np.ndarray | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class CalibrationRows:
    """Calibration rows ready to embed.

    `input_ids [rows, length]` int32; `NOISE_ID` only in noise rows. `attention_mask [rows, length]` int32, ones before
    zeros in every row (padding stands at the end), or None where no row is padded. `domains` names each row's domain,
    `notes` says what a user should know (fewer rows than asked, fillers used). `sha256` is that of the ids as
    little-endian int32 in row order, `tokenizer` the tokenizer's fingerprint (empty if none was needed).
    """

    input_ids: np.ndarray
    attention_mask: np.ndarray | None
    domains: tuple[str, ...]
    source: str
    seed: int
    tokenizer: str
    sha256: str
    notes: tuple[str, ...] = ()

    @property
    def composition(self) -> dict[str, int]:
        """Rows per domain, in row order."""
        return dict(Counter(self.domains))

    def record(self) -> dict[str, Any]:
        """Everything that a job keeps about its calibration rows, as JSON-able values."""
        rows, length = self.input_ids.shape
        return {
            "source": self.source,
            "composition": self.composition,
            "rows": rows,
            "length": length,
            "seed": self.seed,
            "tokenizer": self.tokenizer,
            "sha256": self.sha256,
            "notes": list(self.notes),
        }

    def tensors(self) -> dict[str, np.ndarray]:
        """The tensors of `cal_data.safetensors`: `input_ids`, and `attention_mask` where rows are padded."""
        tensors = {"input_ids": self.input_ids}
        if self.attention_mask is not None:
            tensors["attention_mask"] = self.attention_mask
        return tensors


def hash_ids(ids: np.ndarray) -> str:
    """SHA-256 of token ids as little-endian int32 in row order."""
    return sha256(np.ascontiguousarray(ids, dtype="<i4").tobytes()).hexdigest()
