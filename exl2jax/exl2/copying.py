"""The files of a source that are copied to the result: those that a loader or a person reads."""

from collections.abc import Collection
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from exl2jax.errors import ModelError
from exl2jax.models.config import CONFIG_NAME
from exl2jax.storage import copy_file

COPIED = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "tekken.json",
    "*.model",
    "*.tiktoken",
    "generation_config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
    "chat_template.json",
    "*.jinja",
    "*.py",
    "*.md",
    "LICEN[CS]E*",
    "COPYING*",
    "NOTICE*",
    "USE_POLICY*",
)
"""Patterns of the names of files that are copied; everything else stays behind."""

LARGEST = 256 * 2**20
"""Bytes of the largest file that is copied; the largest published tokenizers have 40 MB."""

CARD_FILE, RECORD_FILE = "README.md", "exl2jax.json"
"""The card of a result, and the record that it is made from."""

WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf")
"""Endings of files that a loader takes for weights."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Copies:
    """The files of a directory that are copied, in the order of their names, and the names of those that are not."""

    files: tuple[Path, ...]
    left: tuple[str, ...]


def plan_copies(directory: Path) -> Copies:
    """Divide the files of a directory; `ModelError` for a file that must be copied and cannot be read.

    Links are followed, since download tools keep the files themselves elsewhere.
    """
    entries = [p for p in sorted(directory.iterdir()) if p.is_symlink() or not p.is_dir()]
    files = [path for path in entries if _is_copied(path.name)]
    for path in files:
        _require_copyable(path)
    left = [p.name for p in entries if not _is_copied(p.name) and p.name != CONFIG_NAME]
    return Copies(files=tuple(files), left=tuple(name for name in left if not name.endswith(".safetensors")))


def copy_files(copies: Copies, target: Path) -> None:
    """Copy the planned files."""
    for path in copies.files:
        copy_file(path, target / path.name)


def foreign_files(target: Path, written: Collection[str]) -> list[str]:
    """Files of a directory that a loader or a person would take for part of the result, and that are not `written`.

    They are left from an earlier result in the same directory. Weight files are not among them: `compile_model` refuses
    those. Nor are the record and the card of an earlier conversion, which the next one replaces.
    """
    if not target.is_dir():
        return []
    replaced = (RECORD_FILE, CARD_FILE) if (target / RECORD_FILE).exists() else ()
    found = [p.name for p in sorted(target.iterdir()) if _is_copied(p.name) or p.suffix in (*WEIGHT_SUFFIXES, ".json")]
    return [name for name in found if name not in (*written, *replaced) and not name.endswith(".safetensors")]


def _is_copied(name: str) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in COPIED)


def _require_copyable(path: Path) -> None:
    """Refuse anything but a readable regular file of at most the largest size."""
    real = f" (a link to {path.resolve()})" if path.is_symlink() else ""
    try:
        if not path.is_file():
            raise ModelError(f"{path}{real}: is no file, so it cannot be copied into the result; restore or remove it")
        size = path.stat().st_size
        with path.open("rb"):
            pass
    except OSError as e:
        raise ModelError(f"{path}{real}: cannot be read ({e}); fix its permissions or remove it") from e
    if size > LARGEST:
        raise ModelError(
            f"{path}{real}: {size / 1e6:.0f} MB are more than the {LARGEST / 1e6:.0f} MB of a file that is copied into "
            "the result; remove it"
        )
