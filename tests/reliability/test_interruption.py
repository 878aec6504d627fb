"""Killed, refused, without power: a conversion goes on and ends in the same bytes (`make torture` runs every case)."""

import errno
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from exl2jax.cli import main
from exl2jax.conversion.work_directory import WorkDirectory
from tests.reliability.disk import REFUSED
from tests.reliability.experiments import (
    POINTS,
    Reference,
    freeze,
    lose_power,
    reference,
    refuse,
    resume_faults,
    spread,
)
from tests.reliability.scene import Scene, differences, fresh, make_scene

FREEZES, POWER_LOSSES = 12, 8


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Scene:
    return make_scene(tmp_path_factory.mktemp("scene"))


@pytest.fixture(scope="module")
def known(scene: Scene, tmp_path_factory: pytest.TempPathFactory) -> Reference:
    return reference(scene, tmp_path_factory.mktemp("reference") / "base")


def test_the_harness_sees_the_whole_conversion(known: Reference) -> None:
    """The watch sees every operation: each file of the result came by a write, a sync and a rename."""
    assert {o.kind for o in known.operations} >= {"create", "write", "fsync", "rename", "mkdir", "unlink"}
    renamed = {o.path for o in known.operations if o.kind == "rename"}
    assert set(known.outcome) <= renamed
    for o in (o for o in known.operations if o.kind == "rename" and o.source.endswith(".tmp")):
        before = [p.kind for p in known.operations[: o.index] if p.path == o.source]
        assert before[-1] == "fsync" and "write" in before, o.path
        assert known.operations[o.index + 1].kind == "fsync", "the directory is synced behind every rename"
    assert len(known.kill_points()) > 150 and len(known.fault_points()) > 150


@pytest.mark.parametrize("part", range(FREEZES))
def test_a_kill_at_an_operation(scene: Scene, known: Reference, tmp_path: Path, part: int) -> None:
    index, torn = list(spread(known.kill_points(), FREEZES))[part]
    freeze(scene, tmp_path / "base", index, torn)
    assert resume_faults(scene, tmp_path / "base", known.outcome) == []


@pytest.mark.parametrize("part", [0.3, 0.8])
def test_a_sigkill_of_a_process(scene: Scene, known: Reference, tmp_path: Path, part: float) -> None:
    base = fresh(tmp_path / "base")
    points = [o.index for o in known.operations if o.kind in POINTS]
    command = [sys.executable, "-m", "tests.reliability.child", scene.model, scene.tokens, base]
    index = points[int(part * len(points))]
    done = subprocess.run([*map(str, command), str(index)], capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert resume_faults(scene, base, known.outcome) == []


@pytest.mark.parametrize("place", ["first", "middle"])
@pytest.mark.parametrize("error", REFUSED, ids=errno.errorcode.get)
def test_a_refusal(scene: Scene, known: Reference, tmp_path: Path, error: int, place: str) -> None:
    points = [index for index, e in known.fault_points() if e == error]
    index = points[0 if place == "first" else len(points) // 2]
    assert refuse(scene, tmp_path / "base", index, error, known.outcome) == []


@pytest.mark.parametrize("part", range(POWER_LOSSES))
def test_a_loss_of_power(scene: Scene, known: Reference, tmp_path: Path, part: int) -> None:
    _, image = list(spread(list(known.images), POWER_LOSSES))[part]
    assert lose_power(scene, tmp_path / "base", image, known.outcome) == []


@pytest.mark.parametrize("name", ["hidden_states.safetensors", "measurement.json"])
def test_a_zero_length_checkpoint(scene: Scene, known: Reference, tmp_path: Path, name: str) -> None:
    base = tmp_path / "base"
    states = [o.index for o in known.operations if o.path == "work/hidden_states.safetensors" and o.kind == "rename"]
    freeze(scene, base, states[1], torn=False)
    (base / "work" / name).write_bytes(b"")
    assert resume_faults(scene, base, known.outcome) == []


def start(scene: Scene, base: Path) -> "subprocess.Popen[str]":
    command = [sys.executable, "-m", "exl2jax", *scene.command(base)]
    child = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 300
    while not (base / "work" / "measurement.json").exists() and child.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    return child


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_stop_after_the_module_is_saved(
    scene: Scene, known: Reference, tmp_path: Path, number: signal.Signals, code: int
) -> None:
    base = fresh(tmp_path / "base")
    with start(scene, base) as child:
        child.send_signal(number)
        assert child.stderr is not None
        said = child.stderr.read()
    assert child.returncode == code, said
    assert "stopped in " in said and "run the same command to resume" in said
    assert resume_faults(scene, base, known.outcome) == []


def test_a_second_signal_stops_at_once(scene: Scene, known: Reference, tmp_path: Path) -> None:
    base = fresh(tmp_path / "base")
    with start(scene, base) as child:
        os.kill(child.pid, signal.SIGTERM)
        time.sleep(0.05)
        os.kill(child.pid, signal.SIGTERM)
        assert child.stderr is not None
        said = child.stderr.read()
    assert child.returncode == 143, said
    assert resume_faults(scene, base, known.outcome) == []


def test_a_second_process_is_refused(scene: Scene, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = fresh(tmp_path / "base")
    with WorkDirectory(base / "work").locked():
        assert main(scene.command(base)) == 1
    said = capsys.readouterr().err
    assert "another conversion is running in this work directory" in said and str(base / "work") in said


def test_conversions_in_threads_agree_with_separate_ones(scene: Scene, known: Reference, tmp_path: Path) -> None:
    bases = [fresh(tmp_path / name) for name in "ab"]
    together = threading.Barrier(len(bases))

    def run(base: Path) -> list[str]:
        together.wait()
        scene.run(base)
        return differences(base, known.outcome)

    with ThreadPoolExecutor(len(bases)) as pool:
        assert list(pool.map(run, bases)) == [[], []]


@pytest.mark.skipif(not Path("/proc/self/ns/user").exists(), reason="needs Linux namespaces")
def test_a_disk_that_is_really_full(scene: Scene, known: Reference, tmp_path: Path) -> None:
    """A file system of 200 kB of the test's own is refused with what is missing; with more room the conversion goes."""
    base = fresh(tmp_path / "base")
    script = f"""
set -e
mount -t tmpfs -o size=200k none {base}
set +e
"$@" 2>{tmp_path}/said
echo $? >{tmp_path}/code
cp -r {base}/. {tmp_path}/left
"""
    command = ["unshare", "--user", "--map-root-user", "--mount", "bash", "-c", script, "bash"]
    probe = subprocess.run([*command, "true"], capture_output=True, check=False)
    if probe.returncode:
        pytest.skip("no user namespaces here")
    run = [sys.executable, "-m", "exl2jax", *scene.command(base)]
    subprocess.run([*command, *run], capture_output=True, check=False)
    said = (tmp_path / "said").read_text(encoding="utf-8")
    assert (tmp_path / "code").read_text(encoding="utf-8").strip() == "1", said
    assert "of disk are needed" in said and "more or choose another -o" in said and "Traceback" not in said
    left = tmp_path / "left"
    scene.run(left)
    assert differences(left, known.outcome) == []
