"""The work directory: what a resume accepts, what it refuses by name, and checkpoints that are not what was written."""

import json
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from exl2jax.conversion.checkpoint import FileCheckpoint
from exl2jax.conversion.work_directory import JobState, WorkDirectory
from exl2jax.errors import JobError
from exl2jax.storage import write_json

INPUTS = {"package version": "1", "model config": "c0ffee", "bits": 4.0}


def state(**changes: Any) -> JobState:
    return JobState(**{"inputs": INPUTS, "settings": {"in_dir": "model"}, "stage": "measure", **changes})


@pytest.fixture
def work(tmp_path: Path) -> WorkDirectory:
    work = WorkDirectory(tmp_path / "work")
    work.path.mkdir()
    return work


def test_a_state_comes_back_as_saved(work: WorkDirectory) -> None:
    saved = state(stage="quantize", records={"seconds": {"measure": 1.5}, "list": (1, 2), "name": "Größe"})
    work.save(saved)
    back = work.resume(state())
    assert back.stage == "quantize"
    assert back.records == {"seconds": {"measure": 1.5}, "list": [1, 2], "name": "Größe"}
    assert work.settings() == {"in_dir": "model"}


@pytest.mark.parametrize("name", list(INPUTS))
def test_other_inputs_are_refused_by_name(work: WorkDirectory, name: str) -> None:
    work.save(state())
    with pytest.raises(
        JobError, match=f"begun with other inputs: `?{name}`? .*`no_resume`, or choose another `out_dir`"
    ):
        work.resume(state(inputs={**INPUTS, name: "other"}))
    with pytest.raises(JobError, match="other inputs: flag not given there, 1 now"):
        work.resume(state(inputs={**INPUTS, "flag": 1}))


EDITS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "stage": lambda r: r | {"stage": "compile"},
    "bits": lambda r: r | {"inputs": {**r["inputs"], "bits": 5.0}},
    "records": lambda r: r | {"records": {"calibration": {}}},
    "checksum gone": lambda r: {k: v for k, v in r.items() if k != "sha256"},
    "source": lambda r: r | {"settings": {"in_dir": "/elsewhere"}},
}


@pytest.mark.parametrize("edit", EDITS.values(), ids=EDITS.keys())
def test_a_job_file_edited_by_hand_is_refused(work: WorkDirectory, edit: Callable[[Any], Any]) -> None:
    work.save(state())
    write_json(work.job_file, edit(json.loads(work.job_file.read_text(encoding="utf-8"))))
    with pytest.raises(JobError, match=r"job_new\.json: edited by hand or damaged"):
        work.resume(state())


@pytest.mark.parametrize("number", [1, 2, 4, -1, 10**30])
def test_a_job_file_of_another_format_is_refused(work: WorkDirectory, number: int) -> None:
    write_json(work.job_file, {"format": number, "inputs": INPUTS, "stage": "measure", "records": {}})
    with pytest.raises(JobError, match=r"job_new\.json: written in format .* by another version"):
        work.resume(state())


@pytest.mark.parametrize("content", ["", "{", "[]", "null", "{}", '{"format": "2"}'])
def test_a_torn_job_file_is_refused(work: WorkDirectory, content: str) -> None:
    work.job_file.write_text(content, encoding="utf-8")
    with pytest.raises(JobError, match=r"job_new\.json"):
        work.resume(state())


@dataclass(frozen=True)
class Output:
    value: float


def checkpoint(work: WorkDirectory, **changes: Any) -> FileCheckpoint[Output]:
    file = work.path / "outputs.json"
    settings: dict[str, Any] = {
        "work": work,
        "stage": "measure",
        "job": "job",
        "write": lambda outputs: write_json(file, [o.value for o in outputs]),
        "read": lambda count: [Output(v) for v in json.loads(file.read_text(encoding="utf-8"))[:count]],
    }
    return FileCheckpoint(**settings | changes)


@pytest.fixture
def saved(work: WorkDirectory) -> WorkDirectory:
    carry = {"row": np.arange(24, dtype=np.float32).reshape(3, 4, 2), "ref": np.ones((1, 4, 2), np.float32)}
    checkpoint(work).save(2, carry, [Output(0.1), Output(1 / 3)])
    return work


def test_a_checkpoint_comes_back_as_saved(saved: WorkDirectory) -> None:
    found = checkpoint(saved).load()
    assert found is not None
    position, carry, outputs = found
    assert (position, outputs) == (2, [Output(0.1), Output(1 / 3)])
    assert np.array_equal(carry["row"], np.arange(24, dtype=np.float32).reshape(3, 4, 2))
    assert np.array_equal(carry["ref"], np.ones((1, 4, 2), np.float32))


def test_outputs_may_run_ahead_of_the_states(saved: WorkDirectory) -> None:
    write_json(saved.path / "outputs.json", [0.1, 1 / 3, 7.0])
    found = checkpoint(saved).load()
    assert found is not None and found[2] == [Output(0.1), Output(1 / 3)]


def test_checkpoints_of_another_pass_or_job_are_not_taken(saved: WorkDirectory) -> None:
    assert checkpoint(saved, stage="quantize").load() is None
    assert checkpoint(saved, job="other").load() is None


def _rewrite(path: Path, change: Callable[[dict[str, np.ndarray], dict[str, str]], None]) -> None:
    tensors = load_file(path)
    with safe_open(path, framework="numpy") as handle:
        metadata = json.loads(handle.metadata()["exl2jax"])
    change(tensors, metadata)
    save_file(tensors, path, {"exl2jax": json.dumps(metadata)})


def _flip(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


DAMAGES: dict[str, Callable[[WorkDirectory], None]] = {
    "zero length": lambda w: w.hidden_states.write_bytes(b""),
    "seven bytes": lambda w: w.hidden_states.write_bytes(b"\0" * 7),
    "torn in the header": lambda w: w.hidden_states.write_bytes(w.hidden_states.read_bytes()[:40]),
    "torn in the data": lambda w: w.hidden_states.write_bytes(w.hidden_states.read_bytes()[:-9]),
    "zeros after the header": lambda w: w.hidden_states.write_bytes(w.hidden_states.read_bytes()[:-96] + bytes(96)),
    "a flipped bit in the data": lambda w: _flip(w.hidden_states, -5),
    "another format": lambda w: _rewrite(w.hidden_states, lambda t, m: m.update(format="1")),
    "no format": lambda w: _rewrite(w.hidden_states, lambda t, m: m.pop("format") and None),
    "another position": lambda w: _rewrite(w.hidden_states, lambda t, m: m.update(position="1")),
    "a row less": lambda w: _rewrite(w.hidden_states, lambda t, m: t.pop("row.00002") is None or None),
    "an edited output": lambda w: write_json(w.path / "outputs.json", [0.1, 0.3]),
    "an output less": lambda w: write_json(w.path / "outputs.json", [0.1]),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES.keys())
def test_a_damaged_checkpoint_starts_its_pass_over(
    saved: WorkDirectory, damage: Callable[[WorkDirectory], None], caplog: pytest.LogCaptureFixture
) -> None:
    damage(saved)
    with caplog.at_level(logging.WARNING, "exl2jax"):
        assert checkpoint(saved).load() is None
    assert "starting the measure pass over" in caplog.text
    assert str(saved.path) in caplog.text


def test_what_a_killed_run_left_half_written_is_swept(work: WorkDirectory) -> None:
    work.out_tensor.mkdir()
    left = [work.path / "hidden_states.safetensors.tmp", work.out_tensor / "lm_head.safetensors.tmp"]
    for path in left:
        path.write_bytes(b"half")
    with work.locked():
        assert not any(path.exists() for path in left)


def test_a_second_holder_is_refused_even_in_the_same_process(work: WorkDirectory) -> None:
    with work.locked(), pytest.raises(JobError, match="another conversion is running"), work.locked():
        pass
    with work.locked():
        pass


def test_every_file_of_a_job_is_known_as_one(work: WorkDirectory) -> None:
    """`-nr` clears it, and no compilation into the work directory takes it for a stray."""
    named = {path for name, path in vars(work).items() if name != "path"}
    assert set(work.files) == named
    assert work.files[0] == work.job_file
