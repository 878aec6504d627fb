"""Checkpoints of a pass in the work directory."""

import hashlib
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import numpy as np

from exl2jax.conversion.work_directory import JOB_FORMAT, WorkDirectory
from exl2jax.errors import Exl2JaxError, StorageError
from exl2jax.storage import read_checked_tensors, write_checked_tensors
from exl2jax.storage.digests import fingerprint
from exl2jax.stream.scan import HostCarry

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class FileCheckpoint[O]:
    """Checkpoints of a pass: outputs as JSON first, then the states, whose rename commits both.

    The position is in the metadata of the states, so a kill between the two files leaves outputs ahead of the states;
    `read` gets the number to take. The states carry a checksum of themselves and one of those outputs: a checkpoint
    that is torn, altered or of another format starts its pass over, which gives the same bytes.
    """

    work: WorkDirectory
    stage: str
    job: str
    write: Callable[[list[O]], None]
    read: Callable[[int], list[O]]

    def load(self) -> tuple[int, HostCarry, list[O]] | None:
        """The last sound checkpoint of this pass of this job, or None."""
        path = self.work.hidden_states
        if not path.exists():
            return None
        try:
            tensors, metadata = read_checked_tensors(path)
            if metadata.get("stage") != self.stage or metadata.get("job") != self.job:
                return None
            if metadata.get("format") != str(JOB_FORMAT):
                raise StorageError(f"{path}: the checkpoint is of another format")
            position = int(metadata["position"])
            outputs = self.read(position)
            if _outputs_digest(outputs) != metadata["outputs"]:
                raise StorageError(f"{path}: the results saved with the checkpoint changed since")
            return position, _unflatten(tensors), outputs
        except (Exl2JaxError, KeyError, ValueError) as e:
            log.warning("%s; starting the %s pass over", e, self.stage)
            return None

    def save(self, position: int, carry: HostCarry, outputs: list[O]) -> None:
        """Write a checkpoint after `position` modules."""
        self.write(outputs)
        metadata = {
            "format": str(JOB_FORMAT),
            "stage": self.stage,
            "job": self.job,
            "position": str(position),
            "outputs": _outputs_digest(self.read(position)),
        }
        write_checked_tensors(self.work.hidden_states, _flatten(carry), metadata)


def _outputs_digest(outputs: list[Any]) -> str:
    """SHA-256 of outputs: canonical JSON, with the bytes of every array as a SHA-256 of its own."""
    return fingerprint({"outputs": _plain(outputs)})


def _plain(value: Any) -> Any:
    """Records, mappings, sequences and arrays as JSON; two values that differ have different forms."""
    if isinstance(value, np.ndarray):
        content = hashlib.sha256(np.ascontiguousarray(value).tobytes()).hexdigest()
        return {"dtype": value.dtype.str, "shape": list(value.shape), "sha256": content}
    if is_dataclass(value):
        return {f.name: _plain(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, Mapping):
        return [[_plain(key), _plain(entry)] for key, entry in value.items()]
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    return value.item() if isinstance(value, np.generic) else value


def _flatten(carry: HostCarry) -> dict[str, np.ndarray]:
    return {f"{name}.{i:05}": row for name, rows in carry.items() for i, row in enumerate(rows)}


def _unflatten(tensors: Mapping[str, np.ndarray]) -> HostCarry:
    names = sorted({name.rpartition(".")[0] for name in tensors})
    return {name: np.stack([tensors[t] for t in sorted(tensors) if t.rpartition(".")[0] == name]) for name in names}
