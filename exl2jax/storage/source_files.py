"""Which files of a Hugging Face directory hold the model's weights, as `transformers` chooses them."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from exl2jax.errors import ModelError
from exl2jax.storage.atomic import read_json

LONGEST_NAME = 255
"""Bytes of a file's name that file systems take."""

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
ADAPTERS = "adapter_*.safetensors"
CONSOLIDATED = "consolidated*.safetensors"
"""Files beside the weights: an adapter that is not merged, and a second copy under the names of another library."""

OTHER_FORMATS = {
    CONSOLIDATED: "it has the names of another library; take the files named model-*.safetensors",
    ADAPTERS: "this is only an adapter; merge it into its base model first",
    "pytorch_model*.bin": "convert the model to safetensors first",
    "*.bin": "convert the model to safetensors first",
    "*.pt": "convert the model to safetensors first",
    "*.pth": "convert the model to safetensors first",
    "*.h5": "save the model as safetensors first",
    "*.msgpack": "save the model as safetensors first",
    "*.gguf": "GGUF is quantized already; take the original model",
}
"""Advice for a directory that holds its weights in another form only."""


@dataclass(frozen=True, kw_only=True, slots=True)
class WeightFiles:
    """The files that hold the weights, and what a person should know about the choice."""

    files: tuple[Path, ...]
    notes: tuple[str, ...] = ()


def weight_files(directory: Path) -> WeightFiles:
    """The weight files of a directory: those that its index names, else `model.safetensors`, else all of them.

    Raises `ModelError` where there are none, where one is missing, and where a whole `model.safetensors` stands beside
    shards of an index: nothing says which of the two is the model.
    """
    index, single = directory / INDEX_NAME, directory / SINGLE_NAME
    adapters = tuple(
        f"{path.name}: the adapter beside the model is not merged into it; only the base is converted"
        for path in sorted(directory.glob(ADAPTERS))
    )
    if index.exists():
        found = _indexed(index, single)
    elif single.is_file():
        others = _names(set(directory.glob("*.safetensors")) - {single, *directory.glob(ADAPTERS)})
        ignored = f"{SINGLE_NAME} holds the model; other weight files beside it are ignored: {others}"
        found = WeightFiles(files=(single,), notes=(ignored,) if others else ())
    else:
        found = _all(directory)
    return WeightFiles(files=found.files, notes=(*found.notes, *adapters))


def _all(directory: Path) -> WeightFiles:
    """Every weight file, where no index and no `model.safetensors` says which."""
    beside = {*directory.glob(ADAPTERS), *directory.glob(CONSOLIDATED)}
    files = tuple(sorted(set(directory.glob("*.safetensors")) - beside))
    if files:
        copies = _names(directory.glob(CONSOLIDATED))
        notes = (f"a second copy of the weights is ignored: {copies}",) if copies else ()
        return WeightFiles(files=files, notes=notes)
    for pattern, advice in OTHER_FORMATS.items():
        others = sorted(p.name for p in directory.glob(pattern))
        if others:
            raise ModelError(f"{directory}: no *.safetensors weights found (it has {others[0]}: {advice})")
    raise ModelError(f"{directory}: no *.safetensors weights found")


def _indexed(index: Path, single: Path) -> WeightFiles:
    """The files that an index names, or the single file where the index is left over from an older model."""
    shards = _named_by(index)
    present = [path for path in shards if path.exists()]
    if single.is_file() and single not in shards:
        if not present:
            note = f"{index.name} is stale: the files it names are gone; delete it. {single.name} is converted"
            return WeightFiles(files=(single,), notes=(note,))
        raise ModelError(
            f"{single}: stands beside {present[0].name} and {index.name}, and both may be the model; "
            f"move away {single.name}, or {index.name} with its files"
        )
    missing = [path for path in shards if not path.exists()]
    if missing:
        raise ModelError(f"{missing[0]}: named by {index.name} but missing; download it again")
    beside = set(index.parent.glob("*.safetensors")) - set(shards) - set(index.parent.glob(ADAPTERS))
    others = _names(beside)
    return WeightFiles(files=tuple(shards), notes=(f"{index.name} does not name {others}: ignored",) if others else ())


def _named_by(index: Path) -> list[Path]:
    """Files that an index names, which must lie in its own directory."""
    record = read_json(index, ModelError, "the weight index")
    weight_map = record.get("weight_map") if isinstance(record, dict) else None
    names = list(weight_map.values()) if isinstance(weight_map, dict) else []
    if not names or not all(isinstance(n, str) and _is_plain_name(n) for n in names):
        raise ModelError(f"{index}: weight_map must map tensors to files of the same directory")
    return [index.parent / n for n in sorted(set(names))]


def _is_plain_name(name: str) -> bool:
    """Whether a name stays in its directory, whatever the file system makes of it."""
    plain = name == Path(name).name and name not in ("", "..") and name.isprintable()
    return plain and len(name.encode()) <= LONGEST_NAME


def _names(paths: Iterable[Path]) -> str:
    """The names of some files, three at most spelt out."""
    names = sorted(path.name for path in paths)
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
