"""The record of a set in its work directory: the work directory alone is enough to resume all sizes."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from exl2jax.conversion.config import ConversionConfig
from exl2jax.conversion.settings import settings_record
from exl2jax.conversion.sizes import Size
from exl2jax.errors import JobError
from exl2jax.storage import make_directory, read_json, write_json

SET_NAME = "sizes.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class SizeSet:
    """The last command of a set: the settings of its sizes, the sizes, and the wishes for their cards."""

    settings: Mapping[str, Any]
    sizes: tuple[Size, ...]
    wishes: Mapping[str, Any]


def write_set(base: ConversionConfig, sizes: Sequence[Size], wishes: Mapping[str, Any]) -> None:
    """Keep what the command asks for in its work directory."""
    make_directory(base.out_dir, "`out_dir`")
    record = {"settings": settings_record(base), "sizes": [asdict(size) for size in sizes], "wishes": dict(wishes)}
    write_json(base.out_dir / SET_NAME, record)


def read_set(out_dir: Path) -> SizeSet | None:
    """The set of a work directory, None where there is none; `JobError` for a damaged record."""
    path = out_dir / SET_NAME
    if not path.exists():
        return None
    record = read_json(path, JobError, "the record of a set")
    try:
        sizes = tuple(Size(**size) for size in record["sizes"])
        return SizeSet(settings=dict(record["settings"]), sizes=sizes, wishes=dict(record["wishes"]))
    except (KeyError, TypeError, ValueError) as e:
        raise JobError(
            f"{path}: not the record of a set ({e}); name source and sizes again, by `in_dir`, `bits`"
        ) from e
