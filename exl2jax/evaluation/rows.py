"""Token rows to evaluate on: the built-in held-out text by domain, a text or Parquet file, or a file of ids."""

import hashlib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import numpy as np

from exl2jax.calibration import Tokenizer, load_tokenizer
from exl2jax.calibration.chat import conversation, read_chat_template
from exl2jax.calibration.parquet import parquet_texts
from exl2jax.errors import CalibrationError
from exl2jax.storage import TensorFiles

HELDOUT = "heldout"
"""Name of the built-in text, which no calibration set holds."""
_HEADING = re.compile(r"^=== (\w+) ===\n", re.MULTILINE)


@dataclass(frozen=True, kw_only=True, slots=True)
class EvalRows:
    """`ids [rows, length]` int32, and the domain of each row where the text has domains."""

    ids: np.ndarray
    domains: tuple[str, ...] = ()

    @property
    def domain_names(self) -> tuple[str, ...]:
        """The domains in the order of the text."""
        return tuple(dict.fromkeys(self.domains))

    @property
    def sha256(self) -> str:
        """Fingerprint of the ids and their shape."""
        ids = np.ascontiguousarray(self.ids, np.int32)
        return hashlib.sha256(repr(ids.shape).encode() + ids.tobytes()).hexdigest()

    def of_domain(self, name: str) -> list[int]:
        """Indices of a domain's rows."""
        return [i for i, domain in enumerate(self.domains) if domain == name]

    def first(self, rows: int | None) -> "EvalRows":
        """At most `rows` rows, evenly over the domains as the text has them."""
        if rows is None or rows >= len(self.ids):
            return self
        if rows < 1:
            raise CalibrationError(f"`rows` is {rows}; at least one row is needed")
        by_domain = [self.of_domain(name) for name in self.domain_names] or [list(range(len(self.ids)))]
        turns = [(turn, d, i) for d, indices in enumerate(by_domain) for turn, i in enumerate(indices)]
        kept = sorted(i for _, _, i in sorted(turns)[:rows])
        return EvalRows(ids=self.ids[kept], domains=tuple(self.domains[i] for i in kept) if self.domains else ())


def heldout_texts() -> dict[str, str]:
    """The built-in held-out text by domain."""
    text = (resources.files("exl2jax.calibration") / "data" / "heldout.utf8").read_text(encoding="utf-8")
    _, *parts = _HEADING.split(text)
    return {name: body.strip() for name, body in zip(parts[::2], parts[1::2], strict=True)}


def load_eval_rows(source: str | Path, model_dir: Path, length: int, rows: int | None = None) -> EvalRows:
    """Rows of `heldout`, of a text or Parquet file cut to `length` tokens, or of a safetensors file of `input_ids`.

    Raises `CalibrationError` when the source is missing, unreadable, or too short for one row.
    """
    path = Path(source)
    if str(source) == HELDOUT and not path.exists():
        return heldout_rows(load_tokenizer(model_dir), length).first(rows)
    if path.suffix == ".safetensors":
        return EvalRows(ids=read_token_rows(path)).first(rows)
    if path.suffix == ".parquet":
        tokenizer = load_tokenizer(model_dir)
        texts = parquet_texts(path, (), lambda value, where: _conversation_text(model_dir, value, where))
        return EvalRows(ids=_cut([tokenizer.encode(text) for text in texts], length, path)).first(rows)
    return EvalRows(ids=text_rows(path, model_dir, length)).first(rows)


def _conversation_text(model_dir: Path, value: object, where: str) -> str:
    return read_chat_template(model_dir).render(conversation(value, where))


def heldout_rows(tokenizer: Tokenizer, length: int) -> EvalRows:
    """The built-in text in rows of `length` tokens, domain after domain; what is left of a domain is dropped."""
    ids, domains = [], []
    for name, text in heldout_texts().items():
        tokens = tokenizer.encode(text)
        count = len(tokens) // length
        ids.append(tokens[: count * length].reshape(count, length))
        domains += [name] * count
    if not domains:
        raise CalibrationError(f"the built-in text has no {length} tokens in a row; take a smaller `length`")
    return EvalRows(ids=np.concatenate(ids), domains=tuple(domains))


def read_token_rows(path: Path) -> np.ndarray:
    """The `input_ids [rows, length]` of a safetensors file, int32."""
    if not path.is_file():
        raise CalibrationError(f"{path}: no such token file")
    files = TensorFiles([path])
    if "input_ids" not in files:
        raise CalibrationError(f"{path}: holds no tensor input_ids [rows, length]")
    ids = files.read("input_ids")
    if ids.ndim != 2 or not np.issubdtype(ids.dtype, np.integer):
        raise CalibrationError(f"{path}: input_ids must be integers [rows, length], got {ids.dtype} {list(ids.shape)}")
    return ids.astype(np.int32)


def text_rows(path: Path, model_dir: Path, length: int) -> np.ndarray:
    """A text file tokenized once and cut into whole rows of `length` tokens."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as e:
        raise CalibrationError(f"{path}: cannot be read as UTF-8 text ({e})") from e
    return _cut([load_tokenizer(model_dir).encode(text)], length, path)


def _cut(texts: Iterable[Sequence[int] | np.ndarray], length: int, path: Path) -> np.ndarray:
    parts = [np.asarray(ids, np.int32) for ids in texts]
    ids = np.concatenate(parts) if parts else np.empty(0, np.int32)
    rows = len(ids) // length
    if rows == 0:
        raise CalibrationError(f"{path}: {len(ids)} tokens, a row needs {length}; give more text or a smaller `length`")
    return ids[: rows * length].reshape(rows, length)
