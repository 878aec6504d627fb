"""A `tokenizer.json` for a model that has none, made from the tokenizer that `transformers` reads."""

import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from exl2jax.calibration.texts import package_texts
from exl2jax.errors import ModelError

SAMPLE = 1000
"""Characters of each built-in text that both forms of a tokenizer must encode alike."""

SENTENCE_PIECE_FILES = ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model")
TIKTOKEN_FILES = ("tiktoken.model",)

_TIKTOKEN_LINE = re.compile(rb"[A-Za-z0-9+/]+=* \d+\r?\n")


def require_packages(model_dir: Path) -> None:
    """Refuse a tokenizer that needs a package which is not installed; the message names the package.

    Raises `ModelError`. A `vocab.json` or `vocab.txt` needs no further package.
    """
    if any((model_dir / name).is_file() for name in ("vocab.json", "vocab.txt")):
        return
    for name in (*SENTENCE_PIECE_FILES, *TIKTOKEN_FILES):
        path = model_dir / name
        if not path.is_file():
            continue
        package = "tiktoken" if name in TIKTOKEN_FILES or _is_tiktoken(path) else "sentencepiece"
        if find_spec(package) is None:
            raise ModelError(
                f"{path}: the model has no tokenizer.json, and this file is read with the package {package}, which is "
                f"not installed; add the model's tokenizer.json or run: pip install {package}"
            )
        return


def written_form(library: Any, model_dir: Path) -> str:
    """The content of a `tokenizer.json` that encodes as a tokenizer of `transformers` does.

    Raises `ModelError` where there is no such form, or where it encodes the built-in texts differently.
    """
    from tokenizers import Tokenizer as Library

    backend = getattr(library, "backend_tokenizer", None)
    advice = "ExLlamaV2 needs a tokenizer.json; add the one of the model's publisher"
    if backend is None:
        raise ModelError(f"{model_dir}: {type(library).__name__} cannot be written as tokenizer.json; {advice}")
    text = backend.to_str(pretty=True)
    written = Library.from_str(text)
    written.no_truncation()
    written.no_padding()
    for sample in package_texts().texts.values():
        piece = sample[:SAMPLE]
        if written.encode(piece, add_special_tokens=False).ids != library.encode(piece, add_special_tokens=False):
            raise ModelError(f"{model_dir}: the tokenizer encodes differently once written as tokenizer.json; {advice}")
    return text


def _is_tiktoken(path: Path) -> bool:
    """Whether a file holds lines of a base64 token and its rank, which is the form of tiktoken."""
    with path.open("rb") as file:
        return _TIKTOKEN_LINE.match(file.read(256)) is not None
