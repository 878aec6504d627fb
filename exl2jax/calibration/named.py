"""The named sets of Optimum's GPTQ: the same ids, files, splits and windows, without torch."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random
from typing import Any, Protocol

import numpy as np

from exl2jax.calibration.jsonl_index import open_jsonl_index
from exl2jax.calibration.parquet import first_cells
from exl2jax.calibration.source import NAMED_SETS, REFUSED_SETS
from exl2jax.calibration.tokenizer import Tokenizer
from exl2jax.errors import CalibrationError, SettingsError

WIKITEXT_LINES = 1000
"""Lines of wikitext2 that Optimum encodes."""

_HUB_SPLIT = {"train": "train", "validation": "test"}
_C4_FILE = {"train": "en/c4-train.00000-of-01024.json.gz", "validation": "en/c4-validation.00000-of-00008.json.gz"}


class Documents(Protocol):
    """Texts by position."""

    def __len__(self) -> int:
        """Number of texts."""
        ...

    def text(self, index: int) -> str:
        """One text."""
        ...


def get_dataset(
    name: str,
    tokenizer: Tokenizer,
    nsamples: int = 128,
    seqlen: int = 2048,
    seed: int = 0,
    split: str = "train",
    *,
    cal_dir: Path | None = None,
) -> list[dict[str, np.ndarray]]:
    """Samples of a named set as Optimum's function of this name gives them.

    Each holds `input_ids` and an `attention_mask` of ones, int64 `[1, seqlen]`. `cal_dir` is a folder with a local
    copy; without it the `datasets` library loads the set.
    """
    rows = named_rows(name, tokenizer, rows=nsamples, length=seqlen, seed=seed, split=split, cal_dir=cal_dir)
    return [{"input_ids": row[None].astype(np.int64), "attention_mask": np.ones((1, seqlen), np.int64)} for row in rows]


def named_rows(
    name: str, tokenizer: Tokenizer, *, rows: int, length: int, seed: int, split: str, cal_dir: Path | None
) -> np.ndarray:
    """Token rows `[rows, length]` int32 of a named set; windows are drawn by Python's `random` from the seed.

    Raises `SettingsError` for unknown names and splits, and `CalibrationError` where the set cannot be had (the message
    says what to install or to download) or is too short.
    """
    if name not in NAMED_SETS:
        reason = "is refused, as in Optimum" if name in REFUSED_SETS else "is unknown"
        raise SettingsError(f"calibration set {name!r} {reason}; known are {', '.join(NAMED_SETS)}")
    if split not in _HUB_SPLIT:
        raise SettingsError(f"calibration: split is {split!r}; it must be 'train' or 'validation'")
    random = Random(seed)
    if name == "wikitext2":
        return _wikitext_rows(_wikitext_lines(split, cal_dir), tokenizer, rows, length, random)
    with _c4_documents(name, split, cal_dir) as documents:
        return _c4_rows(documents, tokenizer, rows, length, random)


def _wikitext_rows(lines: list[str], tokenizer: Tokenizer, rows: int, length: int, random: Random) -> np.ndarray:
    """Windows of the joined lines, encoded once."""
    text = "".join(line or " \n" for line in lines)
    tokens = tokenizer.encode(text, template=True)
    if len(tokens) < length:
        raise CalibrationError(
            f"wikitext2: its first {WIKITEXT_LINES} lines are {len(tokens)} tokens, {length} are needed for one row; "
            f"ask for a length of at most {len(tokens)}"
        )
    return np.stack([_window(tokens, length, random) for _ in range(rows)])


def _c4_rows(documents: Documents, tokenizer: Tokenizer, rows: int, length: int, random: Random) -> np.ndarray:
    """One window per document, documents drawn until one is long enough."""
    too_short: set[int] = set()
    windows: list[np.ndarray] = []
    while len(windows) < rows:
        if len(too_short) == len(documents):
            raise CalibrationError(
                f"c4: none of its {len(documents)} documents has {length} tokens; ask for shorter rows"
            )
        index = random.randint(0, len(documents) - 1)
        if index in too_short:
            continue
        tokens = tokenizer.encode(documents.text(index), template=True)
        if len(tokens) < length:
            too_short.add(index)
        else:
            windows.append(_window(tokens, length, random))
    return np.stack(windows)


def _window(tokens: np.ndarray, length: int, random: Random) -> np.ndarray:
    """A random stretch of `length` tokens; the whole where there is no choice (Optimum raises there)."""
    if len(tokens) == length:
        return tokens
    start = random.randint(0, len(tokens) - length - 1)
    return tokens[start : start + length]


def _wikitext_lines(split: str, cal_dir: Path | None) -> list[str]:
    """The first lines as the `wikitext-2-raw-v1` set holds them: blank lines are empty strings."""
    hub_split = _HUB_SPLIT[split]
    if cal_dir is None:
        data = _load(
            "wikitext2", lambda library: library.load_dataset("wikitext", "wikitext-2-raw-v1", split=hub_split)
        )
        return [data[i]["text"] for i in range(min(WIKITEXT_LINES, len(data)))]
    shard = f"{hub_split}-00000-of-00001.parquet"
    path = _local(
        cal_dir,
        "wikitext2",
        (f"wikitext-2-raw-v1/{shard}", shard, f"wikitext-2-raw/wiki.{hub_split}.raw", f"wiki.{hub_split}.raw"),
    )
    if path.suffix == ".parquet":
        return first_cells(path, "text", WIKITEXT_LINES)
    try:
        with path.open(encoding="utf-8") as file:
            lines = [line for _, line in zip(range(WIKITEXT_LINES), file, strict=False)]
    except (OSError, UnicodeDecodeError) as error:
        raise CalibrationError(f"{path}: not readable as UTF-8 text ({error})") from error
    return [line if line.strip() else "" for line in lines]


@contextmanager
def _c4_documents(name: str, split: str, cal_dir: Path | None) -> Iterator[Documents]:
    file = _C4_FILE[split]
    if cal_dir is None:
        yield _HubDocuments(
            _load(name, lambda library: library.load_dataset("allenai/c4", split=split, data_files={split: file}))
        )
        return
    plain = file.removesuffix(".gz")
    path = _local(cal_dir, name, (file, Path(file).name, plain, Path(plain).name))
    with open_jsonl_index(path) as index:
        yield index


class _HubDocuments:
    """A `datasets.Dataset` with a `text` column."""

    def __init__(self, data: Any) -> None:
        self._data = data

    def __len__(self) -> int:
        return len(self._data)

    def text(self, index: int) -> str:
        return self._data[index]["text"]


def _local(cal_dir: Path, name: str, candidates: tuple[str, ...]) -> Path:
    """The first of some files that a folder has."""
    for candidate in candidates:
        if (cal_dir / candidate).is_file():
            return cal_dir / candidate
    raise CalibrationError(f"{cal_dir}: no local copy of {name}; put one of {', '.join(candidates)} there")


def _load(name: str, load: Callable[[Any], Any]) -> Any:
    """Load a set through the optional `datasets` library."""
    advice = "or download the set's files and give their folder as `cal_dir`"
    try:
        import datasets  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise CalibrationError(
            f"{name}: needs the 'datasets' library; install it with pip install 'exl2jax[datasets]', {advice}"
        ) from error
    try:
        return load(datasets)
    # The library raises many unrelated kinds of error for a missing network, cache or file.
    except Exception as error:
        raise CalibrationError(f"{name}: could not be loaded ({error}); connect to the network, {advice}") from error
