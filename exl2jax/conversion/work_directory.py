"""The work directory of a conversion: the job file, checkpoints of the passes, and the lock."""

import contextlib
import hashlib
import json
import logging
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout

from exl2jax.errors import Exl2JaxError, JobError, StorageError
from exl2jax.storage import (
    make_directory,
    read_checked_tensors,
    read_json,
    remove,
    storing,
    sweep,
    write_checked_tensors,
    write_json,
)
from exl2jax.storage.digests import fingerprint
from exl2jax.stream.scan import HostCarry

log = logging.getLogger(__name__)

JOB_FORMAT = 2
"""Version of the job file and of the checkpoints; 1 had no checksums."""
STAGES = ("forward", "backward", "perturb", "price", "measure", "quantize", "compile", "finished")


@dataclass(frozen=True, kw_only=True, slots=True)
class JobState:
    """Where a conversion is: what its bytes depend on, everything that was asked, its stage, and the records of the
    stages done.
    """  # noqa: D205

    inputs: Mapping[str, Any]
    settings: Mapping[str, Any]
    stage: str
    records: Mapping[str, Any] = field(default_factory=dict)

    def advanced(self, stage: str, **records: Any) -> "JobState":
        """The state after a stage, its records added."""
        return replace(self, stage=stage, records={**self.records, **records})


class WorkDirectory:
    """The files of a job, under the names that users of the stock converter know."""

    def __init__(self, path: Path) -> None:
        """Name the files; nothing is touched."""
        self.path = path
        self.job_file = path / "job_new.json"
        self.cal_data = path / "cal_data.safetensors"
        self.measure_cal_data = path / "cal_data_measure.safetensors"
        self.self_rows = path / "self_rows"
        self.hidden_states = path / "hidden_states.safetensors"
        self.module_inputs = path / "module_inputs.f32"
        self.fisher = path / "fisher.safetensors"
        self.perturbations = path / "perturbations.safetensors"
        self.scaled_fisher = path / "scaled_fisher.safetensors"
        self.measurement = path / "measurement.json"
        self.reports = path / "quantized.json"
        self.out_tensor = path / "out_tensor"

    @property
    def files(self) -> tuple[Path, ...]:
        """Everything that a job leaves, the job file first: without it the rest is of no job."""
        rows = (self.cal_data, self.measure_cal_data, self.self_rows)
        states = (*rows, self.hidden_states, self.module_inputs, self.fisher, self.perturbations, self.scaled_fisher)
        return (self.job_file, *states, self.measurement, self.reports, self.out_tensor)

    def left_by(self, stage: str) -> Path | None:
        """The file in which a stage leaves its result for the later ones, whose checksum the job file keeps."""
        weights = {"backward": self.fisher, "perturb": self.scaled_fisher}
        found = {"price": self.measurement, "measure": self.measurement, "quantize": self.reports}
        return (weights | found).get(stage)

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the directory for this process; the lock dies with it. `JobError` when another one has it."""
        make_directory(self.path, "-o/--out_dir")
        lock = FileLock(self.path / ".lock")
        with storing(self.path / ".lock", "cannot lock"):
            try:
                lock.acquire(timeout=0)
            except Timeout as e:
                raise JobError(
                    f"{self.path}: another conversion is running in this work directory; wait or choose another -o"
                ) from e
        try:
            sweep(self.path)
            sweep(self.out_tensor)
            yield
        finally:
            lock.release()

    def settings(self) -> dict[str, Any]:
        """What was asked of the job here; `JobError` where there is none."""
        if not self.job_file.exists():
            raise JobError(f"{self.path}: holds no job to resume; name the source model with -i/--in_dir")
        return self._read()["settings"]

    def clear(self) -> None:
        """Remove everything that a job leaves (`-nr`); other files stay."""
        for path in self.files:
            remove(path)

    def resume(self, new: JobState) -> JobState:
        """The state to go on from: the job file's, if it is of the same inputs, or `new`."""
        if not self.job_file.exists():
            remove(self.hidden_states)
            return new
        record = self._read()
        self._require_same(record["inputs"], new.inputs)
        return replace(new, stage=record["stage"], records=record["records"])

    def _read(self) -> dict[str, Any]:
        """The job file, proven to be what `save` wrote."""
        record = read_json(self.job_file, JobError, "the job file")
        advice = "start over with -nr or choose another -o"
        if not isinstance(record, dict) or not isinstance(record.get("format"), int):
            raise JobError(f"{self.job_file}: not a job file of this program; {advice}")
        if record["format"] != JOB_FORMAT:
            raise JobError(
                f"{self.job_file}: written in format {_short(record['format'])} by another version, "
                f"this one reads format {JOB_FORMAT}; finish it with that version, {advice}"
            )
        if record.pop("sha256", None) != fingerprint(record) or record.get("stage") not in STAGES:
            raise JobError(f"{self.job_file}: edited by hand or damaged (its checksum does not fit); {advice}")
        return record

    def save(self, state: JobState) -> None:
        """Write the job file, last of all."""
        # Through JSON once, so that the checksum is over what a reader finds: tuples become lists.
        record = json.loads(json.dumps({"format": JOB_FORMAT, **asdict(state)}))
        write_json(self.job_file, {**record, "sha256": fingerprint(record)})

    def _require_same(self, there: Any, here: Mapping[str, Any]) -> None:
        there = there if isinstance(there, dict) else {}
        for name in [*here, *(n for n in there if n not in here)]:
            if there.get(name) != here.get(name):
                raise JobError(
                    f"{self.job_file}: this work directory was begun with another {name} "
                    f"({_short(there.get(name))} there, {_short(here.get(name))} now); "
                    "take the same, start over with -nr, or choose another -o"
                )


@dataclass(frozen=True, kw_only=True, slots=True)
class FileCheckpoint[O]:
    """Checkpoints of a pass: outputs as JSON first, then the states, whose rename commits both.

    The position stands in the states' own metadata, so a kill between the two files leaves outputs that run ahead of
    the states; `read` is told how many to take. The states carry a checksum over themselves and one over those
    outputs: a checkpoint that is torn, altered or of another format starts its pass over, which gives the same bytes.
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
    """SHA-256 of outputs as they were read: frozen records and arrays, whose `repr` shows every field exactly."""
    with np.printoptions(threshold=sys.maxsize, floatmode="unique"):
        return hashlib.sha256(repr(outputs).encode()).hexdigest()


def _flatten(carry: HostCarry) -> dict[str, np.ndarray]:
    return {f"{name}.{i:05}": row for name, rows in carry.items() for i, row in enumerate(rows)}


def _unflatten(tensors: Mapping[str, np.ndarray]) -> HostCarry:
    names = sorted({name.rpartition(".")[0] for name in tensors})
    return {name: np.stack([tensors[t] for t in sorted(tensors) if t.rpartition(".")[0] == name]) for name in names}


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 24 else text[:21] + "..."
