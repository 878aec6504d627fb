"""Several devices and several processes agree with one: whole conversions, each in processes of its own."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest
from jax.experimental import multihost_utils
from safetensors.numpy import load_file

from exl2jax import ConversionConfig, convert
from exl2jax.errors import JobError, SettingsError
from exl2jax.stream.devices import as_first_process, join_processes, require_agreement, spread
from exl2jax.testing.tiny_model import write_tiny_llama

ROOT = Path(__file__).parents[2]
JOBS = ("best", "stock")
"""Two conversions: the first measures costs and accuracies, the second quantizes by stock's algorithm from those."""

CONVERT = """
import sys
from exl2jax.cli.entry import main
from exl2jax.stream.devices import local_devices, row_devices, spread
model, base, devices, here = sys.argv[1:]
flags = ["-i", model, "-b", "4.5", "-c", "random", "-r", "5", "-mr", "5", "-l", "24", "-ml", "24", "--devices", devices]
assert main(["convert", "-o", f"{base}/best", "--variant", "accuracies=true", *flags]) == 0
assert main(["convert", "-o", f"{base}/stock", "--preset", "stock", "-m", f"{base}/best/measurement.json", *flags]) == 0
with spread():
    assert row_devices() == int(devices) and len(local_devices()) == int(here)
"""


class Found(NamedTuple):
    """The result of a conversion: its allocation, the figures of its measurement, and those of its modules."""

    strategy: dict[str, Any]
    measured: np.ndarray
    reported: np.ndarray
    fisher: np.ndarray | None


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "tiny"
    return write_tiny_llama(folder, num_layers=1, num_kv_heads=4, intermediate_size=64)  # all linears of one shape


def run(model: Path, base: Path, here: int, processes: int = 1) -> list[dict[str, Found]]:
    """The results of processes that start together with `here` devices each, by job."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{s.getsockname()[1]}"
    started = []
    for index in range(processes):
        environment = os.environ | {
            "XLA_FLAGS": f"--xla_force_host_platform_device_count={here}",
            "JAX_PLATFORMS": "cpu",
            "PYTHONPATH": str(ROOT),
        }
        if processes > 1:
            environment |= {
                "JAX_COORDINATOR_ADDRESS": address,
                "JAX_NUM_PROCESSES": str(processes),
                "JAX_PROCESS_ID": str(index),
            }
        arguments = [str(model), str(base / str(index)), str(here * processes), str(here)]
        with (base / f"{index}.err").open("w") as err:
            started.append(subprocess.Popen([sys.executable, "-c", CONVERT, *arguments], env=environment, stderr=err))
    try:
        for index, process in enumerate(started):
            assert process.wait(timeout=300) == 0, (base / f"{index}.err").read_text()[-3000:]
    finally:
        for process in started:
            process.kill()
            process.wait()
    return [{job: read(base / str(index) / job) for job in JOBS} for index in range(processes)]


def read(work: Path) -> Found:
    """The figures in a work directory."""
    path = work / "measurement.json"
    measurement = json.loads(path.read_text()) if path.exists() else {}  # the second job takes the first one's
    reports = json.loads((work / "quantized.json").read_text())
    figures = [r[k] for r in reports for k in ("rfn_error", "stream_error", "perplexity", "perplexity_full") if r[k]]
    fisher = work / "fisher.safetensors"
    return Found(
        strategy=json.loads((work / "job_new.json").read_text())["records"]["strategy"],
        measured=np.array(list(_numbers(measurement))),
        reported=np.array(figures),
        fisher=np.concatenate([x.ravel() for _, x in sorted(load_file(fisher).items())]) if fisher.exists() else None,
    )


def _numbers(record: Any) -> Any:
    """Every float of a JSON record."""
    if isinstance(record, dict | list):
        for item in record.values() if isinstance(record, dict) else record:
            yield from _numbers(item)
    elif isinstance(record, float):
        yield record


@pytest.fixture(scope="module")
def alone(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Found]:
    """One device."""
    return run(model, tmp_path_factory.mktemp("alone"), 1)[0]


def agree(found: dict[str, Found], alone: dict[str, Found]) -> None:
    for job in JOBS:
        a, b = found[job], alone[job]
        assert a.strategy["modules"] == b.strategy["modules"]
        # A code on a tie may fall the other way after a sum in another order.
        np.testing.assert_allclose(a.measured, b.measured, rtol=2e-2)
        assert not len(b.measured) or np.median(np.abs(a.measured - b.measured) / np.abs(b.measured)) < 1e-4
        np.testing.assert_allclose(a.reported, b.reported, rtol=1e-2)
        if b.fisher is not None:
            np.testing.assert_allclose(a.fisher, b.fisher, rtol=1e-4)


def test_host_devices_agree_with_one(model: Path, alone: dict[str, Found], tmp_path: Path) -> None:
    """Four devices, over which the five rows do not come out even; the two processes below are a mesh of two."""
    agree(run(model, tmp_path, 4)[0], alone)


def test_processes_agree_with_one(model: Path, alone: dict[str, Found], tmp_path: Path) -> None:
    for found in run(model, tmp_path, 1, processes=2):
        agree(found, alone)


def test_more_devices_than_there_are(model: Path, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="`devices` is 64"), spread(64):
        pass
    with pytest.raises(SettingsError, match="`devices` is 0"):
        convert(ConversionConfig(in_dir=model, out_dir=tmp_path, devices=0))


def test_processes_at_different_places_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    require_agreement("alone, there is nobody to disagree")
    other = np.frombuffer(b"price after 2 modules".ljust(256), np.uint8)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(multihost_utils, "process_allgather", lambda own: np.stack([own, other]))
    require_agreement("price after 2 modules")
    with pytest.raises(JobError, match=r"price after 3 modules and price after 2 modules.*`no_resume`"):
        require_agreement("price after 3 modules")
    monkeypatch.setattr(jax, "devices", lambda: [None, None])
    with pytest.raises(SettingsError, match="over 2 processes takes all 2"), spread(1):
        pass


def test_the_first_process_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    assert as_first_process(True)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(multihost_utils, "broadcast_one_to_all", lambda own: ~own)
    assert as_first_process(False)


def test_half_an_environment_of_processes_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    join_processes()  # nothing is said, nothing happens
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "localhost:1")
    monkeypatch.setenv("JAX_NUM_PROCESSES", "many")
    with pytest.raises(SettingsError, match=r"JAX_COORDINATOR_ADDRESS is 'localhost:1'.*JAX_NUM_PROCESSES"):
        join_processes()
