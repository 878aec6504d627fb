"""The tokenizer of a model directory, reduced to what calibration needs."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from exl2jax.calibration.tokenizer_json import require_packages, written_form
from exl2jax.errors import ModelError

_SLOW_FILES = (
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
    "tiktoken.model",
)
"""Files of tokenizers in other forms than `tokenizer.json`."""

_FINGERPRINT_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "merges.txt",
    *_SLOW_FILES,
)


class Backend(Protocol):
    """The interface that a tokenizer library must offer."""

    def encode(self, text: str, template: bool) -> Sequence[int]:
        """Token ids of a text; `template` adds the special tokens that the model's tokenizer adds by default."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids, special tokens written out."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Tokenizer:
    """A model's tokenizer.

    `bos_id`, `eos_id` and `pad_id` are None where the model has none. `vocab_size` is the highest known id plus one
    (the embedding may have more rows). `fingerprint` is the SHA-256 of the tokenizer's files. `written` is the content
    of a `tokenizer.json` for a model that has none, which a result needs; None where the model has one.
    """

    backend: Backend
    bos_id: int | None
    eos_id: int | None
    pad_id: int | None
    vocab_size: int
    fingerprint: str
    written: str | None = None

    def encode(self, text: str, *, bos: bool = False, eos: bool = False, template: bool = False) -> np.ndarray:
        """Token ids `[n]` int32 of a text.

        No special token is added unless asked for: `bos` and `eos` put the model's own around the text (nothing where
        it has none), `template` applies the tokenizer's default template, as calling a `transformers` tokenizer does.
        """
        ids = list(self.backend.encode(text, template))
        if bos and self.bos_id is not None:
            ids.insert(0, self.bos_id)
        if eos and self.eos_id is not None:
            ids.append(self.eos_id)
        return np.array(ids, dtype=np.int32)

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """Text of token ids `[n]`, special tokens written out."""
        return self.backend.decode([int(i) for i in ids])


MAX_BYTES = 256 * 2**20
"""Size of a tokenizer file that is read; the largest published ones have 40 MB."""


class _FastBackend:
    """A `tokenizer.json`, through the `tokenizers` library alone (no slow import of `transformers`)."""

    def __init__(self, path: Path) -> None:
        from tokenizers import Tokenizer as Library

        if (size := path.stat().st_size) > MAX_BYTES:
            raise ModelError(f"{path}: {size} bytes, more than the {MAX_BYTES} that a tokenizer may have")
        try:
            self._library = Library.from_file(str(path))
        # The library raises bare Exception for every fault of the file.
        except Exception as error:
            raise ModelError(f"{path}: not a readable tokenizer ({error}); restore the model's own file") from error
        self._library.no_truncation()
        self._library.no_padding()

    def encode(self, text: str, template: bool) -> Sequence[int]:
        return self._library.encode(text, add_special_tokens=template).ids

    def decode(self, ids: Sequence[int]) -> str:
        return self._library.decode(list(ids), skip_special_tokens=False)

    def vocab_size(self) -> int:
        return max(self._library.get_vocab(with_added_tokens=True).values(), default=-1) + 1

    def token_id(self, token: str) -> int | None:
        return self._library.token_to_id(token)


class _TransformersBackend:
    """A model without `tokenizer.json`, through `transformers.AutoTokenizer`; never runs the model's own code."""

    def __init__(self, model_dir: Path) -> None:
        from transformers import AutoTokenizer

        try:
            self.library: Any = AutoTokenizer.from_pretrained(
                str(model_dir), local_files_only=True, trust_remote_code=False
            )
        # Each slow tokenizer raises its own kinds of error.
        except Exception as error:
            raise ModelError(
                f"{model_dir}: the tokenizer cannot be loaded ({error}); add the model's tokenizer.json"
            ) from error

    def encode(self, text: str, template: bool) -> Sequence[int]:
        return self.library.encode(text, add_special_tokens=template)

    def decode(self, ids: Sequence[int]) -> str:
        return self.library.decode(list(ids), skip_special_tokens=False)

    def vocab_size(self) -> int:
        return max(self.library.get_vocab().values(), default=-1) + 1

    def token_id(self, token: str) -> int | None:
        return self.library.get_vocab().get(token)


def load_tokenizer(model_dir: Path) -> Tokenizer:
    """Read the tokenizer of a model directory.

    `tokenizer.json` is read directly; without it `transformers` looks for any other form. Special ids come from
    `config.json`, then from `tokenizer_config.json`, then from `special_tokens_map.json`.

    Raises `ModelError` if there is no tokenizer, if it cannot be read, or if a package that it needs is missing.
    """
    model_dir, written = Path(model_dir), None
    if (model_dir / "tokenizer.json").is_file():
        backend = _FastBackend(model_dir / "tokenizer.json")
    elif any((model_dir / name).is_file() for name in _SLOW_FILES):
        if "auto_map" in _read_json(model_dir / "tokenizer_config.json"):
            raise ModelError(
                f"{model_dir / 'tokenizer_config.json'}: the tokenizer needs code of the model's own (auto_map), "
                "which is never run; add a tokenizer.json"
            )
        require_packages(model_dir)
        backend = _TransformersBackend(model_dir)
        written = written_form(backend.library, model_dir)
    else:
        raise ModelError(f"{model_dir}: no tokenizer found; tokenizer.json is missing, copy it from the model's source")
    bos, eos, pad = (_special_id(model_dir, backend, name) for name in ("bos", "eos", "pad"))
    return Tokenizer(
        backend=backend,
        bos_id=bos,
        eos_id=eos,
        pad_id=pad,
        vocab_size=backend.vocab_size(),
        fingerprint=_fingerprint(model_dir),
        written=written,
    )


def _special_id(model_dir: Path, backend: _FastBackend | _TransformersBackend, name: str) -> int | None:
    """Id of the `bos`, `eos` or `pad` token; None where no file names one that the vocabulary knows."""
    config = _read_json(model_dir / "config.json")
    for section in (config, config.get("text_config")):
        value = section.get(f"{name}_token_id") if isinstance(section, dict) else None
        value = value[0] if isinstance(value, list) and value else value
        if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
            return value
    for file in ("tokenizer_config.json", "special_tokens_map.json"):
        token = _read_json(model_dir / file).get(f"{name}_token")
        token = token.get("content") if isinstance(token, dict) else token
        found = backend.token_id(token) if isinstance(token, str) else None
        if found is not None:
            return found
    return None


def _read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; empty if there is no such file."""
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{path}: not readable as JSON ({error}); restore the model's own file") from error
    if not isinstance(value, dict):
        raise ModelError(f"{path}: holds {type(value).__name__} where an object is expected; restore the file")
    return value


def _fingerprint(model_dir: Path) -> str:
    """SHA-256 over the names and bytes of the tokenizer's files."""
    digest = sha256()
    for name in _FINGERPRINT_FILES:
        path = model_dir / name
        if path.is_file():
            content = path.read_bytes()
            digest.update(f"{name}\0{len(content)}\0".encode())
            digest.update(content)
    return digest.hexdigest()
