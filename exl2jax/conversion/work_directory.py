"""The work directory of a conversion: its files, the job file and the lock."""

import contextlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from exl2jax.conversion.inputs import differences
from exl2jax.errors import JobError
from exl2jax.storage import (
    make_directory,
    read_json,
    remove,
    storing,
    sweep,
    write_json,
)
from exl2jax.storage.digests import fingerprint

JOB_FORMAT = 3
"""Version of the job file and of the checkpoints."""
MEASURING = ("forward", "backward", "perturb", "price", "measure")
STAGES = (*MEASURING, "trace", "outputs", "quantize", "tune", "compile", "finished")


@dataclass(frozen=True, kw_only=True, slots=True)
class JobState:
    """The progress of a conversion: its inputs, its settings, its stage, and the records of the stages done."""

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
        self.outputs = path / "outputs"
        self.out_tensor = path / "out_tensor"
        self.tuned = path / "tuned.safetensors"

    @property
    def files(self) -> tuple[Path, ...]:
        """All files of a job, the job file first: without it the rest belongs to no job."""
        rows = (self.cal_data, self.measure_cal_data, self.self_rows)
        states = (*rows, self.hidden_states, self.module_inputs, self.fisher, self.perturbations, self.scaled_fisher)
        return (self.job_file, *states, self.measurement, self.reports, self.outputs, self.out_tensor, self.tuned)

    def left_by(self, stage: str) -> Path | None:
        """The file with a stage's result for later stages; the job file keeps its checksum."""
        weights = {"backward": self.fisher, "perturb": self.scaled_fisher}
        results = {"price": self.measurement, "measure": self.measurement, "quantize": self.reports, "tune": self.tuned}
        return (weights | results).get(stage)

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Lock the directory until the block or the process ends; `JobError` when another process holds the lock."""
        make_directory(self.path, "`out_dir`")
        lock = FileLock(self.path / ".lock")
        with storing(self.path / ".lock", "cannot lock"):
            try:
                lock.acquire(timeout=0)
            except Timeout as e:
                raise JobError(
                    f"{self.path}: another conversion is running in this work directory; wait, or choose another "
                    "`out_dir`"
                ) from e
        try:
            sweep(self.path)
            sweep(self.out_tensor)
            yield
        finally:
            lock.release()

    def settings(self) -> dict[str, Any]:
        """The settings of the job here; `JobError` where there is none."""
        if not self.job_file.exists():
            raise JobError(f"{self.path}: holds no job to resume; name the source model as `in_dir`")
        return self._read()["settings"]

    def clear(self) -> None:
        """Remove all files of a job; other files stay."""
        for path in self.files:
            remove(path)

    def resume(self, new: JobState) -> JobState:
        """The state to continue from: that of the job file if its inputs are the same, `new` without a job file."""
        if not self.job_file.exists():
            remove(self.hidden_states)
            return new
        record = self._read()
        self._require_same(record["inputs"], new.inputs)
        return replace(new, stage=record["stage"], records=record["records"])

    def _read(self) -> dict[str, Any]:
        """The job file, proven to be what `save` wrote."""
        record = read_json(self.job_file, JobError, "the job file")
        advice = "start over with `no_resume` or choose another `out_dir`"
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
        """Refuse a job of other inputs, naming each with both values and the ways out."""
        if lines := differences(there if isinstance(there, dict) else {}, here):
            raise JobError(
                f"{self.job_file}: this work directory was begun with other inputs: {'; '.join(lines)}. "
                "Take the same, start over with `no_resume`, or choose another `out_dir`"
            )


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 24 else text[:21] + "..."
